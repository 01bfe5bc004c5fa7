"""Requests to the airlock and what is told of them: asked by authors, decided by reviewers.

A released file itself is no model here: it is safetensors (`client.airlock` reads it).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trocar.graph.words import HandleText
from trocar.strict import Strict
from trocar.wire.requests import Name
from trocar.wire.results import Public

TicketState = Literal[
    "unsigned", "submitted", "seconded", "approved", "released", "rejected", "withdrawn", "expired", "failed"
]
Step = Literal["sign", "approve", "reject", "withdraw", "apply"]
Prose = Annotated[str, Field(max_length=2000)]
Bits = Annotated[int, Field(ge=0, le=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


# ---- asked ----------------------------------------------------------------------------------------


class ExportRequest(Strict):
    """Asks that the numbers of a handle leave.

    Attributes:
        reason: what they are needed for.
        controls: what keeps them safe after they left.
    """

    handle: HandleText
    reason: Prose
    controls: Prose


class RaiseRequest(Strict):
    """Asks for larger limits of an account on a model's lineage.

    Attributes:
        life_bits, day_bits: the new limits; None leaves one as it is.
        owner: `key:...` or `project:...`; None is the calling key.
    """

    model: Name
    reason: Prose
    controls: Prose
    life_bits: Bits | None = None
    day_bits: Bits | None = None
    owner: Annotated[str, Field(max_length=200)] | None = None


class StepRequest(Strict):
    """A step on a request.

    Attributes:
        digest: of the request as it was seen; an approval must name it.
        words: for the record; of an approval or a rejection, which needs some.
    """

    digest: Digest | None = None
    words: Prose = ""


# ---- told -----------------------------------------------------------------------------------------


class ReasonView(Strict):
    """Why the checks did not simply pass; `path` is what it is about."""

    code: str
    path: str
    text: str


class PartView(Strict):
    """One array of what is to leave.

    Attributes:
        blocks: whole blocks between the last write upstream and the read; None: nothing was written.
        first: whether the row of position 0 is among the rows.
        one_hot_columns: columns in which a single number is nearly all; for reviewers only.
    """

    name: str
    site: str
    origin: str
    label: str
    rows: int
    width: int
    blocks: int | None
    first: bool
    texts: tuple[str, ...]
    one_hot_columns: int | None = None


class RaiseView(Strict):
    """The limits that are asked for."""

    owner: str
    life_bits: int | None
    day_bits: int | None


class StepView(Strict):
    """A step that was taken; who approved is not told to a reviewer who has not decided."""

    step: str
    state: TicketState
    holder: str
    role: str
    words: str
    time: str


class EarlierView(Strict):
    """An earlier export of the author's project."""

    ticket: str
    state: TicketState
    lineage: str
    price_bits: int
    sites: tuple[str, ...]
    submitted: str


class ReviewView(Strict):
    """What a decision also needs; for reviewers only. None: not capped, or never used."""

    lineage_left_bits: int | None
    key_left_bits: int | None
    earlier: tuple[EarlierView, ...]


class TicketView(Public):
    """A request in the airlock and where it stands.

    Attributes:
        ticket: its id.
        you: what the caller is to it: `author`, `checker`, `colleague`, ...
        author: id of the key that asked; `holder` is the person behind it.
        checks: how the automatic checks ended.
        needed: persons who must approve; `agreed` have.
        price_bits: what its release is charged, once; 0 for a raise.
        limit_bits: of the lineage, for life; None when nothing is capped.
        digest: of all that is decided on.
    """

    ticket: str
    kind: Literal["rows", "artifact", "raise"]
    state: TicketState
    you: str
    author: str
    holder: str
    project: str
    lineage: str
    fingerprint: str
    reason: str
    controls: str
    checks: Literal["pass", "review", "fail"]
    reasons: tuple[ReasonView, ...]
    needed: int
    agreed: int
    price_bits: int
    limit_bits: int | None
    digest: str
    submitted: str
    expires: str
    parts: tuple[PartView, ...] = ()
    limits: RaiseView | None = None
    steps: tuple[StepView, ...] = ()
    review: ReviewView | None = None


class TicketsView(Public):
    """The newest requests that the caller sees, newest first."""

    tickets: tuple[TicketView, ...]

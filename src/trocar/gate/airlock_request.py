"""A request to the airlock as one frozen value, and its one spelling: the document that is hashed.

The document holds everything that a reviewer decides on: who asks for what and why, what the checks found,
what it costs, how many must agree and until when. Nothing in it changes after submission; where a request
stands is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trocar import errors, sites
from trocar.gate import chain
from trocar.gate.airlock_states import Actor, RequestKind
from trocar.gate.checks import (
    Check,
    Checked,
    Disposition,
    ExportKind,
    Numbers,
    Origin,
    Part,
    Reason,
    measure,
)
from trocar.gate.limits import Limits
from trocar.gate.policy import Lineage, Role, Tier
from trocar.graph.labels import Label
from trocar.sites import Site


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """One array that is to leave, and what the server knows of it; the fields are those of `checks.Part`.

    Attributes:
        values: float32, `[width]` or `[rows, width]`.
    """

    name: str
    origin: Origin
    label: Label
    values: npt.NDArray[np.float32]
    site: Site | None = None
    blocks: int | None = None
    first: bool = False
    texts: tuple[str, ...] = ()
    leans_on: int | None = None

    @property
    def rows(self) -> npt.NDArray[np.float32]:
        """The numbers as rows.

        Raises:
            ProgramError: `bad_value` for another shape or type.
        """
        if self.values.ndim not in (1, 2) or 0 in self.values.shape or self.values.dtype != np.float32:
            reason = f"float32 rows were expected, not {self.values.dtype} of shape {self.values.shape}"
            raise errors.refuse("bad_value", "parts", reason)
        return np.atleast_2d(self.values)

    def part(self) -> Part:
        """What the checks see."""
        rows = self.rows
        height, width = rows.shape
        return Part(
            self.name, self.origin, self.label, self.site, height, width, measure(rows), self.blocks,
            self.first, self.texts, self.leans_on,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class ExportAsk:
    """What `Airlock.submit` takes.

    Attributes:
        fingerprint: of the model that the numbers come from.
        reason: what they are needed for.
        controls: what keeps them safe after they left.
    """

    kind: ExportKind
    lineage: Lineage
    fingerprint: str
    parts: tuple[Sent, ...]
    reason: str
    controls: str


@dataclass(frozen=True, slots=True)
class RaiseAsk:
    """What `Airlock.submit_raise` takes: larger limits for the account of `owner` on a lineage."""

    lineage: Lineage
    owner: str
    limits: Limits
    reason: str
    controls: str


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """The part of a document that only an export has."""

    kind: ExportKind
    fingerprint: str
    bits: int
    parts: tuple[Part, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites whose rows leave, or can be had from what leaves."""
        return tuple(p.site for p in self.parts if p.site is not None and p.tells_rows)


@dataclass(frozen=True, slots=True)
class RaiseFacts:
    """The part of a document that only a raise has."""

    owner: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was submitted.

    Attributes:
        needed: persons who must approve.
        price_bits: what its release will be charged, overhead included; 0 for a raise.
        submitted_ms, expires_ms: UTC.
    """

    id: str
    author: Actor
    lineage: Lineage
    reason: str
    controls: str
    checked: Checked
    needed: int
    price_bits: int
    submitted_ms: int
    expires_ms: int
    what: ExportFacts | RaiseFacts

    @property
    def kind(self) -> RequestKind:
        return RequestKind.export if isinstance(self.what, ExportFacts) else RequestKind.raise_


def digest(document: str, content: bytes) -> str:
    """SHA-256 of a document and the frozen bytes that it is about."""
    return hashlib.sha256(document.encode("ascii", "backslashreplace") + b"\n" + content).hexdigest()


def write(request: Request) -> str:
    """The document: canonical JSON."""
    told = as_json(request)
    return chain.canonical(told)


def as_json(request: Request) -> dict[str, Any]:
    """The document as JSON values."""
    told = asdict(request)
    told["kind"] = request.kind.value
    if isinstance(request.what, ExportFacts):
        told["what"]["parts"] = [_part_json(part) for part in request.what.parts]
    return told


def read(document: str) -> Request:
    """The request in a document.

    Raises:
        ServerFault: `store_damaged`.
    """
    try:
        return _request(json.loads(document))
    except (ValueError, KeyError, TypeError, errors.TrocarError) as e:
        raise errors.refuse("store_damaged", "", "a request in the airlock cannot be read") from e


def _request(told: Mapping[str, Any]) -> Request:
    author, lineage, checked = told["author"], told["lineage"], told["checked"]
    reasons = tuple(Reason(Check(r["code"]), r["path"], r["text"]) for r in checked["reasons"])
    what = _export(told["what"]) if told["kind"] == RequestKind.export else _raise(told["what"])
    cap = None if lineage["cap"] is None else Tier(lineage["cap"])
    return Request(
        id=told["id"],
        author=Actor(**{**author, "role": Role(author["role"])}),
        lineage=Lineage(lineage["name"], lineage["secret_bits"], cap),
        checked=Checked(Disposition(checked["disposition"]), reasons),
        what=what,
        **{n: told[n] for n in ("reason", "controls", "needed", "price_bits", "submitted_ms", "expires_ms")},
    )


def _export(told: Mapping[str, Any]) -> ExportFacts:
    parts = tuple(_part(p) for p in told["parts"])
    return ExportFacts(ExportKind(told["kind"]), told["fingerprint"], told["bits"], parts)


def _raise(told: Mapping[str, Any]) -> RaiseFacts:
    return RaiseFacts(told["owner"], Limits(**told["limits"]))


def _part_json(part: Part) -> dict[str, Any]:
    site = "" if part.site is None else str(part.site)
    return {**asdict(part), "site": site, "label": part.label.name, "texts": list(part.texts)}


def _part(told: Mapping[str, Any]) -> Part:
    return Part(
        **{
            **told,
            "origin": Origin(told["origin"]),
            "label": Label[told["label"]],
            "site": sites.parse(told["site"]) if told["site"] else None,
            "numbers": Numbers(**told["numbers"]),
            "texts": tuple(told["texts"]),
        }
    )

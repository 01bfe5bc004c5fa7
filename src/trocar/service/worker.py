"""What holds weights and rows, as the rest of the service sees it: orders in, declared arrays out.

A worker runs in this process, or in one of its own. Orders name handles whose ids were made on this side; what
comes back is arrays whose types and shapes were fixed before, and nothing else of a worker is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trocar.engine.protocol import EngineStats
from trocar.gate.schema import Arrays, Field
from trocar.graph.facts import ModelFacts
from trocar.models.text import TextCodec
from trocar.service.prepare import Prepared
from trocar.wire.requests import FitRequest


class Watch(Protocol):
    """Who waits for an order: is told how far it is, and may not want it any more."""

    def progress(self, done: int) -> None: ...

    def stoppable(self, stop: Callable[[], None]) -> None: ...

    def require_wanted(self) -> None:
        """Raises `cancelled` when nobody wants it."""


@dataclass(frozen=True, slots=True)
class RunOrder:
    """A checked request to run.

    Attributes:
        id: of this order; unique.
        handles: of each variant, the id of the handle of each capture.
        made: in a session, ids by the name that a program uses.
        begun: whether it goes on with something that was begun, so that a full engine delays it and never refuses.
    """

    id: str
    tenant: str
    prepared: Prepared
    handles: tuple[Mapping[str, str], ...]
    made: Mapping[str, str] = field(default_factory=dict)
    begun: bool = False


@dataclass(frozen=True, slots=True)
class FitOrder:
    """A fit of stored rows.

    Attributes:
        labels, groups: one per row; None for a linear map.
        artifact: id that the artifact gets.
    """

    id: str
    tenant: str
    request: FitRequest
    sites: tuple[str, ...]
    labels: Sequence[bool | int | float] | None
    groups: Sequence[int | str] | None
    artifact: str


@dataclass(frozen=True, slots=True)
class NumbersOrder:
    """The numbers of one handle, for the airlock.

    Attributes:
        rows: whether they are captured rows, and not what a fit made.
        fields: the arrays, named `site/array`; captured rows are `site/rows`, in the order of prompts and positions.
    """

    tenant: str
    handle: str
    rows: bool
    fields: tuple[Field, ...]


class Worker(Protocol):
    """Runs orders for one model. Thread-safe; faults are `TrocarError`."""

    @property
    def name(self) -> str:
        """Of the engine."""

    def run(self, order: RunOrder, watch: Watch) -> list[Arrays]:
        """The declared arrays of each variant; captured rows are kept under their handles, or none are."""

    def fit(self, order: FitOrder, watch: Watch) -> Arrays:
        """`metrics`, float32 [sites, numbers]; the artifact is kept under its id."""

    def numbers(self, order: NumbersOrder) -> Arrays:
        """Exactly the arrays of `order.fields`, as float32."""

    def erase(self, tenant: str, handles: Sequence[str]) -> None:
        """Deletes rows and artifacts; those that are gone already do not matter."""

    def stats(self) -> EngineStats: ...

    def check(self) -> list[str]: ...

    def halt(self) -> None:
        """Stops the engine: what waits for it fails now."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Model:
    """A served model: its public side, and who runs it.

    Attributes:
        engine: name of the engine, asked once: what a worker may change later, it could speak with.
    """

    facts: ModelFacts
    text: TextCodec
    worker: Worker
    engine: str

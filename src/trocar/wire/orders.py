"""What the gate and a worker process say to each other in the bodies of frames.

Towards the worker: everything from which it can work out the same checked program that the gate has. Back: raw
arrays whose sizes were declared, or one code of `FAULTS` with the number of a node. No text of a worker is ever
part of it, but for the facts of its models, which are asked once and pinned.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from trocar import errors
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts, ModelFacts
from trocar.strict import Strict
from trocar.wire import tensors
from trocar.wire.requests import FitRequest, RunRequest

MOST_ORDER_BYTES: Final = 512 << 20
MOST_RESULT_BYTES: Final = 1 << 30
MOST_FACTS_BYTES: Final = 64 << 10
FAULTS: Final = (
    "internal", "cancelled", "queue_full", "disk_full", "too_expensive", "edit_not_finite", "edit_missed",
    "result_not_finite", "no_keys_left", "bad_labels", "too_few_rows", "rows_not_finite", "fit_not_converged",
    "handle_not_found", "handle_incomplete", "store_damaged",
)  # fmt: skip
"""Codes that a worker may name, by their numbers: four bits of the overhead that every request pays."""
_FAULT: Final = struct.Struct(">II")
FAULT_BYTES: Final = _FAULT.size
STATS: Final = (
    "forwards", "sequences", "tokens", "most_requests", "live_requests", "chunks", "preemptions",
    "prefix_hit_tokens", "shared_rows", "live_sequences", "kv_bytes",
)  # fmt: skip
"""Counters of an engine, in the order in which they are sent."""
_STATS: Final = struct.Struct(f">{len(STATS)}Q")
STATS_BYTES: Final = _STATS.size
_COUNT: Final = struct.Struct(">I")
COUNT_BYTES: Final = _COUNT.size

M = TypeVar("M", bound=Strict)
Vectors = Mapping[str, npt.NDArray[np.float32]]
Arrays = Mapping[str, npt.NDArray[Any]]


class Pinned(Strict):
    """What is public of a model and its engine."""

    facts: ModelFacts
    engine: str


class Hello(Strict):
    """What the gate goes by and tells everybody; a worker to which it does not apply must say so.

    Attributes:
        models: the facts by which it checks and prices.
        network: `closed` when it says that the worker has none.
    """

    models: tuple[Pinned, ...]
    network: Literal["closed", "allowed"] = "allowed"


GREETED: Final = ("network",)
"""What else than the models may not apply, by number."""


class Ask(Strict):
    """The model whose facts are asked, or whose engine is."""

    model: str


class RunSheet(Strict):
    """An order to run; arrays of the request ride beside it.

    Attributes:
        order: its id, which starts the ids of its tasks.
        handles: of each variant, the id of the handle of each capture.
        made: in a session, ids by the name that a program uses.
        known: facts of the handles that the program names, as the gate has them.
        digest: of the request and its arrays; the worker must come to the same.
    """

    model: str
    order: str
    tenant: str
    request: RunRequest
    handles: tuple[dict[str, str], ...]
    made: dict[str, str]
    begun: bool
    known: dict[str, HandleFacts]
    prices: Prices
    digest: str


class FitSheet(Strict):
    """An order to fit; `labels` and `groups` are per row."""

    model: str
    order: str
    tenant: str
    request: FitRequest
    sites: tuple[str, ...]
    labels: tuple[bool | int | float, ...] | None
    groups: tuple[int | str, ...] | None
    artifact: str


class NumbersSheet(Strict):
    """The numbers of a handle that are to be frozen.

    Attributes:
        rows: whether they are captured rows.
        shapes: of the arrays, by `site/array`, in the order in which they come back.
    """

    model: str
    tenant: str
    handle: str
    rows: bool
    shapes: dict[str, tuple[int, ...]]


class EraseSheet(Strict):
    """Rows and artifacts that go."""

    tenant: str
    handles: tuple[str, ...]


def with_arrays(sheet: Strict, vectors: Vectors) -> bytes:
    """A sheet with the arrays of its request."""
    return tensors.pack(sheet.model_dump_json().encode(), vectors)


def run_sheet(body: bytes) -> tuple[RunSheet, dict[str, npt.NDArray[np.float32]]]:
    """The other way.

    Raises:
        BadRequest: `bad_frame`.
    """
    raw, vectors = tensors.unpack(body)
    return read(RunSheet, raw), vectors


def read(model: type[M], raw: bytes) -> M:
    """A sheet of the gate, which is trusted to have checked what a client sent.

    Raises:
        BadRequest: `bad_frame`.
    """
    try:
        return model.model_validate_json(raw)
    except ValidationError as e:
        reason = f"not a {model.__name__}: {len(e.errors())} fields are wrong"
        raise errors.refuse("bad_frame", "$", reason) from e


def pack_fault(code: str, node: int | None) -> bytes:
    """A fault; a code that is not one of `FAULTS` is `internal`."""
    number = FAULTS.index(code) if code in FAULTS else 0
    return _FAULT.pack(number, 0 if node is None else node + 1)


def unpack_fault(body: bytes, nodes: Sequence[str]) -> tuple[str, str]:
    """Code and path.

    Args:
        nodes: what the path may be, by number.

    Raises:
        BadRequest: `bad_frame` for a number outside both tables.
    """
    if len(body) != FAULT_BYTES:
        raise errors.refuse("bad_frame", "$", f"a fault has {FAULT_BYTES} bytes, not {len(body)}")
    number, node = _FAULT.unpack(body)
    if number >= len(FAULTS) or node > len(nodes):
        raise errors.refuse("bad_frame", "$", "a fault names a code or a node that there is not")
    return FAULTS[number], nodes[node - 1] if node else ""


def pack_stats(counters: Mapping[str, int]) -> bytes:
    return _STATS.pack(*(counters[name] for name in STATS))


def unpack_stats(body: bytes) -> dict[str, int]:
    return dict(zip(STATS, _STATS.unpack(body), strict=True))


def pack_count(n: int) -> bytes:
    return _COUNT.pack(n)


def unpack_count(body: bytes) -> int:
    return int(_COUNT.unpack(body)[0])


def pack_arrays(arrays: Arrays, order: Sequence[str]) -> bytes:
    """Arrays one after another, little-endian, in the order in which they were declared."""
    return b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in order)


def unpack_array(body: memoryview, offset: int, kind: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """One array of a body, as a view that cannot be written."""
    count = 1
    for n in shape:
        count *= n
    return np.frombuffer(body, dtype=kind, count=count, offset=offset).reshape(shape)

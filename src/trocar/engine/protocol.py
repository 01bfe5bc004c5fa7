"""What an engine is: it takes accepted programs with their tokens and vectors, and gives arrays back.

An engine knows nothing of keys, budgets, stores or HTTP. It trusts `Checked` completely and touches only the
rows that `Checked` resolved. Captured rows go to the task's sinks while the batch runs.

Shape letters: N rows, D width, K top-k, M named tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from trocar.graph.check import Checked
from trocar.graph.facts import ModelFacts

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
MAX_ABS_WRITE = 1e7


@dataclass(frozen=True, slots=True)
class RowTags:
    """Which token each row belongs to: prompt index and absolute position, int64 [N].

    A `per_prompt` value has position -1.
    """

    prompts: I64
    positions: I64
    token_ids: I64
    phases: tuple[Literal["prompt", "gen"], ...]

    def order(self) -> I64:
        """Indices that sort the rows by prompt, then position."""
        return np.lexsort((self.positions, self.prompts))


class Sink(Protocol):
    """Takes captured rows: float32 [N, D] by site, with one tag per row."""

    def append(self, vectors: Mapping[str, F32], tags: RowTags) -> None: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One accepted request.

    Attributes:
        request: id, for cancelling and for messages.
        tokens: token ids of each prompt.
        vectors: float32 [D], or a matrix, of each `tensor` and `vector` node; arrays of an `sae` node stand
            under `id.w_enc`, `id.b_enc`, `id.w_dec`, `id.b_dec` and `id.threshold`.
        stored: float32 [N_i, D] per prompt of each `stored` node.
        probes: (weights [D], bias) of each `score` node that names a probe.
        sinks: where each `capture` node's rows go.
        progress: called with the number of finished prompts.
        tenant: who asks: turns are taken between tenants, and cached prefixes are theirs alone.
        family: id shared by the variants of a sweep, whose prompts are the same.
        fork: layers that all variants of the family compute alike.
    """

    request: str
    checked: Checked
    tokens: tuple[tuple[int, ...], ...]
    vectors: Mapping[str, F32]
    stored: Mapping[str, tuple[F32, ...]]
    probes: Mapping[str, tuple[F32, float]]
    sinks: Mapping[str, Sink]
    progress: Callable[[int], None]
    tenant: str = ""
    family: str | None = None
    fork: int = 0


@dataclass(frozen=True, slots=True)
class Lensed:
    """ids int64 and logprobs float32, [values, N, K]."""

    tags: RowTags
    ids: I64
    logprobs: F32


@dataclass(frozen=True, slots=True)
class Named:
    """Log-probabilities of named tokens, float32 [N, M]."""

    tags: RowTags
    logprobs: F32


@dataclass(frozen=True, slots=True)
class Scored:
    """One number per row, float32 [N]."""

    tags: RowTags
    scores: F32


@dataclass(frozen=True, slots=True)
class Metered:
    """One number per prompt, float32 [P]."""

    values: F32


@dataclass(frozen=True, slots=True)
class Patterned:
    """Attention probabilities, float32 [N, H, K]: heads and keys in the order in which the read names them."""

    tags: RowTags
    probs: F32


@dataclass(frozen=True, slots=True)
class Rowed:
    """Rows as they are, float32 [N, D] of each value of a `raw` node, in the order in which it names them."""

    tags: RowTags
    rows: tuple[F32, ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """Sampled token ids per prompt, the end token not included, and the end token that came, if one did."""

    ids: tuple[tuple[int, ...], ...]
    ends: tuple[int | None, ...]

    @property
    def finished(self) -> tuple[bool, ...]:
        return tuple(end is not None for end in self.ends)


@dataclass(frozen=True, slots=True)
class Captured:
    """How many rows each prompt gave; the rows themselves went to the sink."""

    rows_per_prompt: tuple[int, ...]


Outcome = Lensed | Named | Scored | Metered | Patterned | Rowed | Generated | Captured


@dataclass(frozen=True, slots=True)
class EditEffect:
    """Rows that an edit wrote, and their mean Euclidean norm before and after."""

    id: str
    rows: int
    norm_before: float
    norm_after: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a task gave.

    Attributes:
        lengths: tokens sampled for each prompt, an end token included.
    """

    outputs: Mapping[str, Outcome]
    edits: tuple[EditEffect, ...]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start.

    Attributes:
        forwards: forward passes.
        sequences: prompts that were finished.
        tokens: rows that went through the model.
        most_requests: the largest number of requests in one forward pass.
        live_requests: requests that are not finished.
        chunks: passes over a part of a prompt.
        preemptions: sequences that gave their place back and were computed again.
        prefix_hit_tokens: prompt tokens that came from the prefix cache.
        shared_rows: rows that variants of a sweep did not compute a second time below the layer where they part.
        live_sequences: sequences that hold keys and values now.
        kv_bytes: bytes of keys and values now.
    """

    forwards: int
    sequences: int
    tokens: int
    most_requests: int
    live_requests: int
    chunks: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    shared_rows: int = 0
    live_sequences: int = 0
    kv_bytes: int = 0


class Engine(Protocol):
    """Runs tasks. Thread-safe; results arrive on the future, faults as `TrocarError`."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def name(self) -> str: ...

    def submit(self, task: Task) -> Future[TaskResult]: ...

    def cancel(self, request: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def check(self) -> list[str]: ...

    def close(self) -> None: ...

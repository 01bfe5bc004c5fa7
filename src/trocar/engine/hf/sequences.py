"""Live requests and their prompts on the way through the engine: plain state, moved by the scheduler."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from trocar import errors
from trocar.engine.collect import Collector
from trocar.engine.hf.kv import Slot
from trocar.engine.hf.sampler import Sampler
from trocar.engine.protocol import Task, TaskResult
from trocar.engine.runs import PROMPT_LEVEL, Run
from trocar.graph import ops


@dataclass(slots=True, eq=False)
class Live:
    """A request that is not finished.

    Attributes:
        weight: work of one row, counted in rows of a plain forward pass: a lens on every layer costs more.
        edited: selectors of the program's edits.
        looked: selectors of its reads and of outputs that read the end of the model.
        waiting: sequences that are not in the engine; preempted ones stand in front.
        running: sequences that hold keys and values.
    """

    task: Task
    future: Future[TaskResult]
    run: Run
    collector: Collector
    weight: float
    edited: frozenset[str]
    looked: frozenset[str]
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0
    done: int = 0

    @classmethod
    def of(cls, task: Task, row_flops: float) -> Live:
        """A request that has just come; `row_flops` is what a row of a plain pass takes."""
        run, nodes = Run(task), task.checked.program.nodes
        edited = frozenset(n.at for n in nodes if isinstance(n, ops.EDIT_NODES))
        looked = frozenset(n.at for n in nodes if isinstance(n, ops.Read | ops.Logprobs | ops.Metric))
        live = cls(task, Future(), run, Collector(run), _weight(task, row_flops), edited, looked)
        live.waiting.extend(Sequence(live, prompt) for prompt in range(len(task.tokens)))
        return live

    @property
    def whole(self) -> bool:
        """Whether prompts must be processed in one piece."""
        return self.task.checked.whole

    @property
    def over(self) -> bool:
        return self.run.failed is not None or self.done == len(self.task.tokens)

    @property
    def keeps_values(self) -> bool:
        return any(v.kind in PROMPT_LEVEL for v in self.task.checked.values.values())


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt of one request.

    Attributes:
        tokens: prompt and sampled tokens.
        fed: tokens whose keys and values are there.
        seen: tokens that were collected; more than `fed` after a preemption.
        slot: its keys and values.
        ended: no further token is sampled.
    """

    live: Live
    prompt: int
    tokens: list[int] = field(default_factory=list)
    fed: int = 0
    seen: int = 0
    slot: Slot | None = None
    ended: bool = False
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.live.task.tokens[self.prompt])
        self.sampler = Sampler(self.live.task.checked.generation, self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.live.task.tokens[self.prompt])

    @property
    def most(self) -> int:
        return self.live.task.checked.generation.max_new_tokens

    @property
    def sampled(self) -> int:
        return len(self.tokens) - self.length

    @property
    def to_feed(self) -> int:
        """Tokens that wait to be fed: the last one of a text only when its row is read."""
        last_is_idle = self.ended and not self.live.task.checked.reads_gen and self.sampled > 0
        return len(self.tokens) - int(last_is_idle) - self.fed

    @property
    def finished(self) -> bool:
        return self.to_feed == 0 and (self.ended or self.most == 0)

    @property
    def decoding(self) -> bool:
        return self.fed >= self.length

    @property
    def held_bytes(self) -> int:
        return self.live.task.checked.held_bytes[self.prompt]

    @property
    def settled(self) -> bool:
        """Whether prompt-wide values are known: none are made, or the prompt has been seen."""
        return not self.live.keeps_values or self.prompt in self.live.run.kept

    def accept(self, token: int, eos: frozenset[int]) -> None:
        self.tokens.append(token)
        stops = self.live.task.checked.generation.stop_at_eos and token in eos
        self.ended = stops or self.sampled == self.most

    def text(self, eos: frozenset[int]) -> tuple[tuple[int, ...], int | None]:
        """Sampled ids without the end token, and that token if one came."""
        made = self.tokens[self.length :]
        stopped = bool(made) and made[-1] in eos and self.live.task.checked.generation.stop_at_eos
        return (tuple(made[:-1]), made[-1]) if stopped else (tuple(made), None)

    def rewind(self) -> None:
        """After a preemption: everything is fed again, nothing is collected twice."""
        self.seen = max(self.seen, self.fed)
        self.fed, self.slot = 0, None


def _weight(task: Task, row_flops: float) -> float:
    cost = task.checked.cost
    return max(1.0, cost.flops / (cost.tokens * row_flops))


def first_row(live: Live, prompt: int, *, reads: bool) -> int:
    """The first prompt row that the program edits (or, with `reads`, looks at); the prompt's length if none."""
    first = len(live.task.tokens[prompt])
    for at in live.edited | live.looked if reads else live.edited:
        rows = live.task.checked.selections[at].rows[prompt].prompt
        first = min(first, rows[0]) if len(rows) else first
    return first


def block_keys(tenant: str, tokens: list[int], stop: int, block_tokens: int) -> tuple[bytes, ...]:
    """Chained hashes of whole blocks of `tokens[:stop]`, salted by tenant."""
    key = hashlib.blake2b(tenant.encode(), digest_size=16).digest()
    out = []
    for start in range(0, stop - block_tokens + 1, block_tokens):
        block = np.asarray(tokens[start : start + block_tokens], dtype=np.int64).tobytes()
        key = hashlib.blake2b(key + block, digest_size=16).digest()
        out.append(key)
    return tuple(out)


def cancelled() -> errors.TrocarError:
    return errors.refuse("cancelled", "", "the job was cancelled")

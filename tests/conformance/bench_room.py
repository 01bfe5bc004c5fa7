"""How the suite talks to an engine: programs become tasks, tasks share one forward pass, sinks keep rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trocar.engine.hf.engine import HFEngine
from trocar.engine.protocol import Task, TaskResult
from trocar.errors import TrocarError
from trocar.graph import check, ops
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.sites import SITES

WAIT_S = 60.0
_numbers = itertools.count()


@dataclass
class Shelf:
    """A sink that keeps what it gets: float32 rows by site, ordered by prompt, then position."""

    parts: list[tuple[dict[str, np.ndarray], Any]] = field(default_factory=list)

    def append(self, vectors: Mapping[str, np.ndarray], tags: Any) -> None:
        self.parts.append(({k: v.copy() for k, v in vectors.items()}, tags))

    def keys(self) -> np.ndarray:
        """[N, 3] of prompt, position, token id, sorted."""
        found = np.concatenate([np.stack([t.prompts, t.positions, t.token_ids], 1) for _, t in self.parts])
        return found[np.lexsort((found[:, 1], found[:, 0]))]

    def rows(self, site: str) -> torch.Tensor:
        tags = [t for _, t in self.parts]
        order = np.lexsort(
            (np.concatenate([t.positions for t in tags]), np.concatenate([t.prompts for t in tags]))
        )
        return torch.from_numpy(np.concatenate([v[site] for v, _ in self.parts])[order])


@dataclass
class Ask:
    """One request: nodes, prompts, and what stands beside them.

    Attributes:
        vectors: float32 [D] by id of a `tensor` node.
        stored: by id of a `stored` node, float32 [N_i, D] per prompt.
        own: sinks to use instead of shelves, by id of a `capture` node.
        sinks: where the captured rows of the latest run went.
    """

    nodes: Sequence[Any]
    prompts: Sequence[Sequence[int]]
    generation: Generation = field(default_factory=Generation)
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stored: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    progress: Any = None
    own: Mapping[str, Any] = field(default_factory=dict)
    sinks: dict[str, Any] = field(default_factory=dict)

    def constants(self, prompt: int) -> dict[str, torch.Tensor]:
        return {**self.vectors, **{k: rows[prompt] for k, rows in self.stored.items()}}


@dataclass(frozen=True)
class Bench:
    """A model under test with its engine; `model` is the plain Hugging Face model that hooks go on."""

    loaded: Any
    engine: HFEngine
    prompts: tuple[tuple[int, ...], ...]

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def layers(self) -> int:
        return int(self.loaded.facts.n_layers)

    @property
    def middle(self) -> int:
        return self.layers // 2

    def width(self, site: str) -> int:
        return int(self.loaded.facts.width(site))

    def sites(self) -> list[str]:
        """Every served site, at a layer in the middle."""
        return [f"{n}.{self.middle}" if SITES[n].layered else n for n in self.loaded.facts.sites]

    def vector(self, site: str, size: float = 3.0, seed: int = 0) -> torch.Tensor:
        v = torch.randn(self.width(site), generator=torch.Generator().manual_seed(seed))
        return size * v / v.norm()

    def task(self, ask: Ask) -> Task:
        """Checks the program and makes a task; `ask.sinks` gets a new shelf per capture.

        Raises:
            ProgramError: what the checker finds.
        """
        program = Program(nodes=tuple(ask.nodes))
        facts = self.loaded.facts
        handles = {
            n.handle: HandleFacts(
                handle=n.handle,
                kind="activations",
                fingerprint=facts.fingerprint,
                widths={n.site: int(ask.stored[n.id][0].shape[1])},
                rows_per_prompt=tuple(len(r) for r in ask.stored[n.id]),
            )
            for n in ask.nodes
            if isinstance(n, ops.Stored)
        }
        scope = Scope(
            facts,
            tuple(len(p) for p in ask.prompts),
            ask.generation,
            {n.name: tuple(ask.vectors[n.id].shape) for n in ask.nodes if isinstance(n, ops.Tensor)},
            handles,
            self.loaded.tokenize,
        )
        checked = check.check(program, scope, Prices(32, 256))
        ask.sinks = {n.id: ask.own.get(n.id, Shelf()) for n in ask.nodes if isinstance(n, ops.Capture)}
        return Task(
            request=f"test-{next(_numbers)}",
            checked=checked,
            tokens=tuple(tuple(p) for p in ask.prompts),
            vectors={k: v.numpy() for k, v in ask.vectors.items()},
            stored={k: tuple(r.numpy() for r in rows) for k, rows in ask.stored.items()},
            probes={},
            sinks=ask.sinks,
            progress=ask.progress or (lambda _done: None),
        )

    def alone(self, ask: Ask) -> TaskResult:
        return self.engine.submit(self.task(ask)).result(WAIT_S)

    def together(self, *asks: Ask) -> list[TaskResult | TrocarError]:
        """Results, or what each failed with, of requests that are all waiting when the engine looks."""
        tasks = [self.task(ask) for ask in asks]
        with self.engine._wake:  # the engine sees all of them or none
            futures = [self.engine.submit(task) for task in tasks]
        return [f.exception(WAIT_S) or f.result() for f in futures]  # type: ignore[misc]


def read(site: str, at: str = "prompt[*]", name: str = "r") -> ops.Read:
    return ops.Read(id=name, site=site, at=at)


def capture(*names: str, name: str = "kept") -> ops.Capture:
    return ops.Capture(id=name, of=names)


def logprobs(tokens: Sequence[int], at: str = "prompt[*]", name: str = "lp") -> ops.Logprobs:
    return ops.Logprobs(id=name, at=at, tokens=tuple(tokens))


def text() -> ops.Text:
    return ops.Text(id="text")


def greedy(most: int, *, stop: bool = False) -> Generation:
    return Generation(max_new_tokens=most, stop_at_eos=stop)


GAPS: dict[str, float] = {}


def close(name: str, ours: Any, theirs: Any, most: float = 1e-4) -> None:
    """Asserts that two arrays are near, and remembers the largest difference for the summary."""
    a, b = torch.as_tensor(np.asarray(ours), dtype=torch.float64), torch.as_tensor(theirs).double()
    assert a.shape == b.shape, (a.shape, b.shape)
    gap = float((a - b).abs().max())
    GAPS[name] = max(GAPS.get(name, 0.0), gap)
    assert gap <= most, f"{name}: {gap:.2e}"

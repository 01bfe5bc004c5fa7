"""What the benchmarks share: programs become tasks, tasks start together, turns are timed in CPU seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trocar.engine.hf.engine import HFEngine, Limits
from trocar.engine.protocol import Task, TaskResult
from trocar.graph import ops
from trocar.graph.check import check
from trocar.graph.cost import Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.models.load import Loaded
from trocar.service.compose import spare_collector

PRICES = Prices(32, 256)
Nodes = list[dict[str, object]]
TEXT: Nodes = [{"id": "text", "op": "text"}]


class Rows:
    """A sink that only counts."""

    def __init__(self) -> None:
        self.rows = 0

    def append(self, vectors: object, tags: Any) -> None:
        self.rows += len(tags.phases)


@dataclass(frozen=True)
class Ask:
    """One request of one tenant: its nodes, prompts, and vectors by id of a `tensor` node."""

    tenant: str
    nodes: Nodes
    prompts: Sequence[Sequence[int]]
    new_tokens: int = 0
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def task(self, loaded: Loaded) -> Task:
        """Checks the program; every task is new, because an engine runs it once."""
        program = Program.model_validate_json(json.dumps({"nodes": self.nodes}))
        scope = Scope(
            loaded.facts,
            tuple(len(p) for p in self.prompts),
            Generation(max_new_tokens=self.new_tokens, stop_at_eos=False),
            {n.name: tuple(self.vectors[n.id].shape) for n in program.nodes if isinstance(n, ops.Tensor)},
            {},
            loaded.tokenize,
        )
        sinks = {n.id: Rows() for n in program.nodes if isinstance(n, ops.Capture)}
        return Task(
            self.tenant, check(program, scope, PRICES), tuple(tuple(p) for p in self.prompts),
            self.vectors, {}, {}, sinks, lambda _: None, tenant=self.tenant,
        )  # fmt: skip


def engine(loaded: Loaded, **limits: Any) -> HFEngine:
    """An engine that waits long enough for all requests of a turn, and computes every prompt anew; its process is
    set up as a server's is."""
    made = HFEngine(loaded, Limits(gather_s=0.2, prefix_cache=False, **limits))
    spare_collector()
    return made


def together(runner: HFEngine, tasks: Sequence[Task]) -> list[TaskResult]:
    """All tasks at once; the first one waits for the others in the engine."""
    futures = [runner.submit(task) for task in tasks]
    return [f.result() for f in futures]


def plain_model(home: Path) -> Any:
    """The model as its own library loads it, without packed layers or packed attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(home), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids; lengths differ by up to three."""
    stream = np.random.default_rng(seed)
    return [stream.integers(1000, 40000, length - i % 4).tolist() for i in range(count)]


def vector(width: int, seed: int, size: float = 1.0) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal(width)
    return (size * v / np.linalg.norm(v)).astype(np.float32)


def steer(layer: int, coef: float = 1.0) -> Nodes:
    """Adds the request's vector to the residual stream after a layer, at every token."""
    return [
        {"id": "v", "op": "tensor", "name": "v"},
        {"id": "e", "op": "edit.add", "site": f"resid_post.{layer}", "value": "v", "coef": coef, "at": "all"},
    ]


def keep(layers: Sequence[int]) -> Nodes:
    """Captures the residual stream after some layers, at every token."""
    reads: Nodes = [{"id": f"h{i}", "op": "read", "site": f"resid_post.{i}", "at": "all"} for i in layers]
    return [*reads, {"id": "c", "op": "capture", "of": [f"h{i}" for i in layers]}] if reads else []


def cpu(verb: Callable[[], object]) -> float:
    """CPU seconds of the whole process while `verb` runs."""
    started_s = time.process_time()
    verb()
    return time.process_time() - started_s


def turns(verbs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each verb measures, once per round; who begins changes from round to round."""
    names = list(verbs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            found[name].append(verbs[name]())
    return found


def ratios(of: Sequence[float], over: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(of, over, strict=True)]

"""How long the checker takes, against validating the same JSON with pydantic alone.

A request waits for both: `Program.model_validate_json` makes the program, `check` accepts it. One call of each in
alternating turns, in CPU time of the thread. Ratios: `pydantic_*` is pydantic's time / the checker's;
`ms_over_ordinary_*` is one millisecond over the checker's median; `linear` compares the time per node of a
program of 500 nodes with the largest one's: 1.0 when time grows as the nodes do.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.machine import finish
from bench.room import PRICES, Nodes
from trocar.graph.check import MAX_NODE_PROMPTS, check
from trocar.graph.facts import ModelFacts
from trocar.graph.program import MAX_NODES, Generation, Program
from trocar.graph.scope import Scope

LAYERS, WIDTH, LENGTH, ROUNDS = 30, 576, 24, 20
FACTS = ModelFacts(
    name="bench", fingerprint="sha256:" + "0" * 64, lineage="bench", family="llama", dtype="float32",
    n_layers=LAYERS, d_model=WIDTH, d_mlp=1536, n_heads=9, n_kv_heads=3, d_head=64, vocab_size=49152, context=8192,
    parameters=134_515_008, weight_bits=134_515_008 * 16, open_weights=True,
    sites=("resid_post", "mlp_out", "attn_out", "z"), unavailable={}, eos=(2,),
)  # fmt: skip
SIZES = {"small": 5, "ordinary": 40, "n500": 500, "largest": MAX_NODES}
PROMPTS = (1, 64)
GOALS = {"ms_over_ordinary_1": 1.0, "linear_1": round(1 / 1.5, 3), "linear_64": round(1 / 1.5, 3)}


def program(size: int) -> Nodes:
    """Steering behind a gate, read and scored on the way, over and over; one output of the model at the end."""
    ask = {"id": "ask", "op": "logprobs", "tokens": [100, 200]}
    nodes = [node for i in range(size // 10 + 1) for node in _block(i)]
    return [*nodes[: size - 1], ask]


def _block(i: int) -> Nodes:
    early, late = i % (LAYERS - 1), i % (LAYERS - 1) + 1
    return [
        {"id": f"h{i}", "op": "read", "site": f"resid_post.{early}", "at": "prompt[-1]"},
        {"id": f"v{i}", "op": "tensor", "name": "v"},
        {"id": f"d{i}", "op": "dot", "a": f"h{i}", "b": f"v{i}"},
        {"id": f"g{i}", "op": "gt", "a": f"d{i}", "b": 0.5},
        {"id": f"s{i}", "op": "scale", "of": f"v{i}", "by": 2.0},
        {"id": f"e{i}", "op": "edit.add", "site": f"resid_post.{late}", "value": f"s{i}", "at": "prompt[-1]",
         "gate": f"g{i}"},
        {"id": f"k{i}", "op": "read", "site": f"mlp_out.{early}", "at": "prompt[*]"},
        {"id": f"m{i}", "op": "capture", "of": [f"k{i}"]},
        {"id": f"l{i}", "op": "lens", "of": [f"h{i}"], "top_k": 5},
        {"id": f"o{i}", "op": "score", "of": f"d{i}"},
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    text: str
    scope: Scope

    def parse(self) -> Program:
        return Program.model_validate_json(self.text)


def case(name: str, size: int, prompts: int) -> Case:
    lengths = tuple(LENGTH - i % 4 for i in range(prompts))
    scope = Scope(FACTS, lengths, Generation(), {"v": (WIDTH,)}, {}, lambda _: [1])
    return Case(f"{name}_{prompts}", json.dumps({"nodes": program(size)}), scope)


def milliseconds(verb: Callable[[], object]) -> float:
    """CPU time of this thread; what was left behind before is collected before."""
    started = time.thread_time_ns()
    verb()
    return (time.thread_time_ns() - started) / 1e6


def measure(subject: Case, calls: int) -> tuple[list[float], list[float]]:
    """The checker's and pydantic's times, call by call in turns."""
    parsed = subject.parse()
    check(parsed, subject.scope, PRICES)
    ours, theirs = [], []
    for _ in range(calls):
        ours.append(milliseconds(lambda: check(parsed, subject.scope, PRICES)))
        theirs.append(milliseconds(subject.parse))
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    rounds = 4 if parser.parse_args().quick else ROUNDS
    torch.set_num_threads(1)
    gc.collect()
    cases = {
        (name, p): case(name, size, p)
        for name, size in SIZES.items()
        for p in PROMPTS
        if size * p <= MAX_NODE_PROMPTS
    }
    per_round = {k: max(3, 2000 // SIZES[k[0]]) for k in cases}
    medians: dict[tuple[str, int], list[float]] = {k: [] for k in cases}
    peers: dict[tuple[str, int], list[float]] = {k: [] for k in cases}
    every: dict[str, list[float]] = {c.name: [] for c in cases.values()}
    for _ in range(rounds):
        for key, subject in cases.items():
            ours, theirs = measure(subject, per_round[key])
            medians[key].append(statistics.median(ours))
            peers[key].append(statistics.median(theirs))
            every[subject.name] += ours
    middle = {c.name: statistics.median(every[c.name]) for c in cases.values()}
    p99 = {name: sorted(values)[int(len(values) * 0.99)] for name, values in every.items()}
    pydantic = {c.name: statistics.median(peers[k]) for k, c in cases.items()}
    nodes = {name: float(size) for name, size in SIZES.items()}
    for key, subject in cases.items():
        name = subject.name
        print(
            f"{SIZES[key[0]]:>5} nodes, {key[1]:>2} prompts: {middle[name]:8.3f} ms, p99 {p99[name]:8.3f} ms; "
            f"pydantic {pydantic[name]:8.3f} ms"
        )
    out = {
        f"pydantic_{c.name}": [b / a for a, b in zip(medians[k], peers[k], strict=True)]
        for k, c in cases.items()
    }
    for p in PROMPTS:
        out[f"ms_over_ordinary_{p}"] = [1.0 / m for m in medians["ordinary", p]]
        out[f"linear_{p}"] = [
            (few / SIZES["n500"]) / (many / SIZES["largest"])
            for few, many in zip(medians["n500", p], medians["largest", p], strict=True)
        ]
    finish("check", out, GOALS, nodes=nodes, median_ms=middle, p99_ms=p99, pydantic_ms=pydantic)


if __name__ == "__main__":
    main()

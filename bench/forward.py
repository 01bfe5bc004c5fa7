"""First passes through the engine against the same passes of the plain Hugging Face model.

The peer is `model(input_ids)` on the same right-padded batches, with the same log-probabilities taken from the
last rows. Both run in one process in alternating turns; the ratio is peer CPU time / ours, so 1.0 means free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch

from bench.machine import finish
from trocar.engine.hf.engine import HFEngine, Limits
from trocar.engine.protocol import Task, TaskResult
from trocar.graph.check import check
from trocar.graph.cost import Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.models.load import Loaded, load

N_PROMPTS, LENGTH = 32, 24
TOKENS = [100, 200]
GOALS = {"no_program": 0.97, "edit_one_layer": 0.95, "capture_one_layer": 0.95, "capture_all_layers": 0.9}


class Rows:
    """A sink that only counts."""

    def __init__(self) -> None:
        self.rows = 0

    def append(self, vectors: object, tags: object) -> None:
        self.rows += len(tags.phases)  # type: ignore[attr-defined]


def task(loaded: Loaded, prompts: list[list[int]], nodes: list[dict[str, object]], name: str) -> Task:
    program = Program.model_validate_json(json.dumps({"nodes": nodes}))
    scope = Scope(
        loaded.facts,
        tuple(len(p) for p in prompts),
        Generation(),
        {"v": (loaded.facts.d_model,)},
        {},
        loaded.tokenize,
    )
    checked = check(program, scope, Prices(32, 256))
    vector = np.ones(loaded.facts.d_model, dtype=np.float32)
    vectors = {str(n["id"]): vector for n in nodes if n["op"] == "tensor"}
    sinks = {str(n["id"]): Rows() for n in nodes if n["op"] == "capture"}
    return Task(name, checked, tuple(tuple(p) for p in prompts), vectors, {}, {}, sinks, lambda _: None)


def programs(n_layers: int) -> dict[str, list[dict[str, object]]]:
    ask = {"id": "lp", "op": "logprobs", "tokens": TOKENS}
    edit = [
        {"id": "v", "op": "tensor", "name": "v"},
        {"id": "e", "op": "edit.add", "site": "resid_post.12", "value": "v", "coef": 0.01},
    ]
    reads = [{"id": f"h{i}", "op": "read", "site": f"resid_post.{i}", "at": "all"} for i in range(n_layers)]
    return {
        "no_program": [ask],
        "edit_one_layer": [*edit, ask],
        "capture_one_layer": [reads[12], {"id": "c", "op": "capture", "of": ["h12"]}, ask],
        "capture_all_layers": [
            *reads,
            {"id": "c", "op": "capture", "of": [f"h{i}" for i in range(n_layers)]},
            ask,
        ],
    }


def cpu(verb: Callable[[], object]) -> float:
    started = time.process_time()
    verb()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    rounds = 3 if parser.parse_args().quick else 11
    torch.set_num_threads(1)
    loaded = load("smollm2-135m-instruct")
    engine = HFEngine(loaded, Limits(gather_s=0.0))
    stream = np.random.default_rng(0)
    prompts = [stream.integers(1000, 40000, LENGTH - i % 4).tolist() for i in range(N_PROMPTS)]
    ids = torch.zeros(N_PROMPTS, LENGTH, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, : len(p)] = torch.tensor(p)
    last = torch.tensor([len(p) - 1 for p in prompts])

    def peer() -> None:
        with torch.inference_mode():
            hidden = loaded.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            loaded.model.get_output_embeddings()(hidden[torch.arange(N_PROMPTS), last]).log_softmax(-1)[
                :, TOKENS
            ]

    def ours(name: str, nodes: list[dict[str, object]]) -> Callable[[], object]:
        def run() -> TaskResult:
            future: Future[TaskResult] = engine.submit(task(loaded, prompts, nodes, name))
            return future.result()

        return run

    verbs = {name: ours(name, nodes) for name, nodes in programs(loaded.facts.n_layers).items()}
    for verb in (peer, *verbs.values()):
        verb()
    ratios: dict[str, list[float]] = {name: [] for name in verbs}
    for _ in range(rounds):
        for name, verb in verbs.items():
            limit = cpu(peer)
            ratios[name].append(limit / cpu(verb))
    engine.close()
    for name, values in ratios.items():
        low, mid, high = min(values), statistics.median(values), max(values)
        print(f"{name:<20} {mid:.3f} of the plain forward (min {low:.3f}, max {high:.3f})")
    finish("forward", ratios, GOALS)


if __name__ == "__main__":
    main()

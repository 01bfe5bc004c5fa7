"""How the cost of a token grows with users, captured layers and distinct vectors.

Two models. SmolLM2 tells what a token costs. A model as deep but only 48 wide, with random weights, tells what the
host does: its arithmetic is next to nothing, so a step takes the time of the calls that make it up. The peer is
always the same number of users with other programs or none: in alternating turns on the narrow model, pass by pass
in turns on SmolLM2, where a ratio compares the median decode passes.

A capture of L layers by U users is fitted as a + b U + c L + d U L microseconds per forward pass over the narrow
model; d is what one more captured layer of one more user costs the host.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench import room
from bench.baton import both_ways, two_copies
from bench.machine import finish
from trocar.engine.hf.engine import HFEngine
from trocar.models.load import Loaded, load
from trocar.models.pull import locate

MODEL = "smollm2-135m-instruct"
LENGTH, NARROW_TOKENS, TOKENS = 8, 24, 12
USERS, LAYERS, VECTORS = (1, 4, 16, 64), (0, 1, 10, 30), (1, 4, 16, 64)
PAIRS = {
    "layers_1_over_30": ("layers_1", "layers_30"),
    "vectors_1_over_64": ("vectors_1", "vectors_64"),
    "no_program_over_layers_1": ("no_program", "layers_1"),
    "no_program_over_layers_30": ("no_program", "layers_30"),
    "no_program_over_vectors_64": ("no_program", "vectors_64"),
    "no_program_over_own_layer": ("no_program", "own_layer"),
}
GOALS = {"layers_1_over_30": 0.95, "vectors_1_over_64": 0.98}


def narrow(home: Path, folder: Path) -> Loaded:
    """A random model with the depth and the tokenizer of another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocab = json.loads((home / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=30, num_attention_heads=3, num_key_value_heads=1,
        head_dim=16, vocab_size=vocab, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / name, folder / name)
    return load(folder)


@dataclass(frozen=True)
class Requests:
    """What is asked of a model."""

    loaded: Loaded
    tokens: int

    def captures(self, users: int, layers: int) -> list[room.Ask]:
        nodes = room.keep(range(layers)) + room.TEXT
        return [room.Ask(f"u{i}", nodes, [p], self.tokens) for i, p in enumerate(self._prompts(users))]

    def edits(self, users: int, distinct: int) -> list[room.Ask]:
        """Everybody steers at one layer, with one of `distinct` vectors."""
        return [self._edit(i, p, 15, i % distinct) for i, p in enumerate(self._prompts(users))]

    def everywhere(self, users: int) -> list[room.Ask]:
        """Everybody steers at a layer of their own."""
        return [self._edit(i, p, i % 30, i) for i, p in enumerate(self._prompts(users))]

    def _edit(self, user: int, prompt: list[int], layer: int, seed: int) -> room.Ask:
        vectors = {"v": room.vector(self.loaded.facts.d_model, seed)}
        return room.Ask(f"u{user}", room.steer(layer) + room.TEXT, [prompt], self.tokens, vectors)

    def _prompts(self, users: int) -> list[list[int]]:
        return room.prompts(users, LENGTH)


@dataclass(frozen=True)
class Desk:
    """Whole turns of one engine."""

    runner: HFEngine
    requests: Requests

    def turn(self, asks: list[room.Ask]) -> Callable[[], float]:
        """Milliseconds per forward pass."""

        def run() -> float:
            tasks = [ask.task(self.requests.loaded) for ask in asks]
            before = self.runner.stats().forwards
            seconds = room.cpu(lambda: room.together(self.runner, tasks))
            return seconds * 1e3 / (self.runner.stats().forwards - before)

        return run


def table(desk: Desk, rounds: int) -> dict[tuple[str, int, int], list[float]]:
    """Milliseconds per pass by kind, users, and layers or vectors."""
    asks = {("capture", u, n): desk.requests.captures(u, n) for u in USERS for n in LAYERS}
    asks |= {("edit", u, v): desk.requests.edits(u, v) for u in USERS for v in VECTORS if v <= u}
    asks |= {("own layer", u, u): desk.requests.everywhere(u) for u in USERS}
    verbs = {f"{k}/{u}/{n}": desk.turn(x) for (k, u, n), x in asks.items()}
    for verb in verbs.values():
        verb()
    found = room.turns(verbs, rounds)
    return dict(zip(asks, found.values(), strict=True))


def show(found: dict[tuple[str, int, int], list[float]]) -> None:
    print("milliseconds per pass of the narrow model")
    for kind in ("capture", "edit", "own layer"):
        for users in USERS:
            cells = [
                f"{n}: {statistics.median(v):.2f}"
                for (k, u, n), v in found.items()
                if (k, u) == (kind, users)
            ]
            print(f"  {kind:<10} {users:>2} users  {'  '.join(cells)}")


def fit(found: dict[tuple[str, int, int], list[float]]) -> dict[str, float]:
    """Least squares of captures, relative to the time measured, so that small steps count as much as large ones."""
    rows, times = [], []
    for (kind, users, layers), values in found.items():
        if kind == "capture":
            rows.append([1.0, users, layers, users * layers])
            times.append(statistics.median(values) * 1e3)
    a, y = np.asarray(rows), np.asarray(times)
    solved = np.linalg.lstsq(a / y[:, None], np.ones(len(y)), rcond=None)[0]
    worst = float(np.abs(a @ solved / y - 1).max())
    return {
        **dict(zip(("step", "user", "layer", "user_layer"), map(float, solved), strict=True)),
        "worst": worst,
    }


def real(rounds: int) -> dict[str, list[float]]:
    """Ratios of SmolLM2 with 64 users: two copies, pass by pass in turns, once with either copy."""
    served, most = (
        two_copies(MODEL, [room.Ask("warm", room.TEXT, room.prompts(max(USERS), LENGTH), 2)]),
        max(USERS),
    )
    requests = Requests(served[0].loaded, TOKENS)
    asks = {
        "no_program": requests.captures(most, 0), "layers_1": requests.captures(most, 1),
        "layers_30": requests.captures(most, 30), "vectors_1": requests.edits(most, 1),
        "vectors_64": requests.edits(most, most), "own_layer": requests.everywhere(most),
    }  # fmt: skip
    out: dict[str, list[float]] = {name: [] for name in PAIRS}
    for _ in range(rounds):
        for name, (first, second) in PAIRS.items():
            both = both_ways(served, asks[first], asks[second])
            out[name].append(math.prod(a.decode / b.decode for a, b in both) ** 0.5)
    for one in served:
        one.runner.close()
    for name, values in out.items():
        print(f"SmolLM2, {most} users, {name:<28} {statistics.median(values):.3f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    home, _ = locate(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        loaded = narrow(home, Path(folder))
        desk = Desk(room.engine(loaded), Requests(loaded, NARROW_TOKENS))
        found = table(desk, 2 if quick else 4)
        desk.runner.close()
    show(found)
    terms = fit(found)
    print("per pass, microseconds: " + ", ".join(f"{k} {v:.1f}" for k, v in terms.items()))
    ratios = real(1 if quick else 3)
    cells = {f"{k.replace(' ', '_')}_{u}_{n}": statistics.median(v) for (k, u, n), v in found.items()}
    finish("scale", ratios, GOALS, narrow_ms=cells, capture_us=terms)


if __name__ == "__main__":
    main()

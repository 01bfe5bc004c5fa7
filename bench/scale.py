"""How the cost of a token grows with users, captured layers and distinct vectors.

Two models. SmolLM2 tells what a token costs. A model as deep but only 48 wide, with random weights, tells what the
host does: its arithmetic is next to nothing, so a step takes the time of the calls that make it up. The peer is
always the same number of users with no program, in alternating turns.

A capture of L layers by U users is fitted as a + b U + c L + d U L microseconds per forward pass over the narrow
model; d is what one more captured layer of one more user costs the host. `no_program_over_*` is CPU time without
programs / with them.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench import room
from bench.machine import finish
from trocar.engine.hf.engine import HFEngine
from trocar.models.load import Loaded, load
from trocar.models.pull import locate

MODEL = "smollm2-135m-instruct"
LENGTH, NARROW_TOKENS, TOKENS = 8, 24, 12
USERS, LAYERS, VECTORS = (1, 4, 16, 64), (0, 1, 10, 30), (1, 4, 16, 64)
GOALS = {"layers_1_over_30": 0.95, "vectors_1_over_64": 0.98}


def narrow(home: Path, folder: Path) -> Loaded:
    """A random model with the depth and the tokenizer of another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=30, num_attention_heads=3, num_key_value_heads=1,
        head_dim=16, vocab_size=512, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / name, folder / name)
    return load(folder)


class Desk:
    """An engine and what is asked of it."""

    def __init__(self, loaded: Loaded, tokens: int) -> None:
        self.loaded, self.tokens = loaded, tokens
        self.runner: HFEngine = room.engine(loaded)
        self._top = min(40_000, loaded.facts.vocab_size)

    def captures(self, users: int, layers: int) -> list[room.Ask]:
        nodes = room.keep(range(layers)) + room.TEXT
        return [room.Ask(f"u{i}", nodes, [p], self.tokens) for i, p in enumerate(self._prompts(users))]

    def edits(self, users: int, distinct: int) -> list[room.Ask]:
        """Everybody steers at one layer, with one of `distinct` vectors."""
        width = self.loaded.facts.d_model
        return [
            room.Ask(
                f"u{i}", room.steer(15) + room.TEXT, [p], self.tokens, {"v": room.vector(width, i % distinct)}
            )
            for i, p in enumerate(self._prompts(users))
        ]

    def everywhere(self, users: int) -> list[room.Ask]:
        """Everybody steers at a layer of their own."""
        width = self.loaded.facts.d_model
        return [
            room.Ask(f"u{i}", room.steer(i % 30) + room.TEXT, [p], self.tokens, {"v": room.vector(width, i)})
            for i, p in enumerate(self._prompts(users))
        ]

    def _prompts(self, users: int) -> list[list[int]]:
        return [[t % self._top for t in p] for p in room.prompts(users, LENGTH)]

    def turn(self, asks: list[room.Ask]) -> Callable[[], float]:
        """Milliseconds per forward pass."""

        def run() -> float:
            tasks = [ask.task(self.loaded) for ask in asks]
            before = self.runner.stats().forwards
            seconds = room.cpu(lambda: room.together(self.runner, tasks))
            return seconds * 1e3 / (self.runner.stats().forwards - before)

        return run


def table(desk: Desk, rounds: int) -> dict[tuple[str, int, int], list[float]]:
    """Milliseconds per pass by kind, users, and layers or vectors."""
    asks = {("capture", u, n): desk.captures(u, n) for u in USERS for n in LAYERS}
    asks |= {("edit", u, v): desk.edits(u, v) for u in USERS for v in VECTORS if v <= u}
    asks |= {("own layer", u, u): desk.everywhere(u) for u in USERS}
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
    """Ratios of SmolLM2 with 64 users."""
    desk, most = Desk(load(MODEL), TOKENS), max(USERS)
    asks = {
        "none": desk.captures(most, 0), "layers_1": desk.captures(most, 1), "layers_30": desk.captures(most, 30),
        "vectors_1": desk.edits(most, 1), "vectors_64": desk.edits(most, most), "own_layer": desk.everywhere(most),
    }  # fmt: skip
    verbs = {name: desk.turn(x) for name, x in asks.items()}
    verbs["layers_30"]()
    found = room.turns(verbs, rounds)
    desk.runner.close()
    for name, values in found.items():
        print(f"SmolLM2, {most} users, {name:<10} {statistics.median(values):.1f} ms per pass")
    out = {
        "layers_1_over_30": room.ratios(found["layers_1"], found["layers_30"]),
        "vectors_1_over_64": room.ratios(found["vectors_1"], found["vectors_64"]),
    }
    for name in ("layers_1", "layers_30", "vectors_64", "own_layer"):
        out[f"no_program_over_{name}"] = room.ratios(found["none"], found[name])
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    home, _ = locate(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(narrow(home, Path(folder)), NARROW_TOKENS)
        found = table(desk, 2 if quick else 4)
        desk.runner.close()
    show(found)
    terms = fit(found)
    print("per pass, microseconds: " + ", ".join(f"{k} {v:.1f}" for k, v in terms.items()))
    ratios = real(1 if quick else 5)
    cells = {f"{k.replace(' ', '_')}_{u}_{n}": statistics.median(v) for (k, u, n), v in found.items()}
    finish("scale", ratios, GOALS, narrow_ms=cells, capture_us=terms)


if __name__ == "__main__":
    main()

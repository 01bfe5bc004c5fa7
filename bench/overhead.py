"""What programs cost while text is generated: the same requests without programs, and with one program each.

The peer is our own engine, serving the same prompts with nothing but text. Ratios are CPU seconds without
programs / CPU seconds with them, so 1.0 means free. Who captures generated rows gets the row of the last token
too, which takes one forward pass more than plain text does; `*_same_passes` compares with plain text one token
longer, which takes as many.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from bench import room
from bench.machine import finish
from trocar.engine.hf.engine import HFEngine
from trocar.models.load import Loaded, load

USERS, LENGTH, TOKENS = 16, 24, 64
GOALS = {"edit": 0.98, "capture_one_layer": 0.98, "capture_all_layers": 0.95}


def asks(loaded: Loaded, tokens: int) -> dict[str, list[room.Ask]]:
    """The kinds of traffic; layers and vectors are each user's own."""
    layers, width = loaded.facts.n_layers, loaded.facts.d_model
    every = list(enumerate(room.prompts(USERS, LENGTH)))
    return {
        "no_program": [room.Ask(f"u{i}", room.TEXT, [p], tokens) for i, p in every],
        "longer": [room.Ask(f"u{i}", room.TEXT, [p], tokens + 1) for i, p in every],
        "edit": [
            room.Ask(f"u{i}", room.steer(2 + i) + room.TEXT, [p], tokens, {"v": room.vector(width, i)})
            for i, p in every
        ],
        "capture_one_layer": [
            room.Ask(f"u{i}", room.keep([2 + i]) + room.TEXT, [p], tokens) for i, p in every
        ],
        "capture_all_layers": [
            room.Ask(f"u{i}", room.keep(range(layers)) + room.TEXT, [p], tokens) for i, p in every
        ],
    }


class Turn:
    """Serves one kind of traffic; remembers how many forward passes it took."""

    def __init__(self, runner: HFEngine, loaded: Loaded, requests: list[room.Ask]) -> None:
        self._runner, self._loaded, self._requests = runner, loaded, requests
        self.passes = 0

    def __call__(self) -> float:
        tasks = [ask.task(self._loaded) for ask in self._requests]
        before = self._runner.stats().forwards
        seconds = room.cpu(lambda: room.together(self._runner, tasks))
        self.passes = self._runner.stats().forwards - before
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    rounds, tokens = (3, 16) if parser.parse_args().quick else (7, TOKENS)
    torch.set_num_threads(1)
    loaded = load("smollm2-135m-instruct")
    runner = room.engine(loaded)
    for requests in asks(loaded, 4).values():
        Turn(runner, loaded, requests)()
    verbs = {name: Turn(runner, loaded, requests) for name, requests in asks(loaded, tokens).items()}
    found = room.turns(verbs, rounds)
    runner.close()
    for name, seconds in found.items():
        made = USERS * (tokens + (name == "longer")) / statistics.median(seconds)
        print(f"{name:<20} {made:6.1f} tokens per CPU second, {verbs[name].passes} passes")
    out = {name: room.ratios(found["no_program"], found[name]) for name in GOALS}
    for name in ("capture_one_layer", "capture_all_layers"):
        out[f"{name}_same_passes"] = room.ratios(found["longer"], found[name])
    finish("overhead", out, GOALS)


if __name__ == "__main__":
    main()

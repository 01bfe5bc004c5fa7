"""What programs cost while text is generated: the same requests without programs, and with one program each.

The peer is our own engine on a second copy of the model, serving the same prompts with nothing but text; both
take turns pass by pass, once with either copy, and a ratio is the geometric mean of both. It is CPU seconds without
programs / CPU seconds with them, so 1.0 means free. Who captures generated rows gets the row of the last token
too, which takes one forward pass more than plain text does; `*_same_passes` counts one more for the peer.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from bench import room
from bench.baton import both_ways, two_copies
from bench.machine import finish
from trocar.models.load import Loaded

USERS, LENGTH, TOKENS = 16, 24, 64
GOALS = {"edit": 0.98, "capture_one_layer": 0.98, "capture_all_layers": 0.95}
SAME_PASSES = ("capture_one_layer_same_passes", "capture_all_layers_same_passes")


def asks(loaded: Loaded, tokens: int) -> dict[str, list[room.Ask]]:
    """The kinds of traffic; layers and vectors are each user's own."""
    layers, width = loaded.facts.n_layers, loaded.facts.d_model
    every = list(enumerate(room.prompts(USERS, LENGTH)))
    return {
        "no_program": [room.Ask(f"u{i}", room.TEXT, [p], tokens) for i, p in every],
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    rounds, tokens = (1, 16) if parser.parse_args().quick else (3, TOKENS)
    torch.set_num_threads(1)
    served = two_copies(
        "smollm2-135m-instruct", [room.Ask("warm", room.TEXT, room.prompts(USERS, LENGTH), 2)]
    )
    out: dict[str, list[float]] = {name: [] for name in (*GOALS, *SAME_PASSES)}
    speeds: dict[str, list[float]] = {name: [] for name in ("no_program", *GOALS)}
    traffic = asks(served[0].loaded, tokens)
    for _ in range(rounds):
        for name in GOALS:
            both = both_ways(served, traffic["no_program"], traffic[name])
            for free, busy in both:
                speeds["no_program"].append(USERS * tokens / free.seconds)
                speeds[name].append(USERS * tokens / busy.seconds)
            out[name].append(math.prod(f.seconds / b.seconds for f, b in both) ** 0.5)
            if name != "edit":
                longer = [f.seconds + (b.passes - f.passes) * f.decode for f, b in both]
                ratios = [x / b.seconds for x, (_, b) in zip(longer, both, strict=True)]
                out[f"{name}_same_passes"].append(math.prod(ratios) ** 0.5)
    for one in served:
        one.runner.close()
    for name, values in speeds.items():
        print(f"{name:<20} {statistics.median(values):6.1f} tokens per CPU second")
    finish("overhead", out, GOALS)


if __name__ == "__main__":
    main()

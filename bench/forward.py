"""First passes through the engine against the same passes of the plain Hugging Face model.

The peer is `model(input_ids)` on the same right-padded batches, as transformers loads it, with the same
log-probabilities taken from the last rows. Both run in one process in alternating turns; the ratio is peer CPU
time / ours, so 1.0 means free.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch

from bench import room
from bench.machine import finish
from trocar.models.load import load
from trocar.models.pull import locate

MODEL = "smollm2-135m-instruct"
N_PROMPTS, LENGTH = 32, 24
TOKENS = [100, 200]
GOALS = {"no_program": 0.97, "edit_one_layer": 0.95, "capture_one_layer": 0.95, "capture_all_layers": 0.9}


def programs(n_layers: int) -> dict[str, room.Nodes]:
    ask: room.Nodes = [{"id": "lp", "op": "logprobs", "tokens": TOKENS}]
    return {
        "no_program": ask,
        "edit_one_layer": [*room.steer(12, 0.01), *ask],
        "capture_one_layer": [*room.keep([12]), *ask],
        "capture_all_layers": [*room.keep(range(n_layers)), *ask],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    rounds = 3 if parser.parse_args().quick else 11
    torch.set_num_threads(1)
    loaded, model = load(MODEL), room.plain_model(locate(MODEL)[0])
    engine = room.engine(loaded)
    prompts = room.prompts(N_PROMPTS, LENGTH)
    ids = torch.zeros(N_PROMPTS, LENGTH, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, : len(p)] = torch.tensor(p)
    last = torch.tensor([len(p) - 1 for p in prompts])
    vector = np.ones(loaded.facts.d_model, dtype=np.float32)

    def peer() -> None:
        with torch.inference_mode():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            model.get_output_embeddings()(hidden[torch.arange(N_PROMPTS), last]).log_softmax(-1)[:, TOKENS]

    def ours(name: str, nodes: room.Nodes) -> float:
        vectors = {"v": vector} if name == "edit_one_layer" else {}
        task = room.Ask(name, nodes, prompts, 0, vectors).task(loaded)
        return room.cpu(lambda: room.together(engine, [task]))

    every = programs(loaded.facts.n_layers)
    peer()
    for name, nodes in every.items():
        ours(name, nodes)
    ratios: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds):
        for name, nodes in every.items():
            limit = room.cpu(peer)
            ratios[name].append(limit / ours(name, nodes))
    engine.close()
    for name, values in ratios.items():
        low, mid, high = min(values), statistics.median(values), max(values)
        print(f"{name:<20} {mid:.3f} of the plain forward (min {low:.3f}, max {high:.3f})")
    finish("forward", ratios, GOALS)


if __name__ == "__main__":
    main()

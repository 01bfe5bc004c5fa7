"""Training dictionaries from rows on disk, against SAELens on the same rows in memory, and against sparsify.

The rows are synthetic: sums of 16 of 1,152 directions, 576 wide, with a mean and some noise, bfloat16 in one file. Ours
reads them through its buffer; the peers hold them as float32 and take random batches. 4,608 features, 32 active,
batches of 4,096. Every side works in a process of its own, in turns, with one thread; a first step is not counted.
Ratios are rows per CPU second, ours / theirs:

- `topk`, `batch_topk`, `matryoshka`, `jumprelu`: against SAELens's trainer and module of that kind.
- `topk_of_sparsify`: against sparsify's coder with Adam, a loop that keeps no statistics of features.
- `topk_of_peak`: what the dense step would take, 10 x width x features operations a row, at our rate, over the
  operations per second of a matrix product of the same sizes. Above 1 where sparse arithmetic does less.

After a longer TopK run of ours and SAELens, both are measured on rows that neither has seen. The benchmark stops when
`fvu` of ours is higher by more than a hundredth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import finish
from bench.probe import WIDTH, FileRows, peak_mb

ATOMS, ACTIVE, K, RATE = 1152, 16, 32, 1e-3
KINDS = ("topk", "batch_topk", "matryoshka", "jumprelu")
SIDES = ("ours", "saelens", "sparsify", "peak")
GOALS = {"topk": 2.5, "batch_topk": 0.95, "matryoshka": 0.95, "jumprelu": 0.95}
EQUAL = 0.01


@dataclass(frozen=True)
class Size:
    """Of one run: rows in the file, of which the last `held` are measured and not trained on."""

    rows: int = 400_000  # more than the buffer of ours holds
    held: int = 20_000
    features: int = 4608
    batch: int = 4096
    steps: int = 10


def make(folder: Path, rows: int) -> None:
    """Writes `rows` [n, 576] as bfloat16 bits."""
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((ATOMS, WIDTH)).astype(np.float32)
    mean = rng.standard_normal(WIDTH).astype(np.float32)
    bits = np.memmap(folder / "rows", np.uint16, "w+", shape=(rows, WIDTH))
    for start in range(0, rows, 8192):
        n = min(8192, rows - start)
        strength = np.zeros((n, ATOMS), np.float32)
        chosen = np.argpartition(rng.random((n, ATOMS)), ACTIVE, axis=1)[:, :ACTIVE]
        np.put_along_axis(strength, chosen, rng.uniform(0.5, 2, (n, ACTIVE)).astype(np.float32), axis=1)
        x = strength @ atoms + mean + 0.3 * rng.standard_normal((n, WIDTH), dtype=np.float32)
        raw = x.view(np.uint32)
        bits[start : start + n] = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16  # to nearest, ties to even
    bits.flush()


class Part:
    """Rows `first` to `last` of a source."""

    def __init__(self, source: FileRows, first: int, last: int) -> None:
        self._source, self._first, self._last = source, first, last
        self.width = source.width

    def __len__(self) -> int:
        return self._last - self._first

    def blocks(self, most: int = 512) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        start = 0
        for block in self._source.blocks(most):
            end = start + len(block)
            if end > self._first and start < self._last:
                yield block[max(self._first - start, 0) : self._last - start]
            start = end


def seen_and_held(folder: Path, size: Size) -> tuple[Part, Part]:
    source = FileRows(folder / "rows")
    edge = size.rows - size.held
    return Part(source, 0, edge), Part(source, edge, size.rows)


def in_memory(part: Part, batch: int) -> Iterator[torch.Tensor]:
    """Random batches for ever, of rows that are held already: reading them is not counted."""
    rows = torch.from_numpy(np.concatenate([block.copy() for block in part.blocks(8192)]))
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(rows), generator=generator)
            yield from (rows[chosen] for chosen in order.split(batch) if len(chosen) == batch)

    return batches()


def rate(step: Callable[[], Any], size: Size) -> float:
    """Rows per CPU second."""
    step()
    started_s = time.process_time()
    for _ in range(size.steps - 1):
        step()
    return (size.steps - 1) * size.batch / (time.process_time() - started_s)


def recipe(kind: str, size: Size) -> Any:
    from trocar.dictionaries import Recipe

    levels = (size.features // 8, size.features // 2) if kind == "matryoshka" else ()
    rows = size.steps * size.batch
    return Recipe(kind, size.features, rows=rows, k=K, batch=size.batch, rate=RATE, levels=levels)  # type: ignore[arg-type]


def ours(kind: str, folder: Path, size: Size) -> dict[str, float]:
    from trocar.dictionaries import Training, measure

    seen, held = seen_and_held(folder, size)
    training = Training(seen, recipe(kind, size))
    found = {"rows_per_s": rate(lambda: training.run(most=1), size)}
    return {**found, "fvu": measure(training.dictionary(), held).fvu}


def saelens(kind: str, folder: Path, size: Size) -> dict[str, float]:
    from trocar.dictionaries import library, load, measure
    from trocar.dictionaries.training import _module, _scale

    lens, wanted = library.saelens(), recipe(kind, size)
    seen, held = seen_and_held(folder, size)
    pace = lens.config.SAETrainerConfig(
        total_training_samples=wanted.rows, train_batch_size_samples=size.batch, lr=RATE, lr_end=RATE
    )
    settings = {"d_in": WIDTH, "d_sae": size.features, "normalize_activations": "expected_average_only_in"}
    torch.manual_seed(wanted.seed)
    module = _module(lens, wanted, settings, fused=False)
    trainer = lens.SAETrainer(pace, module, in_memory(seen, size.batch))
    trainer.activation_scaler.scaling_factor = _scale(seen)

    def step() -> None:
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1

    found = {"rows_per_s": rate(step, size)}
    module.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    with tempfile.TemporaryDirectory() as name:
        module.save_inference_model(name)
        return {**found, "fvu": measure(load(Path(name)), held).fvu}


def sparsify(_: str, folder: Path, size: Size) -> dict[str, float]:
    from trocar.dictionaries import library

    library.saelens()
    from sparsify import SparseCoder, SparseCoderConfig

    seen, _held = seen_and_held(folder, size)
    batches = in_memory(seen, size.batch)
    coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=size.features, k=K))
    adam = torch.optim.Adam(coder.parameters(), lr=RATE)

    def step() -> None:
        adam.zero_grad()
        coder(next(batches)).fvu.backward()
        adam.step()

    return {"rows_per_s": rate(step, size)}


def peak(_: str, __: Path, size: Size) -> dict[str, float]:
    """Operations per CPU second of the encoder's product."""
    a, b = torch.randn(size.batch, WIDTH), torch.randn(WIDTH, size.features)
    return {"per_s": rate(lambda: a @ b, size) * 2 * WIDTH * size.features}


def child(side: str, kind: str, folder: Path, size: Size) -> dict[str, float]:
    """One side in a process of its own, with the most memory it had."""
    command = [sys.executable, "-m", "bench.sae", "--side", side, "--kind", kind, "--folder", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    sized = json.dumps(asdict(size))
    done = subprocess.run([*command, "--size", sized], stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def turn(folder: Path, size: Size) -> tuple[dict[str, float], dict[str, float]]:
    """The ratios of one turn, and the rows per second behind them."""
    rates, ratios = {}, {}
    for kind in KINDS:
        for side in ("ours", "saelens"):
            rates[f"{side}_{kind}"] = child(side, kind, folder, size)["rows_per_s"]
        ratios[kind] = rates[f"ours_{kind}"] / rates[f"saelens_{kind}"]
    rates["sparsify_topk"] = child("sparsify", "topk", folder, size)["rows_per_s"]
    ratios["topk_of_sparsify"] = rates["ours_topk"] / rates["sparsify_topk"]
    rates["matmul_gflop"] = child("peak", "topk", folder, size)["per_s"] / 1e9
    ratios["topk_of_peak"] = rates["ours_topk"] * 10 * WIDTH * size.features / rates["matmul_gflop"] / 1e9
    return ratios, rates


def quality(folder: Path, size: Size) -> dict[str, float]:
    """FVU of both after the same number of steps."""
    found = {side: child(side, "topk", folder, size) for side in ("ours", "saelens")}
    own, theirs = found["ours"]["fvu"], found["saelens"]["fvu"]
    if own > theirs + EQUAL:
        raise SystemExit(f"the unexplained share is {own}, not {theirs}")
    memory = {f"{side}_peak_mb": one["peak_mb"] for side, one in found.items()}
    return {"steps": float(size.steps), "ours_fvu": own, "saelens_fvu": theirs, **memory}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", choices=SIDES, help="what this process measures for the benchmark")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", type=json.loads)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.side:
        verb = {"ours": ours, "saelens": saelens, "sparsify": sparsify, "peak": peak}[chosen.side]
        found = verb(chosen.kind, chosen.folder, Size(**chosen.size))
        print(json.dumps({**found, "peak_mb": peak_mb()}))
        return
    rounds, size, whole = (1, Size(rows=30_000, held=5_000, steps=3), 4) if chosen.quick else (3, Size(), 150)
    ratios: dict[str, list[float]] = {}
    rates: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), size.rows)
        for _ in range(rounds):
            found, behind = turn(Path(name), size)
            for ratio, value in found.items():
                ratios.setdefault(ratio, []).append(value)
            rates.append(behind)
            print(" ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
        equal = quality(Path(name), Size(**{**asdict(size), "steps": whole}))
    middle = {k: float(np.median([one[k] for one in rates])) for k in rates[0]}
    finish("sae", ratios, GOALS, rows_per_cpu_s=middle, quality=equal)


if __name__ == "__main__":
    main()

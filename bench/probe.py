"""Probes over a million rows on disk, against scikit-learn with all rows in memory.

The rows are synthetic and look like a residual stream: 576 features of low rank plus noise, three outliers forty times
as wide with means of 10, 30 and 100 deviations, and 128 labels that each shift the mean; bfloat16 in one file. Ours
reads the file block by block, as float32. The peer is scikit-learn on standardised float32 rows that it holds already:
reading, converting and standardising are not counted for it. Either works in a process of its own, in turns, with one
thread. Ratios are its CPU seconds / ours, at the same objective, to a part in a million or better:

- `first_probe`: sums, the correlation of a sample, and the fit. `further_probe`: with the moments known.
- `probes_128`: 128 times its probe / the moments of all rows and 128 probes in shared passes.
- `ridge`, `lda`, `pca`: one each / a pass for the moments and the closed form; `all_three`: together, from one pass.
- `memory_goal`: 2 GB / the most memory that any of ours had, Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import finish

WIDTH, RANK, LABELS, SHIFT = 576, 64, 128, 0.8
OUTLIERS = {17: 10.0, 200: 30.0, 411: 100.0}
L2, COMPONENTS, EQUAL = 1.0, 64, 1e-6
FURTHER = 3
WINDOW = 64 << 20
GOALS = {
    "first_probe": 1.0,
    "further_probe": 4.0,
    "probes_128": 20.0,
    "ridge": 1.0,
    "lda": 1.0,
    "pca": 1.0,
    "all_three": 1.0,
    "memory_goal": 1.0,
}


def make(folder: Path, rows: int) -> None:
    """Writes `rows` [n, 576] as bfloat16 bits, and `labels` [128, n] of -1 and +1 as int8."""
    rng = np.random.default_rng(0)
    mixing = (2 / RANK**0.5 * rng.standard_normal((RANK, WIDTH))).astype(np.float32)
    directions = rng.standard_normal((LABELS, WIDTH)).astype(np.float32)
    directions *= SHIFT / np.linalg.norm(directions, axis=1, keepdims=True)
    mean = (3 * rng.standard_normal(WIDTH)).astype(np.float32)
    scale = np.ones(WIDTH, np.float32)
    for feature, deviations in OUTLIERS.items():
        scale[feature], mean[feature] = 40.0, deviations * 2.4  # a feature has a deviation of about 2.4
    bits = np.memmap(folder / "rows", np.uint16, "w+", shape=(rows, WIDTH))
    labels = np.memmap(folder / "labels", np.int8, "w+", shape=(LABELS, rows))
    for start in range(0, rows, 16384):
        n = min(16384, rows - start)
        signs = rng.integers(0, 2, (n, LABELS), dtype=np.int8) * 2 - 1
        x = rng.standard_normal((n, RANK), dtype=np.float32) @ mixing
        x += rng.standard_normal((n, WIDTH), dtype=np.float32) + signs.astype(np.float32) @ directions
        raw = ((x + mean) * scale).view(np.uint32)
        bits[start : start + n] = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16  # to nearest, ties to even
        labels[:, start : start + n] = signs.T
    bits.flush()
    labels.flush()


class FileRows:
    """The file as a source: bfloat16 becomes float32 in a buffer, and pages go when they are read."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(
                file.fileno(), 0, access=mmap.ACCESS_COPY
            )  # torch wants memory it may write
        self._rows = torch.frombuffer(self._map, dtype=torch.bfloat16).view(-1, WIDTH)
        self.width = WIDTH

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self, most: int = 512) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        buffer = np.empty((most, WIDTH), np.float32)
        converted, left = torch.from_numpy(buffer), 0
        for start in range(0, len(self), most):
            n = min(most, len(self) - start)
            converted[:n].copy_(self._rows[start : start + n])
            yield buffer[:n]
            read = (start + n) * WIDTH * 2
            if read - left > WINDOW:
                self._map.madvise(mmap.MADV_DONTNEED, left, WINDOW)
                left += WINDOW


def cpu(verb: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.process_time()
    found = verb()
    return time.process_time() - started_s, found


def objective(source: FileRows, signs: Any, weights: Any, bias: float, deviation: Any) -> float:
    """Per row, in float64, of raw weights."""
    total, row = 0.0, 0
    for block in source.blocks(8192):
        scores = block.astype(np.float64) @ weights + bias
        total += float(np.logaddexp(0, -signs[row : row + len(block)] * scores).sum())
        row += len(block)
    return (total + L2 / 2 * float(((weights * deviation) ** 2).sum())) / row


def ours(folder: Path) -> dict[str, float]:
    from trocar.analysis import probes
    from trocar.analysis.many import logistic_many
    from trocar.analysis.moments import moments
    from trocar.analysis.spectra import leace, pca, whitening

    source = FileRows(folder / "rows")
    labels = np.memmap(folder / "labels", np.int8, "r").reshape(LABELS, -1)
    out: dict[str, float] = {}

    out["first_probe"], (probe,) = cpu(lambda: logistic_many(source, labels[:1], l2=L2))
    out["passes_first"] = probe.passes
    closed: dict[str, Callable[[Any], Any]] = {
        "ridge": lambda m: probes.ridge(m, L2),
        "lda": lambda m: probes.discriminant_of_two(m, L2),
        "pca": lambda m: pca(m, COMPONENTS),
        "whitening": whitening,
        "leace": leace,
    }
    out["moments"], (known,) = cpu(lambda: moments(source, targets=labels[0] > 0))
    for name, verb in closed.items():
        out[name] = cpu(lambda verb=verb: verb(known))[0]  # type: ignore[misc]
    again = [labels[i : i + 1] for i in range(FURTHER)]
    out["further_probe"], found = cpu(
        lambda: [logistic_many(source, one, l2=L2, known=known)[0] for one in again]
    )
    out["further_probe"] /= FURTHER
    out["passes_further"] = found[0].passes
    out["probes_128"], many = cpu(lambda: logistic_many(source, labels, l2=L2, known=known))
    out["passes_128"] = max(p.passes for p in many)
    deviation = np.sqrt(known.variance)
    for name, p in (("first", probe), ("further", found[0]), ("many", many[0])):
        out[f"objective_{name}"] = objective(source, labels[0], p.weights[0], float(p.bias[0]), deviation)
    return out


def theirs(folder: Path) -> dict[str, float]:
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression, Ridge

    source = FileRows(folder / "rows")
    y = np.memmap(folder / "labels", np.int8, "r").reshape(LABELS, -1)[0] > 0
    z = np.concatenate([block.copy() for block in source.blocks(8192)])
    mean, deviation = z.mean(axis=0, dtype=np.float64), z.std(axis=0, dtype=np.float64)
    for start in range(0, len(z), 8192):
        z[start : start + 8192] = (z[start : start + 8192] - mean) / deviation
    out: dict[str, float] = {}
    out["probe"], model = cpu(lambda: LogisticRegression(C=1 / L2, max_iter=1000).fit(z, y))
    out["iterations"] = float(model.n_iter_[0])
    weights = model.coef_[0].astype(np.float64) / deviation
    bias = float(model.intercept_[0]) - float(weights @ mean)
    out["objective"] = objective(source, np.where(y, 1, -1), weights, bias, deviation)
    out["ridge"] = cpu(lambda: Ridge(alpha=L2, solver="cholesky").fit(z, y.astype(np.float32)))[0]
    out["lda"] = cpu(lambda: LinearDiscriminantAnalysis(solver="lsqr").fit(z, y))[0]
    out["pca"] = cpu(lambda: PCA(COMPONENTS, svd_solver="covariance_eigh").fit(z))[0]
    return out


def peak_mb() -> float:
    """The most memory this process had; `getrusage` would count that of who started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def child(side: str, folder: Path) -> dict[str, float]:
    """One side in a process of its own, with the most memory it had."""
    command = [sys.executable, "-m", "bench.probe", "--side", side, "--folder", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(own: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """The ratios of one turn; stops when an objective of ours is not as low."""
    for name in ("first", "further", "many"):
        if own[f"objective_{name}"] > peer["objective"] * (1 + EQUAL):
            raise SystemExit(f"{name}: the objective is {own[f'objective_{name}']}, not {peer['objective']}")
    closed = sum(peer[name] for name in ("ridge", "lda", "pca"))
    every = own["moments"] + sum(own[name] for name in ("ridge", "lda", "pca"))
    each = {name: peer[name] / (own["moments"] + own[name]) for name in ("ridge", "lda", "pca")}
    return {
        "first_probe": peer["probe"] / own["first_probe"],
        "further_probe": peer["probe"] / own["further_probe"],
        "probes_128": LABELS * peer["probe"] / (own["moments"] + own["probes_128"]),
        **each,
        "all_three": closed / every,
        "memory_goal": 2000 / own["peak_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--side", choices=("ours", "theirs"), help="what this process measures for the benchmark"
    )
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.side:
        found = (ours if chosen.side == "ours" else theirs)(chosen.folder)
        found["peak_mb"] = peak_mb()
        print(json.dumps(found))
        return
    rounds, rows = (1, 60_000) if chosen.quick else (3, 1_000_000)
    ratios: dict[str, list[float]] = {name: [] for name in GOALS}
    sides: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), rows)
        for _ in range(rounds):
            own, peer = (child(side, Path(name)) for side in ("ours", "theirs"))
            sides["ours"].append(own)
            sides["theirs"].append(peer)
            for ratio, value in compare(own, peer).items():
                ratios[ratio].append(value)
            print(" ".join(f"{k} {v[-1]:.2f}" for k, v in ratios.items()), flush=True)
    middle = {
        side: {k: float(np.median([turn[k] for turn in turns])) for k in turns[0]}
        for side, turns in sides.items()
    }
    finish("probe", ratios, GOALS, ours=middle["ours"], scikit_learn=middle["theirs"], rows={"n": rows})


if __name__ == "__main__":
    main()

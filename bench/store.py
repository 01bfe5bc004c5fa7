"""Rows of activations to disk and back: this store against raw memory-mapped files and against other formats.

Everyone keeps the same rows of width 576 as bfloat16, given as float32 in batches of 8,192, and delivers float32.
`append` ends when every row is synchronised (Lance, Zarr and Parquet synchronise nothing); `scan` passes over
all rows in blocks of 512, warm; `gather` picks 4,096 random rows, warm; `filter` finds the one percent of rows with
label 7 and delivers them. Ratios are the peer's time / ours, `append` in wall time and the others in CPU time, so
that 1.0 is as fast as the peer. `scan_cold` and `gather_cold` follow after the system has forgotten the files, in
wall time, against raw files alone. `scan_peak_mb` is by how much a process grows that scans a handle larger than
2 GB.

Lance, Zarr and Parquet run in a Python of their own as children that measure themselves. `TROCAR_BENCH_STORE` names
one that has pylance and zarr beside what this project needs; without it, a virtual environment is made for the run.
A peer that cannot be had is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import finish
from bench.store_sides import BATCH, SITE, Ours, Raw, Safetensors, forget
from trocar.store import RowTable, Store

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ROWS, QUICK_ROWS, PICKED = 576, 400_000, 60_000, 4096
ROUNDS = {"append": 5, "scan": 9, "gather": 15, "filter": 7}
LARGE_ROWS, LARGE_WIDTH = 560_000, 2048
GOALS = {"append_raw": 0.8, "scan_raw": 0.9, "gather_raw": round(1 / 1.3, 3)}
CHILDREN = ("lance", "zarr", "parquet")
SCAN = """
import resource, sys
from pathlib import Path
from trocar.store import Store
with Store(Path(sys.argv[1])) as store:
    rows = store.open("bench", sys.argv[2]).site(sys.argv[3])
    next(rows.blocks())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = sum(float(block[0, 0]) for block in rows.blocks())
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


class Child:
    """A peer's process; one line out and one line back per turn."""

    def __init__(self, python: str, kind: str, folder: Path, source: Path, n: int) -> None:
        script = ROOT / "bench" / "peers" / "store_peer.py"
        self.place = folder / kind
        self.place.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self._child = subprocess.Popen(
            [python, str(script), kind, str(self.place), str(source), str(n), str(WIDTH)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        print(f"{kind} {self._line()['version']}")

    def _line(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        found: dict[str, Any] = json.loads(self._child.stdout.readline())
        return found

    def run(self, verb: str, index: np.ndarray) -> dict[str, float]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"verb": verb, "index": index.tolist()}) + "\n")
        self._child.stdin.flush()
        return self._line()

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


class Here:
    """A side that runs in this process, measured as a child measures itself."""

    def __init__(self, side: Ours | Raw) -> None:
        self.side = side

    def run(self, verb: str, index: np.ndarray) -> dict[str, float]:
        if verb == "append":
            self.side.clear()
        arguments = (index,) if verb == "gather" else ()
        wall, cpu = time.perf_counter(), time.process_time()
        found = getattr(self.side, verb)(*arguments)
        return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "sum": found}

    def close(self) -> None:
        if isinstance(self.side, Ours) and self.side.store is not None:
            self.side.store.close()


def peer_python(folder: Path) -> str:
    """The named one, or a new virtual environment that also sees the packages of this one."""
    named = os.environ.get("TROCAR_BENCH_STORE")
    if named:
        return named
    print(
        "making a virtual environment for Lance and Zarr; TROCAR_BENCH_STORE=PYTHON names one that is there"
    )
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    wanted = ["pylance", "zarr", "-c", str(ROOT / "constraints.txt")]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return str(python)


def rows(n: int) -> np.ndarray:
    """Bits of bfloat16 rows: normal numbers, none of them odd."""
    numbers = np.random.default_rng(1).standard_normal((n, WIDTH), dtype=np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def sides_of(folder: Path, bits: np.ndarray) -> dict[str, Here | Child]:
    source = folder / "source.bin"
    bits.tofile(source)
    found: dict[str, Here | Child] = {
        "ours": Here(Ours(folder, bits)),
        "raw": Here(Raw(folder, bits)),
        "safetensors": Here(Safetensors(folder, bits)),
    }
    try:
        python = peer_python(folder / "venv")
        for kind in CHILDREN:
            found[kind] = Child(python, kind, folder, source, len(bits))
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as e:
        print(f"the other formats are left out: {type(e).__name__}", file=sys.stderr)
    return found


def turns(
    verb: str, sides: dict[str, Here | Child], n: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """What each side measured, turn by turn; all must find the same sum."""
    out: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(rounds):
        index = np.random.default_rng(turn).choice(n, PICKED, replace=False)
        results = {name: side.run(verb, index) for name, side in sides.items()}
        sums = {name: r["sum"] for name, r in results.items()}
        if max(sums.values()) - min(sums.values()) > 1e-3 * n**0.5:
            raise RuntimeError(f"{verb} did not deliver the same rows: {sums}")
        for name, result in results.items():
            out[name].append(result)
    return out


def cold(ours: Ours, raw: Raw, n: int, rounds: int) -> dict[str, list[float]]:
    """Wall time of raw / ours after the system has forgotten the files."""
    out: dict[str, list[float]] = {"scan_cold_raw": [], "gather_cold_raw": []}
    for turn in range(rounds):
        index = np.random.default_rng(100 + turn).choice(n, PICKED, replace=False)
        for name, verb in (("scan_cold_raw", "scan"), ("gather_cold_raw", "gather")):
            took = {}
            for side in (ours, raw):
                if isinstance(side, Ours):
                    assert side.reader is not None
                    side.rows = side.reader.site(SITE)
                else:
                    side.shards = side._open()
                forget(side.files())
                took[type(side)] = Here(side).run(verb, index)["wall_s"]
            out[name].append(took[Raw] / took[Ours])
    return out


def peak_mb(folder: Path) -> tuple[float, float]:
    """By how much a scan of a large handle makes a process grow, and how large the handle is, in MB."""
    with (
        Store(folder) as store,
        store.create("bench", "m", "f", {SITE: LARGE_WIDTH}, "p", dtype="bfloat16") as writer,
    ):
        vectors = np.ones((BATCH, LARGE_WIDTH), np.float32)
        for start in range(0, LARGE_ROWS, BATCH):
            at = np.arange(start, start + BATCH)
            words, phases = ["word"] * BATCH, ["prompt"] * BATCH
            table = RowTable.of(prompt=at // 64, position=at % 64, token_id=at, token=words, phase=phases)
            writer.append({SITE: vectors}, table)
        info = writer.finish()
    command = [sys.executable, "-c", SCAN, str(folder), info.id, SITE]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout), info.size_bytes / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    n = QUICK_ROWS if quick else ROWS
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TROCAR_BENCH_DISK")) as name:
        folder = Path(name)
        bits = rows(n)
        sides = sides_of(folder, bits)
        for verb, rounds in ROUNDS.items():
            unit = "wall_s" if verb == "append" else "cpu_s"
            found = turns(verb, sides, n, 2 if quick else rounds)
            ours = [r[unit] for r in found.pop("ours")]
            seconds[f"{verb}_ours"] = float(np.median(ours))
            for peer, results in found.items():
                theirs = [r[unit] for r in results]
                seconds[f"{verb}_{peer}"] = float(np.median(theirs))
                ratios[f"{verb}_{peer}"] = [t / o for t, o in zip(theirs, ours, strict=True)]
        kept = {key: s.side for key, s in sides.items() if isinstance(s, Here)}
        assert isinstance(kept["ours"], Ours)
        assert isinstance(kept["raw"], Raw)
        ratios |= cold(kept["ours"], kept["raw"], n, 2 if quick else 7)
        for side in sides.values():
            side.close()
        size = {"mb": n * WIDTH * 2 / 1e6}
        if not quick:
            size["scan_peak_mb"], size["scanned_mb"] = peak_mb(folder / "large")
    finish("store", ratios, GOALS, seconds=seconds, size=size)


if __name__ == "__main__":
    main()

"""A writer that is meant to die: appends shards for ever and acknowledges each commit in a side file.

Run as `python killed_writer.py ROOT ACKS`; it waits for a line on stdin first. Row i holds a pattern of i, so
whoever finds it can tell whether it is whole.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trocar.store import RowTable, Store

WIDTHS = {"resid_post.0": 64, "mlp_act.1": 32}
BATCH = 500
PROMPT_ROWS = 7


def pattern(index: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.float32]:
    return ((index[:, None] * 31 + np.arange(width)) % 65_521).astype(np.float32)


def batch(start: int) -> tuple[dict[str, npt.NDArray[np.float32]], RowTable]:
    index = np.random.default_rng(start).permutation(np.arange(start, start + BATCH))
    table = RowTable.of(
        prompt=index // PROMPT_ROWS,
        position=index % PROMPT_ROWS,
        token_id=index,
        token=[f"t{i}" for i in index],
        phase=["prompt"] * BATCH,
    )
    return {site: pattern(index, width) for site, width in WIDTHS.items()}, table


def main(root: Path, acks: Path) -> None:
    sys.stdin.readline()
    writer = Store(root).create("alice", "smol", "f1", WIDTHS, "p1")
    with acks.open("a") as out:
        for start in range(0, 10**9, BATCH):
            writer.append(*batch(start))
            writer.flush()
            out.write(f"{writer.id} {start + BATCH}\n")
            out.flush()
            os.fsync(out.fileno())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

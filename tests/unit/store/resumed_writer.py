"""A capture that is meant to die and to go on: the rows of every prompt that is not there yet, then the end.

Run as `python resumed_writer.py ROOT HANDLE N_PROMPTS [URL OPTION=VALUE ...]`; a prompt's rows follow from its
number, so whoever reads them can tell whether each is there once and whole. It says "going" when it has resumed,
and "finished" at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trocar.store import Objects, RowTable, Store

SITES = {"resid_post.0": 64, "mlp_act.1": 32}
SHARD_ROWS = 50


def length(prompt: int) -> int:
    return 1 + prompt * 7 % 11


def prompt_rows(prompt: int) -> tuple[dict[str, npt.NDArray[np.float32]], RowTable]:
    n = length(prompt)
    table = RowTable.of(
        prompt=[prompt] * n, position=range(n), token_id=[prompt * 16 + q for q in range(n)],
        token=[f"t{q}" for q in range(n)], phase=["prompt"] * n, labels={"even": [prompt % 2 == 0] * n},
    )  # fmt: skip
    row = np.arange(n, dtype=np.float32)[:, None] + prompt % 100
    return {site: row + np.arange(width, dtype=np.float32) for site, width in SITES.items()}, table


def shard_bytes() -> int:
    return SHARD_ROWS * 2 * sum(SITES.values())


def main(root: Path, handle: str, n_prompts: int, objects: Objects | None) -> None:
    with (
        Store(root, objects=objects, shard_bytes=shard_bytes()) as store,
        store.resume("alice", handle) as writer,
    ):
        print("going", flush=True)
        there = set(writer.committed.tolist())
        for prompt in range(n_prompts):
            if prompt not in there:
                writer.append(*prompt_rows(prompt))
        writer.finish()
    print("finished", flush=True)


if __name__ == "__main__":
    place = sys.argv[4:]
    options = dict(option.split("=", 1) for option in place[1:])
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Objects(place[0], options) if place else None)

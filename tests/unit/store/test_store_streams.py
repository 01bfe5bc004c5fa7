"""Rows in blocks: the canonical order whatever came when, bounded memory, and any rows picked out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from trocar import errors
from trocar.store import RowTable, Store, order, rows
from trocar.store.order import Mix, Run, Sorted

WIDTH = 6
Keys = list[tuple[int, int]]
RNG = np.random.default_rng(11)
ALL: Keys = [(p, q) for p in range(60) for q in range(p % 7)]
SHUFFLED: Keys = [ALL[i] for i in RNG.permutation(len(ALL))]
# Neighbours change places, so that each shard overlaps with the next by a little.
NEARLY: Keys = [key for i in range(0, len(ALL), 2) for key in ALL[i : i + 2][::-1]]
SAME: Keys = [(3, 1)] * 40 + [(2, 5)] * 30 + [(3, 1)] * 20
ARRIVALS = {"in order": ALL, "shuffled": SHUFFLED, "nearly": NEARLY, "backwards": ALL[::-1], "same": SAME}


def table(keys: Keys) -> RowTable:
    return RowTable.of(
        prompt=[p for p, _ in keys], position=[q for _, q in keys], token_id=range(len(keys)),
        token=["t"] * len(keys), phase=["prompt"] * len(keys),
    )  # fmt: skip


def vectors(keys: Keys) -> npt.NDArray[np.float32]:
    """A row names its prompt, its position and when it came."""
    come = np.arange(len(keys))
    return np.array(
        [[p, q, i // 256, i % 256, 1, -p] for (p, q), i in zip(keys, come, strict=True)], np.float32
    )


def expected(keys: Keys) -> npt.NDArray[np.float32]:
    found = vectors(keys)
    return found[np.lexsort((np.arange(len(keys)), found[:, 1], found[:, 0]))]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about surviving."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened


def kept(store: Store, keys: Keys, per_shard: int, dtype: str = "bfloat16") -> str:
    numbered = vectors(keys)
    with store.create("alice", "smol", "f1", {"final_norm": WIDTH}, "p1", dtype=dtype) as writer:
        for start in range(0, len(keys), per_shard):
            writer.append(
                {"final_norm": numbered[start : start + per_shard]}, table(keys[start : start + per_shard])
            )
            writer.flush()
        return writer.finish().id


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("per_shard", [11, 50, 1000])
@pytest.mark.parametrize("arrival", ARRIVALS)
def test_blocks_are_the_rows_in_canonical_order(
    store: Store, arrival: str, per_shard: int, dtype: str
) -> None:
    keys = ARRIVALS[arrival]
    reader = store.open("alice", kept(store, keys, per_shard, dtype))
    found, site = expected(keys), reader.site("final_norm")
    np.testing.assert_array_equal(reader.read("final_norm"), found)
    assert (len(site), site.width) == (len(keys), WIDTH)
    for most in (1, 16, 512):
        sizes = []
        for passes in range(2):
            start = 0
            for block in site.blocks(most):
                assert block.dtype == np.float32
                assert 1 <= len(block) <= most
                np.testing.assert_array_equal(block, found[start : start + len(block)])
                block[:] = np.nan  # a block is the caller's
                start += len(block)
                sizes.append(len(block))
            assert start == len(keys), passes
    table_ = reader.rows()
    np.testing.assert_array_equal(np.stack([table_.prompt, table_.position], 1), found[:, :2])
    index = RNG.integers(0, len(keys), 70)
    np.testing.assert_array_equal(site.take(index), found[index])


def test_some_prompts_in_blocks(store: Store) -> None:
    reader = store.open("alice", kept(store, SHUFFLED, 20))
    found = expected(SHUFFLED)
    chosen = found[np.isin(found[:, 0], [5, 41, 6])]
    site = reader.site("final_norm", [41, 5, 6])
    np.testing.assert_array_equal(np.concatenate([b.copy() for b in site.blocks(4)]), chosen)
    np.testing.assert_array_equal(site.take(np.array([9, 0])), chosen[[9, 0]])


def test_nothing_is_no_block(store: Store) -> None:
    empty = store.open("alice", store.create("alice", "smol", "f1", {"final_norm": WIDTH}, "p1").finish().id)
    assert list(empty.site("final_norm").blocks()) == []
    assert empty.site("final_norm").take(np.empty(0, np.int64)).shape == (0, WIDTH)
    with pytest.raises(errors.ProgramError):
        empty.site("final_norm").take(np.array([0]))


@pytest.mark.parametrize("index", [[-1], [0, 9]])
def test_rows_that_are_not_there_cannot_be_picked(store: Store, index: list[int]) -> None:
    site = store.open("alice", kept(store, ALL[:9], 5)).site("final_norm")
    with pytest.raises(errors.ProgramError) as caught:
        site.take(np.array(index))
    assert (caught.value.code, caught.value.path) == ("bad_value", "index")


def test_a_block_has_rows(store: Store) -> None:
    site = store.open("alice", kept(store, ALL[:9], 5)).site("final_norm")
    with pytest.raises(errors.ProgramError) as caught:
        next(site.blocks(0))
    assert (caught.value.code, caught.value.path) == ("bad_value", "most")


def test_shards_in_order_are_streamed_without_their_sidecars(store: Store, tmp_path: Path) -> None:
    handle = kept(store, ALL, 50)
    for path in (tmp_path / "data" / handle).glob("*.parquet"):
        path.unlink()
    np.testing.assert_array_equal(store.open("alice", handle).site("final_norm").read(), expected(ALL))


def sorted_shards(keys: Keys, per_shard: int) -> list[Sorted]:
    parts = [table(keys[i : i + per_shard]) for i in range(0, len(keys), per_shard)]
    found = [np.sort(rows.keys(t.prompt, t.position)) for t in parts]
    return [Sorted(i, len(k), int(k[0]), int(k[-1]), lambda k=k: k) for i, k in enumerate(found)]


def test_merging_holds_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "MERGED_ROWS", 40)
    pieces = list(order.merged(sorted_shards(SHUFFLED, 10)))
    assert sum(map(len, pieces)) == len(ALL)
    assert max(len(p) for p in pieces if isinstance(p, Mix)) <= 40
    assert sum(isinstance(p, Mix) for p in pieces) > 3


def test_only_shards_that_overlap_are_merged() -> None:
    shards = sorted_shards(NEARLY[:30] + ALL[30:], 10)
    assert not order.is_tidy(sorted_shards(NEARLY[1:31], 10))
    pieces = list(order.merged(shards))
    assert all(isinstance(p, Run) for p in pieces)
    loaded: list[int] = []
    watched = [Sorted(s.number, s.n_rows, s.first, s.last, lambda s=s: (loaded.append(s.number), s.keys())[1])
               for s in sorted_shards(NEARLY[1:31] + ALL[31:], 10)]  # fmt: skip
    assert sum(map(len, order.merged(watched))) == len(ALL) - 1
    assert set(loaded) <= {0, 1, 2, 3}, "a shard that overlaps with none was read"


SCAN = """
import resource, sys
from pathlib import Path
from trocar.store import Store
with Store(Path(sys.argv[1])) as store:
    site = store.open("alice", sys.argv[2]).site("final_norm")
    next(site.blocks())  # torch is there now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = sum(float(block[:, 0].sum()) for block in site.blocks())
    print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("tidy", [True, False])
def test_a_scan_needs_less_memory_than_the_rows(tmp_path: Path, tidy: bool) -> None:
    """160 MB of bfloat16 in 40 shards; the peak of a process that scans them grows by less than 40 MB."""
    n, width = 20_000, 4096
    prompts = np.arange(n) if tidy else np.arange(n).reshape(2, -1).T.ravel()
    with (
        Store(tmp_path, shard_bytes=4 << 20) as store,
        store.create("alice", "smol", "f1", {"final_norm": width}, "p1", dtype="bfloat16") as writer,
    ):
        for start in range(0, n, 500):
            part = [(int(p), 0) for p in prompts[start : start + 500]]
            writer.append({"final_norm": np.full((500, width), start // 500, np.float32)}, table(part))
        handle = writer.finish().id
    run = subprocess.run(
        [sys.executable, "-c", SCAN, str(tmp_path), handle], capture_output=True, text=True, check=True
    )
    total, grown_kb = run.stdout.split()
    assert float(total) == 500 * sum(range(40))
    assert int(grown_kb) < 40_000

"""Death of the writer: no acknowledged row is lost, no torn row is readable, nothing is left behind."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from killed_writer import batch

from trocar.store import Reader, Store

SCRIPT = Path(__file__).with_name("killed_writer.py")
WIDTHS = {"resid_post.0": 64, "mlp_act.1": 32}
BATCH, N_KILLS, PATIENCE_S = 500, 12, 30.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a writer that waits for `go`; all die at the end of the test."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "store"), str(tmp_path / "acks")]
    started: list[subprocess.Popen[str]] = []

    def launch() -> subprocess.Popen[str]:
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def acknowledged(acks: Path) -> dict[str, int]:
    """Rows promised by handle; a torn last line promises nothing."""
    text = acks.read_text() if acks.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return {handle: int(n) for handle, n in (line.split() for line in lines)}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the writer made no progress"


def assert_whole(reader: Reader) -> None:
    """Every readable row is the one that was written: computed here, not with the writer's code."""
    n = reader.info.n_rows
    assert n % BATCH == 0
    index = np.arange(n)
    table = reader.rows()
    np.testing.assert_array_equal(table.token_id, index)
    np.testing.assert_array_equal(table.prompt * 7 + table.position, index)
    assert list(table.token[:3]) == ["t0", "t1", "t2"][:n]
    for site, width in WIDTHS.items():
        expected = [(index * 31 + j) % 65_521 for j in range(width)]
        np.testing.assert_array_equal(reader.read(site), np.array(expected, np.float32).T)


def files(folder: Path) -> set[str]:
    return (
        {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} if folder.exists() else set()
    )


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(
    tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    root, acks = tmp_path / "store", tmp_path / "acks"
    rng = random.Random(7)
    with_leftovers = 0
    for trial, process in enumerate([start() for _ in range(N_KILLS)]):
        known = len(acknowledged(acks))
        go(process)
        wait_until(lambda known=known: len(acknowledged(acks)) > known)
        time.sleep(rng.uniform(0, 0.05))
        if trial % 2:
            wait_until(lambda: files(root / "tmp"))  # in the middle of a shard
        process.kill()
        assert process.wait() == -9
        before = files(root / "data") | files(root / "tmp")
        with Store(root) as store:
            after = files(root / "data")
            with_leftovers += before != after
            assert files(root / "tmp") == set()
            assert store.check() == []
            promised = acknowledged(acks)
            newest = store.list("alice")[-1]
            assert newest.state == "failed"
            assert newest.n_rows >= promised[newest.id] >= BATCH
            assert_whole(store.open("alice", newest.id, partial=True))
    assert with_leftovers > 0, "no kill hit a shard: the test shows nothing"
    with Store(root) as store:
        assert len(acknowledged(acks)) == N_KILLS == len(store.list("alice"))
        for handle, n_rows in acknowledged(acks).items():
            reader = store.open("alice", handle, partial=True)
            assert reader.info.n_rows >= n_rows
            assert_whole(reader)
        assert store.verify() == []


def test_death_at_any_step_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is copied before every fsync, rename and SQL commit: what a death there would leave."""
    root = tmp_path / "store"
    promised: list[int] = []
    n_acknowledged = 0

    def snapshot(*_: object) -> None:
        shutil.copytree(root, tmp_path / f"death-{len(promised)}")
        promised.append(n_acknowledged)

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            snapshot()
            return call(*arguments)

        return wrapped

    with Store(root) as store:
        writer = store.create("alice", "smol", "f1", WIDTHS, "p1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", before(os.fsync))
            patch.setattr(Path, "rename", before(Path.rename))
            sa.event.listen(sa.Engine, "commit", snapshot)
            try:
                for first in (0, BATCH):
                    writer.append(*batch(first))
                    writer.flush()
                    n_acknowledged = first + BATCH
            finally:
                sa.event.remove(sa.Engine, "commit", snapshot)
    assert len(promised) >= 2 * (3 + 3 + 1 + 1)  # two shards of three files: fsyncs, renames, folder, commit
    for step, n_rows in enumerate(promised):
        with Store(tmp_path / f"death-{step}") as store:
            assert store.check() == store.verify() == []
            assert files(tmp_path / f"death-{step}" / "tmp") == set()
            reader = store.open("alice", writer.id, partial=True)
            assert reader.info.n_rows == n_rows
            assert_whole(reader)


def test_a_reader_in_another_process_sees_whole_shards_that_only_grow(
    tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    with Store(tmp_path / "store") as store:
        go(start())
        wait_until(lambda: acknowledged(tmp_path / "acks"))
        seen = [0]
        while len(seen) < 200 and seen[-1] < 20 * BATCH:
            promised = acknowledged(tmp_path / "acks")
            (handle,) = promised
            reader = store.open("alice", handle, partial=True)
            assert reader.info.state == "open"
            assert reader.info.n_rows >= max(seen[-1], promised[handle])
            assert_whole(reader)
            seen.append(reader.info.n_rows)
        assert len(set(seen)) > 3, "the writer did not write while we read"


def test_opening_a_store_in_use_sweeps_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as first:
        writer = first.create("alice", "smol", "f1", WIDTHS, "p1")
        (tmp_path / "tmp" / "draft").write_bytes(b"being written")
        with Store(tmp_path) as second:
            assert second.list("alice")[0].state == "open"
        assert (tmp_path / "tmp" / "draft").exists()
        assert writer.finish().state == "complete"
    with Store(tmp_path) as third:
        assert not (tmp_path / "tmp" / "draft").exists()
        assert third.list("alice")[0].state == "complete"

"""Going on after a death: prompts that were committed are there once and whole, and one writer writes at a time."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from resumed_writer import SHARD_ROWS, SITES, length, prompt_rows, shard_bytes

from trocar import errors
from trocar.store import Reader, Store, Writer

SCRIPT = Path(__file__).with_name("resumed_writer.py")
N_KILLS, N_PROMPTS = 3, 240


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path, shard_bytes=shard_bytes()) as opened:
        yield opened
        assert opened.check() == opened.verify() == []


def new(store: Store, **options: bool) -> Writer:
    return store.create("alice", "smol", "f1", SITES, "p1", dtype="bfloat16", **options)


def assert_prompts(reader: Reader, prompts: list[int]) -> None:
    """Exactly these prompts are there, each row once: computed here, not by the writer's script."""
    table = reader.rows()
    keys = [(p, q) for p in prompts for q in range(length(p))]
    assert list(zip(table.prompt.tolist(), table.position.tolist(), strict=True)) == keys
    assert table.token_id.tolist() == [p * 16 + q for p, q in keys]
    if keys:
        assert table.labels["even"].tolist() == [int(p % 2 == 0) for p, _ in keys]
    for site, width in SITES.items():
        expected = np.array([[q + p % 100 + j for j in range(width)] for p, q in keys], np.float32)
        np.testing.assert_array_equal(reader.read(site), expected.reshape(-1, width))


def n_files(root: Path) -> int:
    return sum(1 for _ in (root / "data").rglob("*.*"))


def wait_for_shards(root: Path, n: int) -> None:
    deadline = time.monotonic() + 60
    while n_files(root) < n:
        assert time.monotonic() < deadline, "the writer made no progress"


def test_a_capture_killed_again_and_again_equals_one_that_was_not(tmp_path: Path) -> None:
    rng = random.Random(3)
    with Store(tmp_path, shard_bytes=shard_bytes()) as store:
        handle = new(store, resumable=True).id
    command, seen = [sys.executable, str(SCRIPT), str(tmp_path), handle, str(N_PROMPTS)], [0]
    for trial in range(N_KILLS + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
            if trial == N_KILLS:
                assert process.stdout.readline() == "finished\n"
                continue
            wait_for_shards(tmp_path, n_files(tmp_path) + 3 * rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
        with Store(tmp_path) as store:
            reader = store.open("alice", handle, partial=True)
            assert (reader.info.state, store.check()) == ("failed", [])
            there = sorted({int(p) for p in reader.rows().prompt})
            assert there == list(range(len(there)))  # the script goes through them in order
            assert_prompts(reader, there)
            assert len(there) >= seen[-1]
            seen.append(len(there))
    assert len(set(seen)) > 2, "the kills hit nothing"
    assert seen[-1] < N_PROMPTS
    with Store(tmp_path) as store:
        assert store.verify() == []
        reader = store.open("alice", handle)
        assert_prompts(reader, list(range(N_PROMPTS)))


def test_a_living_writer_is_not_replaced(store: Store, tmp_path: Path) -> None:
    writer = new(store)
    writer.append(*prompt_rows(3))
    writer.flush()
    for other in (store, Store(tmp_path)):
        with pytest.raises(errors.ProgramError) as caught:
            other.resume("alice", writer.id)
        assert (caught.value.code, caught.value.path) == ("handle_incomplete", "handle")
        if other is not store:
            other.close()
    writer.append(*prompt_rows(4))
    assert writer.finish().n_rows == length(3) + length(4)


def test_a_writer_that_died_is_replaced_while_others_have_the_store_open(
    store: Store, tmp_path: Path
) -> None:
    """Its handle is still "open": nobody was alone to sweep."""
    handle = new(store, resumable=True)
    handle.detach()
    command = [sys.executable, str(SCRIPT), str(tmp_path), handle.id, str(N_PROMPTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.kill()
    assert store.list("alice")[0].state == "open"
    with store.resume("alice", handle.id) as writer:
        there = writer.committed.tolist()
        for prompt in range(10):
            if prompt not in there:
                writer.append(*prompt_rows(prompt))
        writer.finish()
    assert_prompts(store.open("alice", handle.id), sorted({*range(10), *there}))


def test_a_finished_or_foreign_handle_is_not_resumed(store: Store) -> None:
    done, foreign = new(store).finish().id, store.create("bob", "smol", "f1", SITES, "p1").id
    with pytest.raises(errors.ProgramError) as caught:
        store.resume("alice", done)
    assert (caught.value.code, caught.value.path) == ("bad_value", "handle")
    for name in (foreign, "act_" + "0" * 32, "../x"):
        with pytest.raises(errors.NotFound):
            store.resume("alice", name)
    assert store.open("alice", done).info.state == "complete"


def test_leaving_early_keeps_what_is_committed_where_that_was_asked_for(store: Store) -> None:
    def run(writer: Writer) -> None:
        with writer:
            for prompt in range(20):
                writer.append(*prompt_rows(prompt))
            raise KeyError("the engine fell over")

    kept, dropped = new(store, resumable=True), new(store)
    for writer in (kept, dropped):
        with pytest.raises(KeyError):
            run(writer)
    rows = {info.id: info.n_rows for info in store.list("alice")}
    assert rows[dropped.id] == 0
    assert 0 < rows[kept.id] < sum(map(length, range(20)))
    committed = kept.committed.tolist()
    assert_prompts(store.open("alice", kept.id, partial=True), committed)
    with store.resume("alice", kept.id) as again:
        assert again.committed.tolist() == committed
        vectors, table = prompt_rows(30)
        with pytest.raises(errors.ProgramError) as caught:
            again.append(vectors, table.with_labels({"odd": table.position}))
        assert (caught.value.code, caught.value.path) == ("rows_mismatch", "rows.odd")
    assert store.list("alice")[0].state == "failed"


def test_rows_that_are_appended_together_are_committed_together(store: Store) -> None:
    with new(store) as writer:
        for prompt in range(40):
            writer.append(*prompt_rows(prompt))
            reader = store.open("alice", writer.id, partial=True)
            assert_prompts(reader, writer.committed.tolist())
        assert len(writer.committed) > 0
        writer.finish()
    assert max(np.diff(store.open("alice", writer.id).index.starts)) <= SHARD_ROWS

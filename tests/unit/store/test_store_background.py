"""Committing in a thread: bounded memory, waiting when it is full, and faults that do not get lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trocar import errors
from trocar.store import BackgroundWriter, RowTable, Store, Writer

WIDTH, N = 8, 10
ROW_BYTES = 4 * WIDTH


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path, shard_bytes=25 * ROW_BYTES) as opened:
        yield opened
        assert opened.check() == []


def new(store: Store, **options: bool) -> Writer:
    return store.create("alice", "smol", "f1", {"final_norm": WIDTH}, "p1", **options)


def rows(prompt: int, n: int = N) -> tuple[dict[str, np.ndarray], RowTable]:
    table = RowTable.of(
        prompt=[prompt] * n, position=range(n), token_id=[1] * n, token=["t"] * n, phase=["prompt"] * n
    )
    return {"final_norm": np.full((n, WIDTH), prompt, np.float32)}, table


def test_rows_that_were_appended_are_there(store: Store) -> None:
    with BackgroundWriter(new(store)) as writer:
        for prompt in range(30):
            vectors, table = rows(prompt)
            writer.append(vectors, table)
            vectors["final_norm"][:] = -1  # the writer has a copy
        writer.flush()
        assert writer.committed.tolist() == list(range(30))
        writer.append(*rows(30))
        info = writer.finish()
    assert (info.n_rows, info.state) == (31 * N, "complete")
    found = store.open("alice", info.id).read("final_norm")
    np.testing.assert_array_equal(found, np.repeat(np.arange(31), N)[:, None] * np.ones(WIDTH))
    with pytest.raises(RuntimeError, match="finished"):
        writer.append(*rows(1))


def test_appending_waits_for_room_and_not_for_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, seen = threading.Event(), [0]
    real = Writer.append

    def slow(self: Writer, vectors: Any, table: RowTable) -> None:
        gate.wait(10)
        real(self, vectors, table)

    monkeypatch.setattr(Writer, "append", slow)

    def capture(writer: BackgroundWriter) -> None:
        for prompt in range(12):
            writer.append(*rows(prompt))
            seen[0] += 1

    with BackgroundWriter(new(store), most_bytes=4 * N * ROW_BYTES) as writer:
        thread = threading.Thread(target=capture, args=(writer,))
        thread.start()
        deadline = time.monotonic() + 5
        while seen[0] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert seen[0] == 4  # what fits waits without anybody waiting for it, and no more
        gate.set()
        thread.join()
        assert writer.finish().n_rows == 12 * N


def test_an_append_larger_than_the_queue_goes_through(store: Store) -> None:
    with BackgroundWriter(new(store), most_bytes=1) as writer:
        for prompt in range(3):
            writer.append(*rows(prompt, 70))
        assert writer.finish().n_rows == 210


def test_faults_are_raised_where_somebody_listens(store: Store) -> None:
    with BackgroundWriter(new(store)) as writer:
        vectors, table = rows(0)
        writer.append({"final_norm": vectors["final_norm"][:, 1:]}, table)
        for verb in (writer.flush, writer.finish, lambda: writer.append(vectors, table)):
            with pytest.raises(errors.ProgramError) as caught:
                verb()
            assert caught.value.code == "width_mismatch"
    assert store.list("alice")[0].state == "failed"


def test_a_full_store_does_not_leave_anybody_waiting(tmp_path: Path) -> None:
    with Store(tmp_path, shard_bytes=25 * ROW_BYTES, quota_bytes=20_000) as store:

        def capture() -> None:
            with BackgroundWriter(new(store), most_bytes=ROW_BYTES) as writer:
                for prompt in range(1000):
                    writer.append(*rows(prompt))

        with pytest.raises(errors.Overloaded):
            capture()
        assert store.list("alice")[0].n_rows == 0


@pytest.mark.parametrize("resumable", [True, False])
def test_leaving_early_is_the_writers_own_way(store: Store, resumable: bool) -> None:
    def run() -> None:
        with BackgroundWriter(new(store, resumable=resumable)) as writer:
            for prompt in range(5):
                writer.append(*rows(prompt))
            writer.flush()
            writer.append(*rows(5))
            raise KeyError("the engine fell over")

    with pytest.raises(KeyError):
        run()
    (info,) = store.list("alice")
    assert info.state == "failed"
    assert (info.n_rows >= 5 * N) == resumable
    assert f"trocar-{info.id}" not in {thread.name for thread in threading.enumerate()}

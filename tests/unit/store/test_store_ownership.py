"""Whose things they are: one answer for everything that is not yours, expiry, deletion, quotas, artifacts."""

from __future__ import annotations

import errno
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from trocar import errors
from trocar.store import HandleInfo, RowTable, Store

WIDTH = 16
ARRAYS = {
    "resid_post.3": {"direction": np.arange(4, dtype=np.float32), "bias": np.array([0.5])},
    "final_norm": {"counts": np.array([[1, 2], [3, 4]])},
}


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with Store(tmp_path, clock=clock) as opened:
        yield opened
        assert opened.check() == []


def rows(n: int) -> tuple[dict[str, np.ndarray], RowTable]:
    table = RowTable.of(
        prompt=[0] * n, position=range(n), token_id=[1] * n, token=["t"] * n, phase=["prompt"] * n
    )
    return {"resid_post.3": np.ones((n, WIDTH), np.float32)}, table


def kept(store: Store, owner: str = "alice", n: int = 4, ttl_s: float | None = None) -> HandleInfo:
    with store.create(owner, "smol", "f1", {"resid_post.3": WIDTH}, "p1", ttl_s=ttl_s) as writer:
        writer.append(*rows(n))
        return writer.finish()


MALFORMED = [
    "",
    "act_",
    "act_" + "g" * 32,
    "act_" + "A" * 32,
    "act_" + "0" * 31,
    "act_" + "0" * 33,
    "act_" + "0" * 32 + "\n",
    "../../etc/passwd",
    "act_../../../../../../../../etc/pas",
    "act_%00' OR '1'='1",
]


def test_absent_foreign_expired_deleted_and_malformed_are_one_answer(store: Store, clock: Clock) -> None:
    foreign, dead, gone = kept(store, "bob").id, kept(store, ttl_s=10).id, kept(store).id
    clock.now_s += 10
    store.delete("alice", gone)
    artifact = store.save_artifact("bob", "logistic", "f1", ARRAYS, {})
    answers = set()
    for name in [foreign, dead, gone, artifact, "act_" + "0" * 32, "art_" + "0" * 32, *MALFORMED]:
        for verb in (store.open, store.open_artifact, store.delete):
            with pytest.raises(errors.NotFound) as caught:
                verb("alice", name)
            answer = caught.value.as_json()["error"]["refusals"][0]
            answers.add(str({**answer, "reason": answer["reason"].replace(repr(name[:40]), "ID")}))
    assert len(answers) == 1
    assert "handle_not_found" in answers.pop()
    assert store.open("bob", foreign).info.n_rows == 4


def test_ids_are_random_and_long(store: Store) -> None:
    found = {kept(store, n=1).id for _ in range(8)}
    assert len(found) == 8
    assert all(re.fullmatch(r"act_[0-9a-f]{32}", name) for name in found)


def test_lists_hold_the_owners_things_only(store: Store) -> None:
    first, second = kept(store), kept(store)
    artifact = store.save_artifact("alice", "ridge", "f1", ARRAYS, {})
    kept(store, "bob")
    assert [info.id for info in store.list("alice")] == sorted([first.id, second.id])  # one instant
    assert store.list("alice")[0] == next(i for i in (first, second) if i.id == store.list("alice")[0].id)
    assert [info.id for info in store.list_artifacts("alice")] == [artifact]
    assert store.list("carol") == []


def test_expiry_removes_bytes(store: Store, clock: Clock, tmp_path: Path) -> None:
    info = kept(store, ttl_s=5.0)
    assert info.expires_s == clock.now_s + 5.0
    clock.now_s += 4.9
    assert store.sweep() == 0
    reader = store.open("alice", info.id)
    before = reader.read("resid_post.3")
    clock.now_s += 0.2
    assert store.list("alice") == []
    assert store.sweep() == 1
    assert store.usage("alice") == 0
    assert list((tmp_path / "data").iterdir()) == []
    assert before.sum() == 4 * WIDTH  # what is mapped stays
    with pytest.raises(errors.NotFound):
        reader.read("resid_post.3")


def test_what_is_pinned_outlives_its_time_and_counts(store: Store, clock: Clock) -> None:
    info = kept(store, ttl_s=5.0)
    artifact = store.save_artifact("alice", "ridge", "f1", ARRAYS, {}, ttl_s=5.0)
    used = store.usage("alice")
    for name in (info.id, artifact):
        store.pin("alice", name)
    clock.now_s += 100
    assert store.sweep() == 0
    assert store.usage("alice") == used
    assert store.list("alice")[0].pinned
    assert store.list_artifacts("alice")[0].pinned
    assert store.open("alice", info.id).info.n_rows == 4
    store.unpin("alice", info.id)
    with pytest.raises(errors.NotFound):
        store.open("alice", info.id)
    assert store.sweep() == 1
    assert [a.id for a in store.list_artifacts("alice")] == [artifact]
    store.delete("alice", artifact)
    assert store.usage("alice") == 0


@pytest.mark.parametrize("verb", [Store.pin, Store.unpin])
def test_only_the_owner_pins(store: Store, clock: Clock, verb: Callable[[Store, str, str], None]) -> None:
    foreign, dead = kept(store, "bob").id, kept(store, ttl_s=5.0).id
    clock.now_s += 5
    for name in (foreign, dead, *MALFORMED):
        with pytest.raises(errors.NotFound):
            verb(store, "alice", name)
    assert not store.list("bob")[0].pinned


@pytest.mark.parametrize("ttl_s", [0, -1.0, float("nan"), float("inf")])
def test_a_ttl_is_a_positive_number(store: Store, ttl_s: float) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        kept(store, ttl_s=ttl_s)
    assert (caught.value.code, caught.value.path) == ("bad_value", "ttl_s")


def test_deleting_under_a_writer_stops_it(store: Store, tmp_path: Path) -> None:
    writer = store.create("alice", "smol", "f1", {"resid_post.3": WIDTH}, "p1")
    writer.append(*rows(3))
    writer.flush()
    store.delete("alice", writer.id)
    writer.append(*rows(3))
    with pytest.raises(errors.NotFound):
        writer.flush()
    writer.abandon()
    assert list((tmp_path / "data").iterdir()) == list((tmp_path / "tmp").iterdir()) == []


def on_disk(root: Path) -> int:
    return sum(p.stat().st_size for p in (root / "data").rglob("*") if p.is_file())


def test_usage_is_what_is_on_disk(store: Store, tmp_path: Path) -> None:
    info = kept(store)
    store.save_artifact("alice", "ridge", "f1", ARRAYS, {})
    assert store.usage("alice") == on_disk(tmp_path) > info.size_bytes > 4 * 4 * WIDTH
    assert store.usage("bob") == 0


def test_a_quota_refuses_and_leaves_nothing(tmp_path: Path, clock: Clock) -> None:
    with Store(tmp_path, quota_bytes=60_000, clock=clock) as store:
        kept(store, ttl_s=10)
        writer = store.create("alice", "smol", "f1", {"resid_post.3": WIDTH}, "p1")
        writer.append(*rows(1000))  # 64 kB
        before = on_disk(tmp_path)
        with pytest.raises(errors.Overloaded) as caught:
            writer.flush()
        assert caught.value.code == "disk_full"
        assert on_disk(tmp_path) == before == store.usage("alice")
        with pytest.raises(errors.Overloaded):
            store.save_artifact("alice", "ridge", "f1", {"final_norm": {"a": np.zeros(9000)}}, {})
        writer.abandon()
        kept(store, "bob", n=700)  # another owner has a quota of its own
        with pytest.raises(errors.Overloaded):
            kept(store, n=800)  # 51 kB and the 5 kB of the first handle, and headers
        clock.now_s += 10
        kept(store, n=800)  # the first handle has expired
        assert store.check() == []


def test_two_writers_cannot_exceed_a_quota_together(tmp_path: Path) -> None:
    refused: list[str] = []

    def write() -> None:
        """In a store of its own, as another process would: only the catalog stands between the writers."""
        with Store(tmp_path, quota_bytes=100_000) as mine:
            try:
                kept(mine, n=400)  # about 31 kB with headers and sidecar
            except errors.Overloaded as e:
                refused.append(e.code)

    with Store(tmp_path, quota_bytes=100_000) as store:
        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        complete = [info for info in store.list("alice") if info.state == "complete"]
        assert store.usage("alice") == sum(info.size_bytes for info in complete) <= 100_000
        assert len(complete) + len(refused) == 8
        assert len(complete) == 100_000 // complete[0].size_bytes
        assert store.check() == []


@pytest.mark.parametrize("n_good", range(4))
def test_a_full_disk_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_good: int
) -> None:
    """The disk fills up at the vectors, the sidecar, the data folder, the folder of the handle."""
    calls = itertools.count()

    def full(fd: int) -> None:
        if next(calls) == n_good:
            raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path) as store:
        writer = store.create("alice", "smol", "f1", {"resid_post.3": WIDTH}, "p1")
        writer.append(*rows(10))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(errors.Overloaded) as caught:
                writer.flush()
        assert caught.value.code == "disk_full"
        assert list((tmp_path / "tmp").iterdir()) == list((tmp_path / "data").iterdir()) == []
        assert writer.finish().n_rows == 10  # the buffer was kept
        assert store.check() == store.verify() == []


def test_artifacts_come_back_whole(store: Store, clock: Clock) -> None:
    info = {"auroc": {"resid_post.3": 0.975}, "classes": [0, 1]}
    name = store.save_artifact("alice", "logistic", "f1", ARRAYS, info, ttl_s=60)
    assert re.fullmatch(r"art_[0-9a-f]{32}", name)
    found = store.open_artifact("alice", name)
    assert found.info == store.list_artifacts("alice")[0]
    assert (found.info.kind, found.info.fingerprint, found.info.info) == ("logistic", "f1", info)
    assert found.info.expires_s == clock.now_s + 60
    assert found.info.shapes == {
        "resid_post.3": {"direction": (4,), "bias": (1,)},
        "final_norm": {"counts": (2, 2)},
    }
    for site, named in ARRAYS.items():
        for key, array in named.items():
            np.testing.assert_array_equal(found.arrays[site][key], array)
            assert found.arrays[site][key].dtype == array.dtype
    store.delete("alice", name)
    assert store.list_artifacts("alice") == []


@pytest.mark.parametrize(
    ("kind", "arrays", "name"),
    [
        ("activations", ARRAYS, "bad_value"),
        ("ridge", {"nowhere.3": {"a": np.zeros(1)}}, "unknown_site"),
        ("ridge", {"final_norm": {"a/b": np.zeros(1)}}, "bad_value"),
        ("ridge", {"final_norm": {"a": np.zeros(1, np.complex64)}}, "bad_value"),
    ],
)
def test_artifacts_are_checked(store: Store, kind: str, arrays: dict[str, dict], name: str) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        store.save_artifact("alice", kind, "f1", arrays, {})
    assert caught.value.code == name


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        info, artifact = kept(store), store.save_artifact("alice", "ridge", "f1", ARRAYS, [1])
    with Store(tmp_path) as store:
        assert store.open("alice", info.id).info == info
        assert store.open_artifact("alice", artifact).info.info == [1]
        assert store.check() == store.verify() == []


def test_nobody_else_on_the_machine_can_read_the_files(store: Store, tmp_path: Path) -> None:
    kept(store)
    store.save_artifact("alice", "ridge", "f1", ARRAYS, {})
    for path in (tmp_path / "data", *(tmp_path / "data").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path

"""Labels that come later: with their rows, there whole or not at all, and no vector touched."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from trocar import errors
from trocar.store import RowTable, Store

KEYS = [(p, q) for p in range(12) for q in range(1 + p % 4)]
WIDTH = 3


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened
        assert opened.check() == opened.verify() == []


def kept(store: Store, *, complete: bool = True) -> str:
    """Rows that came in another order, over several shards."""
    shuffled = [KEYS[i] for i in np.random.default_rng(2).permutation(len(KEYS))]
    writer = store.create("alice", "smol", "f1", {"final_norm": WIDTH}, "p1", resumable=True)
    for start in range(0, len(KEYS), 9):
        part = shuffled[start : start + 9]
        table = RowTable.of(
            prompt=[p for p, _ in part], position=[q for _, q in part], token_id=[1] * len(part),
            token=["t"] * len(part), phase=["prompt"] * len(part), label=[p % 3 for p, _ in part],
        )  # fmt: skip
        writer.append({"final_norm": np.array([[p, q, 1] for p, q in part], np.float32)}, table)
        writer.flush()
    if complete:
        writer.finish()
    else:
        writer.detach()
    return writer.id


def vector_files(root: Path) -> dict[str, tuple[float, int]]:
    return {p.name: (p.stat().st_mtime, p.stat().st_ino) for p in (root / "data").rglob("*.safetensors")}


VALUES: dict[str, list[Any]] = {
    "by_key": [100 * p + q for p, q in KEYS],
    "score": [p / 4 for p, _ in KEYS],
    "city": ["Rome" if p > 5 else "Ōsaka" for p, _ in KEYS],
    "late": [q > 1 for _, q in KEYS],
}


@pytest.mark.parametrize("name", VALUES)
def test_labels_stand_beside_their_rows(store: Store, tmp_path: Path, name: str) -> None:
    handle, values = kept(store), VALUES[name]
    before, used = vector_files(tmp_path), store.usage("alice")
    old = store.open("alice", handle)
    store.add_labels("alice", handle, name, values)
    assert vector_files(tmp_path) == before
    assert store.usage("alice") > used
    reader = store.open("alice", handle)
    assert reader.rows().labels[name].tolist() == values
    assert reader.rows().label.tolist() == [p % 3 for p, _ in KEYS]
    assert reader.rows([7, 2]).labels[name].tolist() == [
        v for v, (p, _) in zip(values, KEYS, strict=True) if p in (2, 7)
    ]
    wanted = values[KEYS.index((7, 2))]
    view = reader.view().where(label=1, **{name: wanted})
    chosen = [key for key, v in zip(KEYS, values, strict=True) if v == wanted and key[0] % 3 == 1]
    assert chosen
    np.testing.assert_array_equal(view.site("final_norm").read()[:, :2], chosen)
    assert name not in old.rows().labels  # a reader is a snapshot
    assert store.list("alice")[0].n_rows == len(KEYS)


def test_several_labels_are_filtered_together(store: Store) -> None:
    handle = kept(store)
    for name, values in VALUES.items():
        store.add_labels("alice", handle, name, values)
    view = (
        store.open("alice", handle).view().where(city="Rome", late=True, score=slice(2, None), label=[0, 2])
    )
    chosen = [(p, q) for p, q in KEYS if p > 5 and q > 1 and p >= 8 and p % 3 != 1]
    assert chosen
    np.testing.assert_array_equal(view.site("final_norm").read()[:, :2], chosen)
    assert set(view.rows().labels) == {"label", *VALUES}
    first, second = view.split(0.5, 0, by="by_key")
    assert len(first) + len(second) == len(chosen)


def test_one_label_per_prompt(store: Store) -> None:
    handle = kept(store)
    store.add_labels("alice", handle, "truth", [p % 2 for p in range(14)], by="prompt")
    assert store.open("alice", handle).rows().labels["truth"].tolist() == [p % 2 for p, _ in KEYS]


REFUSED: list[tuple[str, Any, str, str]] = [
    ("label", VALUES["score"], "bad_value", "name"), ("prompt", VALUES["score"], "bad_value", "name"),
    ("../x", VALUES["score"], "bad_value", "name"), ("", VALUES["score"], "bad_value", "name"),
    ("file_row_number", VALUES["score"], "bad_value", "name"), ("x", [1, 2], "rows_mismatch", "values"),
    ("x", [None] * len(KEYS), "bad_value", "values"), ("x", [float("nan")] * len(KEYS), "bad_value", "values"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "code", "path"), REFUSED)
def test_labels_that_do_not_fit_are_refused(
    store: Store, name: str, values: Any, code: str, path: str
) -> None:
    handle = kept(store)
    used = store.usage("alice")
    with pytest.raises(errors.ProgramError) as caught:
        store.add_labels("alice", handle, name, values)
    assert (caught.value.code, caught.value.path) == (code, path)
    with pytest.raises(errors.ProgramError):
        store.add_labels("alice", handle, "y", [1] * 11, by="prompt")
    assert store.usage("alice") == used


def test_whose_rows_and_which(store: Store) -> None:
    handle, unfinished = kept(store), kept(store, complete=False)
    for owner, name in (("bob", handle), ("alice", "act_" + "0" * 32)):
        with pytest.raises(errors.NotFound):
            store.add_labels(owner, name, "x", VALUES["score"])
        with pytest.raises(errors.NotFound):
            store.drop_labels(owner, name, "x")
    with pytest.raises(errors.ProgramError) as caught:
        store.add_labels("alice", unfinished, "x", VALUES["score"])
    assert caught.value.code == "handle_incomplete"


def test_dropped_labels_are_gone_and_can_come_again(store: Store, tmp_path: Path) -> None:
    handle = kept(store)
    used = store.usage("alice")
    store.add_labels("alice", handle, "x", VALUES["score"])
    store.drop_labels("alice", handle, "x")
    assert store.usage("alice") == used
    assert list((tmp_path / "data").rglob("labels.*")) == []
    store.add_labels("alice", handle, "x", VALUES["by_key"])
    assert store.open("alice", handle).rows().labels["x"].tolist() == VALUES["by_key"]
    for name in ("label", "y", "", "prompt"):
        with pytest.raises(errors.ProgramError) as caught:
            store.drop_labels("alice", handle, name)
        assert caught.value.code == "bad_value"


def test_labels_count_in_the_quota(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        handle = kept(store)
        used = store.usage("alice")
    with Store(tmp_path, quota_bytes=used + 100) as store:
        with pytest.raises(errors.Overloaded):
            store.add_labels("alice", handle, "x", VALUES["score"])
        assert store.usage("alice") == used
        assert (store.check(), list((tmp_path / "tmp").iterdir())) == ([], [])


def test_one_of_many_adds_a_name(store: Store, tmp_path: Path) -> None:
    """Each in a store of its own, as another process would be; the loser destroys nothing."""
    handle, outcomes = kept(store), []

    def add(n: int) -> None:
        with Store(tmp_path) as mine:
            try:
                mine.add_labels("alice", handle, "x", [n] * len(KEYS))
                outcomes.append(n)
            except errors.ProgramError:
                pass

    threads = [threading.Thread(target=add, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = outcomes
    assert store.open("alice", handle).rows().labels["x"].tolist() == [winner] * len(KEYS)


def test_death_at_any_step_of_adding_and_dropping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is copied before every fsync, rename, unlink and SQL commit: what a death there would leave."""
    root, n_copies, promised = tmp_path / "store", 0, []
    there = False

    def snapshot(*_: object) -> None:
        nonlocal n_copies
        shutil.copytree(root, tmp_path / f"death-{n_copies}")
        promised.append(there)
        n_copies += 1

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            snapshot()
            return call(*arguments, **named)

        return wrapped

    with Store(root) as store:
        handle = kept(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", before(os.fsync))
            patch.setattr(Path, "rename", before(Path.rename))
            patch.setattr(Path, "unlink", before(Path.unlink))
            sa.event.listen(sa.Engine, "commit", snapshot)
            try:
                store.add_labels("alice", handle, "x", VALUES["by_key"])
                there = True
                snapshot()
                store.drop_labels("alice", handle, "x")
            finally:
                sa.event.remove(sa.Engine, "commit", snapshot)
    seen = set()
    for step in range(n_copies):
        with Store(tmp_path / f"death-{step}") as store:
            assert store.check() == store.verify() == []
            table = store.open("alice", handle).rows()
            seen.add(("x" in table.labels, promised[step]))
            if "x" in table.labels:
                assert table.labels["x"].tolist() == VALUES["by_key"]
            assert len(table) == len(KEYS)
    assert {(False, False), (True, True)} <= seen

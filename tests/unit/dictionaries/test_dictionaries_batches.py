"""Batches: every row once a round, in an order that is random and follows from the seed, from bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trocar import errors
from trocar.analysis.source import ArraySource
from trocar.dictionaries.batches import Batches


def numbered(n: int) -> ArraySource:
    """Row i is [i, -i]."""
    return ArraySource(np.arange(n, dtype=np.float32)[:, None] * np.array([[1, -1]], dtype=np.float32))


def drawn(batches: Batches, count: int) -> npt.NDArray[np.int64]:
    """The numbers of the rows of the next batches, [count, batch]."""
    found = [next(batches).numpy() for _ in range(count)]
    assert all((rows[:, 0] == -rows[:, 1]).all() for rows in found)
    return np.stack([rows[:, 0] for rows in found]).astype(np.int64)


def test_rows_that_fit_are_each_given_once_a_round() -> None:
    rounds = drawn(Batches(numbered(30), 6, seed=1), 15).reshape(3, 30)
    assert [sorted(r) for r in rounds.tolist()] == [list(range(30))] * 3
    assert len({tuple(r) for r in rounds.tolist()}) == 3


def test_a_batch_crosses_the_edge_of_a_round() -> None:
    given = drawn(Batches(numbered(10), 4, seed=1), 5).ravel()
    assert sorted(given[:10]) == sorted(given[10:]) == list(range(10))


def test_a_window_gives_no_row_twice_in_a_round_and_leaves_none_behind_for_long() -> None:
    n, batch, room = 2000, 10, 100
    batches = Batches(numbered(n), batch, seed=3, room=room)
    assert batches.room == room
    first = drawn(batches, (n - room) // batch).ravel()
    assert len(set(first.tolist())) == n - room
    waited = np.arange(len(first)) // batch * batch + room - first  # rows that were read since this one
    assert (waited > 0).all()
    assert 60 < waited.mean() < 140
    assert waited.max() < 20 * room


def test_a_window_is_random_and_as_wide_as_its_room() -> None:
    rows = drawn(Batches(numbered(5000), 50, seed=0, room=1000), 40)
    spans = np.ptp(rows, axis=1)
    assert spans.mean() > 800
    assert (np.diff(rows, axis=1) < 0).mean() > 0.3


def test_the_room_is_at_least_four_batches_and_at_most_the_rows() -> None:
    assert Batches(numbered(1000), 50, seed=0, room=1).room == 200
    assert Batches(numbered(120), 50, seed=0, room=1).room == 120


@pytest.mark.parametrize("room", [None, 40])
def test_the_seed_alone_decides(room: int | None) -> None:
    a, b, c = (drawn(Batches(numbered(200), 8, seed=s, room=room), 60) for s in (5, 5, 6))
    assert (a == b).all()
    assert (a != c).any()


@pytest.mark.parametrize("room", [None, 40])
@pytest.mark.parametrize("done", [0, 1, 37])
def test_skipping_is_serving(room: int | None, done: int) -> None:
    served, skipped = (Batches(numbered(200), 8, seed=5, room=room) for _ in range(2))
    for _ in range(done):
        next(served)
    skipped.skip(done)
    assert served.served == skipped.served == done
    assert (drawn(served, 30) == drawn(skipped, 30)).all()


@pytest.mark.parametrize("room", [None, 16])
def test_a_batch_is_its_own_memory(room: int | None) -> None:
    one, other = (Batches(numbered(50), 4, seed=0, room=room) for _ in range(2))
    next(one).zero_()
    next(other)
    assert (drawn(one, 40) == drawn(other, 40)).all()


def test_blocks_of_any_size_give_the_same_rows() -> None:
    class Odd:
        width = 2

        def __len__(self) -> int:
            return 101

        def blocks(self, most: int = 512) -> Iterator[npt.NDArray[Any]]:
            yield from numbered(101).blocks(7)

    a, b = (
        drawn(Batches(Odd(), 5, seed=2, room=20), 50),
        drawn(Batches(numbered(101), 5, seed=2, room=20), 50),
    )
    assert (a == b).all()


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(errors.ProgramError) as e:
        Batches(numbered(7), 8, seed=0)
    assert (e.value.code, e.value.path) == ("too_few_rows", "batch")


def test_a_row_that_is_not_finite_is_refused() -> None:
    rows = np.ones((50, 3), dtype=np.float32)
    rows[41, 1] = np.nan
    batches = Batches(ArraySource(rows), 4, seed=0, room=16)
    with pytest.raises(errors.ProgramError) as e:
        drawn(batches, 20)
    assert e.value.code == "rows_not_finite"

"""The canonical order over shards, each of which is sorted: which rows come next, without holding all of them.

Shards that follow one another are passed on as they are. Shards that overlap, because rows arrived in any order,
are merged by their keys; the keys of those that overlap at one point are all that is in memory. Rows with equal
keys keep the order of their shards. This module knows keys and numbers, no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from trocar.store.rows import Ints

MERGED_ROWS: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one shard that follow one another: from `start` to `stop`, not included."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """Rows from anywhere: int64 [n], number of the shard and of the row in it."""

    shards: Ints
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def cut(self, most: int) -> Iterator[Run | Mix]:
        """The same rows in pieces of at most so many; a piece of rows that follow one another is a `Run`."""
        for start in range(0, len(self), most):
            shards, rows = self.shards[start : start + most], self.rows[start : start + most]
            steps = bool((shards == shards[0]).all()) and bool((np.diff(rows) == 1).all())
            yield Run(int(shards[0]), int(rows[0]), int(rows[-1]) + 1) if steps else Mix(shards, rows)


Piece = Run | Mix


@dataclass(frozen=True, slots=True)
class Sorted:
    """One sorted shard: its number, how many rows, its ends, and its keys when they are needed."""

    number: int
    n_rows: int
    first: int
    last: int
    keys: Callable[[], Ints]


def is_tidy(shards: Sequence[Sorted]) -> bool:
    """Whether the order of the shards is the canonical order."""
    return all(a.last <= b.first for a, b in pairwise(shards))


def merged(shards: Sequence[Sorted]) -> Iterator[Piece]:
    """All rows in canonical order."""
    waiting = sorted(shards, key=lambda s: (s.first, s.number))
    active: list[_Cursor] = []
    while waiting or active:
        while waiting and (not active or waiting[0].first <= min(c.head for c in active)):
            active.append(_Cursor.of(waiting.pop(0)))
        bound = waiting[0].first if waiting else None
        if len(active) == 1:
            (only,) = active
            stop = only.before(bound)
            if stop > only.start:
                yield Run(only.shard.number, only.start, stop)
            only.start = stop
        else:
            yield from _mix(sorted(active, key=lambda c: c.shard.number), bound)
        active = [c for c in active if c.start < c.shard.n_rows]


@dataclass(slots=True, eq=False)
class _Cursor:
    shard: Sorted
    keys: Ints | None
    start: int = 0

    @classmethod
    def of(cls, shard: Sorted) -> _Cursor:
        return cls(shard, None)

    def known(self) -> Ints:
        if self.keys is None:
            self.keys = self.shard.keys()
        return self.keys

    @property
    def head(self) -> int:
        return int(self.known()[self.start]) if self.start else self.shard.first

    def before(self, bound: int | None) -> int:
        """The first row whose key is not below `bound`."""
        if bound is None or self.shard.last < bound:
            return self.shard.n_rows
        return int(np.searchsorted(self.known(), bound, side="left"))


def _mix(active: Sequence[_Cursor], bound: int | None) -> Iterator[Mix]:
    """Rows of several shards up to `bound`, at most about `MERGED_ROWS` of them."""
    each = max(1, MERGED_ROWS // len(active))
    cut = min(int(c.known()[min(c.start + each, c.shard.n_rows) - 1]) for c in active)
    if bound is not None and cut >= bound:
        stops = [c.before(bound) for c in active]
    else:
        stops = [int(np.searchsorted(c.known(), cut, side="right")) for c in active]
    rows = [np.arange(c.start, stop) for c, stop in zip(active, stops, strict=True)]
    found = [c.known()[r] for c, r in zip(active, rows, strict=True)]
    shards = [np.full(len(r), c.shard.number) for c, r in zip(active, rows, strict=True)]
    order = np.argsort(np.concatenate(found), kind="stable")
    for c, stop in zip(active, stops, strict=True):
        c.start = stop
    if len(order):
        yield Mix(np.concatenate(shards)[order], np.concatenate(rows)[order])

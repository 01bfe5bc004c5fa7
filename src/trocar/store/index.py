"""The rows of one handle as its sidecars tell them: how many, in which order, and what each one is.

A row's `id` is its place in the order of arrival: rows of shard 0, then of shard 1, and so on. Sidecars are read
when something asks for them, one at a time, with their hash compared; a handle whose shards follow one another in
canonical order is streamed without reading any. This module knows no vectors and no owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar.store import order, rows, sidecars
from trocar.store.catalog import WHOLE, File
from trocar.store.depot import Depot
from trocar.store.order import Mix, Piece, Sorted
from trocar.store.rows import Ints, Labels, RowTable

_NO_ROWS: Final = sidecars.pack(rows.empty())


class RowIndex:
    """The rows that `files` list, at the time when they were listed."""

    def __init__(self, depot: Depot, files: Sequence[File]) -> None:
        self._depot = depot
        self._sidecars = [f for f in files if f.site == "" and f.shard != WHOLE]
        self._labels = {f.label: f for f in files if f.label}
        self.starts: Ints = np.cumsum([0, *(f.n_rows for f in self._sidecars)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def n_shards(self) -> int:
        return len(self._sidecars)

    @cached_property
    def _sorted(self) -> list[Sorted]:
        return [self._sorted_shard(i, f) for i, f in enumerate(self._sidecars)]

    def _sorted_shard(self, number: int, file: File) -> Sorted:
        if file.first_key is not None and file.last_key is not None:
            return Sorted(
                number, file.n_rows, file.first_key, file.last_key, lambda: self._shard_keys(number)
            )
        keys = self._shard_keys(number)
        return Sorted(number, file.n_rows, int(keys[0]), int(keys[-1]), lambda: keys)

    def _shard_keys(self, number: int) -> Ints:
        return rows.keys(*sidecars.places(self._depot.load(self._sidecars[number])))

    @cached_property
    def tidy(self) -> bool:
        """Whether ids count up in canonical order."""
        return order.is_tidy(self._sorted)

    def pieces(self) -> Iterator[Piece]:
        """All rows in canonical order, as they stream best."""
        return order.merged(self._sorted)

    @cached_property
    def keys(self) -> Ints:
        """int64 [n], by id."""
        return np.concatenate([np.empty(0, np.int64), *(s.keys() for s in self._sorted)])

    @cached_property
    def ids(self) -> Ints:
        """int64 [n], the ids in canonical order."""
        return np.arange(len(self)) if self.tidy else np.argsort(self.keys, kind="stable")

    def in_order(self, ids: Ints) -> Ints:
        """The same ids in canonical order."""
        found = np.sort(ids)
        return found if self.tidy else found[np.argsort(self.keys[found], kind="stable")]

    @cached_property
    def prompts(self) -> Ints:
        """int64, sorted: the prompts that have rows."""
        return np.unique(rows.prompts(self.keys))

    def counts(self) -> tuple[int, ...]:
        """Number of rows of prompt 0, 1, ... up to the last prompt that has any."""
        return tuple(np.bincount(rows.prompts(self.keys)).tolist())

    def ids_of(self, prompts: Sequence[int]) -> Ints:
        """The ids of all rows of these prompts, in canonical order."""
        found = np.isin(rows.prompts(self.keys), np.asarray(prompts, dtype=np.int64))
        return self.in_order(np.flatnonzero(found))

    def places(self, ids: Ints) -> Mix:
        """Where the rows of `ids` lie."""
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        return Mix(shards, ids - self.starts[shards])

    def numbered(self, numbers: Ints) -> Mix:
        """Where the rows with these numbers in canonical order lie."""
        return self.places(numbers if self.tidy else self.ids[numbers])

    def table(self, ids: Ints | None = None) -> RowTable:
        """What the rows are, all in canonical order or those of `ids` in that order."""
        ids = self.ids if ids is None else ids
        where = self.places(ids)
        parts, found = [], []
        for number in np.unique(where.shards).tolist():
            here = np.flatnonzero(where.shards == number)
            parts.append(self._shard_table(number).take(where.rows[here]))
            found.append(here)
        if not parts:
            return self._nothing()
        back = np.empty(len(ids), np.int64)
        back[np.concatenate(found)] = np.arange(len(ids))
        table = rows.concat(parts).take(back)
        return table.with_labels({name: self.labels(name)[ids] for name in self._labels})

    def _nothing(self) -> RowTable:
        """A table of no rows with the columns that the others have."""
        if not self._sidecars:
            return rows.empty()
        table = self._shard_table(0).take(slice(0, 0))
        return table.with_labels({name: self.labels(name)[:0] for name in self._labels})

    def _shard_table(self, number: int) -> RowTable:
        return sidecars.unpack(self._depot.load(self._sidecars[number]))

    def labels(self, name: str) -> Labels:
        """Labels that were added to the finished handle, by id."""
        return sidecars.unpack_labels(name, self._depot.load(self._labels[name]))

    @cached_property
    def columns(self) -> Mapping[str, str]:
        """Kind ("int64", "double", "string") of each column that the rows have, labels included."""
        first = sidecars.columns(self._depot.load(self._sidecars[0]) if self._sidecars else _NO_ROWS)
        for file in self._labels.values():
            first |= sidecars.columns(self._depot.load(file))
        return first

    def column(self, name: str, ids: Ints | None) -> npt.NDArray[Any]:
        """One column, all rows in canonical order or those of `ids` in that order; None is an empty string."""
        ids = self.ids if ids is None else ids
        if name in self._labels:
            return self.labels(name)[ids]
        parts = [sidecars.column(self._depot.load(f), name) for f in self._sidecars]
        return np.concatenate(parts)[ids] if parts else np.empty(0, np.int64)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Where the sidecars can be read on this machine, in the order of the shards."""
        return tuple(self._depot.local(f) for f in self._sidecars)

    @cached_property
    def label_paths(self) -> Mapping[str, Path]:
        """Where added labels can be read on this machine, by name."""
        return {name: self._depot.local(f) for name, f in self._labels.items()}

    def kinds(self) -> dict[str, str] | None:
        """`RowTable.kinds` of the captured rows; None when there are none."""
        return self._shard_table(0).kinds() if self._sidecars else None

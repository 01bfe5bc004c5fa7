"""The reader of one handle: a snapshot of the shards that were committed when it was opened.

Rows come in canonical order, by (prompt, position), whatever the order in which they were captured. A handle
of one shard is read as a view of the file; several shards are gathered into one array. Whether the caller may
see the handle was decided by `Store.open`; a reader knows nothing of owners.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog, rows, shards
from trocar.store.catalog import File, State
from trocar.store.depot import Depot
from trocar.store.ids import HandleId
from trocar.store.rows import Ints, RowTable
from trocar.store.shards import Vectors

__all__ = ["HandleInfo", "Reader", "State", "infos_of"]


@dataclass(frozen=True, slots=True)
class HandleInfo:
    """What a handle is.

    Attributes:
        widths: width of a row by site, in numbers.
        state: "open" while it is written, "complete" after `finish`, "failed" if its writer died.
        created_s, expires_s: Unix time in seconds; expires_s is None for a handle that stays.
        n_rows: committed rows (each has one vector per site).
        size_bytes: bytes on disk, sidecars included.
    """

    id: HandleId
    owner: str
    model: str
    fingerprint: str
    program_hash: str
    widths: Mapping[str, int]
    dtype: str
    state: State
    created_s: float
    expires_s: float | None
    n_rows: int
    size_bytes: int


def infos_of(c: sa.Connection, entries: Sequence[catalog.Entry]) -> list[HandleInfo]:
    """The public description of each entry."""
    totals = catalog.totals(c, [e.id for e in entries])
    return [_info(e, *totals.get(e.id, (0, 0))) for e in entries]


def _info(entry: catalog.Entry, n_rows: int, size_bytes: int) -> HandleInfo:
    return HandleInfo(
        id=HandleId(entry.id),
        owner=entry.owner,
        model=entry.model,
        fingerprint=entry.fingerprint,
        program_hash=entry.program_hash,
        widths=json.loads(entry.layout),
        dtype="float32",
        state=entry.state,
        created_s=entry.created_s,
        expires_s=entry.expires_s,
        n_rows=n_rows,
        size_bytes=size_bytes,
    )


class Reader:
    """Reads the handle that `info` describes; any number of threads may share one."""

    def __init__(self, depot: Depot, info: HandleInfo, files: Sequence[File]) -> None:
        self.info = info
        self._depot = depot
        self._sidecars = [f for f in files if f.site == ""]
        self._shards = {s: [f for f in files if f.site == s] for s in info.widths}
        self._starts = np.cumsum([0, *(f.n_rows for f in self._sidecars)])

    @cached_property
    def _arrived(self) -> RowTable:
        """Every row in the order of the shards."""
        return rows.concat([rows.from_parquet(self._load(f)) for f in self._sidecars])

    @cached_property
    def _order(self) -> Ints:
        return self._arrived.order()

    def rows(self, prompts: Sequence[int] | None = None) -> RowTable:
        """What the rows are, in canonical order.

        Args:
            prompts: keep the rows of these prompts only; their order does not matter.

        Raises:
            ProgramError: `bad_value` for a prompt of which nothing is stored.
            ServerFault: `store_damaged`.
        """
        return self._arrived.take(self._chosen(prompts))

    def rows_per_prompt(self) -> tuple[int, ...]:
        """Number of rows of prompt 0, 1, ... up to the last prompt that has any."""
        return tuple(np.bincount(self._arrived.prompt).tolist())

    def read(self, site: str, prompts: Sequence[int] | None = None) -> Vectors:
        """The vectors at `site`, float32 [n, width], row for row what `rows(prompts)` describes; read-only.

        Raises:
            ProgramError: `site_unavailable` for a site that was not captured; else as `rows`.
            ServerFault: `store_damaged` when a file is not the one that was written.
        """
        if site not in self.info.widths:
            near = errors.closest(site, self.info.widths)
            raise errors.refuse(
                "site_unavailable", "site", f"{site!r} is not in {self.info.id}", closest=near
            )
        index = self._chosen(prompts)
        out = self._gather(site, index)
        out.flags.writeable = False
        return out

    def _gather(self, site: str, index: Ints) -> Vectors:
        views = [self._view(f) for f in self._shards[site]]
        if len(views) == 1:
            return _pick(views[0], index)
        out = np.empty((len(index), self.info.widths[site]), np.float32)
        for start, view in zip(self._starts[:-1], views, strict=True):
            here = np.flatnonzero((index >= start) & (index < start + len(view)))
            out[_span(here)] = _pick(view, index[here] - start)
        return out

    def _chosen(self, prompts: Sequence[int] | None) -> Ints:
        """Where the chosen rows arrived, in canonical order."""
        if prompts is None:
            return self._order
        absent = set(prompts) - set(np.unique(self._arrived.prompt).tolist())
        if absent:
            raise errors.refuse("bad_value", "prompts", f"no rows of prompt {min(absent)} in {self.info.id}")
        keep = np.isin(self._arrived.prompt[self._order], list(prompts))
        return self._order[keep]

    def _view(self, file: File) -> Vectors:
        try:
            mapped = self._depot.map(file)
        except FileNotFoundError:
            raise self._depot.missing(file) from None
        return shards.view(mapped, file.n_rows, self.info.widths[file.site], file.path)

    def _load(self, file: File) -> bytes:
        try:
            return self._depot.load(file)
        except FileNotFoundError:
            raise self._depot.missing(file) from None


def _span(index: npt.NDArray[np.int64]) -> Ints | slice:
    """`index` as a slice when it counts up by one, so that picking needs no copy."""
    if len(index) and index[-1] - index[0] == len(index) - 1 and bool((np.diff(index) == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _pick(view: Vectors, index: Ints) -> Vectors:
    return view[_span(index)]

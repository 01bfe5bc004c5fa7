"""The writer of one handle: buffers rows up to a bound, then commits them as a shard of all sites.

Rows may arrive in any order; each shard is put into canonical order before it is written, so that a handle
of one shard is read without copying. A writer belongs to one thread. What has been flushed survives a crash;
what is in the buffer does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog, ids, rows, shards
from trocar.store.depot import Depot, Draft
from trocar.store.ids import HandleId
from trocar.store.quota import Quota
from trocar.store.reader import HandleInfo, infos_of
from trocar.store.rows import RowTable
from trocar.store.shards import ITEM_BYTES, Vectors


class Writer:
    """Appends rows to the handle `id`; leaving a `with` block without `finish` abandons it.

    Example:
        >>> with store.create("alice", "smol", "f1", {"resid_post.3": 2}, "p1") as writer:
        ...     writer.append({"resid_post.3": vectors}, table)
        ...     info = writer.finish()
    """

    def __init__(
        self, depot: Depot, quota: Quota, handle: HandleId, widths: Mapping[str, int], shard_bytes: int
    ) -> None:
        self.id = handle
        self._depot, self._quota, self._widths = depot, quota, widths
        self._row_bytes = ITEM_BYTES * sum(widths.values())
        self._capacity = max(1, shard_bytes // self._row_bytes)
        self._buffer = {s: np.empty((self._capacity, w), np.float32) for s, w in widths.items()}
        self._tables: list[RowTable] = []
        self._n_buffered = 0
        self._n_shards = 0
        self._first: RowTable | None = None
        self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.abandon()

    def append(self, vectors: Mapping[str, Vectors], table: RowTable) -> None:
        """Adds rows; commits a shard each time the buffer is full.

        Args:
            vectors: float32 [n, width] for each site of the handle.
            table: what the n rows are. Either every append carries labels, or none does.

        Raises:
            ProgramError: `rows_mismatch`, `width_mismatch` or `bad_value`; nothing was added.
            Overloaded: `disk_full`; earlier shards stay, the buffer is kept.
            NotFound: `handle_not_found` when the handle was deleted meanwhile.
        """
        self._require_open()
        self._check(vectors, table)
        start = 0
        while start < len(table):
            take = min(self._capacity - self._n_buffered, len(table) - start)
            self._fill(vectors, table, slice(start, start + take))
            start += take
            if self._n_buffered == self._capacity:
                self.flush()

    def flush(self) -> None:
        """Commits what is buffered as one shard; when it returns, the rows survive a crash."""
        self._require_open()
        if not self._n_buffered:
            return
        drafts: list[Draft] = []
        with self._depot.catalog.read() as c:
            self._admit(c, self._n_buffered * self._row_bytes)  # before anything is written in vain
        try:
            self._draft_shard(drafts)
            size_bytes = sum(d.size_bytes for d in drafts)
            self._depot.publish(self.id, drafts, lambda c: self._admit(c, size_bytes))
        finally:
            self._depot.discard(drafts)  # renamed away when published
        self._tables, self._n_buffered = [], 0
        self._n_shards += 1

    def finish(self) -> HandleInfo:
        """Commits the rest and closes the handle for good: state "complete"."""
        self.flush()
        with self._depot.catalog.write() as c:
            entry = replace(self._entry(c), state="complete")
            catalog.set_state(c, entry.id, entry.state)
            info = infos_of(c, [entry])[0]
        self._done = True
        return info

    def abandon(self) -> None:
        """Drops every row of the handle, committed or not, and leaves it behind in state "failed"."""
        self._require_open()
        self._done = True
        self._depot.withdraw(lambda c: catalog.fail(c, self.id))

    def _require_open(self) -> None:
        if self._done:
            raise RuntimeError(f"the writer of {self.id} is finished")

    def _entry(self, c: sa.Connection) -> catalog.Entry:
        entry = catalog.find(c, self.id)
        if entry is None:
            raise ids.not_found(self.id)
        return entry

    def _check(self, vectors: Mapping[str, Vectors], table: RowTable) -> None:
        if vectors.keys() != self._widths.keys():
            odd = sorted(vectors.keys() ^ self._widths.keys())[0]
            raise errors.refuse("rows_mismatch", "vectors", f"{odd!r} is missing, or is not in this handle")
        table.checked()
        for site, width in self._widths.items():
            _check_vectors(site, vectors[site], len(table), width)
        if self._first is None:
            self._first = table
        if not table.same_label_type(self._first):
            raise errors.refuse("rows_mismatch", "rows.label", "earlier rows had other labels, or none")

    def _fill(self, vectors: Mapping[str, Vectors], table: RowTable, part: slice) -> None:
        stop = self._n_buffered + part.stop - part.start
        for site, buffer in self._buffer.items():
            buffer[self._n_buffered : stop] = vectors[site][part]
        self._tables.append(table.take(part))
        self._n_buffered = stop

    def _draft_shard(self, drafts: list[Draft]) -> None:
        """Writes one draft per site and the sidecar, appending each to `drafts` as soon as it is there."""
        table = rows.concat(self._tables)
        order = table.order()
        shard, n_rows = self._n_shards, len(table)
        tidy = rows.is_sorted(order)
        for site, buffer in self._buffer.items():
            vectors = buffer[:n_rows] if tidy else buffer[order]
            name = f"{shard:06d}.{site}.safetensors"
            parts = shards.parts(vectors)
            drafts.append(self._depot.draft(parts, name=name, shard=shard, site=site, n_rows=n_rows))
        sidecar = [rows.to_parquet(table if tidy else table.take(order))]
        name = f"{shard:06d}.rows.parquet"
        drafts.append(self._depot.draft(sidecar, name=name, shard=shard, site="", n_rows=n_rows))

    def _admit(self, c: sa.Connection, size_bytes: int) -> None:
        self._quota.admit(c, self._entry(c).owner, size_bytes)


def _check_vectors(site: str, array: Vectors, n_rows: int, width: int) -> None:
    path = f"vectors.{site}"
    if array.dtype != np.float32 or array.ndim != 2:
        reason = f"{site} came as {array.dtype} of rank {array.ndim}, not as float32 [n, width]"
        raise errors.refuse("bad_value", path, reason)
    if array.shape[1] != width:
        raise errors.refuse(
            "width_mismatch", path, f"{site} has width {width}, the rows have {array.shape[1]}"
        )
    if array.shape[0] != n_rows:
        reason = f"{array.shape[0]} vectors at {site} for {n_rows} rows"
        raise errors.refuse("rows_mismatch", path, reason)

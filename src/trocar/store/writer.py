"""The writer of one handle: buffers rows up to a bound, then commits them as a shard of all sites.

Rows may arrive in any order; each shard is put into canonical order before it is written, so that a handle
of one shard is read without copying. Rows that are appended together are committed together unless they are
more than a shard holds, so a prompt that is appended whole is there whole or not at all after a crash. A writer
belongs to one thread. What has been flushed survives a crash; what is in the buffer does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np
import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog, dtypes, ids, rows, shards, sidecars
from trocar.store.depot import Depot
from trocar.store.dtypes import ITEM_BYTES, Dtype, Vectors
from trocar.store.ids import HandleId
from trocar.store.quota import Quota
from trocar.store.reader import HandleInfo, infos_of
from trocar.store.rows import Ints, RowTable
from trocar.store.shelf import Draft, Slot


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """What a handle holds when its writer starts: nothing, or what a dead writer has committed.

    Attributes:
        kinds: columns of the committed rows, from `RowTable.kinds`; None before the first row.
        prompts: int64, sorted: the prompts that have rows.
    """

    n_shards: int = 0
    kinds: dict[str, str] | None = None
    prompts: Ints = field(default_factory=lambda: np.empty(0, np.int64))


class Writer:
    """Appends rows to the handle `id`.

    Leaving a `with` block without `finish` abandons the handle, or detaches from it when it is resumable.

    Example:
        >>> with store.create("alice", "smol", "f1", {"resid_post.3": 2}, "p1") as writer:
        ...     writer.append({"resid_post.3": vectors}, table)
        ...     info = writer.finish()
    """

    def __init__(
        self,
        depot: Depot,
        quota: Quota,
        handle: HandleId,
        widths: Mapping[str, int],
        dtype: Dtype,
        shard_bytes: int,
        begun: Begun,
        *,
        resumable: bool,
    ) -> None:
        self.id = handle
        self._depot, self._quota, self._widths, self._dtype = depot, quota, widths, dtype
        self._row_bytes = ITEM_BYTES[dtype] * sum(widths.values())
        self._capacity = max(1, shard_bytes // self._row_bytes)
        self._buffer = {s: dtypes.empty(self._capacity, w, dtype) for s, w in widths.items()}
        self._tables: list[RowTable] = []
        self._n_buffered = 0
        self._resumable = resumable
        self._n_shards, self._kinds, self._prompts = begun.n_shards, begun.kinds, begun.prompts
        self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            (self.detach if self._resumable else self.abandon)()

    @property
    def committed(self) -> Ints:
        """int64, sorted: the prompts of the rows that survive a crash, an earlier writer's included."""
        return self._prompts

    def append(self, vectors: Mapping[str, Vectors], table: RowTable) -> None:
        """Adds rows; commits a shard when they do not fit beside those that wait, and when the buffer is full.

        Args:
            vectors: float32 [n, width] for each site of the handle.
            table: what the n rows are. The same columns are given in every append.

        Raises:
            ProgramError: `rows_mismatch`, `width_mismatch` or `bad_value`; nothing was added.
            Overloaded: `disk_full`; earlier shards stay, the buffer is kept.
            NotFound: `handle_not_found` when the handle was deleted meanwhile.
        """
        self._require_open()
        self._check(vectors, table)
        if self._capacity - self._n_buffered < len(table) <= self._capacity:
            self.flush()
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
        table = rows.concat(self._tables)
        done = False
        try:
            self._draft_shard(table, drafts)
            size_bytes = sum(d.size_bytes for d in drafts)
            self._depot.publish(self.id, drafts, lambda c: self._admit(c, size_bytes))
            done = True
        finally:
            if not done:
                self._depot.shelf.discard(drafts)
        self._tables, self._n_buffered = [], 0
        self._n_shards += 1
        self._prompts = np.union1d(self._prompts, table.prompt)

    def finish(self) -> HandleInfo:
        """Commits the rest and closes the handle for good: state "complete"."""
        self.flush()
        with self._depot.catalog.write() as c:
            entry = replace(self._entry(c), state="complete")
            catalog.set_state(c, entry.id, entry.state)
            info = infos_of(c, [entry])[0]
        self._leave()
        return info

    def detach(self) -> None:
        """Drops what is not committed and leaves the rest in state "failed", as a death would, to be resumed."""
        self._require_open()
        self._leave()
        with self._depot.catalog.write() as c:
            catalog.set_state(c, self.id, "failed")

    def abandon(self) -> None:
        """Drops every row of the handle, committed or not, and leaves it behind in state "failed"."""
        self._require_open()
        self._leave()
        self._depot.withdraw(lambda c: catalog.fail(c, self.id))

    def _leave(self) -> None:
        self._done = True
        self._tables, self._buffer = [], {}
        self._depot.unclaim(self.id)

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
            dtypes.require_fits(vectors[site], self._dtype, f"vectors.{site}")
        if self._kinds is None:
            self._kinds = table.kinds()
        different = sorted(self._kinds.items() ^ table.kinds().items())
        if different:
            name = different[0][0]
            raise errors.refuse(
                "rows_mismatch", f"rows.{name}", f"earlier rows had no such {name}, or another"
            )

    def _fill(self, vectors: Mapping[str, Vectors], table: RowTable, part: slice) -> None:
        stop = self._n_buffered + part.stop - part.start
        for site, buffer in self._buffer.items():
            dtypes.encode(vectors[site][part], self._dtype, buffer[self._n_buffered : stop])
        self._tables.append(table.take(part))
        self._n_buffered = stop

    def _draft_shard(self, table: RowTable, drafts: list[Draft]) -> None:
        """Writes one draft per site and the sidecar, appending each to `drafts` as soon as it is there."""
        order = table.order()
        shard, n_rows, draft = self._n_shards, len(table), self._depot.shelf.draft
        tidy = rows.is_sorted(order)
        for site, buffer in self._buffer.items():
            words = buffer[:n_rows] if tidy else buffer[order]
            slot = Slot(f"{shard:06d}.{site}.safetensors", shard, site, n_rows)
            drafts.append(draft(self.id, shards.parts(words, self._dtype), slot))
        table = table if tidy else table.take(order)
        ends = [int(key) for key in rows.keys(table.prompt[[0, -1]], table.position[[0, -1]])]
        slot = Slot(f"{shard:06d}.rows.parquet", shard, "", n_rows, "", *ends)
        drafts.append(draft(self.id, [sidecars.pack(table)], slot))

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

"""The reader of one handle: a snapshot of the shards that were committed when it was opened.

Rows come in canonical order, by (prompt, position), whatever the order in which they were captured. They are
streamed with `site`, or read into memory with `read`, where one shard of float32 is a view of the file. Whether
the caller may see the handle was decided by `Store.open`; a reader knows nothing of owners.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog
from trocar.store.catalog import File, State
from trocar.store.depot import Depot
from trocar.store.dtypes import Dtype, Vectors
from trocar.store.ids import HandleId
from trocar.store.index import RowIndex
from trocar.store.rows import Ints, RowTable
from trocar.store.selection import Whole
from trocar.store.siterows import Selected, SiteFiles, SiteRows, some
from trocar.store.view import View

__all__ = ["HandleInfo", "Reader", "State", "infos_of"]


@dataclass(frozen=True, slots=True)
class HandleInfo:
    """What a handle is.

    Attributes:
        widths: width of a row by site, in numbers.
        dtype: of the numbers in the files; readers give float32.
        state: "open" while it is written, "complete" after `finish`, "failed" if its writer died.
        created_s, expires_s: Unix time in seconds; expires_s is None for a handle that stays.
        pinned: whether it stays after `expires_s`.
        n_rows: committed rows (each has one vector per site).
        size_bytes: bytes on disk, sidecars included.
    """

    id: HandleId
    owner: str
    model: str
    fingerprint: str
    program_hash: str
    widths: Mapping[str, int]
    dtype: Dtype
    state: State
    created_s: float
    expires_s: float | None
    pinned: bool
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
        dtype=entry.dtype,
        state=entry.state,
        created_s=entry.created_s,
        expires_s=entry.expires_s,
        pinned=entry.pinned,
        n_rows=n_rows,
        size_bytes=size_bytes,
    )


class Reader:
    """Reads the handle that `info` describes; any number of threads may share one."""

    def __init__(self, depot: Depot, info: HandleInfo, files: Sequence[File]) -> None:
        self.info = info
        self.index = RowIndex(depot, files)
        self._sites = {
            site: SiteFiles(depot, [f for f in files if f.site == site], width, info.dtype)
            for site, width in info.widths.items()
        }

    def rows(self, prompts: Sequence[int] | None = None) -> RowTable:
        """What the rows are, in canonical order.

        Args:
            prompts: keep the rows of these prompts only; their order does not matter.

        Raises:
            ProgramError: `bad_value` for a prompt of which nothing is stored.
            ServerFault: `store_damaged`.
        """
        return self.index.table(None if prompts is None else self._chosen(prompts))

    def rows_per_prompt(self) -> tuple[int, ...]:
        """Number of rows of prompt 0, 1, ... up to the last prompt that has any."""
        return self.index.counts()

    def site(self, site: str, prompts: Sequence[int] | None = None) -> SiteRows:
        """The vectors at `site`, row for row what `rows(prompts)` describes, to be streamed or picked.

        Raises:
            ProgramError: `site_unavailable` for a site that was not captured; else as `rows`.
        """
        chosen = None if prompts is None else self._chosen(prompts)
        return SiteRows(self.info.widths.get(site, 0), [self.selected(site, chosen)])

    def view(self) -> View:
        """Every row and every site, to be narrowed."""
        return View([self], Whole(self.index), tuple(self.info.widths))

    def selected(self, site: str, ids: Ints | None) -> Selected:
        """The rows of these ids at `site`; all in canonical order when None. Raises as `site` does."""
        if site not in self._sites:
            near = errors.closest(site, self._sites)
            raise errors.refuse(
                "site_unavailable", "site", f"{site!r} is not in {self.info.id}", closest=near
            )
        index, files = self.index, self._sites[site]
        if ids is None:
            return Selected(files, len(index), index.pieces, index.numbered)
        return some(files, ids, index.places)

    def read(self, site: str, prompts: Sequence[int] | None = None) -> Vectors:
        """The vectors at `site`, float32 [n, width], row for row what `rows(prompts)` describes; read-only.

        Raises:
            ProgramError: as `site`.
            ServerFault: `store_damaged` when a file is not the one that was written.
        """
        found = self.site(site, prompts)
        ids = self.index.ids if prompts is None else self._chosen(prompts)
        out = self._view(site, ids) if self._is_view(ids) else found.read()
        out.flags.writeable = False
        return out

    def _is_view(self, ids: Ints) -> bool:
        """Whether the rows lie one after the other in one file, as float32."""
        one = self.info.dtype == "float32" and self.index.n_shards == 1 and len(ids) > 0
        return one and bool((np.diff(ids) == 1).all())

    def _view(self, site: str, ids: Ints) -> Vectors:
        rows: Vectors = self._sites[site].words(0)[ids[0] : ids[-1] + 1].view(np.float32)
        return rows

    def _chosen(self, prompts: Sequence[int]) -> Ints:
        """The ids of the rows of these prompts, in canonical order."""
        absent = set(prompts) - set(self.index.prompts.tolist())
        if absent:
            raise errors.refuse("bad_value", "prompts", f"no rows of prompt {min(absent)} in {self.info.id}")
        return self.index.ids_of(prompts)

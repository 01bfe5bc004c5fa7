"""A view: some rows of one handle or several, and some sites, named now and read when somebody asks.

`where`, `sample`, `split` and `concat` give new views and read no row; `len`, `rows` and `site` work out which rows
are meant, once. Rows keep their canonical order; joined handles follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from trocar import errors, sites
from trocar.store import filters, rows, selection
from trocar.store.rows import RowTable
from trocar.store.selection import Step
from trocar.store.siterows import SiteRows

if TYPE_CHECKING:
    from trocar.store.reader import Reader

_NOT_LABELS: Final = ("role", "split")


class View:
    """Rows of the handles that `readers` read; make one with `Reader.view` or `concat`.

    Example:
        >>> acts = store.open("alice", handle).view()
        >>> train, test = acts.where(position=-1, layer=12).split(0.8, seed=0)
        >>> for block in train.site("resid_post.12").blocks(): ...
    """

    def __init__(self, readers: Sequence[Reader], step: Step, names: Sequence[str]) -> None:
        self.readers, self._step, self._sites = tuple(readers), step, tuple(names)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that the view shows."""
        return self._sites

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of a row by site."""
        return {name: self.readers[0].info.widths[name] for name in self._sites}

    def __len__(self) -> int:
        return sum(map(len, self._step.found))

    def where(self, *, site: str | Sequence[str] | None = None, layer: Any = None, **conditions: Any) -> View:
        """The rows that meet every condition; `site` and `layer` choose sites instead.

        Args:
            layer: a number, or a list or range of them.
            conditions: by column (`prompt`, `position`, `token_id`, `token`, `phase`, `role`, `split`, `part`, or a
                label's name): a value, a list of values, a `range`, or a `slice` whose upper end is not
                included. position=-1 is the last stored token of its prompt.

        Raises:
            ProgramError: `unknown_field`, `bad_value`, or `site_unavailable`.
        """
        named = self._named(site, layer)
        parsed = {name: filters.parse(name, self._kind(name), value) for name, value in conditions.items()}
        parts = parsed.pop("part", None)
        if not parsed and parts is None:
            return View(self.readers, self._step, named)
        return View(self.readers, selection.Kept(self._step, parsed, parts), named)

    def _kind(self, name: str) -> str:
        if name == "part":
            return "int64"
        for reader in self.readers:
            if name not in reader.index.columns:
                near = errors.closest(name, [*reader.index.columns, "site", "layer", "part"])
                reason = f"the rows of {reader.info.id} have no {name!r}"
                raise errors.refuse("unknown_field", f"where.{name}", reason, closest=near)
        return self.readers[0].index.columns[name]

    def _named(self, site: str | Sequence[str] | None, layer: Any) -> tuple[str, ...]:
        wanted = [site] if isinstance(site, str) else site
        for name in wanted or ():
            self._require(name)
        layers = layer if isinstance(layer, list | tuple | set | range) else [layer]
        kept = [
            name
            for name in self._sites
            if (wanted is None or name in wanted) and (layer is None or sites.parse(name).layer in layers)
        ]
        if not kept:
            reason = f"no site of the view is in layer {layer!r}"
            raise errors.refuse("site_unavailable", "where.layer", reason)
        return tuple(kept)

    def _require(self, name: str) -> None:
        if name not in self._sites:
            near = errors.closest(name, self._sites)
            reason = f"{name!r} is not among the sites of the view"
            raise errors.refuse("site_unavailable", "site", reason, closest=near)

    def sample(self, n: int, seed: int) -> View:
        """`n` of the rows, drawn at random; the same seed draws the same.

        Raises:
            ProgramError: `bad_value`; `too_few_rows` when somebody asks for the rows.
        """
        if n < 1 or seed < 0:
            raise errors.refuse("bad_value", "sample", f"{n} rows with seed {seed} cannot be drawn")
        return View(self.readers, selection.Sampled(self._step, n, seed), self._sites)

    def split(self, fraction: float, seed: int, by: str = "prompt") -> tuple[View, View]:
        """Two views: about `fraction` of the rows, and the others.

        Args:
            by: rows with the same value of this column stay together; "row" to split rows.

        Raises:
            ProgramError: `bad_value`, `unknown_field`; `too_few_rows` when somebody asks for the rows.
        """
        if not 0 < fraction < 1 or seed < 0:
            raise errors.refuse("bad_value", "split", f"{fraction} with seed {seed} is no split")
        if by != "row":
            self._kind(by)
        step = selection.Split(self._step, fraction, seed, by)
        first, second = (selection.Side(step, first=side) for side in (True, False))
        return View(self.readers, first, self._sites), View(self.readers, second, self._sites)

    def rows(self) -> RowTable:
        """What the rows are; `part` counts the handles of a view that was joined."""
        tables = [some.index.table(some.ids) for some in self._step.found]
        if len(tables) == 1:
            return tables[0]
        for name in _NOT_LABELS:
            if any(getattr(t, name) is not None for t in tables):
                tables = [t if getattr(t, name) is not None else _with_none(t, name) for t in tables]
        part = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
        return replace(rows.concat(tables), part=part)

    def site(self, name: str) -> SiteRows:
        """The vectors at a site, row for row what `rows` describes.

        Raises:
            ProgramError: `site_unavailable`.
        """
        self._require(name)
        found = zip(self.readers, self._step.found, strict=True)
        return SiteRows(self.widths[name], [reader.selected(name, some.ids) for reader, some in found])

    def joined(self) -> tuple[Sequence[Reader], Step]:
        """What `concat` needs."""
        return self.readers, self._step


def _with_none(table: RowTable, name: str) -> RowTable:
    return partial(replace, table)(**{name: np.full(len(table), None, dtype=object)})


def concat(views: Sequence[View]) -> View:
    """The rows of several views, one after the other; `part` in their rows tells which.

    Raises:
        ProgramError: `nothing_returned` for no view; `width_mismatch`, `wrong_handle` or `rows_mismatch` when they
            do not have the same sites and widths, model, and labels.
    """
    if not views:
        raise errors.refuse("nothing_returned", "views", "there is no view to join")
    first = views[0]
    for i, other in enumerate(views[1:], 1):
        path = f"views.{i}"
        if other.widths != first.widths:
            odd = sorted(set(other.widths.items()) ^ set(first.widths.items()))[0]
            raise errors.refuse("width_mismatch", path, f"{odd[0]!r} is not in both views, or not as wide")
        if other.readers[0].info.fingerprint != first.readers[0].info.fingerprint:
            raise errors.refuse("wrong_handle", path, "the views are of different models")
        odd_labels = sorted(_labels(other) ^ _labels(first))
        if odd_labels:
            reason = f"labels {odd_labels[0][0]!r} are not in both views, or of another type"
            raise errors.refuse("rows_mismatch", path, reason)
    pairs = [v.joined() for v in views]
    readers = [reader for held, _ in pairs for reader in held]
    return View(readers, selection.Joined([step for _, step in pairs]), first.sites)


def _labels(shown: View) -> set[tuple[str, str]]:
    columns = shown.readers[0].index.columns
    return {(name, kind) for name, kind in columns.items() if name not in rows.FIXED}

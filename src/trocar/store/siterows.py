"""The vectors of one site, streamed in blocks or picked at random, always as float32.

Streaming maps one shard at a time and widens it block by block into one buffer that fits the cache, so a store of
any size passes through little memory. Picking asks the shelf first: rows that are not in memory are read in
parallel there, and the rest come from the map. This module knows no sidecars and no owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from trocar import errors
from trocar.store import dtypes, shards
from trocar.store.catalog import File
from trocar.store.depot import Depot
from trocar.store.dtypes import ITEM_BYTES, Dtype, Vectors, Words
from trocar.store.order import Mix, Piece, Run
from trocar.store.rows import Ints

BLOCK_ROWS: Final = 512
MAPPED_BYTES: Final = 256 << 20
HELD_BYTES: Final = 1 << 30
PLACED_ROWS: Final = 1 << 15


class SiteFiles:
    """The shards of one site of one handle; keeps what it has mapped for picking, up to `HELD_BYTES`."""

    def __init__(self, depot: Depot, files: Sequence[File], width: int, dtype: Dtype) -> None:
        self.depot, self.files, self.width, self.dtype = depot, files, width, dtype
        self.row_bytes = width * ITEM_BYTES[dtype]
        self._held: dict[int, Words] = {}

    def words(self, shard: int) -> Words:
        """The stored rows of a shard, mapped; writing into them changes no file."""
        file = self.files[shard]
        return shards.view(memoryview(self.depot.map(file)), file.n_rows, self.width, self.dtype, file.path)

    def empty(self, n_rows: int) -> Words:
        return dtypes.empty(n_rows, self.width, self.dtype)

    def pick(self, places: Mix) -> Words:
        """The rows at `places`, in that order."""
        out = self.empty(len(places))
        for shard in np.unique(places.shards).tolist():
            here = places.shards == shard
            if here.all():
                self._pick(shard, places.rows, out)
            else:
                some = self.empty(int(here.sum()))
                self._pick(shard, places.rows[here], some)
                out[here] = some
        return out

    def _pick(self, shard: int, rows: Ints, out: Words) -> None:
        starts = (shards.HEADER_BYTES + rows * self.row_bytes).tolist()
        if not self.depot.pick(self.files[shard], starts, out.data.cast("B")):
            np.take(self._hold(shard), rows, axis=0, out=out, mode="clip")

    def _hold(self, shard: int) -> Words:
        """A mapped shard that stays mapped; the one that was held longest makes room."""
        words = self._held.get(shard)
        if words is None:
            words = self.words(shard)
            held = dict(self._held)  # threads that share a reader each see a whole one
            while held and sum(w.nbytes for w in held.values()) + words.nbytes > HELD_BYTES:
                held.pop(next(iter(held)))
            self._held = {**held, shard: words}
        return words


@dataclass(frozen=True, slots=True)
class Selected:
    """Rows of one site of one handle in their order.

    Attributes:
        pieces: where they lie; called once for each pass.
        places: where those at some numbers in the order lie.
    """

    files: SiteFiles
    n_rows: int
    pieces: Callable[[], Iterator[Piece]]
    places: Callable[[Ints], Mix]


class SiteRows:
    """Vectors [n, width] of one site: `len`, `width`, `blocks`, `take`; every pass gives the same rows."""

    def __init__(self, width: int, parts: Sequence[Selected]) -> None:
        self._width, self._parts = width, parts

    @property
    def width(self) -> int:
        return self._width

    def __len__(self) -> int:
        return sum(p.n_rows for p in self._parts)

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Vectors]:
        """float32 [n, width] with 1 <= n <= `most`, in canonical order.

        A block may be written into, and holds its rows until the next one is asked for.

        Raises:
            ServerFault: `store_damaged`.
            NotFound: `handle_not_found` when the handle was deleted meanwhile.
        """
        if most < 1:
            raise errors.refuse("bad_value", "most", f"{most} rows are no block")
        buffer = np.empty((min(most, len(self)), self._width), np.float32)
        for part in self._parts:
            yield from _Pass(part.files, buffer).blocks(part.pieces())

    def take(self, index: Ints) -> Vectors:
        """float32 [k, width]: the rows at these numbers, counted from 0 in the order of `blocks`.

        Raises:
            ProgramError: `bad_value` for a number that is not below the length.
            ServerFault, NotFound: as for `blocks`.
        """
        index = np.asarray(index, dtype=np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise errors.refuse("bad_value", "index", f"the rows are numbered from 0 to {len(self) - 1}")
        out = np.empty((len(index), self._width), np.float32)
        start = 0
        for part in self._parts:
            here = np.flatnonzero((index >= start) & (index < start + part.n_rows))
            words = part.files.pick(part.places(index[here] - start))
            if len(here) == len(out):
                dtypes.decode(words, part.files.dtype, out)
            else:
                vectors = np.empty(words.shape, np.float32)
                dtypes.decode(words, part.files.dtype, vectors)
                out[here] = vectors
            start += part.n_rows
        return out

    def read(self) -> Vectors:
        """Every row, float32 [n, width], in memory."""
        out = np.empty((len(self), self._width), np.float32)
        start = 0
        for block in self.blocks():
            out[start : start + len(block)] = block
            start += len(block)
        return out


class _Pass:
    """One pass over one handle's rows, with the shards that it has mapped."""

    def __init__(self, files: SiteFiles, buffer: Vectors) -> None:
        self._files, self._buffer = files, buffer
        self._scratch = files.empty(0)
        self._mapped: dict[int, Words] = {}
        self._touched_bytes = 0

    def blocks(self, pieces: Iterator[Piece]) -> Iterator[Vectors]:
        most = max(1, len(self._buffer))
        for piece in pieces:
            if isinstance(piece, Run):
                yield from self._run(piece, most)
            else:
                for cut in piece.cut(most):
                    yield from self._run(cut, most) if isinstance(cut, Run) else [self._mix(cut)]

    def _run(self, run: Run, most: int) -> Iterator[Vectors]:
        if run.shard not in self._mapped:
            self._mapped.clear()
            self._ahead(run.shard + 1)
        words = self._words(run.shard, len(run))
        if self._files.dtype == "float32":
            for start in range(run.start, run.stop, most):
                yield words[start : min(start + most, run.stop)]  # type: ignore[misc]
            return
        widening = dtypes.Widening(words, self._files.dtype, self._buffer)
        for start in range(run.start, run.stop, most):
            yield widening.rows(start, min(start + most, run.stop))

    def _ahead(self, shard: int) -> None:
        if shard < len(self._files.files):
            self._files.depot.shelf.hint(self._files.files[shard])

    def _mix(self, mix: Mix) -> Vectors:
        out = self._buffer[: len(mix)]
        words = self._target(out)
        if bool((mix.shards == mix.shards[0]).all()):
            np.take(self._words(int(mix.shards[0]), len(mix)), mix.rows, axis=0, out=words, mode="clip")
        else:
            for shard in np.unique(mix.shards).tolist():
                here = mix.shards == shard
                words[here] = self._words(shard, len(mix))[mix.rows[here]]
        if words is not out:
            dtypes.decode(words, self._files.dtype, out)
        return out

    def _target(self, out: Vectors) -> Words:
        """Where words go that `out` is made from: itself, when they are float32."""
        if self._files.dtype == "float32":
            return out
        if not len(self._scratch):
            self._scratch = self._files.empty(len(self._buffer))
        return self._scratch[: len(out)]

    def _words(self, shard: int, n_rows: int) -> Words:
        """A mapped shard; when much has been read, what is mapped is let go, so that it counts for nobody."""
        self._touched_bytes += n_rows * self._files.row_bytes
        if self._touched_bytes > MAPPED_BYTES:
            self._mapped.clear()
            self._touched_bytes = 0
        if shard not in self._mapped:
            self._mapped[shard] = self._files.words(shard)
        return self._mapped[shard]


def some(files: SiteFiles, ids: Ints, places: Callable[[Ints], Mix]) -> Selected:
    """The rows of `ids`, in that order; `places` says where ids lie."""
    return Selected(files, len(ids), partial(_pieces, ids, places), lambda numbers: places(ids[numbers]))


def _pieces(ids: Ints, places: Callable[[Ints], Mix]) -> Iterator[Piece]:
    for start in range(0, len(ids), PLACED_ROWS):
        yield places(ids[start : start + PLACED_ROWS])

"""Endless batches of rows in random order, from one pass over the rows at a time and a buffer of bounded size.

Rows that all fit in the buffer are read once and permuted anew in every round. Of more rows, the buffer holds a
window: a batch takes random places of it, and the rows that come next in the source move in. So each row is given
once per round, up to the edge of the window, and rows of one prompt come apart by about the size of the buffer.

The order follows from the seed alone, so a position is a count of batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.labels import Ints
from trocar.analysis.source import Block, Source

BUFFER_BYTES: Final = 512 << 20


class Batches:
    """An iterator over float32 tensors [batch, width], each in memory of its own.

    Args:
        room: rows in the buffer; what `BUFFER_BYTES` allows when left out, but never fewer than four batches.

    Raises:
        ProgramError: `too_few_rows` for fewer rows than a batch has; `rows_not_finite` when such a row is read.
    """

    def __init__(self, source: Source, batch: int, seed: int, room: int | None = None) -> None:
        if len(source) < batch:
            raise errors.refuse(
                "too_few_rows", "batch", f"there are {len(source)} rows for a batch of {batch}"
            )
        allowed = BUFFER_BYTES // (4 * source.width) if room is None else room
        self._source, self._batch = source, batch
        self._room = min(len(source), max(allowed, 4 * batch))
        self._rng = np.random.default_rng([seed, 11])
        self._order = self._permuted() if self._room == len(source) else self._windowed()
        self.served = 0

    @property
    def room(self) -> int:
        """Rows that are held."""
        return self._room

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.served += 1
        return torch.from_numpy(next(self._order))

    def skip(self, batches: int) -> None:
        """Goes on where an iterator that has served so many batches more would; reads the rows between."""
        for _ in range(batches):
            next(self)

    def _permuted(self) -> Iterator[Block]:
        rows, left = np.empty((self._room, self._source.width), dtype=np.float32), np.zeros(0, dtype=np.int64)
        _Following(self._forever()).into(rows, np.arange(self._room))
        while True:
            while len(left) < self._batch:
                left = np.concatenate([left, self._rng.permutation(len(rows))])
            yield rows[left[: self._batch]]
            left = left[self._batch :]

    def _windowed(self) -> Iterator[Block]:
        rows = np.empty((self._room, self._source.width), dtype=np.float32)
        following = _Following(self._forever())
        following.into(rows, np.arange(self._room))
        while True:
            places = self._rng.choice(self._room, self._batch, replace=False)
            yield rows[places]
            following.into(rows, places)

    def _forever(self) -> Iterator[Block]:
        while True:
            yield from streams.finite(self._source)


class _Following:
    """The rows that come next, across the edges of blocks; a block is used up before the next one is asked for."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._block: Block = np.empty((0, 0), dtype=np.float32)

    def into(self, rows: Block, places: Ints) -> None:
        """Writes the next `len(places)` rows to these places."""
        done = 0
        while done < len(places):
            if not len(self._block):
                self._block = next(self._blocks)
            n = min(len(self._block), len(places) - done)
            rows[places[done : done + n]] = self._block[:n]
            self._block, done = self._block[n:], done + n

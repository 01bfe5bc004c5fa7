"""Sources made of sources: two side by side, their difference, and some of the rows of one.

Each is a `Source` itself, so whatever reads rows reads these too: the moments of `Beside(x, y)` hold the
products of both, and a held-out part is a `Subset`. Nothing is copied but the block at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis.source import BLOCK_ROWS, Block, Source


def together(a: Source, b: Source, most: int = BLOCK_ROWS) -> Iterator[tuple[Block, Block]]:
    """Blocks of both with the same rows, wherever their own blocks end; both as long as `a` says."""
    ours, rest = b.blocks(most), np.empty((0, b.width), dtype=np.float32)
    for block in a.blocks(most):
        done = 0
        while done < len(block):
            rest = rest if len(rest) else next(ours)
            n = min(len(block) - done, len(rest))
            yield block[done : done + n], rest[:n]
            done, rest = done + n, rest[n:]


class Beside:
    """Rows of `a` and of `b` side by side: float32 [n, a.width + b.width].

    Raises:
        ProgramError: `rows_mismatch` unless both have the same number of rows.
    """

    def __init__(self, a: Source, b: Source) -> None:
        _require_equal_length(a, b)
        self._a, self._b = a, b

    @property
    def width(self) -> int:
        return self._a.width + self._b.width

    def __len__(self) -> int:
        return len(self._a)

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        buffer = np.empty((most, self.width), dtype=np.float32)
        for left, right in together(self._a, self._b, most):
            block = buffer[: len(left)]
            block[:, : left.shape[1]] = left
            block[:, left.shape[1] :] = right
            yield block


class Difference:
    """Row by row `a - b`: float32 [n, width].

    Raises:
        ProgramError: `rows_mismatch`, `width_mismatch`.
    """

    def __init__(self, a: Source, b: Source) -> None:
        _require_equal_length(a, b)
        require_equal_width(a, b)
        self._a, self._b = a, b

    @property
    def width(self) -> int:
        return self._a.width

    def __len__(self) -> int:
        return len(self._a)

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        buffer = np.empty((most, self.width), dtype=np.float32)
        for left, right in together(self._a, self._b, most):
            with np.errstate(over="ignore", invalid="ignore"):  # analyses refuse what comes of it
                yield np.subtract(left, right, out=buffer[: len(left)])


class Subset:
    """The rows of a source where `keep` [n] is true, in order."""

    def __init__(self, source: Source, keep: npt.NDArray[np.bool_]) -> None:
        self._source, self._keep, self._n = source, keep, int(keep.sum())

    @property
    def width(self) -> int:
        return self._source.width

    def __len__(self) -> int:
        return self._n

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        start = 0
        for block in self._source.blocks(most):
            keep = self._keep[start : start + len(block)]
            start += len(block)
            if keep.all():
                yield block
            elif keep.any():
                yield block[keep]


def require_equal_width(a: Source, b: Source) -> None:
    if a.width != b.width:
        reason = f"rows are {a.width} wide on one side and {b.width} on the other"
        raise errors.refuse("width_mismatch", "rows", reason)


def _require_equal_length(a: Source, b: Source) -> None:
    if len(a) != len(b):
        raise errors.refuse("rows_mismatch", "rows", f"{len(a)} rows on one side and {len(b)} on the other")

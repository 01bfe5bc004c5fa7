"""Rows of one site as every analysis sees them: a width, a count, and blocks that can be read again and again.

A block is small enough for the cache (512 rows of width 576 are 1.2 MB), so rows never have to be in memory
together. Where they come from, a store, a file or an array, is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from trocar import errors

Block = npt.NDArray[np.float32]
BLOCK_ROWS: Final = 512


@runtime_checkable
class Source(Protocol):
    """Rows of one site, in blocks; every pass gives the same rows in the same order."""

    @property
    def width(self) -> int: ...

    def __len__(self) -> int: ...

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        """float32 [n <= most, width], C-contiguous, in order; valid until the next block (buffers are reused)."""
        ...


class ArraySource:
    """A source of rows that are in memory: float16, float32 or float64 [n, width], read as float32.

    Raises:
        ProgramError: `rows_mismatch` for anything but floats of rank 2.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        if array.ndim != 2 or array.dtype.kind != "f":
            reason = f"the rows are {array.dtype} of rank {array.ndim}, not floats [n, width]"
            raise errors.refuse("rows_mismatch", "rows", reason)
        self._array = array

    @property
    def width(self) -> int:
        return int(self._array.shape[1])

    def __len__(self) -> int:
        return len(self._array)

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        rows = self._array
        buffer = np.empty((min(most, len(rows)), self.width), dtype=np.float32)
        for start in range(0, len(rows), most):
            block = buffer[: min(most, len(rows) - start)]
            with np.errstate(over="ignore"):  # what does not fit becomes an infinity, which analyses refuse
                np.copyto(block, rows[start : start + most], casting="same_kind")
            yield block

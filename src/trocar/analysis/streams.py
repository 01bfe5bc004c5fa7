"""What passes over a source give beside `moments`: checked blocks, chosen rows, and rows in random order.

Each function holds one block, what it returns, and at most `BUFFER_BYTES` of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from trocar import errors
from trocar.analysis.joined import Beside, Subset
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.moments import moments
from trocar.analysis.results import Vector
from trocar.analysis.source import BLOCK_ROWS, Block, Source

BUFFER_BYTES: Final = 128 << 20
MAX_PARTS: Final = 8
LARGEST: Final = 1e15  # squares of larger numbers, summed, leave the range of float32
_ROUNDING: Final = 1e-6
_SMALLEST: Final = 1e-30


def finite(source: Source, path: str = "rows", most: int = BLOCK_ROWS) -> Iterator[Block]:
    """The blocks of a source, each checked.

    Raises:
        ProgramError: `rows_not_finite`.
    """
    for block in source.blocks(most):
        require_finite(block, path)
        yield block


def require_finite(block: Block, path: str = "rows") -> None:
    """Refuses NaN, which fails every comparison, and what is too large to be squared."""
    if block.size and not (block.min() >= -LARGEST and block.max() <= LARGEST):
        reason = f"a row holds NaN, an infinity or a number beyond {LARGEST:g}"
        raise errors.refuse("rows_not_finite", path, reason)


def buffer_rows(width: int) -> int:
    """How many rows of a width fit in `BUFFER_BYTES`; at least one."""
    return max(1, BUFFER_BYTES // (4 * width))


def rows_at(source: Source, index: Ints) -> Block:
    """The rows with the numbers `index` [k], in the order of `index`: float32 [k, width], in one pass.

    Raises:
        ProgramError: `bad_value` for a number that no row has, `rows_not_finite`.
    """
    if len(index) and not (index.min() >= 0 and index.max() < len(source)):
        wrong = index[(index < 0) | (index >= len(source))][0]
        raise errors.refuse("bad_value", "rows", f"there is no row {wrong}: rows run to {len(source) - 1}")
    order = np.argsort(index, kind="stable")
    ascending, found = index[order], np.empty((len(index), source.width), dtype=np.float32)
    start = done = 0
    for block in source.blocks():
        if done == len(index):
            break
        end = int(np.searchsorted(ascending, start + len(block)))
        found[order[done:end]] = block[ascending[done:end] - start]
        start, done = start + len(block), end
    require_finite(found)
    return found


def sample(n: int, most: int, seed: int) -> Ints:
    """Row numbers of a uniform sample of `n` rows without repeats, ascending; all of them if `most` allows."""
    if n <= most:
        return np.arange(n, dtype=np.int64)
    rng = np.random.default_rng([seed, 3])
    return np.sort(rng.choice(n, size=most, replace=False)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Standardises rows: `(x - mean) * inverse`, float32 [width]; inverse is 0 for a constant feature."""

    mean: Vector
    inverse: Vector

    def apply(self, block: Block) -> Block:
        """float32 [n, width]; the mean goes before rounding matters."""
        z: Block = (block - self.mean) * self.inverse
        return z


def scale(source: Source) -> Scale:
    """Mean and deviation of each column, in one pass.

    Raises:
        ProgramError: `rows_not_finite`, `too_few_rows` for no rows.
    """
    (found,) = moments(source, gram=False)
    return Scale(found.mean.astype(np.float32), inverse(found.mean, found.variance).astype(np.float32))


def inverse(mean: Floats, variance: Floats) -> Floats:
    """1 / deviation; 0 for a feature that does not vary beyond the rounding of float32."""
    deviation = np.sqrt(variance)
    varies = deviation > np.maximum(_ROUNDING * np.abs(mean), _SMALLEST)
    return np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Moments of rows x and of what they lack of rows y, r = y - x; float64.

    Attributes:
        mean, gap: of x and of r, [width].
        own: covariance of x, [width, width]. `cross`: of x with r.
        variance: of each column of r, [width].
    """

    mean: Floats
    gap: Floats
    own: Floats
    cross: Floats
    variance: Floats


def residuals(x: Source, y: Source) -> Residuals:
    """One pass over both: half the memory of `moments` of both side by side.

    Products are float32 within a block, about the mean of the first one, and float64 across blocks.

    Raises:
        ProgramError: `rows_not_finite`, `rows_mismatch`.
    """
    width = x.width
    pilot: Block | None = None
    total, square = np.zeros(2 * width), np.zeros(width)
    own, cross = np.zeros((width, width)), np.zeros((width, width))
    for both in finite(Beside(x, y)):
        both[:, width:] -= both[:, :width]
        pilot = both.mean(axis=0) if pilot is None else pilot
        z, r = np.split(both - pilot, 2, axis=1)
        total += np.r_[z.sum(axis=0, dtype=np.float64), r.sum(axis=0, dtype=np.float64)]
        square += np.einsum("nd,nd->d", r, r)
        own += z.T @ z
        cross += z.T @ r
    n = max(len(x), 1)
    shift = total / n
    mean = shift if pilot is None else pilot + shift
    a, b = np.split(shift, 2)
    variance = np.maximum(square / n - b**2, 0.0)
    return Residuals(
        mean[:width], mean[width:], own / n - np.outer(a, a), cross / n - np.outer(a, b), variance
    )


def shuffled(
    source: Source, batch: int, rng: np.random.Generator, room: int | None = None
) -> Iterator[tuple[Block, Ints]]:
    """Every row once, in random order, as batches of rows and their numbers.

    Rows are dealt at random into up to `MAX_PARTS` parts, one pass each. A part that fits in the buffer is
    shuffled whole, so the order is a uniform permutation up to `MAX_PARTS` buffers of rows; beyond, each
    buffer holds rows from a stretch `MAX_PARTS` times its own length.

    Args:
        room: rows in the buffer; what `BUFFER_BYTES` allows when left out.
    """
    n = len(source)
    room = buffer_rows(source.width) if room is None else room
    parts = min(MAX_PARTS, -(-n // room))
    part = rng.permutation(n) % parts if n else np.zeros(0, dtype=np.int64)
    buffer = np.empty((min(room, -(-n // max(parts, 1))), source.width), dtype=np.float32)
    for p in range(parts):
        yield from _mixed(source, np.flatnonzero(part == p), buffer, batch, rng)


def _mixed(
    source: Source, index: Ints, buffer: Block, batch: int, rng: np.random.Generator
) -> Iterator[tuple[Block, Ints]]:
    keep = np.zeros(len(source), dtype=bool)
    keep[index] = True
    done = filled = 0
    for given in Subset(source, keep).blocks():
        block = given
        while len(block):
            n = min(len(block), len(buffer) - filled)
            buffer[filled : filled + n] = block[:n]
            filled, block = filled + n, block[n:]
            if filled == len(buffer):
                yield from _batches(buffer, index[done : done + filled], batch, rng)
                done, filled = done + filled, 0
    yield from _batches(buffer[:filled], index[done:], batch, rng)


def _batches(rows: Block, index: Ints, batch: int, rng: np.random.Generator) -> Iterator[tuple[Block, Ints]]:
    if len(rows):
        for chosen in np.array_split(rng.permutation(len(rows)), -(-len(rows) // batch)):
            yield rows[chosen], index[chosen]

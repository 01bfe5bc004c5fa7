"""What one pass over the rows leaves behind: counts, sums and products, from which the closed forms follow.

Rows are centred on a pilot before they are multiplied, so a feature whose mean is a hundred deviations loses
nothing; products are made in the given precision within a chunk and summed in float64 across chunks. Moments of
disjoint rows merge exactly, up to the rounding of float64: a fit over shards is the fit over all of them. Targets
are numbers per row (labels, one-hot classes, rows of another site) and are multiplied with the rows in the same pass.

Shapes: n rows, d features, k targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.source import Block, Source

Precision = Literal["float32", "float64"]
CHUNK_ROWS: Final = 4096
CHUNK_NUMBERS: Final = 2**24
LEAST_ROWS: Final = 256
"""Rows that are multiplied at once: many enough for the speed of a large product, and 64 MB of float32 at most."""
EXACT_CELLS: Final = 2**24
"""Up to so many numbers, float64 costs so little that nothing else is worth its rounding."""


def precision_of(n: int, width: int) -> Precision:
    """In which precision rows are multiplied when nobody says."""
    return "float64" if n * width <= EXACT_CELLS else "float32"


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over rows x and targets t, with x centred on `pilot`; float64.

    Attributes:
        pilot: [d], near the mean; where it lies changes rounding and nothing else.
        total: [d], sum of x - pilot.
        square: [d], sum of the squares of x - pilot.
        gram: [d, d], sum of (x - pilot) (x - pilot)^T; None where only sums were asked for.
        target_total, target_square: [k], sums of t and of its squares.
        cross: [d, k], sum of (x - pilot) t^T.
    """

    n: int
    pilot: Floats
    total: Floats
    square: Floats
    gram: Floats | None
    target_total: Floats
    target_square: Floats
    cross: Floats

    @property
    def width(self) -> int:
        return len(self.pilot)

    @property
    def mean(self) -> Floats:
        return self.pilot + self.total / self.n

    @property
    def variance(self) -> Floats:
        """Of each feature, [d], over n."""
        return np.maximum(self.square / self.n - (self.total / self.n) ** 2, 0.0)

    @property
    def covariance(self) -> Floats:
        """[d, d], over n (not n - 1).

        Raises:
            ValueError: there is no Gram matrix.
        """
        if self.gram is None:
            raise ValueError("these moments have no Gram matrix")
        shift = self.total / self.n
        return self.gram / self.n - np.outer(shift, shift)

    @property
    def cross_covariance(self) -> Floats:
        """[d, k], of features and targets, over n."""
        return self.cross / self.n - np.outer(self.total / self.n, self.target_total / self.n)

    def about(self, pilot: Floats) -> Moments:
        """The same moments on another pilot."""
        step, n = self.pilot - pilot, self.n
        gram = self.gram
        if gram is not None:
            edge = np.outer(self.total, step)
            gram = gram + edge + edge.T + n * np.outer(step, step)
        return replace(
            self,
            pilot=pilot,
            total=self.total + n * step,
            square=self.square + 2 * step * self.total + n * step**2,
            gram=gram,
            cross=self.cross + np.outer(step, self.target_total),
        )

    def plain(self) -> Moments:
        """The same moments without a Gram matrix."""
        return replace(self, gram=None)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows together.

        Raises:
            ValueError: widths or targets differ, or one side alone has a Gram matrix.
        """
        return self._plus(other, 1)

    def without(self, part: Moments) -> Moments:
        """The moments of the rows that are not in `part`, which are among these."""
        return self._plus(part, -1)

    def _plus(self, other: Moments, sign: int) -> Moments:
        if self.cross.shape != other.cross.shape or (self.gram is None) != (other.gram is None):
            raise ValueError(f"moments of {self.cross.shape} and of {other.cross.shape} do not go together")
        other = other.about(self.pilot)
        gram = None if self.gram is None or other.gram is None else self.gram + sign * other.gram
        return Moments(
            self.n + sign * other.n,
            self.pilot,
            self.total + sign * other.total,
            self.square + sign * other.square,
            gram,
            self.target_total + sign * other.target_total,
            self.target_square + sign * other.target_square,
            self.cross + sign * other.cross,
        )


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of all the parts together, which share no row; in the order given, so the bits are repeatable."""
    return reduce(Moments.merge, parts)


def moments(
    source: Source,
    *,
    targets: npt.NDArray[Any] | None = None,
    part: Ints | None = None,
    parts: int = 1,
    gram: bool | Sequence[bool] = True,
    pilot: Floats | None = None,
    precision: Precision | None = None,
) -> tuple[Moments, ...]:
    """Moments of each part of the rows, in one pass: `n width^2` multiplications, and no more memory than a chunk.

    The Gram matrix is a symmetric rank-k update, half the work of a product.

    Args:
        targets: numbers [n] or [n, k].
        part: the part of each row, [n], from 0 to `parts` - 1; a row of another number is left out. Without it, all
            rows are of part 0.
        gram: False leaves the Gram matrix out, and with it nearly all of the work; one for each part, or one for all.
        pilot: where to centre the rows; a median of the first ones when it is None. Shards that share a pilot round
            alike.
        precision: of the products; by default float64 for small data (`precision_of`).

    Raises:
        ProgramError: `rows_not_finite`, `bad_labels` for a wrong number of targets or parts.
    """
    n, exact = len(source), precision or precision_of(len(source), source.width)
    t, level = _targets(targets, n)
    if part is not None and len(part) != n:
        raise errors.refuse("bad_labels", "part", f"{len(part)} parts for {n} rows")
    grams = [gram] * parts if isinstance(gram, bool) else gram
    chunk = max(LEAST_ROWS, min(CHUNK_ROWS, CHUNK_NUMBERS // (source.width * parts)))
    sums: list[_Sums] = []
    row = 0
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite in the end is refused
        for block in source.blocks():
            if not sums:
                centre = (_pilot(block) if pilot is None else pilot).astype(np.float32)
                sums = [_Sums(chunk, t.shape[1], centre, wanted, exact) for wanted in grams]
            here = slice(row, row + len(block))
            row += len(block)
            _share(block, t[here], None if part is None else part[here], sums)
        if not sums:
            raise errors.refuse("too_few_rows", "rows", "there are no rows")
        return tuple(one.result(level) for one in sums)


def _share(block: Block, t: Floats, part: Ints | None, sums: Sequence[_Sums]) -> None:
    """Adds each row of a block to its part."""
    for number, one in enumerate(sums):
        chosen = None if part is None else np.flatnonzero(part == number)
        if chosen is None or len(chosen) == len(block):
            one.add(block, t)
        elif len(chosen):
            one.add(block[chosen], t[chosen])


class _Sums:
    """What `moments` adds up for one part: rows are centred into a chunk, and a full chunk is multiplied."""

    def __init__(
        self, chunk: int, k: int, pilot: npt.NDArray[np.float32], gram: bool, precision: Precision
    ) -> None:
        width = len(pilot)
        self._pilot, self._n, self._filled = pilot, 0, 0
        stride = -(-(width + 1 + k) // 16) * 16  # rows begin where vector instructions like them to
        self._x = np.empty((chunk, stride), precision)[:, : width + 1 + k]  # features, a one, targets
        self._x[:, width] = 1
        self._t = np.empty((chunk, k))
        self._gram = np.zeros((width + 1 + k, width + 1 + k)) if gram else None
        self._square, self._sums = np.zeros(width), np.zeros((k + 1, width))
        self._target_sums, self._target_squares = np.zeros(k), np.zeros(k)

    def add(self, block: Block, t: Floats) -> None:
        done = 0
        while done < len(block):
            take = min(len(block) - done, len(self._x) - self._filled)
            room = slice(self._filled, self._filled + take)
            features = self._x[room, : len(self._pilot)]
            np.subtract(block[done : done + take], self._pilot, out=features, dtype=features.dtype)
            self._t[room] = t[done : done + take]
            done += take
            self._filled += take
            if self._filled == len(self._x):
                self._multiply()

    def _multiply(self) -> None:
        d, x, t = len(self._pilot), self._x[: self._filled], self._t[: self._filled]
        x[:, d + 1 :] = t
        if self._gram is None:
            self._sums += x[:, d:].T @ x[:, :d]
            self._square += _squares(x[:, :d])
        else:
            self._gram += x.T @ x
        self._target_sums += t.sum(axis=0)
        self._target_squares += (t**2).sum(axis=0)
        self._n += self._filled
        self._filled = 0

    def result(self, level: Floats) -> Moments:
        """The moments, when the targets are really higher by `level`."""
        self._multiply()
        d, gram, square, sums = len(self._pilot), self._gram, self._square, self._sums
        if gram is not None:
            gram, sums = gram[:d, :d].copy(), gram[d:, :d]
            square = gram.diagonal().copy()
        total = sums[0].copy()
        cross = sums[1:].T + np.outer(total, level)
        if not np.isfinite(total).all():
            raise errors.refuse("rows_not_finite", "rows", "a row holds NaN or an infinity")
        if not (np.isfinite(square).all() and np.isfinite(cross).all()):
            reason = "the rows are so large that their squares leave the range of the products"
            raise errors.refuse("rows_not_finite", "rows", reason)
        n, low = self._n, self._target_sums
        target_square = self._target_squares + 2 * level * low + n * level**2
        pilot = self._pilot.astype(np.float64)
        return Moments(n, pilot, total, square, gram, low + n * level, target_square, cross)


def _squares(x: Block | Floats) -> Floats:
    """Sums of squares in short runs: thousands of positive float32 numbers in one sum are biased by their rounding."""
    even = len(x) - len(x) % 32
    runs = x[:even].reshape(-1, 32, x.shape[1])
    total: Floats = np.einsum("bnd,bnd->bd", runs, runs).sum(axis=0, dtype=np.float64)
    rest: Floats = np.einsum("nd,nd->d", x[even:], x[even:])
    return total + rest


def _pilot(block: Block) -> Floats:
    """A median: the first rows are where the largest activations are, and a mean would follow them."""
    middle = np.median(block[:512], axis=0).astype(np.float64)
    return np.where(np.isfinite(middle), middle, 0.0)


def _targets(targets: npt.NDArray[Any] | None, n: int) -> tuple[Floats, Floats]:
    """The targets [n, k] less a level [k]: their mean where it is far from 0 in units of their deviation."""
    if targets is None:
        return np.zeros((n, 0)), np.zeros(0)
    columns = np.asarray(targets, dtype=np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if len(columns) != n:
        raise errors.refuse("bad_labels", "labels", f"{len(columns)} labels for {n} rows")
    mean, deviation = columns.mean(axis=0), columns.std(axis=0)
    level = np.where(np.abs(mean) > 4 * deviation, mean, 0.0)
    return columns - level, level

"""Histograms whose bins lie on a grid of powers of two, so that the edges tell little about single values.

The grid is an exponent and the number of its first bin; both are whole numbers, and with the counts they are
all that leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis.labels import Floats, Ints

MAX_BINS: Final = 1024
MAX_CLASSES: Final = 64
LARGEST: Final = 1e30
_FINEST: Final = -1000


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of values in bins of width `2^exponent`, the first of which begins at `first * 2^exponent`.

    A bin holds its lower edge and not its upper one.

    Attributes:
        counts: int64 [classes, bins]; one class where there were none.
        outside: int64 [classes, 2], values below the first bin and above the last.
        classes: what the rows of `counts` stand for, ascending.
    """

    exponent: int
    first: int
    counts: Ints
    outside: Ints
    classes: npt.NDArray[Any]

    @property
    def edges(self) -> Floats:
        """float64 [bins + 1], exact."""
        numbers = self.first + np.arange(self.counts.shape[1] + 1, dtype=np.float64)
        return np.asarray(np.ldexp(numbers, self.exponent))


def histogram(
    values: npt.NDArray[Any],
    *,
    bins: int = 64,
    classes: npt.NDArray[Any] | None = None,
    tail: float = 0.0,
) -> Histogram:
    """Counts values in the finest bins that cover all of them, or all but a share at each end.

    Args:
        values: float [N], for example scores of a projection.
        bins: 2 to 1024.
        classes: ints [N], for counts by class; up to 64 different ones.
        tail: share of the values at each end that need no bin, 0 to 0.25; they are counted as outside. One
            outlier otherwise decides the width of the bins.

    Raises:
        ProgramError: `too_few_rows`, `rows_not_finite`, `rows_mismatch`, `bad_value`.
    """
    x = np.asarray(values, dtype=np.float64)
    _require(x, bins, classes, tail)
    ranked = np.sort(x)
    cut = int(tail * len(x))
    exponent, first = _grid(float(ranked[cut]), float(ranked[len(x) - 1 - cut]), bins)
    with np.errstate(over="ignore"):  # far outside
        found = np.floor(np.ldexp(x, -exponent)) - first
    bin_of = np.clip(found, -1, bins).astype(np.int64) + 1
    of = np.zeros(len(x), dtype=np.int64) if classes is None else np.asarray(classes)
    names, class_of = np.unique(of, return_inverse=True)
    table = np.bincount(class_of * (bins + 2) + bin_of, minlength=len(names) * (bins + 2)).reshape(
        len(names), -1
    )
    return Histogram(exponent, first, table[:, 1:-1], table[:, [0, -1]], names)


def _grid(low: float, high: float, bins: int) -> tuple[int, int]:
    """The smallest exponent for which all bins from that of `low` to that of `high` are at most `bins`."""
    width = max(high - low, max(abs(low), abs(high)) * 1e-12)
    if width == 0:
        return 0, 0
    exponent = max(math.frexp(width / bins)[1] - 1, _FINEST)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    return exponent, math.floor(math.ldexp(low, -exponent))


def _require(x: Floats, bins: int, classes: npt.NDArray[Any] | None, tail: float) -> None:
    if x.ndim != 1 or not len(x):
        raise errors.refuse("too_few_rows", "values", f"values are {list(x.shape)}, not [n] with n >= 1")
    if not (np.abs(x) <= LARGEST).all():
        raise errors.refuse("rows_not_finite", "values", f"a value is NaN, infinite or beyond {LARGEST:g}")
    if not 2 <= bins <= MAX_BINS:
        raise errors.refuse("bad_value", "bins", f"{bins!r} is not between 2 and {MAX_BINS}")
    if not 0 <= tail <= 0.25:
        raise errors.refuse("bad_value", "tail", f"{tail!r} is not between 0 and 0.25")
    if classes is None:
        return
    if len(classes) != len(x):
        raise errors.refuse("rows_mismatch", "classes", f"{len(classes)} classes for {len(x)} values")
    if len(np.unique(classes)) > MAX_CLASSES:
        raise errors.refuse("bad_value", "classes", f"there are more than {MAX_CLASSES} classes")

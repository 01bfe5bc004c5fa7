"""Linear maps from rows of one site to rows of another, by least squares with a penalty, scored on held-out rows.

One pass over both sources gives the moments of their rows side by side, and everything follows from them: the map, and
what it leaves unexplained on either side of the split. Such a map is close to the weights between its sites, which is
why a server of secret weights refuses it (`graph.labels.Rules.own_targets`). Tuned lenses (Belrose et al. 2023) and
transcoders begin like this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from trocar import errors
from trocar.analysis.labels import Floats
from trocar.analysis.moments import Moments, moments
from trocar.analysis.source import BLOCK_ROWS, ArraySource, Block, Source

DEFAULT_L2: Final = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit:
    """`x @ map + bias`, float64 [width, target] and [target]; `r2` over all numbers of the held-out rows."""

    map: Floats
    bias: Floats
    r2: float
    r2_train: float


def sizes(n: int, test_fraction: float) -> tuple[int, int]:
    """Rows that are fitted and held out, of `n`.

    Raises:
        ProgramError: `too_few_rows`.
    """
    held = max(1, round(test_fraction * n))
    if n - held < 2:
        raise errors.refuse(
            "too_few_rows", "handle", f"{n} rows; a map needs at least 2 to fit and 1 to test"
        )
    return n - held, held


def linear_map(
    x: Floats | Source, y: Floats | Source, *, test_fraction: float, seed: int, l2: float | None
) -> LinearFit:
    """Fits rows [n, width] to rows [n, target]: squared errors plus l2 times the squares of the map, on raw rows.

    Raises:
        ProgramError: `too_few_rows`, `rows_not_finite`, `rows_mismatch`.
        RunFailed: `fit_not_converged` where features depend on each other more than l2 makes up for.
    """
    if len(x) != len(y):
        raise errors.refuse("rows_mismatch", "target", f"{len(x)} rows on one side and {len(y)} on the other")
    n_train, _ = sizes(len(x), test_fraction)
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    part = np.zeros(len(x), dtype=np.int64)
    part[order[n_train:]] = 1
    left, right = (ArraySource(rows) if isinstance(rows, np.ndarray) else rows for rows in (x, y))
    try:
        train, test = moments(Beside(left, right), part=part, parts=2)
    except errors.ProgramError as e:
        raise errors.refuse(e.code, "handle", e.reason) from None
    d = left.width
    penalty = (DEFAULT_L2 if l2 is None else l2) / train.n
    covariance = train.covariance
    inner = covariance[:d, :d] + penalty * np.eye(d)
    try:
        weights = cho_solve(cho_factor(inner, check_finite=False), covariance[:d, d:], check_finite=False)
    except LinAlgError:
        raise errors.refuse("fit_not_converged", "l2", "the features depend on each other") from None
    bias = train.mean[d:] - train.mean[:d] @ weights
    return LinearFit(weights, bias, *(_r2(weights, bias, m) for m in (test, train)))


class Beside:
    """The rows of two sources side by side, whose blocks need not end at the same rows."""

    def __init__(self, left: Source, right: Source) -> None:
        self._sides = (left, right)

    @property
    def width(self) -> int:
        return self._sides[0].width + self._sides[1].width

    def __len__(self) -> int:
        return len(self._sides[0])

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        buffer = np.empty((most, self.width), dtype=np.float32)
        columns = (slice(None, self._sides[0].width), slice(self._sides[0].width, None))
        runs = [_Run(side.blocks(most)) for side in self._sides]
        for start in range(0, len(self), most):
            block = buffer[: min(most, len(self) - start)]
            for run, where in zip(runs, columns, strict=True):
                run.fill(block[:, where])
            yield block


class _Run:
    """Rows taken from blocks as they are needed."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks, self._left = blocks, np.empty((0, 0), dtype=np.float32)

    def fill(self, out: Block) -> None:
        done = 0
        while done < len(out):
            if not len(self._left):
                self._left = next(self._blocks)
            take = min(len(out) - done, len(self._left))
            out[done : done + take], self._left = self._left[:take], self._left[take:]
            done += take


def _r2(weights: Floats, bias: Floats, m: Moments) -> float:
    """1 - squared errors over squared distances from the mean, of the rows that `m` tells of."""
    d, covariance = len(weights), m.covariance
    inner, crossed, outer = covariance[:d, :d], covariance[:d, d:], covariance[d:, d:]
    missed = m.mean[d:] - m.mean[:d] @ weights - bias
    spread = float(np.trace(outer))
    errors_left = spread - 2 * float((weights * crossed).sum()) + float((weights * (inner @ weights)).sum())
    return 1.0 - (errors_left + float(missed @ missed)) / spread if spread > 0 else 0.0

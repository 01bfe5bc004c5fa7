"""Scores of a fit on held-out rows, with the uncertainty that the number of test groups leaves.

AUROC is the probability that a row of the upper class scores above one of the lower class, ties counted half
(Hanley and McNeil 1982). Intervals are 95 % percentile bootstraps (Efron 1979) over groups, per stratum: rows
of one group are not independent. A perfect score has the interval [1, 1]: a bootstrap cannot see beyond
the rows it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from trocar.analysis.labels import Floats, Ints

N_RESAMPLES: Final = 1000
_BLOCK_CELLS: Final = 4_000_000
_ROUNDING: Final = 1e-12
Weighted = Callable[[Floats], Floats]


def auroc(scores: Floats, y: Floats) -> float:
    """AUROC of `scores` [n] for classes `y` [n] of 0 and 1, both present."""
    return float(weighted_auroc(scores, y)(np.ones((1, len(y))))[0])


def weighted_auroc(scores: Floats, y: Floats) -> Weighted:
    """Prepares AUROC under row weights: takes [b, n], gives [b]; each class has some weight."""
    order = np.argsort(scores, kind="stable")
    ties = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    upper = y[order] == 1

    def score(weights: Floats) -> Floats:
        ranked = weights[:, order]
        ones = np.add.reduceat(ranked * upper, ties, axis=1)
        zeros = np.add.reduceat(ranked * ~upper, ties, axis=1)
        below = np.cumsum(zeros, axis=1) - zeros / 2
        share: Floats = (ones * below).sum(axis=1) / (ones.sum(axis=1) * zeros.sum(axis=1))
        return share

    return score


def r2(predicted: Floats, y: Floats) -> float:
    """1 - residual / total sum of squares about the mean of `y`, which is not constant."""
    return float(weighted_r2(predicted, y)(np.ones((1, len(y))))[0])


def weighted_r2(predicted: Floats, y: Floats) -> Weighted:
    """Prepares R2 under row weights: takes [b, n], gives [b], NaN where the targets have no spread."""
    centred = y - y.mean()
    residual = (y - predicted) ** 2

    def score(weights: Floats) -> Floats:
        n = weights.sum(axis=1)
        square: Floats = weights @ centred**2
        total = square - (weights @ centred) ** 2 / n
        spread = total > _ROUNDING * square
        explained: Floats = 1 - np.divide(
            weights @ residual, total, out=np.full(len(n), np.nan), where=spread
        )
        return explained

    return score


def interval(score: Weighted, stratum: Ints, group: Ints, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a weighted score; see `intervals`."""
    return intervals([score], stratum, group, seed)[0]


def intervals(scores: Sequence[Weighted], stratum: Ints, group: Ints, seed: int) -> list[tuple[float, float]]:
    """95 % bootstrap intervals of weighted scores, all on the same resamples.

    Args:
        scores: what `weighted_auroc` and the like prepared.
        stratum: stratum of each group, int64 [n_groups]; groups are drawn within their stratum.
        group: group of each test row, int64 [n].

    Resamples in which R2 is undefined are left out. AUROC always is defined: each resample has every stratum.
    """
    rng = np.random.default_rng([seed, 2])
    members, row_member = np.unique(group, return_inverse=True)
    drawn = [[score(w[:, row_member]) for score in scores] for w in _resamples(rng, stratum[members])]
    found = [np.concatenate(each) for each in zip(*drawn, strict=True)]
    ends = [np.quantile(f[~np.isnan(f)], [0.025, 0.975]) for f in found]
    return [(float(low), float(high)) for low, high in ends]


def _resamples(rng: np.random.Generator, stratum: Ints) -> Iterator[Floats]:
    """How often each group was drawn, [block, n_groups], in blocks of bounded size."""
    n_groups = len(stratum)
    block = max(1, min(N_RESAMPLES, _BLOCK_CELLS // n_groups))
    for start in range(0, N_RESAMPLES, block):
        size = min(block, N_RESAMPLES - start)
        counts = np.zeros((size, n_groups))
        for value in np.unique(stratum):
            where = np.flatnonzero(stratum == value)
            drawn = rng.integers(len(where), size=(size, len(where))) + np.arange(size)[:, None] * len(where)
            counts[:, where] = np.bincount(drawn.ravel(), minlength=size * len(where)).reshape(size, -1)
        yield counts

"""What a report measures on held-out rows: AUROC, R2, accuracy and calibration, each with an interval.

A measure knows its value, its value when rows count more or less (for the bootstrap), and what each row adds to it
(for the infinitesimal jackknife of Efron 1982, which for AUROC is the variance of DeLong 1988, and over groups that of
Obuchowski 1997). Up to 5,000 rows intervals are bootstraps; beyond, where both agree, the normal interval costs
nothing. Calibration: the Brier score (Brier 1950), and the expected calibration error over 15 bins of equal width
(Naeini et al. 2015, Guo et al. 2017), which is biased upwards by about one over the root of the rows in a bin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from trocar.analysis import metrics
from trocar.analysis.labels import Floats, Ints

BOOTSTRAP_ROWS: Final = 5_000
N_BINS: Final = 15
_NORMAL: Final = 1.959963984540054


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """Attributes:
    influence: [n]; the value's derivative by the weight of each row.
    low, high: what the measure cannot leave.
    """

    value: float
    weighted: metrics.Weighted
    influence: Floats
    low: float = 0.0
    high: float = 1.0


def auroc(scores: Floats, y: Floats) -> Measure:
    """AUROC of scores [n] for classes [n] of 0 and 1, both present."""
    upper = y == 1
    ones, zeros = np.sort(scores[upper]), np.sort(scores[~upper])
    value = metrics.auroc(scores, y)
    share = np.empty(len(y))
    share[upper] = _below(zeros, scores[upper])
    share[~upper] = 1 - _below(ones, scores[~upper])
    influence = (share - value) / np.where(upper, len(ones), len(zeros))
    return Measure(value, metrics.weighted_auroc(scores, y), influence)


def _below(ranked: Floats, values: Floats) -> Floats:
    """The share of `ranked` below each value, ties counted half."""
    sides = np.searchsorted(ranked, values, "left") + np.searchsorted(ranked, values, "right")
    share: Floats = sides / (2 * len(ranked))
    return share


def r2(predicted: Floats, y: Floats) -> Measure:
    """Explained share of the variance of `y`, which is not constant."""
    residual, spread = (y - predicted) ** 2, (y - y.mean()) ** 2
    rss, tss = float(residual.sum()), float(spread.sum())
    influence = rss / tss**2 * spread - residual / tss
    return Measure(metrics.r2(predicted, y), metrics.weighted_r2(predicted, y), influence, low=-np.inf)


def mean(values: Floats) -> Measure:
    """The mean of a number per row: accuracy of hits, Brier score of squared errors."""
    value = float(values.mean())

    def weighted(weights: Floats) -> Floats:
        out: Floats = weights @ values / weights.sum(axis=1)
        return out

    return Measure(value, weighted, (values - value) / len(values))


def calibration_error(p: Floats, y: Floats) -> Measure:
    """Expected calibration error of probabilities [n] for outcomes [n] of 0 and 1."""
    bins = np.minimum((p * N_BINS).astype(np.int64), N_BINS - 1)
    order = np.argsort(bins, kind="stable")
    edges = np.flatnonzero(np.diff(bins[order], prepend=-1))
    gap = (p - y)[order]

    def weighted(weights: Floats) -> Floats:
        sums = np.add.reduceat(weights[:, order] * gap, edges, axis=1)
        out: Floats = np.abs(sums).sum(axis=1) / weights.sum(axis=1)
        return out

    n = len(p)
    value = float(weighted(np.ones((1, n)))[0])
    sign = np.zeros(N_BINS)
    sign[bins[order][edges]] = np.sign(np.add.reduceat(gap, edges))
    return Measure(value, weighted, (sign[bins] * (p - y) - value) / n)


def intervals(
    measures: Sequence[Measure], stratum: Ints, group: Ints, seed: int
) -> list[tuple[float, float]]:
    """95 % intervals of measures on the same rows, which were drawn in groups, within strata.

    Args:
        stratum: stratum of each group, int64 [n_groups].
        group: group of each row, int64 [n].
    """
    if len(group) <= BOOTSTRAP_ROWS:
        return metrics.intervals([m.weighted for m in measures], stratum, group, seed)
    members, row_member = np.unique(group, return_inverse=True)
    return [_normal(m, row_member, stratum[members]) for m in measures]


def _normal(measure: Measure, member: Ints, stratum: Ints) -> tuple[float, float]:
    by_group = np.bincount(member, weights=measure.influence)
    sides = [by_group[stratum == value] for value in np.unique(stratum)]
    spread = _NORMAL * float(np.sqrt(sum(((s - s.mean()) ** 2).sum() for s in sides)))
    return max(measure.low, measure.value - spread), min(measure.high, measure.value + spread)

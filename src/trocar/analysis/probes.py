"""Probes that follow from moments alone: no row is read again, whatever the labels and penalties.

Ridge and discriminant are made on standardised features (mean and deviation of the fitted rows) and folded back, so
results live in raw space. Targets are columns of the moments: 0 and 1 for two classes, one column per class for more.
Penalties are those of `logistic`: on standardised weights, against a sum over rows. In float64.

Shapes: d features, k targets, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from trocar import errors
from trocar.analysis.labels import Floats
from trocar.analysis.moments import Moments
from trocar.analysis.standard import correlation, standard


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Scores `weights @ x + bias`; float64 [k, d] and [k]."""

    weights: Floats
    bias: Floats


def mean_diff(m: Moments) -> Probe:
    """Difference of the class means, the bias at their midpoint (Marks and Tegmark 2023, "mass-mean").

    Args:
        m: moments with k columns of 0 and 1, each with both.
    """
    ones = m.target_total
    high = m.cross / ones
    low = (m.total[:, None] - m.cross) / (m.n - ones)
    step, middle = (high - low).T, m.pilot + (high + low).T / 2
    return Probe(step, -(step * middle).sum(axis=1))


def ridge(m: Moments, l2: float) -> Probe:
    """Ridge regression of k targets (Hoerl and Kennard 1970): squared errors of the standardised target plus l2 |w|^2.

    w = (R + l2 / n)^-1 r, with R the correlation of the features and r theirs with the target. A constant target is
    predicted by itself.

    Raises:
        RunFailed: `fit_not_converged` where the features are so nearly dependent that l2 does not make up for it.
    """
    s = standard(m)
    mean = m.target_total / m.n
    scaled = _solve(correlation(m, s), s.inverse[:, None] * m.cross_covariance, l2 / m.n)
    weights, bias = s.fold(scaled.T, mean)
    return Probe(weights, bias)


def discriminant(m: Moments, l2: float) -> Probe:
    """Linear discriminant analysis (Fisher 1936; Hastie et al. 2009, 4.3): Gaussian classes that share a covariance.

    weights = S^-1 (mean of the class), bias = log share - mean S^-1 mean / 2, with S the covariance within classes of
    the standardised features, over n, plus l2 / n on its diagonal (Friedman 1989). Scores are logits up to a term that
    all classes share, about the mean of all rows.

    Args:
        m: moments with one column of 0 and 1 for each of C >= 2 classes.

    Raises:
        RunFailed: `fit_not_converged`, as `ridge`.
    """
    s = standard(m)
    share = m.target_total / m.n
    means = s.inverse[:, None] * m.cross_covariance / share  # of each class, about the mean of all
    within = correlation(m, s) - (means * share) @ means.T
    scaled = _solve(within, means, l2 / m.n)
    weights, bias = s.fold(scaled.T, np.log(share) - (means * scaled).sum(axis=0) / 2)
    return Probe(weights, bias)


def discriminant_of_two(m: Moments, l2: float) -> Probe:
    """`discriminant` for each of k columns of 0 and 1: log-odds of the upper class."""
    found = [discriminant(_two(m, column), l2) for column in range(m.cross.shape[1])]
    return Probe(
        np.stack([p.weights[1] - p.weights[0] for p in found]),
        np.stack([p.bias[1] - p.bias[0] for p in found]),
    )


def _two(m: Moments, column: int) -> Moments:
    """The moments with the columns "not this class" and "this class" alone."""
    ones, cross = m.target_total[column], m.cross[:, column]
    totals = np.array([m.n - ones, ones])
    return Moments(
        m.n, m.pilot, m.total, m.square, m.gram, totals, totals, np.stack([m.total - cross, cross], axis=1)
    )


def _solve(matrix: Floats, right: Floats, ridge: float) -> Floats:
    matrix = matrix + ridge * np.eye(len(matrix))
    still = matrix.diagonal() <= ridge  # a feature that does not vary: its row of the right side is 0
    np.fill_diagonal(matrix, np.where(still, 1.0, matrix.diagonal()))
    try:
        solved: Floats = cho_solve(cho_factor(matrix, check_finite=False), right, check_finite=False)
    except LinAlgError:
        reason = (
            f"the features depend on each other, and l2 is too small for it: {ridge:.3g} of their variance"
        )
        raise errors.refuse("fit_not_converged", "l2", reason) from None
    return solved

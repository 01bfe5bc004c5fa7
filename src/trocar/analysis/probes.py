"""The three fits themselves: rows of one site and labels in, a linear score and a direction out.

Rows are standardised for the fit (mean and standard deviation of the fitted rows) and the weights are folded
back, so results live in raw space. A feature that does not vary beyond float32 rounding gets weight 0. All in
float64. Splits, labels and scores are somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge

from trocar import errors
from trocar.analysis.labels import Floats

MAX_ITERATIONS: Final = 5000
_ROUNDING: Final = 1e-6
_SMALLEST: Final = 1e-30  # below it, weights in raw space would leave the range of float32


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """`weights @ x + bias`, and the direction that goes with it; float64 [width]."""

    weights: Floats
    bias: float
    direction: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Standardised:
    """Rows with mean 0 and deviation 1: `z = (x - mean) * inverse`; inverse is 0 for a constant feature."""

    z: Floats
    mean: Floats
    inverse: Floats

    def fold(self, weights: Floats, bias: float) -> tuple[Floats, float]:
        """The weights and bias that give the same scores on raw rows."""
        raw = weights * self.inverse
        return raw, bias - float(raw @ self.mean)


def standardise(x: Floats) -> Standardised:
    """Standardises the columns of `x` [n, width]."""
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    varies = deviation > np.maximum(_ROUNDING * np.abs(mean), _SMALLEST)
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)
    return Standardised((x - mean) * inverse, mean, inverse)


def mean_diff(x: Floats, y: Floats) -> Probe:
    """Difference of the class means, the bias at their midpoint (Marks and Tegmark 2023, "mass-mean")."""
    low, high = x[y == 0].mean(axis=0), x[y == 1].mean(axis=0)
    step = high - low
    return Probe(step, -float(step @ (low + high)) / 2, step)


def logistic(s: Standardised, x: Floats, y: Floats, l2: float) -> Probe:
    """Logistic regression: sum of log losses plus l2/2 times the squared norm of the standardised weights.

    Raises:
        RunFailed: `fit_not_converged`.
    """
    model = LogisticRegression(C=1 / l2, solver="lbfgs", max_iter=MAX_ITERATIONS).fit(s.z, y)
    if model.n_iter_[0] >= MAX_ITERATIONS:
        raise errors.refuse(
            "fit_not_converged", "l2", f"no optimum after {MAX_ITERATIONS} steps with l2={l2:g}"
        )
    weights, bias = s.fold(model.coef_[0], float(model.intercept_[0]))
    unit = _unit(weights)
    gap = float(unit @ (x[y == 1].mean(axis=0) - x[y == 0].mean(axis=0)))
    return Probe(weights, bias, unit * gap)


def ridge(s: Standardised, x: Floats, y: Floats, l2: float) -> Probe:
    """Ridge regression: squared errors of the standardised target plus l2 times the squared norm."""
    scale = y.std()
    model = Ridge(alpha=l2, solver="cholesky").fit(s.z, (y - y.mean()) / scale)
    weights, bias = s.fold(model.coef_ * scale, float(model.intercept_) * scale + y.mean())
    unit = _unit(weights)
    return Probe(weights, bias, unit * float((x @ unit).std()))


def _unit(weights: Floats) -> Floats:
    norm = float(np.linalg.norm(weights))
    return weights / norm if norm > 0 else weights

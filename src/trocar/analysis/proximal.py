"""One minimisation of a smooth convex objective plus l1 |w|_1, told from outside as `descent` is.

Proximal Newton with the rows' correlation for a Hessian (Lee, Sun and Saunders 2014): each step minimises the quadratic
model and the penalty together, which is a lasso over d numbers instead of n rows, solved by scikit-learn's coordinate
descent; then the step is shortened until the objective falls enough.
"""

from __future__ import annotations

import warnings
from typing import Final

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso

from trocar.analysis.labels import Floats

_SUFFICIENT: Final = 1e-4
_FLOOR: Final = 1e-5
_SMALLEST_STEP: Final = 1e-10


class Proximal:
    """A search like `Descent`, over [weights, bias]; f and its gradient are those of the smooth part.

    Args of the constructor:
        matrix: [d, d], correlation of the features.
        curvature: what it is multiplied with to be the Hessian at zero weights.
        l1: penalty of the absolute weights.
        l2: its part of the smooth objective.
    """

    def __init__(
        self,
        start: Floats,
        matrix: Floats,
        curvature: float,
        l1: float,
        l2: float,
        *,
        tolerance: float,
        noise: float,
    ) -> None:
        self.point, self.done, self.stuck = start, False, False
        self._matrix = matrix + _FLOOR * np.eye(len(matrix))
        self._curvature, self._l1, self._l2 = curvature, l1, l2
        self._tolerance, self._noise = tolerance, noise
        self._x: Floats | None = None
        self._f, self._slope, self._step = np.inf, 0.0, 1.0
        self._g = self._direction = np.zeros_like(start)

    def tell(self, f: float, g: Floats) -> None:
        """Takes the smooth part and its gradient at `point`, and moves `point` to where they are wanted next."""
        total = f + self._l1 * float(np.abs(self.point[:-1]).sum())
        if (
            self._x is None
            or total <= self._f + _SUFFICIENT * self._step * self._slope + self._noise * self._f
        ):
            if self._x is not None:
                self._rescale(self.point - self._x, g - self._g)
            self._x, self._f, self._g, self._step = self.point, total, g, 1.0
            self._turn()
        else:
            self._step /= 2
            self.stuck = self._step < _SMALLEST_STEP
        if not self.done:
            self.point = self._x + self._step * self._direction

    def _rescale(self, moved: Floats, changed: Floats) -> None:
        """The curvature along the last step is that of the next model."""
        w = moved[:-1]
        model = float(w @ self._matrix @ w) + float(moved[-1] ** 2)
        seen = float(moved @ changed) - self._l2 * float(w @ w)
        if model > 0 and seen > 0:
            self._curvature = float(np.clip(seen / model, self._curvature / 10, self._curvature * 10))

    def _turn(self) -> None:
        if self._x is None:
            return
        w = self._x[:-1]
        target = self._lasso(w, self._g[:-1])
        self._direction = np.append(target - w, -self._g[-1] / self._curvature)
        fall = self._l1 * float(np.abs(target).sum() - np.abs(w).sum())
        self._slope = float(self._g @ self._direction) + fall
        self.done = -self._slope / 2 <= self._tolerance * abs(self._f)

    def _lasso(self, w: Floats, g: Floats) -> Floats:
        """The minimum of g (v - w) + (v - w) H (v - w) / 2 + l1 |v|_1, H = R^T R, as least squares over R."""
        d = len(w)
        hessian = self._curvature * self._matrix + self._l2 * np.eye(d)
        r = cholesky(hessian, check_finite=False)
        y = solve_triangular(r, hessian @ w - g, trans="T", check_finite=False)
        model = Lasso(alpha=self._l1 / d, fit_intercept=False, precompute=hessian, tol=1e-8, max_iter=2000)
        model.coef_ = w.copy()
        model.warm_start = True
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # a step that is not quite the best is still a step
            found: Floats = model.fit(r, y).coef_
        return found

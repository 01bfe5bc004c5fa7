"""One minimisation by preconditioned L-BFGS, told from outside: it says where to look, and is told what is there.

So any number of them share one scan of the rows. The objective is smooth and convex; the preconditioner is
whatever approximates the inverse of its Hessian (Nocedal and Wright 2006, chapters 3, 7.2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from trocar.analysis.labels import Floats

HISTORY: Final = 10
_SUFFICIENT: Final = 1e-4
_SMALLEST_STEP: Final = 1e-12
_FLAT_STEPS: Final = 3


class Descent:
    """A search for the minimum of f(x), float64 [p].

    Attributes:
        point: where f and its gradient are wanted next; the minimum that was found once `done`.
        done: `point` is within `tolerance`, relative to f, of the minimum, as far as the curvature seen so far tells;
            or f, which is rounded, has not fallen for three steps.
        stuck: no step went down although the curvature promises that one should.
    """

    def __init__(
        self,
        start: Floats,
        precondition: Callable[[Floats], Floats],
        *,
        tolerance: float,
        noise: float,
        first_step: Callable[[float], float] = lambda _: 1.0,
    ) -> None:
        """Args:
        precondition: approximates the inverse Hessian times a vector, up to a factor.
        noise: relative rounding of f; a step that seems to go up by less is no reason to turn back.
        first_step: length of the first step, given the product of gradient and preconditioned gradient.
        """
        self.point, self.done, self.stuck = start, False, False
        self._precondition, self._tolerance, self._noise, self._first_step = (
            precondition, tolerance, noise, first_step,
        )  # fmt: skip
        self._pairs: deque[tuple[Floats, Floats, float]] = deque(maxlen=HISTORY)
        self._scale, self._flat = 1.0, 0
        self._x: Floats | None = None
        self._f, self._slope, self._step = np.inf, 0.0, 1.0
        self._g = self._direction = np.zeros_like(start)

    def tell(self, f: float, g: Floats) -> None:
        """Takes f and its gradient at `point`, and moves `point` to where they are wanted next."""
        if self._x is None:
            self._accept(f, g)
            return
        if f <= self._f + _SUFFICIENT * self._step * self._slope + self._noise * abs(self._f):
            self._learn(self.point - self._x, g - self._g)
            self._accept(f, g)
        else:
            self._shorten(f, float(g @ self._direction))

    def _accept(self, f: float, g: Floats) -> None:
        first = self._x is None
        self._flat = self._flat + 1 if f >= self._f - self._noise * abs(f) else 0
        self._x, self._f, self._g = self.point, f, g
        self._direction = -self._inverse_hessian(g)
        self._slope = float(g @ self._direction)
        if -self._slope / 2 <= self._tolerance * abs(f) or self._flat == _FLAT_STEPS:
            self.done = True
            return
        self._step = self._first_step(-self._slope) if first else 1.0
        self.point = self._x + self._step * self._direction

    def _learn(self, moved: Floats, changed: Floats) -> None:
        curvature = float(moved @ changed)
        if curvature > 1e-10 * float(np.linalg.norm(moved) * np.linalg.norm(changed)):
            self._pairs.append((moved, changed, 1.0 / curvature))
            self._scale = curvature / float(changed @ self._precondition(changed))

    def _shorten(self, f: float, slope: float) -> None:
        """The minimum of the cubic through both ends of the step, kept away from them."""
        bend = self._slope + slope - 3 * (self._f - f) / -self._step
        root = bend * bend - self._slope * slope
        share = 0.5
        if np.isfinite(root) and root >= 0:
            down = slope - self._slope + 2 * np.sqrt(root)
            share = 1 - (slope + np.sqrt(root) - bend) / down if down > 0 else 0.5
        self._step *= float(np.clip(share, 0.1, 0.5)) if np.isfinite(share) else 0.1
        if self._step < _SMALLEST_STEP:
            self.stuck = True
        x = self.point if self._x is None else self._x
        self.point = x + self._step * self._direction

    def _inverse_hessian(self, g: Floats) -> Floats:
        """The two loops of L-BFGS around the preconditioner."""
        q, shares = g.copy(), []
        for moved, changed, inverse in reversed(self._pairs):
            shares.append(inverse * float(moved @ q))
            q -= shares[-1] * changed
        r = self._scale * self._precondition(q)
        for (moved, changed, inverse), share in zip(self._pairs, reversed(shares), strict=True):
            r += (share - inverse * float(changed @ r)) * moved
        return r

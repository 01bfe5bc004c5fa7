"""Standardised features without standardised rows: what is fitted on z = (x - mean) / deviation, said in terms of x.

Penalties apply to standardised weights, so a fit does not depend on the units of a feature. A feature that does not
vary beyond the rounding of float32 has the inverse deviation 0, and gets weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from trocar.analysis.labels import Floats, Ints
from trocar.analysis.moments import Moments

_ROUNDING: Final = 1e-6
_SMALLEST: Final = 1e-30  # below it, weights in raw space would leave the range of float32
_FLOOR: Final = 1e-5
_FAR: Final = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class Far:
    """Features that are centred before they are multiplied, because float32 would lose their digits.

    Attributes:
        columns: int64 [f].
        centre: [f], exact in float32.
    """

    columns: Ints
    centre: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Standard:
    """`z = (x - mean) * inverse`, float64 [d]; `n` rows had this mean and deviation."""

    n: int
    mean: Floats
    inverse: Floats

    def fold(self, weights: Floats, bias: Floats) -> tuple[Floats, Floats]:
        """The raw weights [..., d] and bias [...] that give the same scores."""
        raw = weights * self.inverse
        return raw, bias - raw @ self.mean

    @property
    def far(self) -> Far:
        """The features that lie more than eight deviations from 0."""
        columns = np.flatnonzero(np.abs(self.mean * self.inverse) > _FAR)
        return Far(columns, self.mean[columns].astype(np.float32).astype(np.float64))

    def gradient(self, by_weights: Floats, by_bias: Floats) -> Floats:
        """The gradient by standardised weights [..., d], from that by raw weights and by bias [...]."""
        out: Floats = self.inverse * (by_weights - by_bias[..., None] * self.mean)
        return out


def standard(m: Moments) -> Standard:
    """How the rows of `m` are standardised."""
    mean, deviation = m.mean, np.sqrt(m.variance)
    varies = deviation > np.maximum(_ROUNDING * np.abs(mean), _SMALLEST)
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)
    return Standard(m.n, mean, inverse)


def correlation(m: Moments, s: Standard) -> Floats:
    """[d, d]: the covariance of the standardised features, 0 where one does not vary."""
    out: Floats = m.covariance * np.outer(s.inverse, s.inverse)
    return out


def likely(m: Moments, s: Standard) -> Floats:
    """[d, d]: the correlation of rows that are standardised by `s`, from moments of a sample of them.

    A feature that the sample shows too little of has its full variance all the same: it must not look flat.
    """
    matrix = correlation(m, s)
    np.fill_diagonal(matrix, np.maximum(matrix.diagonal(), 1.0))
    return matrix


def curvature(m: Moments, s: Standard, penalty: float) -> Floats:
    """[d, d]: the inverse of the likely correlation + penalty, for preconditioning.

    What lies below 1e-5 of a feature's variance is rounding in a Gram matrix of float32 products, and is floored.
    """
    matrix = likely(m, s)
    np.fill_diagonal(matrix, matrix.diagonal() + max(penalty, _FLOOR))
    identity = np.eye(len(matrix))
    out: Floats = cho_solve(cho_factor(matrix, check_finite=False), identity, check_finite=False)
    return (out + out.T) / 2

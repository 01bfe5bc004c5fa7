"""What follows from the eigenvectors of a covariance: principal components, whitening, and the erasure of a concept.

From moments alone: no row is read again. Directions whose variance is rounding are left out, so that fewer rows than
features, copies and constants do no harm. In float64.

Shapes: d features, k components or targets, r directions that vary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy.linalg import eigh

from trocar import errors
from trocar.analysis.labels import Floats
from trocar.analysis.moments import Moments
from trocar.analysis.standard import Standard, correlation, standard

Method = Literal["zca", "pca"]
TOLERANCE: Final = 1e-6
"""Of the largest eigenvalue of a correlation; what lies below is the rounding of float32 products."""
_SMALLEST_PART: Final = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """Principal components: `(x - mean) @ axes.T` are the coordinates of a row.

    Attributes:
        mean: [d].
        axes: [k, d], orthonormal, by falling variance; the largest entry of each is positive.
        variance: [k], over n.
        share: [k], of the variance of all directions.
    """

    mean: Floats
    axes: Floats
    variance: Floats
    share: Floats


def pca(m: Moments, k: int) -> Components:
    """The k directions of largest variance (Hotelling 1933), of raw rows: a feature with a large variance leads.

    Raises:
        ProgramError: `bad_value` for k outside 1 to d, `too_few_rows` for fewer than k + 1 rows.
    """
    d = m.width
    if not 1 <= k <= d:
        raise errors.refuse("bad_value", "k", f"{k!r} components of {d} features")
    if m.n <= k:
        raise errors.refuse("too_few_rows", "k", f"{m.n} rows have at most {m.n - 1} components, not {k}")
    covariance = m.covariance
    values, vectors = eigh(covariance, subset_by_index=[d - k, d - 1], check_finite=False)
    axes = vectors[:, ::-1].T
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    variance = np.maximum(values[::-1], 0.0)
    total = float(np.trace(covariance))
    return Components(m.mean, axes, variance, variance / total if total > 0 else np.zeros(k))


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Eigenvalues [r] and eigenvectors [d, r] of the correlation, of the directions that vary, ascending."""

    standard: Standard
    values: Floats
    vectors: Floats

    @property
    def rank(self) -> int:
        return len(self.values)


def spectrum(m: Moments) -> Spectrum:
    """The directions in which standardised rows vary."""
    s = standard(m)
    values, vectors = eigh(correlation(m, s), check_finite=False)
    kept = values > TOLERANCE * max(values[-1], TOLERANCE)
    return Spectrum(s, values[kept], vectors[:, kept])


@dataclass(frozen=True, slots=True, eq=False)
class Whitening:
    """`(x - mean) @ matrix.T` has the covariance 1 in `rank` directions and 0 in the others.

    Attributes:
        matrix: [d, d] for "zca"; [r, d] for "pca", by falling variance.
    """

    mean: Floats
    matrix: Floats
    rank: int


def whitening(m: Moments, method: Method = "zca") -> Whitening:
    """Whitens standardised rows: "zca" stays as near to them as whitened rows can, "pca" turns to their components.

    ZCA-cor and PCA-cor of Kessy, Lewin and Strimmer 2018: C^-1/2 D^-1 and L^-1/2 V^T D^-1, with D the deviations and
    C = V L V^T the correlation.
    """
    found = spectrum(m)
    turned = (found.vectors / np.sqrt(found.values)).T * found.standard.inverse
    matrix = found.vectors @ turned if method == "zca" else turned[::-1]
    return Whitening(found.standard.mean, matrix, found.rank)


@dataclass(frozen=True, slots=True, eq=False)
class Eraser:
    """`x - left @ right @ (x - mean)`: the row without what a linear probe could know of a concept.

    Attributes:
        left: [d, k].
        right: [k, d]; `right @ left` is the identity.
    """

    mean: Floats
    left: Floats
    right: Floats


def leace(m: Moments) -> Eraser:
    """Least-squares concept erasure (LEACE, Belrose et al. 2023, theorem 4.3).

    x - W^+ P W (x - mean), with W a whitening of the rows and P the orthogonal projection on the columns of W S, S the
    covariance of rows and concept. Afterwards that covariance is 0, so all classes have the same mean and no linear
    probe under a convex loss does better than a constant; among all such affine maps this one moves rows the least.
    W^+ P W is the same for any whitening; that of the standardised rows is used, which does not care for units.

    Args:
        m: moments with the concept as targets: one column for two classes, or one for each class.

    Raises:
        ProgramError: `bad_labels` when no target varies with a feature.
    """
    found = spectrum(m)
    inverse = found.standard.inverse
    crossed = inverse[:, None] * m.cross_covariance
    spread = np.sqrt(np.maximum(m.target_square / m.n - (m.target_total / m.n) ** 2, 0.0))
    crossed = np.divide(crossed, spread, out=np.zeros_like(crossed), where=spread > 0)
    whitened = (found.vectors.T @ crossed) / np.sqrt(found.values)[:, None]
    turned, sizes, _ = np.linalg.svd(whitened, full_matrices=False)
    kept = sizes > _SMALLEST_PART * max(sizes.max(initial=0.0), _SMALLEST_PART)
    if not kept.any():
        raise errors.refuse(
            "bad_labels", "labels", "no feature varies with the labels: there is nothing to erase"
        )
    basis = turned[:, kept]
    deviation = np.divide(1.0, inverse, out=np.zeros_like(inverse), where=inverse > 0)
    left = deviation[:, None] * (found.vectors @ (np.sqrt(found.values)[:, None] * basis))
    right = ((found.vectors / np.sqrt(found.values)) @ basis).T * inverse
    return Eraser(found.standard.mean, left, right)

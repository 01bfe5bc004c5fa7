"""What a fit returns: per site a direction, a probe, and how well the probe does on rows it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trocar.analysis.labels import Floats, Ints

Vector = npt.NDArray[np.float32]
Kind = Literal["lda", "logistic", "mean_diff", "multinomial", "ridge"]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether the probabilities of a classifier are what happens, on held-out rows, with 95 % intervals.

    Attributes:
        brier: mean squared distance of the probabilities from the outcomes, over two classes that of the upper one.
        ece: expected calibration error of the upper class, or of the class that is called, over 15 bins.
    """

    brier: float
    brier_interval: Interval
    ece: float
    ece_interval: Interval


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """Scores of a probe for two classes, or for more.

    Attributes:
        n_train, n_test: rows on each side.
        train_counts, test_counts: rows of each class, ascending.
        train_auroc, test_auroc: with more than two classes, the mean over classes of each against the others.
        train_accuracy, test_accuracy: share of rows on the right side of score 0, or with the highest score right.
        interval: 95 % interval of `test_auroc`.
        control_auroc: test AUROC of the same fit on shuffled labels; far from 0.5 means the split leaks.
        accuracy_interval: 95 % interval of `test_accuracy`.
        calibration: None for a probe without probabilities (`mean_diff`).
        folds: AUROC on each fold of the fit to the others; empty when there was no cross-validation.
    """

    n_train: int
    n_test: int
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    train_auroc: float
    test_auroc: float
    train_accuracy: float
    test_accuracy: float
    interval: Interval
    control_auroc: float
    accuracy_interval: Interval
    calibration: Calibration | None = None
    folds: tuple[float, ...] = ()

    @property
    def headline(self) -> float:
        return self.test_auroc


@dataclass(frozen=True, slots=True)
class RidgeMetrics:
    """Scores of a regression.

    Attributes:
        train_r2, test_r2: explained share of the target's variance; negative when worse than its mean.
        interval: 95 % bootstrap interval of `test_r2`.
        control_r2: test R2 of the same fit on shuffled targets; about 0 or below.
        folds: R2 on each fold of the fit to the others; empty when there was no cross-validation.
    """

    n_train: int
    n_test: int
    train_r2: float
    test_r2: float
    interval: Interval
    control_r2: float
    folds: tuple[float, ...] = ()

    @property
    def headline(self) -> float:
        return self.test_r2


@dataclass(frozen=True, slots=True, eq=False)
class SiteFit:
    """The fit at one site. The probe's score of a row x is `weights @ x + bias`.

    Attributes:
        direction: float32 [width]; adding 1.0 times it moves a row by one natural step (see `fit`). Zero when
            the site says nothing at all, for example because all its rows are equal.
        weights: float32 [width], in raw space: no standardisation is left to do.
        bias: float64.
        multinomial: all three have one row, or number, for each class in front.
    """

    direction: Vector
    weights: Vector
    bias: float | Floats
    metrics: ClassMetrics | RidgeMetrics


@dataclass(frozen=True, slots=True, eq=False)
class FitResult:
    """All sites of one fit, on one split.

    Attributes:
        classes: the label values that stand for the lower and the upper class, or for all; None for ridge.
        train, test: row numbers of each side, ascending, int64.
        l2: the penalty that was used at each site; empty for mean_diff, which has none.
    """

    kind: Kind
    classes: tuple[int, ...] | None
    seed: int
    test_fraction: float
    l2: Mapping[str, float]
    train: Ints
    test: Ints
    sites: Mapping[str, SiteFit]

    @property
    def best(self) -> str:
        """The site with the highest test AUROC (or R2); the first of them when several tie.

        Its score is the best of many, so it is optimistic: test it again on rows that this fit has not seen.
        """
        return max(self.sites, key=lambda site: self.sites[site].metrics.headline)

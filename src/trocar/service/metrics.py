"""The numbers that a fit releases for each site: which they are, and in which order."""

from __future__ import annotations

from typing import Final

import numpy as np

from trocar import analysis

_CLASS_METRICS: Final = (
    "auroc", "auroc_low", "auroc_high", "auroc_shuffled", "auroc_train", "accuracy", "accuracy_train", "direction_norm",
)  # fmt: skip
METRICS: Final = {
    "logistic": _CLASS_METRICS,
    "mean_diff": _CLASS_METRICS,
    "ridge": ("r2", "r2_low", "r2_high", "r2_shuffled", "r2_train", "direction_norm"),
    "linear_map": ("r2", "r2_train"),
}
"""Names of the numbers that a fit gives for each site, in order."""


def numbers(fit: analysis.SiteFit) -> tuple[float, ...]:
    """The numbers of `METRICS`."""
    metrics, norm = fit.metrics, float(np.linalg.norm(fit.direction))
    low, high = metrics.interval
    if isinstance(metrics, analysis.RidgeMetrics):
        return (metrics.test_r2, low, high, metrics.control_r2, metrics.train_r2, norm)
    return (
        metrics.test_auroc, low, high, metrics.control_auroc, metrics.train_auroc,
        metrics.test_accuracy, metrics.train_accuracy, norm,
    )  # fmt: skip

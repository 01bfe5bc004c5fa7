"""The numbers that a fit releases for each site: which they are, and in which order."""

from __future__ import annotations

from typing import Final

import numpy as np

from trocar import analysis
from trocar.wire.requests import FitRequest

_CLASS_METRICS: Final = (
    "auroc", "auroc_low", "auroc_high", "auroc_shuffled", "auroc_train", "accuracy", "accuracy_train", "direction_norm",
)  # fmt: skip
_CALIBRATED: Final = (
    *_CLASS_METRICS, "accuracy_low", "accuracy_high", "brier", "brier_low", "brier_high", "ece", "ece_low", "ece_high",
)  # fmt: skip
METRICS: Final = {
    "logistic": _CALIBRATED,
    "lda": _CALIBRATED,
    "multinomial": tuple(name for name in _CALIBRATED if name != "direction_norm"),
    "mean_diff": _CLASS_METRICS,
    "ridge": ("r2", "r2_low", "r2_high", "r2_shuffled", "r2_train", "direction_norm"),
    "linear_map": ("r2", "r2_train"),
}
"""Names of the numbers that a fit gives for each site, in order; `names` adds those of a cross-validation."""


PROBE: Final = ("direction", "weights", "bias")
PROBES: Final = ("directions", "class_weights", "biases")
"""Arrays of an artifact at each site; the second row of names is for one row, or number, of each class."""


def names(request: FitRequest) -> tuple[str, ...]:
    """Of the numbers that a fit gives for each site, in order: they follow from its request."""
    first = METRICS[request.kind]
    if not request.folds:
        return first
    return (*first, *(f"{first[0]}_folds{end}" for end in ("", "_least", "_most")))


def numbers(fit: analysis.SiteFit, request: FitRequest) -> tuple[float, ...]:
    """The numbers of `names`."""
    found = _by_name(fit)
    return tuple(found[name] for name in names(request))


def _by_name(fit: analysis.SiteFit) -> dict[str, float]:
    metrics = fit.metrics
    score = "r2" if isinstance(metrics, analysis.RidgeMetrics) else "auroc"
    low, high = metrics.interval
    found = {
        f"{score}_low": low,
        f"{score}_high": high,
        "direction_norm": float(np.linalg.norm(fit.direction)),
    }
    if metrics.folds:
        found[f"{score}_folds"] = float(np.mean(metrics.folds))
        found |= {f"{score}_folds_least": min(metrics.folds), f"{score}_folds_most": max(metrics.folds)}
    if isinstance(metrics, analysis.RidgeMetrics):
        scores = {"r2": metrics.test_r2, "r2_shuffled": metrics.control_r2, "r2_train": metrics.train_r2}
        return found | scores
    return found | _of_classes(metrics)


def _of_classes(metrics: analysis.ClassMetrics) -> dict[str, float]:
    ends = zip(("accuracy_low", "accuracy_high"), metrics.accuracy_interval, strict=True)
    found = {
        "auroc": metrics.test_auroc,
        "auroc_shuffled": metrics.control_auroc,
        "auroc_train": metrics.train_auroc,
        "accuracy": metrics.test_accuracy,
        "accuracy_train": metrics.train_accuracy,
        **dict(ends),
    }
    c = metrics.calibration
    if c is not None:
        found |= {"brier": c.brier, "brier_low": c.brier_interval[0], "brier_high": c.brier_interval[1]}
        found |= {"ece": c.ece, "ece_low": c.ece_interval[0], "ece_high": c.ece_interval[1]}
    return found

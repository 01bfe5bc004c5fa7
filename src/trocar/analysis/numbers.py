"""What each analysis lets leave: names of its numbers, in order, and shapes of its arrays.

Both follow from the request alone, so that a gate can declare and price them before anything runs, and read
nothing else. A result's `numbers()` has exactly these names; its `arrays()` are what stays behind for later
use (`score`, edits). This module imports no analysis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from trocar.analysis.results import ClassMetrics

CLASS: Final = (
    "auroc", "auroc_low", "auroc_high", "auroc_shuffled", "auroc_train",
    "accuracy", "accuracy_low", "accuracy_high", "accuracy_train",
    "brier", "brier_low", "brier_high", "ece", "ece_low", "ece_high",
)  # fmt: skip
_PAIRS: Final = ("loss", "loss_train", "consistency", "confidence")
_PAIRS_LABELLED: Final = (
    "auroc", "auroc_low", "auroc_high", "auroc_random", "auroc_train", "accuracy", "accuracy_random", "accuracy_train",
)  # fmt: skip
NUMBERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "ccs": _PAIRS,
        "ccs_labelled": _PAIRS + _PAIRS_LABELLED,
        "crc": (*_PAIRS, "explained"),
        "crc_labelled": (*_PAIRS, "explained", *_PAIRS_LABELLED),
        "kmeans": ("inertia", "explained", "smallest", "largest", "passes", "settled"),
        "mlp": (*CLASS, "steps"),
        "sequence": (*CLASS, "steps"),
        "tuned_lens": ("fvu", "fvu_identity", "fvu_train"),
        "tuned_lens_kl": ("fvu", "fvu_identity", "fvu_train", "kl", "kl_identity", "top1", "top1_identity"),
        "map": ("explained_first", "explained_second", "outside"),
        "projection": ("mean", "deviation", "lowest", "highest"),
    }
)
"""By kind. `projection` has these for each direction."""


@dataclass(frozen=True, slots=True)
class Leaves:
    """An array that leaves: its dtype, and its shape in terms of the request."""

    dtype: str
    shape: tuple[str, ...]


ARRAYS: Final[Mapping[str, Mapping[str, Leaves]]] = MappingProxyType(
    {
        "kmeans": {"sizes": Leaves("int64", ("clusters",))},
        "neighbours": {
            "rows": Leaves("int64", ("queries", "k")),
            "scores": Leaves("float32", ("queries", "k")),
        },
        "projection": {"scores": Leaves("float32", ("rows", "directions"))},
        "track": {
            "scores": Leaves("float32", ("rows", "directions")),
            "running": Leaves("float32", ("rows", "directions")),
            "prompt_mean": Leaves("float32", ("prompts", "directions")),
            "prompt_max": Leaves("float32", ("prompts", "directions")),
        },
        "histogram": {
            "grid": Leaves("int64", ("exponent and first",)),
            "counts": Leaves("int64", ("classes", "bins")),
            "outside": Leaves("int64", ("classes", "below and above")),
        },
        "cosines": {"cosines": Leaves("float32", ("directions", "others"))},
        "map": {"cells": Leaves("uint8", ("points", "two")), "rows": Leaves("int64", ("points",))},
    }
)
"""By kind: arrays beside the numbers. `rows` of neighbours and maps are row numbers, never rows."""


def of_classes(metrics: ClassMetrics) -> dict[str, float]:
    """The numbers of `CLASS`.

    Raises:
        ValueError: the probe gives no probabilities.
    """
    c = metrics.calibration
    if c is None:
        raise ValueError("a probe without probabilities has no calibration")
    values = (
        metrics.test_auroc, *metrics.interval, metrics.control_auroc, metrics.train_auroc,
        metrics.test_accuracy, *metrics.accuracy_interval, metrics.train_accuracy,
        c.brier, *c.brier_interval, c.ece, *c.ece_interval,
    )  # fmt: skip
    return dict(zip(CLASS, values, strict=True))

"""Trials of contrast pairs: what is fitted and held out, and how a direction does, with labels or without."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis import labels as given
from trocar.analysis import metrics
from trocar.analysis.labels import Floats, Given, Ints
from trocar.analysis.split import Split, draw, require_classes, strata


@dataclass(frozen=True, slots=True, eq=False)
class PairTrial:
    """Decided before any row is read.

    Attributes:
        fitted: bool [N].
        y: float64 [N] of 0 and 1, 1 where "yes" is right; None without labels.
    """

    split: Split
    fitted: npt.NDArray[np.bool_]
    y: Floats | None
    group: Ints
    stratum: Ints
    seed: int


def plan(
    n: int, labels: Given | None, groups: Given | None, test_fraction: float, seed: int, what: str = "pairs"
) -> PairTrial:
    """Checks labels and groups and draws the held-out pairs; labels have no part in the draw.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `bad_value`.
    """
    if not 0 < test_fraction < 1:
        raise errors.refuse("bad_value", "test_fraction", f"{test_fraction!r} is not between 0 and 1")
    if seed < 0:
        raise errors.refuse("bad_value", "seed", f"{seed!r} is negative")
    y = None if labels is None else given.classes(labels)[0]
    if y is not None and len(y) != n:
        raise errors.refuse("bad_labels", "labels", f"{len(y)} labels for {n} {what}")
    group = given.groups(groups, n)
    n_groups = len(np.unique(group))
    alike = np.zeros(n_groups, dtype=np.int64)
    split = draw(alike, group, test_fraction, seed) if n else Split(group, group)
    if min(len(split.train) - 1, len(split.test)) < 1:
        reason = f"{n} {what} in {n_groups} groups; a fit needs at least 2 to train on and 1 to test"
        raise errors.refuse("too_few_rows", "rows", reason)
    if y is not None:
        require_classes(y, split)
    fitted = np.zeros(n, dtype=bool)
    fitted[split.train] = True
    return PairTrial(split, fitted, y, group, alike if y is None else strata(y, group), seed)


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """How a unit does on held-out pairs, and the sign that its labels (if any) give it.

    Attributes:
        consistency: mean of `(p(yes) + p(no) - 1)^2`. `confidence`: mean of `min(p(yes), p(no))^2`. Both are of
            the unit as found, before the sign.
        labelled: numbers that need labels, by name.
    """

    consistency: float
    confidence: float
    sign: float
    labelled: dict[str, float] = field(default_factory=dict)

    def losses(self, train: float) -> dict[str, float]:
        return {
            "loss": self.consistency + self.confidence,
            "loss_train": train,
            "consistency": self.consistency,
            "confidence": self.confidence,
        }


def judge(trial: PairTrial, yes: Floats, no: Floats, random: Floats, sign: float) -> Verdict:
    """Scores a unit by its logits on both sides [N], beside scores of untrained directions [N, K].

    Args:
        sign: what to answer where labels do not decide.
    """
    test = trial.split.test
    p, q = (1 / (1 + np.exp(-np.clip(s[test], -500, 500))) for s in (yes, no))
    consistency, confidence = float(((p + q - 1) ** 2).mean()), float((np.minimum(p, q) ** 2).mean())
    if trial.y is None:
        return Verdict(consistency, confidence, sign)
    scores = (yes - no) / 2
    sign = _sign(scores, trial)
    return Verdict(consistency, confidence, sign, _labelled(trial, trial.y, sign * scores, random))


def _labelled(trial: PairTrial, y: Floats, scores: Floats, random: Floats) -> dict[str, float]:
    train, test = trial.split.train, trial.split.test
    upper = metrics.weighted_auroc(scores[test], y[test])
    low, high = metrics.interval(upper, trial.stratum, trial.group[test], trial.seed)
    untrained = [_sign(s, trial) * s for s in random.T]
    return {
        "auroc": metrics.auroc(scores[test], y[test]),
        "auroc_low": low,
        "auroc_high": high,
        "auroc_random": float(np.mean([metrics.auroc(s[test], y[test]) for s in untrained])),
        "auroc_train": metrics.auroc(scores[train], y[train]),
        "accuracy": _accuracy(scores, y, test),
        "accuracy_random": float(np.mean([_accuracy(s, y, test) for s in untrained])),
        "accuracy_train": _accuracy(scores, y, train),
    }


def _sign(scores: Floats, trial: PairTrial) -> float:
    """The sign with the higher accuracy on the train side: one bit from the labels."""
    right = _accuracy(scores, trial.y, trial.split.train) if trial.y is not None else 1.0
    return 1.0 if right >= 0.5 else -1.0


def _accuracy(scores: Floats, y: Floats, side: Ints) -> float:
    return float(((scores > 0) == (y == 1))[side].mean())

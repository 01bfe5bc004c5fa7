"""What a two-class trial decides for any kind of probe: the rows that stop its training, and its scores."""

from __future__ import annotations

import numpy as np

from trocar import errors
from trocar.analysis import report
from trocar.analysis.labels import Floats
from trocar.analysis.results import ClassMetrics
from trocar.analysis.split import Split, draw, strata
from trocar.analysis.trial import Trial

VALIDATION_FRACTION = 0.2


def inner(trial: Trial) -> Split:
    """Splits the train side by groups, for early stopping; the test side is never looked at.

    Returns:
        Row numbers of what is fitted (`train`) and of what stops the training (`test`).

    Raises:
        ProgramError: `too_few_rows` when one of the two lacks a class.
    """
    train = trial.split.train
    y, group = trial.y[train], np.unique(trial.group[train], return_inverse=True)[1]
    within = draw(strata(y, group), group, VALIDATION_FRACTION, trial.seed)
    for side in (within.train, within.test):
        lower, upper = _counts(y[side])
        if min(lower, upper) == 0:
            reason = (
                f"of {len(train)} rows to train on, {len(side)} have {lower} and {upper} of the two classes"
            )
            step = "Give more rows or groups of each class: a part of them decides when training stops."
            raise errors.refuse("too_few_rows", "labels", reason, next_step=step)
    return Split(train[within.train], train[within.test])


def judge(scores: Floats, control_scores: Floats, trial: Trial) -> ClassMetrics:
    """What `ClassMetrics` says, from the scores [n] of the probe and of its control, whose threshold is 0."""
    return report.class_metrics(np.stack([scores, control_scores])[:, None], trial)


def _counts(y: Floats) -> tuple[int, int]:
    return int((y == 0).sum()), int((y == 1).sum())

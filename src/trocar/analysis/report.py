"""The report of a supervised fit: from the scores of all rows to a direction and to numbers that may be believed.

Held-out rows alone are measured, with intervals over their groups; the control and the folds stand beside them. No row
is seen here.

Shapes: K probes of C columns, n rows; the first probe is the one reported, the second its control, the others folds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import expit, softmax

from trocar.analysis import measures, metrics
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.measures import Measure
from trocar.analysis.probes import Probe
from trocar.analysis.results import Calibration, ClassMetrics, RidgeMetrics, SiteFit
from trocar.analysis.trial import Trial

_WITH_PROBABILITIES = ("lda", "logistic", "multinomial")


def report(probe: Probe, scores: Floats, trial: Trial) -> SiteFit:
    """The fit at one site.

    Args:
        probe: weights [K * C, d] and bias [K * C].
        scores: [K * C, n], of the float32 weights for the first C.
    """
    columns = len(trial.classes or ()) if trial.kind == "multinomial" else 1
    by_probe = scores.reshape(-1, columns, len(trial.y))
    weights, bias = probe.weights[:columns], probe.bias[:columns]
    steps = _steps(weights, by_probe[0], trial)
    norms = np.linalg.norm(weights, axis=1)
    scale = np.divide(steps, norms, out=np.zeros(columns), where=norms > 0)
    directions = weights if trial.kind == "mean_diff" else weights * scale[:, None]
    found = _ridge_metrics(by_probe, trial) if trial.kind == "ridge" else class_metrics(by_probe, trial)
    raw, toward = weights.astype(np.float32), directions.astype(np.float32)
    if trial.kind == "multinomial":
        return SiteFit(toward, raw, bias, found)
    return SiteFit(toward[0], raw[0], float(bias[0]), found)


def _steps(weights: Floats, scores: Floats, trial: Trial) -> Floats:
    """How far one natural step goes along each unit weight vector, in raw space, [C].

    The distance of the class means (of each class from the others), or one deviation of the rows.
    """
    train = trial.split.train
    norms = np.linalg.norm(weights, axis=1)
    seen, y = scores[:, train], trial.y[train]
    if trial.kind == "ridge":
        gaps = seen.std(axis=1)
    else:
        upper = [y == c for c in range(len(weights))] if len(weights) > 1 else [y == 1]
        gaps = np.array([s[u].mean() - s[~u].mean() for s, u in zip(seen, upper, strict=True)])
    steps: Floats = np.divide(gaps, norms, out=np.zeros(len(weights)), where=norms > 0)
    return steps


def class_metrics(scores: Floats, trial: Trial) -> ClassMetrics:
    """What held-out rows say of a classifier; scores [K, C, n]."""
    train, test, y = trial.split.train, trial.split.test, trial.y
    right = (_called(scores[0]) == y).astype(np.float64)
    ranked, hits = _auroc(scores[0][:, test], y[test]), measures.mean(right[test])
    wanted = [ranked, hits, *_calibration(scores[0][:, test], trial)]
    ends = measures.intervals(wanted, trial.stratum, trial.group[test], trial.seed)
    calibration = None
    if len(wanted) == 4:
        calibration = Calibration(wanted[2].value, ends[2], wanted[3].value, ends[3])
    n_classes = int(y.max()) + 1
    return ClassMetrics(
        n_train=len(train),
        n_test=len(test),
        train_counts=_counts(y[train], n_classes),
        test_counts=_counts(y[test], n_classes),
        train_auroc=_auroc(scores[0][:, train], y[train]).value,
        test_auroc=ranked.value,
        train_accuracy=float(right[train].mean()),
        test_accuracy=hits.value,
        interval=ends[0],
        control_auroc=_auroc(scores[1][:, test], trial.control[test]).value,
        accuracy_interval=ends[1],
        calibration=calibration,
        folds=_folds(scores, trial, lambda s, y: _auroc(s, y).value),
    )


def _ridge_metrics(scores: Floats, trial: Trial) -> RidgeMetrics:
    train, test, y = trial.split.train, trial.split.test, trial.y
    explained = measures.r2(scores[0, 0, test], y[test])
    return RidgeMetrics(
        n_train=len(train),
        n_test=len(test),
        train_r2=metrics.r2(scores[0, 0, train], y[train]),
        test_r2=explained.value,
        interval=measures.intervals([explained], trial.stratum, trial.group[test], trial.seed)[0],
        control_r2=metrics.r2(scores[1, 0, test], trial.control[test]),
        folds=_folds(scores, trial, lambda s, y: metrics.r2(s[0], y)),
    )


def _folds(scores: Floats, trial: Trial, score: Callable[[Floats, Floats], float]) -> tuple[float, ...]:
    if trial.folds is None:
        return ()
    held = [trial.folds == fold for fold in range(trial.n_folds)]
    return tuple(score(s[:, h], trial.y[h]) for s, h in zip(scores[2:], held, strict=True))


def _counts(y: Floats, n_classes: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(y.astype(np.int64), minlength=n_classes))


def _called(scores: Floats) -> Ints:
    """The class of each row by scores [C, n]."""
    out: Ints = (scores[0] > 0).astype(np.int64) if len(scores) == 1 else scores.argmax(axis=0)
    return out


def _auroc(scores: Floats, y: Floats) -> Measure:
    """Of two classes, or the mean over classes of each against the others (Hand and Till 2001 weigh pairs instead)."""
    if len(scores) == 1:
        return measures.auroc(scores[0], y)
    each = [measures.auroc(s, (y == c).astype(np.float64)) for c, s in enumerate(scores)]

    def weighted(weights: Floats) -> Floats:
        out: Floats = np.mean([m.weighted(weights) for m in each], axis=0)
        return out

    influence: Floats = np.mean([m.influence for m in each], axis=0)
    return Measure(float(np.mean([m.value for m in each])), weighted, influence)


def _calibration(scores: Floats, trial: Trial) -> list[Measure]:
    """Brier score and calibration error; nothing for a probe without probabilities."""
    if trial.kind not in _WITH_PROBABILITIES:
        return []
    y = trial.y[trial.split.test]
    if len(scores) == 1:
        p = expit(scores[0])
        return [measures.mean((p - y) ** 2), measures.calibration_error(p, y)]
    shares = softmax(scores, axis=0)
    outcome = (np.arange(len(scores))[:, None] == y).astype(np.float64)
    called, right = shares.max(axis=0), (shares.argmax(axis=0) == y).astype(np.float64)
    return [
        measures.mean(((shares - outcome) ** 2).sum(axis=0)),
        measures.calibration_error(called, right),
    ]

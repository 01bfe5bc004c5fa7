"""The verb `fit`: one split, every site, the same scores; see `probes` for what is fitted.

It refuses what cannot be fitted and tested honestly, in terms of labels and rows. It reads one site at a
time, so a mapping of loaders never holds two sites in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis import metrics, probes
from trocar.analysis.labels import Floats, Given
from trocar.analysis.probes import Probe
from trocar.analysis.results import ClassMetrics, FitResult, Kind, RidgeMetrics, SiteFit
from trocar.analysis.trial import Trial, plan

Rows = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Source = Rows | Callable[[], Rows]
KINDS: Final = ("logistic", "mean_diff", "ridge")
L2_RANGE: Final = (1e-3, 1e9)
DEFAULT_L2_PER_WIDTH: Final = 0.1
"""A prior under which scores of uncorrelated features have variance 10, whatever the width."""


def fit(
    kind: Kind,
    rows_by_site: Mapping[str, Source],
    labels: Given,
    groups: Given | None = None,
    *,
    test_fraction: float = 0.25,
    seed: int = 0,
    l2: float | None = None,
) -> FitResult:
    """Fits one direction per site and tests it on held-out rows.

    - `mean_diff`: direction = mean of the upper class minus mean of the lower class; the probe's weights are
      the direction, its bias lies at the midpoint (Marks and Tegmark 2023, section 5).
    - `logistic`: L2-regularised logistic regression on standardised features, folded back to raw space.
      direction = the unit weight vector times the distance between the class means along it.
    - `ridge`: L2-regularised least squares on standardised features. direction = the unit weight vector times
      one standard deviation of the rows along it, so that adding it moves the prediction by one standard
      deviation of the predictions.

    So in each case adding 1.0 * direction is one natural step of that site, and coefficients mean the same at
    every site and for every kind.

    Args:
        rows_by_site: float [n, width] by site, or a function that loads it.
        labels: n ints or bools of two values (the larger is the upper class), or n finite numbers for ridge.
        groups: n ints or strings; rows of a group stay on one side of the split and are resampled together.
        test_fraction: share of the groups (of each class) that is held out, in (0, 1).
        seed: non-negative; decides split, control and bootstrap.
        l2: the penalty, in the sense of `probes.logistic` and `probes.ridge`; default width / 10.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `rows_mismatch`, `rows_not_finite`, `bad_value`.
        RunFailed: `fit_not_converged`.
    """
    if not rows_by_site:
        raise errors.refuse("bad_value", "sites", "there is no site to fit")
    _check_options(kind, test_fraction, seed, l2)
    trial = plan(kind, labels, groups, test_fraction, seed)
    found: dict[str, SiteFit] = {}
    penalties: dict[str, float] = {}
    for site, source in rows_by_site.items():
        x = _rows(site, source, len(trial.y))
        penalty = l2 if l2 is not None else DEFAULT_L2_PER_WIDTH * x.shape[1]
        found[site] = _fit_site(x, trial, penalty)
        if kind != "mean_diff":
            penalties[site] = penalty
    split = trial.split
    return FitResult(kind, trial.classes, seed, test_fraction, penalties, split.train, split.test, found)


def check(
    kind: Kind, labels: Given, groups: Given | None, *, test_fraction: float, seed: int, l2: float | None
) -> None:
    """Everything about a fit that its request alone can get wrong, before any row is read.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `bad_value`.
    """
    _check_options(kind, test_fraction, seed, l2)
    plan(kind, labels, groups, test_fraction, seed)


def sizes(
    kind: Kind, labels: Given, groups: Given | None, test_fraction: float, seed: int
) -> tuple[int, int]:
    """Rows that a fit would train on and test on: they follow from its request."""
    split = plan(kind, labels, groups, test_fraction, seed).split
    return len(split.train), len(split.test)


def _check_options(kind: str, test_fraction: float, seed: int, l2: float | None) -> None:
    if kind not in KINDS:
        raise errors.refuse(
            "bad_value", "kind", f"{kind!r} is not a fit", closest=errors.closest(kind, KINDS)
        )
    if not 0 < test_fraction < 1:
        raise errors.refuse("bad_value", "test_fraction", f"{test_fraction!r} is not between 0 and 1")
    if seed < 0:
        raise errors.refuse("bad_value", "seed", f"{seed!r} is negative")
    if l2 is not None and kind == "mean_diff":
        raise errors.refuse("bad_value", "l2", "mean_diff has no penalty: leave l2 out")
    if l2 is not None and not L2_RANGE[0] <= l2 <= L2_RANGE[1]:
        raise errors.refuse("bad_value", "l2", f"{l2!r} is not between {L2_RANGE[0]:g} and {L2_RANGE[1]:g}")


def _rows(site: str, source: Source, n: int) -> Floats:
    array: npt.NDArray[Any] = source() if callable(source) else source
    if array.ndim != 2 or array.dtype.kind != "f":
        reason = f"{site} holds {array.dtype} of rank {array.ndim}, not floats [n, width]"
        raise errors.refuse("rows_mismatch", f"sites.{site}", reason)
    if len(array) != n:
        raise errors.refuse("bad_labels", "labels", f"{n} labels for {len(array)} rows at {site}")
    x = array.astype(np.float64)
    if not np.isfinite(x).all():
        raise errors.refuse("rows_not_finite", f"sites.{site}", f"a row at {site} holds NaN or an infinity")
    return x


def _fit_site(x: Floats, trial: Trial, l2: float) -> SiteFit:
    train, test = trial.split.train, trial.split.test
    probe, sham = _probes(trial.kind, x[train], (trial.y[train], trial.control[train]), l2)
    weights = probe.weights.astype(np.float32)
    scores = x @ weights.astype(np.float64) + probe.bias  # what is stored is what is scored
    sham_scores = x[test] @ sham.weights + sham.bias
    measure = _ridge_metrics if trial.kind == "ridge" else _class_metrics
    return SiteFit(
        probe.direction.astype(np.float32), weights, probe.bias, measure(scores, sham_scores, trial)
    )


def _probes(kind: Kind, x: Floats, targets: Sequence[Floats], l2: float) -> list[Probe]:
    if kind == "mean_diff":
        return [probes.mean_diff(x, y) for y in targets]
    s = probes.standardise(x)
    fitted = probes.logistic if kind == "logistic" else probes.ridge
    return [fitted(s, x, y, l2) for y in targets]


def _class_metrics(scores: Floats, sham_scores: Floats, trial: Trial) -> ClassMetrics:
    train, test = trial.split.train, trial.split.test
    y, right = trial.y, (scores > 0) == (trial.y == 1)
    return ClassMetrics(
        n_train=len(train),
        n_test=len(test),
        train_counts=(int((y[train] == 0).sum()), int((y[train] == 1).sum())),
        test_counts=(int((y[test] == 0).sum()), int((y[test] == 1).sum())),
        train_auroc=metrics.auroc(scores[train], y[train]),
        test_auroc=metrics.auroc(scores[test], y[test]),
        train_accuracy=float(right[train].mean()),
        test_accuracy=float(right[test].mean()),
        interval=_interval(metrics.weighted_auroc(scores[test], y[test]), trial),
        control_auroc=metrics.auroc(sham_scores, trial.control[test]),
    )


def _ridge_metrics(scores: Floats, sham_scores: Floats, trial: Trial) -> RidgeMetrics:
    train, test, y = trial.split.train, trial.split.test, trial.y
    return RidgeMetrics(
        n_train=len(train),
        n_test=len(test),
        train_r2=metrics.r2(scores[train], y[train]),
        test_r2=metrics.r2(scores[test], y[test]),
        interval=_interval(metrics.weighted_r2(scores[test], y[test]), trial),
        control_r2=metrics.r2(sham_scores, trial.control[test]),
    )


def _interval(score: metrics.Weighted, trial: Trial) -> tuple[float, float]:
    return metrics.interval(score, trial.stratum, trial.group[trial.split.test], trial.seed)

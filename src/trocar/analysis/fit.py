"""The verb `fit`: one split, every site, the same scores; see `probes` and `logistic` for what is fitted.

It refuses what cannot be fitted and tested honestly, in terms of labels and rows. It reads one site at a time, in
blocks, so memory holds scores and sums, and never the rows.

- `mean_diff`: direction = mean of the upper class minus mean of the lower class; the probe's weights are
  the direction, its bias lies at the midpoint (Marks and Tegmark 2023, section 5).
- `logistic`: regularised logistic regression on standardised features, folded back to raw space.
  direction = the unit weight vector times the distance between the class means along it.
- `lda`: linear discriminant analysis, regularised; direction as for `logistic`.
- `multinomial`: logistic regression with up to 256 classes; for each class a weight vector, and a direction =
  the unit weight vector times the distance of the class's mean from that of all others along it.
- `ridge`: L2-regularised least squares on standardised features. direction = the unit weight vector times
  one standard deviation of the rows along it, so that adding it moves the prediction by one standard
  deviation of the predictions.

So in each case adding 1.0 * direction is one natural step of that site, and coefficients mean the same at
every site and for every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis.labels import Given
from trocar.analysis.probes import Probe
from trocar.analysis.report import report
from trocar.analysis.results import FitResult, Kind, SiteFit
from trocar.analysis.site import ClassWeight, Penalty, fit_probes, rows_of, scores_of
from trocar.analysis.source import ArraySource, Source
from trocar.analysis.trial import Trial, plan

Rows = npt.NDArray[np.float32] | npt.NDArray[np.float64]
GivenRows = Rows | Source | Callable[[], Rows | Source]
KINDS: Final = ("lda", "logistic", "mean_diff", "multinomial", "ridge")
LOGISTIC: Final = ("logistic", "multinomial")
PENALTY_RANGE: Final = (1e-3, 1e9)
MOST_FOLDS: Final = 50
DEFAULT_L2_PER_WIDTH: Final = 0.1
"""A prior under which scores of uncorrelated features have variance 10, whatever the width."""


def fit(
    kind: Kind,
    rows_by_site: Mapping[str, GivenRows],
    labels: Given,
    groups: Given | None = None,
    *,
    test_fraction: float = 0.25,
    seed: int = 0,
    l2: float | None = None,
    l1: float | None = None,
    class_weight: ClassWeight | None = None,
    folds: int = 0,
) -> FitResult:
    """Fits one direction per site and tests it on held-out rows; the module says what each kind is.

    Args:
        rows_by_site: by site, a source or float [n, width], or a function that gives either. Rows are read as float32.
        labels: n ints or bools of two values (the larger is the upper class), or n finite numbers for ridge.
        groups: n ints or strings; rows of a group stay on one side of the split and are resampled together.
        test_fraction: share of the groups (of each class) that is held out, in (0, 1).
        seed: non-negative; decides split, control, folds and bootstrap.
        l2: the penalty of squared standardised weights; default width / 10, or 0 beside an `l1`.
        l1: the penalty of absolute standardised weights; `logistic` alone has one.
        class_weight: "balanced" lets both classes of a logistic fit count the same, however rare one is.
        folds: how many folds of a cross-validation over all rows, from 2 to 50; 0 for none.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `rows_mismatch`, `rows_not_finite`, `bad_value`.
        RunFailed: `fit_not_converged`.
    """
    if not rows_by_site:
        raise errors.refuse("bad_value", "sites", "there is no site to fit")
    check_split(test_fraction, seed)
    _check_penalties(kind, l2, l1, class_weight, folds)
    trial = plan(kind, labels, groups, test_fraction, seed, folds)
    found: dict[str, SiteFit] = {}
    penalties: dict[str, float] = {}
    for site, given in rows_by_site.items():
        with at(site):
            source = read(given, len(trial.y))
            default = 0.0 if l1 is not None else DEFAULT_L2_PER_WIDTH * source.width
            penalty = Penalty(default if l2 is None else l2, l1 or 0.0, class_weight)
            found[site] = _fit_site(source, trial, penalty)
        if kind != "mean_diff":
            penalties[site] = penalty.l2
    split = trial.split
    return FitResult(kind, trial.classes, seed, test_fraction, penalties, split.train, split.test, found)


def check(
    kind: Kind,
    labels: Given,
    groups: Given | None,
    *,
    test_fraction: float,
    seed: int,
    l2: float | None,
    l1: float | None = None,
    class_weight: ClassWeight | None = None,
    folds: int = 0,
) -> None:
    """Everything about a fit that its request alone can get wrong, before any row is read.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `bad_value`.
    """
    check_split(test_fraction, seed)
    _check_penalties(kind, l2, l1, class_weight, folds)
    plan(kind, labels, groups, test_fraction, seed, folds)


def sizes(
    kind: Kind, labels: Given, groups: Given | None, test_fraction: float, seed: int
) -> tuple[int, int]:
    """Rows that a fit would train on and test on: they follow from its request."""
    split = plan(kind, labels, groups, test_fraction, seed).split
    return len(split.train), len(split.test)


def leans_on(kind: Kind, labels: Given, groups: Given | None, test_fraction: float, seed: int) -> int:
    """How many of its rows a fit leans on, whatever their number: fewer rows with as even weights would do as much.

    The participation ratio `(sum w)^2 / sum w^2` of the weights `w`, which are the squared distances of the labels from
    their mean: n for two even classes, and about the size of the smaller one when it is small; of several classes, the
    least one. It follows from the request.
    """
    trial = plan(kind, labels, groups, test_fraction, seed)
    y = trial.y[trial.split.train]
    columns = (
        [y] if trial.classes is None else [(y == i).astype(np.float64) for i in range(len(trial.classes))]
    )
    weights = [(column - column.mean()) ** 2 for column in columns]
    return int(min(w.sum() ** 2 / (w**2).sum() for w in weights) + 1e-6)


def check_split(test_fraction: float, seed: int) -> None:
    """Refuses with `bad_value` what no split can be drawn with."""
    if not 0 < test_fraction < 1:
        raise errors.refuse("bad_value", "test_fraction", f"{test_fraction!r} is not between 0 and 1")
    if seed < 0:
        raise errors.refuse("bad_value", "seed", f"{seed!r} is negative")


def _check_penalties(
    kind: str, l2: float | None, l1: float | None, class_weight: str | None, folds: int
) -> None:
    if kind not in KINDS:
        reason = f"{kind!r} is not a fit"
        raise errors.refuse("bad_value", "kind", reason, closest=errors.closest(kind, KINDS))
    low, high = PENALTY_RANGE
    if l2 is not None and kind == "mean_diff":
        raise errors.refuse("bad_value", "l2", "mean_diff has no penalty: leave l2 out")
    for name, penalty in (("l2", l2), ("l1", l1)):
        if penalty is not None and not low <= penalty <= high:
            raise errors.refuse("bad_value", name, f"{penalty!r} is not between {low:g} and {high:g}")
    if l1 is not None and kind != "logistic":
        raise errors.refuse("bad_value", "l1", f"{kind} has no L1 penalty: leave l1 out")
    if class_weight is not None and (kind not in LOGISTIC or class_weight != "balanced"):
        reason = f'{class_weight!r} for {kind}: logistic and multinomial take "balanced"'
        raise errors.refuse("bad_value", "class_weight", reason)
    if folds and not 2 <= folds <= MOST_FOLDS:
        raise errors.refuse("bad_value", "folds", f"{folds!r} is not between 2 and {MOST_FOLDS}")


@contextmanager
def at(site: str) -> Iterator[None]:
    """What is said of "rows" inside is said of a site."""
    try:
        yield
    except errors.TrocarError as e:
        named = [replace(r, path=f"sites.{site}") if r.path == "rows" else r for r in e.refusals]
        raise type(e)(named) from None


def read(given: GivenRows, n: int) -> Source:
    """The rows of a site as a source of n rows.

    Raises:
        ProgramError: `rows_mismatch`, `bad_labels`.
    """
    source = as_source(given() if callable(given) else given)
    if len(source) != n:
        raise errors.refuse("bad_labels", "labels", f"{n} labels for {len(source)} rows")
    return source


def as_source(rows: Rows | Source) -> Source:
    """Rows as a source; arrays become one.

    Raises:
        ProgramError: `rows_mismatch`.
    """
    return ArraySource(rows) if isinstance(rows, np.ndarray) else rows


def _fit_site(source: Source, trial: Trial, penalty: Penalty) -> SiteFit:
    """What is stored is what is scored: the weights are rounded to float32 before any row is scored."""
    rows = rows_of(source, trial)
    probe = fit_probes(rows, penalty)
    rounded = Probe(probe.weights.astype(np.float32).astype(np.float64), probe.bias)
    return report(rounded, scores_of(rows, rounded), trial)

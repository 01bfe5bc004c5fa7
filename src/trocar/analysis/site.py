"""The fit at one site: which rows each probe learns from, one way to fit them, and the scores of every row.

A fit makes several probes on the same rows, which share every pass: the probe itself, its control on shuffled labels,
and one for each fold of the cross-validation. The last pass scores all rows with all of them.

Shapes: K probes of C columns, n rows, d features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis import probes
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.logistic import Task, logistic
from trocar.analysis.moments import Moments, Precision, merge, moments, precision_of
from trocar.analysis.probes import Probe
from trocar.analysis.scan import Binary, Scores, Softmax
from trocar.analysis.source import Source
from trocar.analysis.standard import standard
from trocar.analysis.trial import Trial

ClassWeight = Literal["balanced"]
Bools = npt.NDArray[np.bool_]
NEAR_PER_WIDTH: Final = 32
"""Rows per feature that tell the correlation well enough to precondition a fit."""
_RUN: Final = 64


@dataclass(frozen=True, slots=True)
class Penalty:
    """Of standardised weights; a class weight of "balanced" makes all classes count the same."""

    l2: float
    l1: float = 0.0
    class_weight: ClassWeight | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a site and how they are divided.

    Attributes:
        part: int64 [n]: twice the fold, plus 1 for a held-out row.
        parts: how many there are.
    """

    source: Source
    trial: Trial
    precision: Precision
    part: Ints
    parts: int

    @property
    def train(self) -> list[Bools]:
        """The rows that each probe learns from, [n]: twice those not held out, then all but each fold."""
        own = self.part % 2 == 0
        return [own, own, *(self.part // 2 != fold for fold in range(self.trial.n_folds))]

    @property
    def labels(self) -> list[Floats]:
        return [self.trial.y, self.trial.control, *(self.trial.y for _ in range(self.trial.n_folds))]

    def of_probes(self, by_part: tuple[Moments, ...]) -> list[Moments]:
        """The moments of the rows that each probe learns from."""
        own = merge(by_part[::2])
        others = (
            merge([m for i, m in enumerate(by_part) if i // 2 != fold]) for fold in range(self.trial.n_folds)
        )
        return [own, own, *others]


def rows_of(source: Source, trial: Trial) -> Rows:
    """Divides the rows of a source as its trial says."""
    held = np.zeros(len(trial.y), dtype=np.int64)
    held[trial.split.test] = 1
    part = held if trial.folds is None else 2 * trial.folds + held
    precision = precision_of(len(source), source.width)
    return Rows(source, trial, precision, part, 2 * max(1, trial.n_folds))


def fit_probes(rows: Rows, penalty: Penalty) -> Probe:
    """Fits all probes: weights [K * C, d] and bias [K * C]."""
    kind = rows.trial.kind
    if kind in ("logistic", "multinomial"):
        return _logistic(rows, penalty)
    targets = np.stack([rows.trial.y, rows.trial.control], axis=1)
    by_part = moments(
        rows.source,
        targets=targets,
        part=rows.part,
        parts=rows.parts,
        gram=kind != "mean_diff",
        precision=rows.precision,
    )
    found = []
    for number, m in enumerate(rows.of_probes(by_part)):
        probe = _closed(kind, m, penalty.l2)
        column = int(number == 1)
        found.append((probe.weights[column], probe.bias[column]))
    return Probe(np.stack([w for w, _ in found]), np.array([b for _, b in found]))


def _closed(kind: str, m: Moments, l2: float) -> Probe:
    if kind == "mean_diff":
        return probes.mean_diff(m)
    return probes.ridge(m, l2) if kind == "ridge" else probes.discriminant_of_two(m, l2)


def _logistic(rows: Rows, penalty: Penalty) -> Probe:
    plain, near = _survey(rows, wanted=penalty.l1 > 0)
    trial, n_classes = rows.trial, int(rows.trial.y.max()) + 1
    tasks, weights = [], []
    for y, train, m in zip(rows.labels, rows.train, plain, strict=True):
        counts = np.bincount(y[train].astype(np.int64), minlength=n_classes).astype(np.float64)
        weights.append(counts.sum() / n_classes / counts if penalty.class_weight else np.ones(n_classes))
        tasks.append(Task(standard(m), counts * weights[-1], penalty.l2, penalty.l1))
    classes = np.stack([np.where(t, y, -1) for y, t in zip(rows.labels, rows.train, strict=True)])
    uneven = np.stack(weights) if penalty.class_weight else None
    far = tasks[0].standard.far
    if trial.kind == "logistic":
        signs = np.where(classes < 0, 0, 2 * classes - 1).astype(np.int8)
        fitted = logistic(
            Binary(rows.source, signs, rows.precision, uneven, far), tasks, near, rows.precision
        )
    else:
        softmax = Softmax(rows.source, classes.astype(np.int16), n_classes, rows.precision, uneven, far)
        fitted = logistic(softmax, tasks, near, rows.precision)
    return Probe(np.concatenate([f.weights for f in fitted]), np.concatenate([f.bias for f in fitted]))


def _survey(rows: Rows, wanted: bool) -> tuple[list[Moments], Moments | None]:
    """The sums of the rows that each probe learns from, and the Gram matrix of a sample of the fitted rows.

    There is no Gram matrix where the rows are so few that they tell no correlation, unless it is wanted.
    """
    n, d = len(rows.source), rows.source.width
    useful = wanted or len(rows.trial.split.train) >= 2 * d
    part = 2 * rows.part + (sampled(n, d) if useful else 0)
    grams = [useful and number % 4 == 1 for number in range(2 * rows.parts)]
    both = moments(rows.source, part=part, parts=2 * rows.parts, gram=grams, precision=rows.precision)
    plain = tuple(both[i].plain().merge(both[i + 1].plain()) for i in range(0, len(both), 2))
    near = merge([m for m in both if m.gram is not None]) if useful else None
    return rows.of_probes(plain), near


def sampled(n: int, d: int) -> Ints:
    """1 for the rows of a sample that tells the correlation of d features well enough, spread in runs; [n]."""
    least = max(NEAR_PER_WIDTH * d, 8192)
    if n <= 2 * least:
        return np.ones(n, dtype=np.int64)
    return (np.arange(n) % (_RUN * n // least) < _RUN).astype(np.int64)


def scores_of(rows: Rows, probe: Probe) -> Floats:
    """The scores of all rows, [K * C, n].

    Raises:
        ProgramError: `rows_not_finite`.
    """
    scores = np.empty((len(probe.weights), len(rows.source)), rows.precision)
    for here, _, _, block in Scores(rows.source, rows.precision).blocks(probe.weights, probe.bias):
        scores[:, here] = block
    if not np.isfinite(scores).all():
        raise errors.refuse("rows_not_finite", "rows", "a row holds NaN or an infinity")
    return scores.astype(np.float64, copy=False)

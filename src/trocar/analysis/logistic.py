"""Logistic regression over a source: two classes or many, one probe or hundreds, in a few passes.

The penalised sum of log losses is minimised by L-BFGS in standardised coordinates, preconditioned by the inverse of the
rows' own correlation: at zero weights the Hessian is the covariance times p (1 - p), so the first step is already the
least-squares fit, its length that of the Gaussian discriminant with the same R2 (Haggstrom 1983), and some four passes
are enough where an optimiser that does not know the covariance takes thirty. All probes share each pass (`scan`).

Objective, of each probe: sum over rows of weight[class] * log loss + l1 |w|_1 + l2 / 2 |w|^2, on standardised weights
w; biases are free. With several classes, softmax over one weight vector per class, all of them penalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from trocar import errors
from trocar.analysis.descent import Descent
from trocar.analysis.labels import Floats
from trocar.analysis.moments import Moments, Precision
from trocar.analysis.proximal import Proximal
from trocar.analysis.scan import Objective
from trocar.analysis.standard import Standard, curvature, likely

MAX_PASSES: Final = 5000
TOLERANCE: Final[dict[Precision, float]] = {"float32": 1e-7, "float64": 1e-12}
"""How far from its minimum the objective may be, relative to itself, by the estimate of the optimiser."""
_NOISE: Final[dict[Precision, float]] = {"float32": 1e-8, "float64": 1e-14}
_LONGEST_FIRST_STEP: Final = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What one probe of an objective is penalised with, and how its rows are standardised.

    Attributes:
        counts: rows of each class, times what a row counts, [2] or [C].
        l1: 0, or the penalty of absolute weights, for two classes.
    """

    standard: Standard
    counts: Floats
    l2: float
    l1: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """`weights @ x + bias`, float64 [C, d] and [C], C = 1 for two classes; in raw space.

    Attributes:
        objective: at the minimum.
        passes: over the rows, until this probe was done.
    """

    weights: Floats
    bias: Floats
    objective: float
    passes: int


def logistic(
    objective: Objective, tasks: Sequence[Task], near: Moments | None = None, precision: Precision = "float32"
) -> list[Fitted]:
    """Fits all probes of `objective`, one pass for each step of all of them.

    Args:
        tasks: one per probe.
        near: moments with a Gram matrix, of these rows or of a sample of them; they speed the fit up and do not change
            the minimum. Without them, standardised coordinates alone have to do.
        precision: that of the objective; decides how near the minimum is told apart.

    Raises:
        RunFailed: `fit_not_converged`.
    """
    searches = _searches(objective, tasks, near, precision)
    fitted: dict[int, Fitted] = {}
    for passes in range(1, MAX_PASSES + 1):
        chosen = [i for i in range(len(tasks)) if i not in fitted]
        raw = [tasks[i].standard.fold(*_split(searches[i].point, objective.columns)) for i in chosen]
        found = objective.at(np.array(chosen), np.stack([w for w, _ in raw]), np.stack([b for _, b in raw]))
        for place, i in enumerate(chosen):
            task, search = tasks[i], searches[i]
            w, _ = _split(search.point, objective.columns)
            loss = float(found.loss[place]) + task.l2 / 2 * float((w * w).sum())
            by_weights = task.standard.gradient(found.weights[place], found.bias[place]) + task.l2 * w
            search.tell(loss, np.concatenate([by_weights.ravel(), found.bias[place]]))
            if search.stuck:
                _refuse(f"the objective does not fall any more after {passes} steps", task)
            if search.done:
                total = loss + task.l1 * float(np.abs(w).sum())
                fitted[i] = Fitted(*raw[place], total, passes)
        if len(fitted) == len(tasks):
            return [fitted[i] for i in range(len(tasks))]
    unfinished = next(i for i in range(len(tasks)) if i not in fitted)
    return _refuse(f"no optimum after {MAX_PASSES} steps", tasks[unfinished])


def _refuse(what: str, task: Task) -> list[Fitted]:
    raise errors.refuse("fit_not_converged", "l2", f"{what} with l2={task.l2:g}")


def _split(point: Floats, columns: int) -> tuple[Floats, Floats]:
    """Weights [C, d] and bias [C] of a point, which is one behind the other."""
    return point[:-columns].reshape(columns, -1), point[-columns:]


def _searches(
    objective: Objective, tasks: Sequence[Task], near: Moments | None, precision: Precision
) -> list[Descent | Proximal]:
    columns = objective.columns
    inverses: dict[float, Floats] = {}
    searches: list[Descent | Proximal] = []
    for task in tasks:
        n, slope = float(task.counts.sum()), _slope(task.counts)
        penalty = task.l2 / (slope * n)
        start = np.zeros(columns * len(task.standard.mean) + columns)
        start[-columns:] = _prior(task.counts)
        options = {"tolerance": TOLERANCE[precision], "noise": _NOISE[precision]}
        if task.l1:
            if near is None:
                raise ValueError("an L1 penalty needs moments")
            matrix = likely(near, task.standard)
            searches.append(Proximal(start, matrix, slope * n, task.l1, task.l2, **options))
            continue
        level = _octave(penalty)
        if near is not None and level not in inverses:
            inverses[level] = curvature(near, task.standard, level)
        inverse = inverses.get(level)
        searches.append(
            Descent(start, _precondition(inverse, columns, slope * n), first_step=_gaussian(n), **options)
        )
    return searches


def _octave(penalty: float) -> float:
    """The nearest power of 2: penalties that are about the same share a preconditioner."""
    return float(2.0 ** round(np.log2(max(penalty, 1e-12))))


def _slope(counts: Floats) -> float:
    """The mean of p (1 - p) at zero weights."""
    share = counts / counts.sum()
    return float((share * (1 - share)).sum() / 2) if len(counts) == 2 else 1 / len(counts)


def _prior(counts: Floats) -> Floats:
    """Biases under which zero weights give each class its share."""
    logs = np.log(counts)
    return logs[1:] - logs[:1] if len(counts) == 2 else logs - logs.mean()


def _precondition(inverse: Floats | None, columns: int, curvature_n: float) -> Callable[[Floats], Floats]:
    def apply(g: Floats) -> Floats:
        out = g / curvature_n
        if inverse is not None:
            out[:-columns] = (out[:-columns].reshape(columns, -1) @ inverse).ravel()
        return out

    return apply


def _gaussian(n: float) -> Callable[[float], float]:
    """From least squares to the discriminant: 1 / (1 - R2) times the step, where the product of gradients is n R2."""
    return lambda product: min(1 / max(1 - product / n, 1e-3), _LONGEST_FIRST_STEP)

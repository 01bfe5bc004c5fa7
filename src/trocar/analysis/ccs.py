"""Directions from contrast pairs without labels: CCS, and its closed form by principal components (CRC).

Both take each statement twice, completed with "yes" and with "no" (or true and false), and look for a
direction on which the two completions of a statement disagree. Labels, if given, choose the sign and score
the result; they never choose the direction. Untrained directions are scored beside it, because many tasks
are solved by almost any direction (Roger 2023).

Legend: N pairs, D width, R restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.joined import Beside, Difference, Subset, require_equal_width
from trocar.analysis.labels import Floats, Given, Ints
from trocar.analysis.moments import moments
from trocar.analysis.pairs import PairTrial, Verdict, judge, plan
from trocar.analysis.results import Vector
from trocar.analysis.source import Block, Source
from trocar.analysis.training import array, drawn, zeros

BATCH: Final = 512
RANDOM_DIRECTIONS: Final = 10
_EPSILON: Final = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class PairFit:
    """A direction from contrast pairs.

    A pair's score is `weights @ (yes - no) / 2 + bias`: positive means "yes". Where there are labels, "yes"
    is the sign with the higher accuracy on the train side; otherwise the sign is arbitrary (the largest weight
    is positive).

    Attributes:
        weights: float32 [D], raw space.
        bias_yes, bias_no: what each side adds, so that `sigmoid(weights @ x + bias)` is the p(x) of the paper.
        direction: float32 [D]; the unit weights times the root mean square of the centred difference
            `yes - no` along them: adding 1.0 times it moves a row about as far as changing the answer does.
        losses: float64 [R], ascending: the train loss of each restart; one for CRC.
    """

    kind: str
    weights: Vector
    bias_yes: float
    bias_no: float
    direction: Vector
    losses: Floats
    explained: float
    verdict: Verdict
    train: Ints
    test: Ints

    @property
    def bias(self) -> float:
        return (self.bias_yes - self.bias_no) / 2

    def scores(self, yes: Source, no: Source) -> Floats:
        """float64 [N], streamed.

        Raises:
            ProgramError: `rows_mismatch`, `width_mismatch`, `rows_not_finite`.
        """
        pairs = _pairs(yes, no, len(self.weights))
        sides = _sides(pairs, self.weights[:, None].astype(np.float64))
        return np.asarray((sides[:, 0] - sides[:, 1]) / 2 + self.bias, dtype=np.float64)

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What stays behind: direction, weights, and the two biases [2]."""
        biases = np.array([self.bias_yes, self.bias_no], dtype=np.float32)
        return {"direction": self.direction, "weights": self.weights, "bias": biases}

    def numbers(self) -> dict[str, float]:
        """The numbers of `NUMBERS[kind]`, or of `kind_labelled` where there were labels."""
        found = self.verdict.losses(float(self.losses[0]))
        if self.kind == "crc":
            found["explained"] = self.explained
        return {**found, **self.verdict.labelled}


@dataclass(frozen=True, slots=True, eq=False)
class _Centre:
    """Means of both sides and one scale for both, of the train pairs: float64 [D] each."""

    yes: Floats
    no: Floats
    inverse: Floats

    def apply(self, yes: Block, no: Block) -> tuple[Block, Block]:
        left, right = (yes - self.yes) * self.inverse, (no - self.no) * self.inverse
        return left.astype(np.float32), right.astype(np.float32)

    def fold(self, weights: Floats, bias: float) -> tuple[Vector, float, float]:
        """Weights [D] and the biases of both sides for raw rows."""
        raw = (weights * self.inverse).astype(np.float32)
        stored = raw.astype(np.float64)
        return raw, bias - float(stored @ self.yes), bias - float(stored @ self.no)


def ccs(
    yes: Source,
    no: Source,
    *,
    labels: Given | None = None,
    groups: Given | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
    restarts: int = 10,
    steps: int = 1000,
    rate: float = 1e-2,
    decay: float = 1e-2,
) -> PairFit:
    """Contrast-consistent search (Burns et al. 2022, "Discovering latent knowledge", section 2).

    Each side is centred on its own mean, which takes away what "yes" and "no" themselves add; one scale per
    feature serves both sides, so that a single direction exists in raw space. Minimises the mean of
    `(p(yes) - (1 - p(no)))^2 + min(p(yes), p(no))^2` with p a logistic unit, by AdamW from several random
    starts on the same batches of 512 pairs, and keeps the start with the lowest train loss. A run visits
    `steps` batches, however many pairs there are.

    Args:
        yes, no: rows of both completions, pair by pair: N rows each.
        labels: N ints or bools; the larger value says that "yes" is right. They choose the sign and score.
        groups: N ints or strings; pairs of a group stay on one side of the split.
        restarts: 1 to 64. steps: 1 to 100,000.

    Raises:
        ProgramError: `rows_mismatch`, `width_mismatch`, `rows_not_finite`, `too_few_rows`, `bad_labels`,
            `bad_value`.
        RunFailed: `fit_not_converged` when no start ends with a finite loss.
    """
    _require_options(restarts, steps, rate)
    trial, pairs, centre = _prepare(yes, no, labels, groups, test_fraction, seed)
    rng = np.random.default_rng([seed, 5])
    theta, bias = drawn(rng, yes.width, restarts), zeros(restarts)
    _minimise(Subset(pairs, trial.fitted), centre, (theta, bias), (steps, rate, decay), rng)
    losses = _losses(Subset(pairs, trial.fitted), centre, array(theta), array(bias))
    if not np.isfinite(losses).any():
        raise errors.refuse("fit_not_converged", "rate", "no start ends with a finite loss")
    best = int(np.nanargmin(losses))
    found = array(theta)[:, best].astype(np.float64), float(array(bias)[best])
    return _finish("ccs", trial, pairs, centre, found, np.sort(losses), explained=0.0)


def crc(
    yes: Source,
    no: Source,
    *,
    labels: Given | None = None,
    groups: Given | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> PairFit:
    """Contrastive representation clustering, top principal component (Burns et al. 2022, appendix).

    The direction of largest variance of `yes - no`, each side centred and scaled as in `ccs`, in closed form
    from one pass. The scale of the weights is that of a deviation of 1 along the direction, so that the losses
    of `ccs` can be compared. `explained` is the component's share of the variance of the differences.

    Raises:
        ProgramError: as `ccs`.
    """
    trial, pairs, centre = _prepare(yes, no, labels, groups, test_fraction, seed)
    (differences,) = moments(Difference(Subset(yes, trial.fitted), Subset(no, trial.fitted)))
    values, vectors = np.linalg.eigh(differences.covariance * np.outer(centre.inverse, centre.inverse))
    if values[-1] <= 0:
        raise errors.refuse("too_few_rows", "rows", "the differences of the pairs are all equal")
    found = vectors[:, -1] * 2 / np.sqrt(values[-1])
    losses = _losses(Subset(pairs, trial.fitted), centre, found[:, None].astype(np.float32), np.zeros(1))
    explained = float(values[-1] / values.sum())
    return _finish("crc", trial, pairs, centre, (found, 0.0), losses, explained=explained)


def _require_options(restarts: int, steps: int, rate: float) -> None:
    if not 1 <= restarts <= 64:
        raise errors.refuse("bad_value", "restarts", f"{restarts!r} is not between 1 and 64")
    if not 1 <= steps <= 100_000:
        raise errors.refuse("bad_value", "steps", f"{steps!r} is not between 1 and 100000")
    if not 0 < rate <= 10:
        raise errors.refuse("bad_value", "rate", f"{rate!r} is not in (0, 10]")


def _prepare(
    yes: Source, no: Source, labels: Given | None, groups: Given | None, test_fraction: float, seed: int
) -> tuple[PairTrial, Beside, _Centre]:
    pairs = _pairs(yes, no, yes.width)
    trial = plan(len(pairs), labels, groups, test_fraction, seed)
    (a,), (b,) = (moments(Subset(side, trial.fitted), gram=False) for side in (yes, no))
    inverse = streams.inverse((np.abs(a.mean) + np.abs(b.mean)) / 2, (a.variance + b.variance) / 2)
    return trial, pairs, _Centre(a.mean, b.mean, inverse)


def _pairs(yes: Source, no: Source, width: int) -> Beside:
    require_equal_width(yes, no)
    if yes.width != width:
        raise errors.refuse(
            "width_mismatch", "rows", f"the probe takes rows of width {width}, not {yes.width}"
        )
    return Beside(yes, no)


def _minimise(
    pairs: Source,
    centre: _Centre,
    unit: tuple[nn.Parameter, nn.Parameter],
    pace: tuple[int, float, float],
    rng: np.random.Generator,
) -> None:
    steps, rate, decay = pace
    adam = torch.optim.AdamW(unit, lr=rate, weight_decay=decay)
    width, taken = pairs.width // 2, 0
    while taken < steps:
        for rows, _ in streams.shuffled(pairs, BATCH, rng):
            yes, no = (torch.from_numpy(x) for x in centre.apply(rows[:, :width], rows[:, width:]))
            adam.zero_grad(set_to_none=True)
            _loss(yes @ unit[0] + unit[1], no @ unit[0] + unit[1]).mean(dim=0).sum().backward()  # type: ignore[no-untyped-call]
            adam.step()
            taken += 1
            if taken == steps:
                break


def _loss(yes: Tensor, no: Tensor) -> Tensor:
    p, q = torch.sigmoid(yes), torch.sigmoid(no)
    return (p + q - 1) ** 2 + torch.minimum(p, q) ** 2


def _losses(pairs: Source, centre: _Centre, theta: Block, bias: npt.NDArray[np.floating]) -> Floats:
    """Mean loss of each restart over the pairs: float64 [R]."""
    width, total = pairs.width // 2, np.zeros(theta.shape[1])
    for rows in pairs.blocks():
        yes, no = centre.apply(rows[:, :width], rows[:, width:])
        units = (torch.from_numpy(np.asarray(x @ theta + bias, dtype=np.float64)) for x in (yes, no))
        total += _loss(*units).sum(dim=0).numpy()
    return total / len(pairs)


def _sides(pairs: Source, weights: Floats) -> Floats:
    """`weights` [D, K] times both sides of each pair: float64 [N, 2 K], first "yes" and then "no".

    Raises:
        ProgramError: `rows_not_finite`.
    """
    width, k = weights.shape
    out, start = np.empty((len(pairs), 2 * k)), 0
    for rows in streams.finite(pairs):
        for side, at in ((rows[:, :width], 0), (rows[:, width:], k)):
            out[start : start + len(rows), at : at + k] = side.astype(np.float64) @ weights
        start += len(rows)
    return out


def _finish(
    kind: str,
    trial: PairTrial,
    pairs: Source,
    centre: _Centre,
    found: tuple[Floats, float],
    losses: Floats,
    explained: float,
) -> PairFit:
    """Folds, judges and signs a unit (weights and bias on standardised rows)."""
    weights, bias_yes, bias_no = centre.fold(*found)
    rng, width = np.random.default_rng([trial.seed, 6]), len(weights)
    random = rng.standard_normal((width, RANDOM_DIRECTIONS)) * centre.inverse[:, None]
    logits = _sides(pairs, np.column_stack([weights.astype(np.float64), random]))
    yes, no = logits[:, 0], logits[:, 1 + RANDOM_DIRECTIONS]
    differences = (logits[:, 1 : 1 + RANDOM_DIRECTIONS] - logits[:, 2 + RANDOM_DIRECTIONS :]) / 2
    differences = differences - random.T @ (centre.yes - centre.no) / 2
    natural = 1.0 if weights[np.argmax(np.abs(weights))] >= 0 else -1.0
    verdict = judge(trial, yes + bias_yes, no + bias_no, differences, natural)
    train = trial.split.train
    step = float(np.sqrt(np.mean(((yes - no)[train] - (yes - no)[train].mean()) ** 2)))
    norm = float(np.linalg.norm(weights.astype(np.float64)))
    signed = (verdict.sign * weights).astype(np.float32)
    direction = (signed / max(norm, _EPSILON) * (step / max(norm, _EPSILON))).astype(np.float32)
    biases = verdict.sign * bias_yes, verdict.sign * bias_no
    split = trial.split
    return PairFit(kind, signed, *biases, direction, losses, explained, verdict, split.train, split.test)

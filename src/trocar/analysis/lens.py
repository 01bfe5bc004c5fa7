"""Tuned lens: an affine map from rows of a layer to rows of the last one (Belrose et al. 2023).

A translator starts from the identity, which is the logit lens, and is fitted by least squares in closed form,
or further by the divergence between the next-token distributions that both rows give. It is a map from
activations to activations, hence close to the weights between: a server of secret weights refuses it, as it
does `maps.linear_map`.

Legend: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, layer_norm, log_softmax, rms_norm

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.joined import Beside, Subset, require_equal_width, together
from trocar.analysis.labels import Floats, Given, Ints
from trocar.analysis.moments import moments
from trocar.analysis.pairs import PairTrial, plan
from trocar.analysis.results import Vector
from trocar.analysis.source import Block, Source
from trocar.analysis.split import draw
from trocar.analysis.training import Pace, array, descend, require_pace, zeros

Method = Literal["least_squares", "kl"]
Norm = Literal["rms", "layer", "none"]
KL_PACE: Final = Pace(steps=300, patience=100, every=25, rate=2e-4, decay=0.0)
BATCH: Final = 64
STOP_ROWS: Final = 256
KL_ROWS: Final = 1024
L2_RANGE: Final = (1e-8, 1e4)


@dataclass(frozen=True, slots=True, eq=False)
class Unembedding:
    """From rows of the last layer to logits: the final norm, then `@ matrix.T`.

    Attributes:
        matrix: float32 [V, D].
        gain, bias: float32 [D] of the norm, or None. A gain that a family stores as an offset from 1 is given
            with the 1 added.
        eps: of the norm.
    """

    matrix: Block
    gain: Vector | None = None
    bias: Vector | None = None
    eps: float = 1e-5
    norm: Norm = "rms"

    def log_probabilities(self, rows: Tensor) -> Tensor:
        """float32 [n, V]."""
        gain, bias = (None if part is None else torch.from_numpy(part) for part in (self.gain, self.bias))
        shape = (rows.shape[1],)
        if self.norm == "rms":
            rows = rms_norm(rows, shape, gain, self.eps)
        elif self.norm == "layer":
            rows = layer_norm(rows, shape, gain, bias, self.eps)
        return log_softmax(rows @ torch.from_numpy(self.matrix).T, dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class TunedLens:
    """`rows @ map + bias` stands for rows of the last layer.

    Attributes:
        map, bias: float32 [D, D] and [D].
        fvu, fvu_identity: share of the variance of the last layer's held-out rows that is left unexplained, by
            the map and by the rows as they are. `fvu_train`: by the map, on fitted rows.
        divergence: with an unembedding, `kl`, `kl_identity` (nats, from the last layer's distribution to the
            map's and to the logit lens') and `top1`, `top1_identity` (share of rows with the same first token),
            on up to 1,024 held-out rows.
        steps: of training by divergence until the best state; 0 for least squares.
    """

    map: Block
    bias: Vector
    fvu: float
    fvu_identity: float
    fvu_train: float
    divergence: dict[str, float]
    steps: int
    train: Ints
    test: Ints

    def translate(self, block: Block) -> Block:
        """float32 [n, D]."""
        out: Block = block @ self.map + self.bias
        return out

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What stays behind."""
        return {"map": self.map, "bias": self.bias}

    def numbers(self) -> dict[str, float]:
        """The numbers of `NUMBERS["tuned_lens"]`, or of `tuned_lens_kl` with an unembedding."""
        explained = {"fvu": self.fvu, "fvu_identity": self.fvu_identity, "fvu_train": self.fvu_train}
        return {**explained, **self.divergence}


def tuned_lens(
    source: Source,
    last: Source,
    *,
    unembedding: Unembedding | None = None,
    method: Method = "least_squares",
    groups: Given | None = None,
    l2: float = 1e-2,
    pace: Pace = KL_PACE,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> TunedLens:
    """Fits a translator and tests it on held-out rows.

    - `least_squares`: minimises squared errors plus `l2` times the squared change that the map makes to each
      standardised feature, in closed form from one pass; a large penalty leaves the identity plus a bias.
    - `kl`: goes on from there, by AdamW on batches of 64 rows, to lower the divergence from the last layer's
      distribution to the map's, which is what the paper minimises. A fifth of the train side, up to 256 rows,
      decides when to stop, and the start counts, so it never ends worse there than least squares. A step costs
      about `6 * 64 * D * V` operations.

    Args:
        source, last: the same N tokens at a layer and at the last one.
        groups: N ints or strings, the prompt of each row; rows of a group stay on one side.
        l2: 1e-8 to 1e4.

    Raises:
        ProgramError: `rows_mismatch`, `width_mismatch`, `rows_not_finite`, `too_few_rows`, `bad_labels`,
            `bad_value`, `missing_field` for `kl` without an unembedding.
        RunFailed: `fit_not_converged` when the divergence is not finite.
    """
    _require_options(source, last, unembedding, method, l2)
    require_pace(pace)
    pairs = Beside(source, last)
    trial = plan(len(pairs), None, groups, test_fraction, seed, what="rows")
    start = _closed_form(Subset(source, trial.fitted), Subset(last, trial.fitted), l2)
    (weights, bias), steps = start.folded(), 0
    if method == "kl" and unembedding is not None:
        steps = _train(pairs, trial, start, unembedding, pace)
        weights, bias = start.folded()
    fvu, fvu_train, fvu_identity = _unexplained(source, last, trial, weights, bias)
    divergence = {} if unembedding is None else _divergence(pairs, trial, (weights, bias), unembedding)
    split = trial.split
    return TunedLens(weights, bias, fvu, fvu_identity, fvu_train, divergence, steps, split.train, split.test)


def _require_options(source: Source, last: Source, given: Unembedding | None, method: str, l2: float) -> None:
    require_equal_width(source, last)
    if method not in ("least_squares", "kl"):
        near = errors.closest(str(method), ("least_squares", "kl"))
        raise errors.refuse("bad_value", "method", f"{method!r} is not a method", closest=near)
    if not L2_RANGE[0] <= l2 <= L2_RANGE[1]:
        raise errors.refuse("bad_value", "l2", f"{l2!r} is not between {L2_RANGE[0]:g} and {L2_RANGE[1]:g}")
    if method == "kl" and given is None:
        raise errors.refuse("missing_field", "unembedding", "a divergence needs the unembedding")
    if given is not None and given.matrix.shape[1:] != (source.width,):
        reason = f"the unembedding is {list(given.matrix.shape)} and the rows are {source.width} wide"
        raise errors.refuse("width_mismatch", "unembedding", reason)


class _Translator(nn.Module):
    """`x + ((x - mean) * inverse) @ weights * scale + bias`: steps of one size suit every feature."""

    def __init__(self, mean: Floats, inverse: Floats, weights: Floats, scale: Floats, bias: Floats) -> None:
        super().__init__()
        self.mean, self.inverse, self.scale = mean, inverse, scale
        self.weights, self.bias = zeros(*weights.shape), zeros(len(bias))
        with torch.no_grad():
            self.weights.copy_(torch.from_numpy(weights))
            self.bias.copy_(torch.from_numpy(bias / scale))
        self._fixed = [torch.from_numpy(a.astype(np.float32)) for a in (mean, inverse, scale)]

    def forward(self, x: Tensor) -> Tensor:
        mean, inverse, scale = self._fixed
        out: Tensor = x + (((x - mean) * inverse) @ self.weights + self.bias) * scale
        return out

    def folded(self) -> tuple[Block, Vector]:
        """The map [D, D] and bias [D] that do the same."""
        weights = array(self.weights).astype(np.float64) * self.scale
        change = self.inverse[:, None] * weights
        bias = array(self.bias) * self.scale - self.mean @ change
        return (np.eye(len(bias)) + change).astype(np.float32), bias.astype(np.float32)


def _closed_form(x: Source, y: Source, l2: float) -> _Translator:
    found = streams.residuals(x, y)
    inverse = streams.inverse(found.mean, np.maximum(np.diag(found.own), 0.0))
    correlation = found.own * np.outer(inverse, inverse)
    penalised = correlation + l2 * np.eye(x.width)
    weights = np.linalg.solve(penalised, inverse[:, None] * found.cross)
    scale = np.sqrt(found.variance)
    scale[scale == 0] = 1.0
    return _Translator(found.mean, inverse, weights / scale, scale, found.gap)


def _unexplained(
    x: Source, y: Source, trial: PairTrial, weights: Block, bias: Vector
) -> tuple[float, float, float]:
    """FVU of the map on test and train rows, and of the identity on test rows."""
    sides = []
    for keep in (~trial.fitted, trial.fitted):
        target = Subset(y, keep)
        (spread,) = moments(target, gram=False)
        left = as_is = 0.0
        for a, b in together(Subset(x, keep), target):
            left += float(np.square(a @ weights + bias - b, dtype=np.float64).sum())
            as_is += float(np.square(a - b, dtype=np.float64).sum())
        total = float(spread.variance.sum()) * len(target)
        if not total > 0:
            reason = f"the {len(target)} rows of one side are all equal at the last layer"
            raise errors.refuse("too_few_rows", "rows", reason)
        sides.append((left / total, as_is / total))
    return sides[0][0], sides[1][0], sides[0][1]


def _train(pairs: Source, trial: PairTrial, net: _Translator, unembedding: Unembedding, pace: Pace) -> int:
    train, width = trial.split.train, pairs.width // 2
    group = np.unique(trial.group[train], return_inverse=True)[1]
    within = draw(np.zeros(int(group.max()) + 1, dtype=np.int64), group, 0.2, trial.seed)
    if not len(within.test):
        reason = "the rows to train on are one group; a part of them decides when training stops"
        raise errors.refuse("too_few_rows", "groups", reason)
    stops = within.test[streams.sample(len(within.test), STOP_ROWS, trial.seed)]
    held_rows = torch.from_numpy(streams.rows_at(pairs, train[stops]))
    parts = [held_rows[i : i + BATCH] for i in range(0, len(stops), BATCH)]
    keep = np.zeros(len(pairs), dtype=bool)
    keep[train[within.train]] = True
    rng = np.random.default_rng([trial.seed, 8])

    def batches() -> Iterator[Tensor]:
        for rows, _ in streams.shuffled(Subset(pairs, keep), BATCH, rng):
            yield torch.from_numpy(rows)

    def loss(rows: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = unembedding.log_probabilities(rows[:, width:])
        found = unembedding.log_probabilities(net(rows[:, :width]))
        return kl_div(found, wanted, log_target=True, reduction="batchmean")

    def held(_: int) -> float:
        return sum(float(loss(part)) * len(part) for part in parts) / len(stops)

    return descend([net], batches, lambda _, rows: loss(rows), held, pace)[0].steps


def _divergence(
    pairs: Source, trial: PairTrial, found: tuple[Block, Vector], unembedding: Unembedding
) -> dict[str, float]:
    test, width = trial.split.test, pairs.width // 2
    rows = streams.rows_at(pairs, test[streams.sample(len(test), KL_ROWS, trial.seed)])
    sums = np.zeros(4)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        x, last = part[:, :width], torch.from_numpy(part[:, width:])
        wanted = unembedding.log_probabilities(last)
        tuned, plain = (
            unembedding.log_probabilities(torch.from_numpy(np.ascontiguousarray(h)))
            for h in (x @ found[0] + found[1], x)
        )
        for i, q in enumerate((tuned, plain)):
            sums[i] += float(kl_div(q, wanted, log_target=True, reduction="sum"))
            sums[2 + i] += float((q.argmax(dim=1) == wanted.argmax(dim=1)).sum())
    names = ("kl", "kl_identity", "top1", "top1_identity")
    return {name: float(value) for name, value in zip(names, sums / len(rows), strict=True)}

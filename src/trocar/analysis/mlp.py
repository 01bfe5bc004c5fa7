"""MLP probe: one hidden layer of rectified units on standardised rows (Belinkov 2022 reviews such probes).

It says how much a site holds beyond what a linear probe reads; a probe of this size can also compute what is
not there, which is what the control on shuffled labels is for (Hewitt and Liang 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trocar import errors
from trocar.analysis import numbers, streams
from trocar.analysis.joined import Subset
from trocar.analysis.labels import Floats, Given, Ints
from trocar.analysis.results import ClassMetrics, Vector
from trocar.analysis.source import Block, Source
from trocar.analysis.streams import Scale
from trocar.analysis.training import Pace, array, descend, drawn, require_pace, zeros
from trocar.analysis.trial import Trial, plan
from trocar.analysis.verdict import inner, judge

MAX_HIDDEN: Final = 4096
STOP_ROWS: Final = 8192
_PARTS: Final = ("mean", "inverse", "first", "first_bias", "second", "bias")


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """Scores a row x as `relu(((x - mean) * inverse) @ first + first_bias) @ second + bias`.

    Attributes:
        scale: float32 [width] twice.
        first: float32 [width, hidden]; `first_bias`, `second`: float32 [hidden]; `bias`: float32 [1].
    """

    scale: Scale
    first: Block
    first_bias: Vector
    second: Vector
    bias: Vector

    def of_block(self, block: Block) -> Vector:
        """float32 [n], of float32 [n, width]."""
        hidden = np.maximum(self.scale.apply(block) @ self.first + self.first_bias, 0)
        score: Vector = hidden @ self.second + self.bias
        return score

    def scores(self, source: Source) -> Floats:
        """float64 [n], streamed.

        Raises:
            ProgramError: `width_mismatch`, `rows_not_finite`.
        """
        if source.width != len(self.first):
            reason = f"the probe takes rows of width {len(self.first)}, not {source.width}"
            raise errors.refuse("width_mismatch", "rows", reason)
        out, start = np.empty(len(source)), 0
        for block in streams.finite(source):
            out[start : start + len(block)] = self.of_block(block)
            start += len(block)
        return out

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What `from_arrays` takes."""
        parts = (
            self.scale.mean,
            self.scale.inverse,
            self.first,
            self.first_bias,
            self.second,
            self.bias,
        )
        return dict(zip(_PARTS, parts, strict=True))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Mlp:
        """The probe that `arrays()` came from."""
        mean, inverse, *rest = (np.asarray(arrays[part], dtype=np.float32) for part in _PARTS)
        return cls(Scale(mean, inverse), *rest)


@dataclass(frozen=True, slots=True, eq=False)
class MlpFit:
    """The probe and how it does on held-out rows; `steps` until its best state."""

    probe: Mlp
    metrics: ClassMetrics
    steps: int
    classes: tuple[int, ...]
    train: Ints
    test: Ints

    def numbers(self) -> dict[str, float]:
        """The numbers of `NUMBERS["mlp"]`."""
        return {**numbers.of_classes(self.metrics), "steps": float(self.steps)}


def mlp(
    source: Source,
    labels: Given,
    groups: Given | None = None,
    *,
    hidden: int = 64,
    batch: int = 128,
    pace: Pace | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> MlpFit:
    """Fits an MLP probe with AdamW and tests it on held-out rows.

    Rows stream in an order that is shuffled anew at each pass (`streams.shuffled`); a fifth of the train
    side, split off by groups, up to 8,192 rows of it, decides when to stop. The control is a second network
    that sees the same batches with shuffled labels. Memory: `streams.BUFFER_BYTES` twice, and the scores.

    Args:
        labels, groups: as in `analysis.fit`: n ints or bools of two values; n ints or strings.
        hidden: units, 1 to 4096.
        batch: rows per step, 2 to 8192.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `rows_not_finite`, `bad_value`.
        RunFailed: `fit_not_converged` when the loss is no longer finite.
    """
    pace = pace or Pace()
    require_pace(pace)
    _require_options(hidden, batch, test_fraction, seed)
    trial = plan("logistic", labels, groups, test_fraction, seed)
    if len(trial.y) != len(source):
        raise errors.refuse("bad_labels", "labels", f"{len(trial.y)} labels for {len(source)} rows")
    nets, scale, steps = _train(source, trial, hidden, batch, pace)
    probe, control = (_probe(net, scale) for net in nets)
    metrics = judge(probe.scores(source), control.scores(source), trial)
    classes = trial.classes or (0, 1)
    return MlpFit(probe, metrics, steps, classes, trial.split.train, trial.split.test)


def _require_options(hidden: int, batch: int, test_fraction: float, seed: int) -> None:
    if not 1 <= hidden <= MAX_HIDDEN:
        raise errors.refuse("bad_value", "hidden", f"{hidden!r} is not between 1 and {MAX_HIDDEN}")
    if not 2 <= batch <= 8192:
        raise errors.refuse("bad_value", "batch", f"{batch!r} is not between 2 and 8192")
    if not 0 < test_fraction < 1:
        raise errors.refuse("bad_value", "test_fraction", f"{test_fraction!r} is not between 0 and 1")
    if seed < 0:
        raise errors.refuse("bad_value", "seed", f"{seed!r} is negative")


class _Net(nn.Module):
    def __init__(self, width: int, hidden: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.first = drawn(rng, width, hidden, gain=2.0)
        self.first_bias = zeros(hidden)
        self.second = drawn(rng, hidden, 1)
        self.bias = zeros(1)

    def forward(self, z: Tensor) -> Tensor:
        return (torch.relu(z @ self.first + self.first_bias) @ self.second)[:, 0] + self.bias


def _train(
    source: Source, trial: Trial, hidden: int, batch: int, pace: Pace
) -> tuple[list[_Net], Scale, int]:
    within = inner(trial)
    keep = np.zeros(len(trial.y), dtype=bool)
    keep[within.train] = True
    fitted = Subset(source, keep)
    scale = streams.scale(fitted)
    rng = np.random.default_rng([trial.seed, 4])
    nets = [_Net(source.width, hidden, rng) for _ in range(2)]
    most = min(STOP_ROWS, streams.buffer_rows(source.width))
    stops = within.test[streams.sample(len(within.test), most, trial.seed)]
    held_z = torch.from_numpy(scale.apply(streams.rows_at(source, stops)))
    targets = [torch.from_numpy(t.astype(np.float32)) for t in (trial.y, trial.control)]

    def batches() -> Iterator[tuple[Tensor, Ints]]:
        for rows, index in streams.shuffled(fitted, batch, rng):
            yield torch.from_numpy(scale.apply(rows)), within.train[index]

    def loss(i: int, given: tuple[Tensor, Ints]) -> Tensor:
        return binary_cross_entropy_with_logits(nets[i](given[0]), targets[i][given[1]])

    def held(i: int) -> float:
        return float(binary_cross_entropy_with_logits(nets[i](held_z), targets[i][stops]))

    return nets, scale, descend(nets, batches, loss, held, pace)[0].steps


def _probe(net: _Net, scale: Scale) -> Mlp:
    return Mlp(scale, array(net.first), array(net.first_bias), array(net.second)[:, 0], array(net.bias))

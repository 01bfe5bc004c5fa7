"""Probes over whole prompts: one score from the rows of all its tokens, however many they are.

A row becomes features y (itself, standardised, or a layer of rectified units on it); heads give each feature
a value, and values are aggregated over the prompt: by their mean, by attention, or by their maximum. Scores
stream with one running state per prompt and head, so a monitor that sees one token at a time computes the
same (`aggregate`).

Legend: N rows, P prompts, D width, F features, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis import numbers, streams
from trocar.analysis.aggregate import HOW, How, Running, starts_of
from trocar.analysis.labels import Floats, Given, Ints
from trocar.analysis.results import ClassMetrics, Vector
from trocar.analysis.sequence_training import Net, train
from trocar.analysis.source import Block, Source
from trocar.analysis.streams import Scale
from trocar.analysis.training import Pace, array, require_pace
from trocar.analysis.trial import Trial, plan
from trocar.analysis.verdict import judge

_SHAPES: Final[Mapping[str, tuple[int, int]]] = {
    "mean": (1, 0), "max": (1, 0), "attention": (1, 0), "multimax": (10, 100),
}  # fmt: skip
_PARTS: Final = ("mean", "inverse", "first", "first_bias", "values", "queries", "bias")


@dataclass(frozen=True, slots=True, eq=False)
class SequenceProbe:
    """Scores the rows of a prompt.

    With z a standardised row, y = z, or `relu(z @ first + first_bias)` where there are hidden units, the
    score is bias plus the sum over heads of: the mean over rows of `y @ values` (mean); their maximum (max,
    multimax); their mean weighted by the softmax over rows of `y @ queries` (attention).

    Attributes:
        scale: float32 [D] twice.
        first: float32 [D, hidden]; `first_bias`: float32 [hidden]; both empty without hidden units.
        values, queries: float32 [F, H]; queries are zero where nothing attends. `bias`: float32 [1].
    """

    how: How
    scale: Scale
    first: Block
    first_bias: Vector
    values: Block
    queries: Block
    bias: Vector

    def heads(self, block: Block) -> tuple[Block, Block]:
        """Value and attention logit of each head: float32 [n, H] each, of rows float32 [n, D]."""
        y = self.scale.apply(block)
        if len(self.first_bias):
            y = np.maximum(y @ self.first + self.first_bias, 0)
        return y @ self.values, y @ self.queries

    def scores(self, source: Source, prompt: npt.NDArray[Any]) -> Floats:
        """float64 [P], prompts in the order of their first rows; streamed.

        Args:
            prompt: int64 [N], the prompt of each row; rows of a prompt are neighbours.

        Raises:
            ProgramError: `width_mismatch`, `rows_mismatch`, `rows_not_finite`.
        """
        if source.width != len(self.scale.mean):
            reason = f"the probe takes rows of width {len(self.scale.mean)}, not {source.width}"
            raise errors.refuse("width_mismatch", "rows", reason)
        starts = starts_of(prompt, len(source))
        running = Running(self.how, len(starts) - 1, self.values.shape[1])
        number, done = np.repeat(np.arange(len(starts) - 1), np.diff(starts)), 0
        for block in streams.finite(source):
            running.add(number[done : done + len(block)], *self.heads(block))
            done += len(block)
        return running.totals() + float(self.bias[0])

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What `from_arrays` takes, beside `how`."""
        parts = (
            self.scale.mean,
            self.scale.inverse,
            self.first,
            self.first_bias,
            self.values,
            self.queries,
            self.bias,
        )
        return dict(zip(_PARTS, parts, strict=True))

    @classmethod
    def from_arrays(cls, how: How, arrays: Mapping[str, npt.NDArray[Any]]) -> SequenceProbe:
        """The probe that `arrays()` came from."""
        mean, inverse, *rest = (np.asarray(arrays[part], dtype=np.float32) for part in _PARTS)
        return cls(how, Scale(mean, inverse), *rest)


@dataclass(frozen=True, slots=True, eq=False)
class SequenceFit:
    """The probe and how it does on held-out prompts; `train` and `test` are numbers of prompts."""

    probe: SequenceProbe
    metrics: ClassMetrics
    steps: int
    classes: tuple[int, ...]
    train: Ints
    test: Ints

    def numbers(self) -> dict[str, float]:
        """The numbers of `NUMBERS["sequence"]`."""
        return {**numbers.of_classes(self.metrics), "steps": float(self.steps)}


def sequence_probe(
    how: How,
    source: Source,
    prompt: npt.NDArray[Any],
    labels: Given,
    groups: Given | None = None,
    *,
    heads: int | None = None,
    hidden: int | None = None,
    batch: int = 32,
    pace: Pace | None = None,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> SequenceFit:
    """Fits a probe that reads all rows of a prompt, and tests it on held-out prompts.

    - `mean`: a linear probe on the mean row, the usual baseline; a needle in a long prompt is averaged away.
    - `max`: the largest score of a linear probe over the rows.
    - `attention`: softmax attention over rows (Kantamneni et al. 2025; McKenzie et al. 2025, "Detecting
      high-stakes interactions with activation probes"); several heads and hidden units as in Kramar et al. 2026.
    - `multimax`: each head takes its maximum over rows instead (Kramar et al. 2026, "Building production-ready
      probes for Gemini"); what one token says counts the same in a prompt of any length.

    Training streams whole prompts in an order that is shuffled anew at each pass; a fifth of the train side,
    split off by groups, decides when to stop, and a control on shuffled labels learns from the same batches.

    Args:
        prompt: int64 [N], the prompt of each row; rows of a prompt are neighbours, prompts come in any order.
        labels, groups: one per prompt, in the order of their first rows; as in `analysis.fit`.
        heads: 1 to 64; default 1, and 10 for multimax. `mean` and `max` have one.
        hidden: units of the layer before the heads, 0 (none) to 4096; default 0, and 100 for multimax.
        batch: prompts per step, 1 to 1024.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `rows_mismatch`, `rows_not_finite`, `bad_value`,
            `too_expensive` for a prompt whose rows do not fit in `streams.BUFFER_BYTES`.
        RunFailed: `fit_not_converged` when the loss is no longer finite.
    """
    pace = pace or Pace()
    require_pace(pace)
    shape = _shape(how, heads, hidden)
    _require_options(batch, test_fraction, seed)
    starts = starts_of(prompt, len(source))
    trial = plan("logistic", labels, groups, test_fraction, seed)
    _require_prompts(source, starts, trial)
    nets, scale, steps = train(source, starts, trial, how, shape, batch, pace)
    probe, control = (_probe(net, scale) for net in nets)
    metrics = judge(probe.scores(source, prompt), control.scores(source, prompt), trial)
    classes = trial.classes or (0, 1)
    return SequenceFit(probe, metrics, steps, classes, trial.split.train, trial.split.test)


def _probe(net: Net, scale: Scale) -> SequenceProbe:
    parts = (net.first, net.first_bias, net.values, net.queries, net.bias)
    return SequenceProbe(net.how, scale, *(array(part) for part in parts))


def _shape(how: str, heads: int | None, hidden: int | None) -> tuple[int, int]:
    if how not in HOW:
        near = errors.closest(str(how), HOW)
        raise errors.refuse("bad_value", "how", f"{how!r} is not a way to aggregate", closest=near)
    h = _SHAPES[how][0] if heads is None else heads
    f = _SHAPES[how][1] if hidden is None else hidden
    most = 1 if how in ("mean", "max") else 64
    if not 1 <= h <= most:
        raise errors.refuse("bad_value", "heads", f"{how} has 1 to {most} heads, not {h!r}")
    if not 0 <= f <= 4096:
        raise errors.refuse("bad_value", "hidden", f"{f!r} is not between 0 and 4096")
    return h, f


def _require_options(batch: int, test_fraction: float, seed: int) -> None:
    if not 1 <= batch <= 1024:
        raise errors.refuse("bad_value", "batch", f"{batch!r} is not between 1 and 1024")
    if not 0 < test_fraction < 1:
        raise errors.refuse("bad_value", "test_fraction", f"{test_fraction!r} is not between 0 and 1")
    if seed < 0:
        raise errors.refuse("bad_value", "seed", f"{seed!r} is negative")


def _require_prompts(source: Source, starts: Ints, trial: Trial) -> None:
    if len(trial.y) != len(starts) - 1:
        reason = f"{len(trial.y)} labels for {len(starts) - 1} prompts"
        raise errors.refuse("bad_labels", "labels", reason)
    longest, room = int(np.diff(starts).max()), streams.buffer_rows(source.width)
    if longest > room:
        reason = f"a prompt has {longest} rows; training holds {room} rows of width {source.width}"
        raise errors.refuse(
            "too_expensive", "prompt", reason, next_step="Leave out some positions of long prompts."
        )

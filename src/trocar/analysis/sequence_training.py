"""Training of the probes of `sequences`: whole prompts in random order, rows of a batch laid end to end.

Nothing is padded: aggregates run over segments of one long matrix of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trocar.analysis import streams
from trocar.analysis.aggregate import How
from trocar.analysis.joined import Subset
from trocar.analysis.labels import Ints
from trocar.analysis.source import Block, Source
from trocar.analysis.streams import Scale
from trocar.analysis.training import Pace, descend, drawn, zeros
from trocar.analysis.trial import Trial
from trocar.analysis.verdict import inner


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Whole prompts laid end to end.

    Attributes:
        z: float32 [n, D], standardised rows.
        segment: int64 [n], which of the batch's prompts each row belongs to, ascending.
        index: int64 [p], the numbers of the prompts.
    """

    z: Tensor
    segment: Tensor
    index: Tensor


class Net(nn.Module):
    """The probe as torch trains it; `SequenceProbe` is the same in numpy, streamed."""

    def __init__(self, how: How, width: int, shape: tuple[int, int], rng: np.random.Generator) -> None:
        super().__init__()
        heads, hidden = shape
        self.how, features = how, hidden or width
        self.first = drawn(rng, width, hidden, gain=2.0)
        self.first_bias = zeros(hidden)
        self.values = drawn(rng, features, heads)
        self.queries = zeros(features, heads)  # attention begins as the mean
        self.bias = zeros(1)

    def forward(self, given: Prompts) -> Tensor:
        y, p = given.z, len(given.index)
        if len(self.first_bias):
            y = torch.relu(y @ self.first + self.first_bias)
        values, segment = y @ self.values, given.segment
        if self.how in ("max", "multimax"):
            return largest(values, segment, p).sum(dim=1) + self.bias
        weights = self._weights(y, segment, p) if self.how == "attention" else torch.ones_like(values)
        total = _added(weights, segment, p)
        return (_added(weights * values, segment, p) / total).sum(dim=1) + self.bias

    def _weights(self, y: Tensor, segment: Tensor, p: int) -> Tensor:
        logits = y @ self.queries
        return torch.exp(logits - largest(logits.detach(), segment, p)[segment])


def largest(values: Tensor, segment: Tensor, p: int) -> Tensor:
    """Maximum of each segment: [p, H]; each has a row."""
    lowest = values.new_full((p, values.shape[1]), -torch.inf)
    return lowest.scatter_reduce(0, segment[:, None].expand_as(values), values, "amax")


def _added(values: Tensor, segment: Tensor, p: int) -> Tensor:
    return values.new_zeros((p, values.shape[1])).index_add(0, segment, values)


def train(
    source: Source, starts: Ints, trial: Trial, how: How, shape: tuple[int, int], batch: int, pace: Pace
) -> tuple[list[Net], Scale, int]:
    """The probe and its control on shuffled labels, and the steps until the probe's best state."""
    within = inner(trial)
    scale = streams.scale(Subset(source, _rows_of(within.train, starts)))
    rng = np.random.default_rng([trial.seed, 7])
    nets = [Net(how, source.width, shape, rng) for _ in range(2)]
    targets = [torch.from_numpy(t.astype(np.float32)) for t in (trial.y, trial.control)]

    def prepared(index: Ints) -> Iterator[Prompts]:
        for rows, segment, numbers in whole_prompts(source, starts, index, batch, rng):
            parts = scale.apply(rows), segment, numbers
            yield Prompts(*(torch.from_numpy(part) for part in parts))

    def loss(i: int, given: Prompts) -> Tensor:
        return binary_cross_entropy_with_logits(nets[i](given), targets[i][given.index])

    stops = list(prepared(_fitting(rng.permutation(within.test), starts, streams.buffer_rows(source.width))))
    n_stops = sum(len(b.index) for b in stops)

    def held(i: int) -> float:
        return sum(float(loss(i, b)) * len(b.index) for b in stops) / n_stops

    course = descend(nets, lambda: prepared(within.train), loss, held, pace)[0]
    return nets, scale, course.steps


def whole_prompts(
    source: Source, starts: Ints, index: Ints, batch: int, rng: np.random.Generator, room: int | None = None
) -> Iterator[tuple[Block, Ints, Ints]]:
    """All rows of the prompts `index`, each prompt once, in random order, `batch` prompts at a time.

    Prompts are dealt at random into passes as rows are in `streams.shuffled`; no prompt has more than `room` rows.

    Yields:
        Rows of the batch end to end, the place of each row's prompt in the batch, the prompts' numbers.
    """
    lengths, room = np.diff(starts), streams.buffer_rows(source.width) if room is None else room
    parts = min(streams.MAX_PARTS, -(-int(lengths[index].sum()) // room))
    dealt = rng.permutation(index)
    for p in range(parts):
        mine = np.sort(dealt[p::parts])
        rows = _Taker(Subset(source, _rows_of(mine, starts)))
        while len(mine):
            group = mine[: len(_fitting(mine, starts, room))]
            held, ends = rows.take(int(lengths[group].sum())), np.cumsum(lengths[group])
            for chosen in np.array_split(rng.permutation(len(group)), -(-len(group) // batch)):
                pieces = [held[ends[i] - lengths[group[i]] : ends[i]] for i in chosen]
                segment = np.repeat(np.arange(len(chosen)), lengths[group[chosen]])
                yield np.concatenate(pieces), segment, group[chosen]
            mine = mine[len(group) :]


def _fitting(index: Ints, starts: Ints, room: int) -> Ints:
    """The first prompts of `index` whose rows fit in `room` together."""
    used = np.cumsum(np.diff(starts)[index])
    return index[: int(np.searchsorted(used, room, side="right"))]


class _Taker:
    """Takes rows off a source, as many as wanted at a time."""

    def __init__(self, source: Source) -> None:
        self._blocks, self._width = source.blocks(), source.width
        self._rest: Block = np.empty((0, self._width), dtype=np.float32)

    def take(self, n: int) -> Block:
        out, filled = np.empty((n, self._width), dtype=np.float32), 0
        while filled < n:
            self._rest = self._rest if len(self._rest) else next(self._blocks)
            size = min(n - filled, len(self._rest))
            out[filled : filled + size] = self._rest[:size]
            filled, self._rest = filled + size, self._rest[size:]
        return out


def _rows_of(prompts: Ints, starts: Ints) -> npt.NDArray[np.bool_]:
    chosen = np.zeros(len(starts) - 1, dtype=bool)
    chosen[prompts] = True
    return np.repeat(chosen, np.diff(starts))

"""Where rows lie in one step: the host computes every bound, programs never see the batch.

A step is one forward pass over the rows of many sequences, one after the other. A `Member` is what one
sequence feeds in this step: tokens at consecutive absolute positions. Rows may move between layers (sweep
variants part, finished rows leave), so a member has a first row per stage of the step. `Layout.pick` turns a
selector into the rows of its own members and of nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from trocar.engine.protocol import I64, RowTags
from trocar.graph.scope import Selection

NONE: I64 = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Member:
    """One sequence of a task in one step.

    Attributes:
        slot: index within its layout.
        prompt: index of the prompt within its request.
        length: tokens of the prompt; positions from there on are generated.
        first: absolute position of the first token fed.
        fed: ids of the tokens fed.
        starts: its first row in each stage of the step.
        fresh: positions below were seen by an earlier step (before a preemption): edited again, not collected.
    """

    slot: int
    prompt: int
    length: int
    first: int
    fed: Sequence[int]
    starts: tuple[int, ...]
    fresh: int = 0

    @property
    def stop(self) -> int:
        return self.first + len(self.fed)


@dataclass(frozen=True, slots=True)
class Picked:
    """Rows of one selector in one step.

    Attributes:
        index: flat rows in the stage's tensor, int64 [N].
        where: the same for indexing, as a slice when the rows are known to be consecutive.
        slots: owner of each row, int64 [N].
        positions: absolute position of each row.
        ranks: which of its prompt's selected rows each row is, counted from the first one of the prompt.
    """

    index: torch.Tensor
    slots: torch.Tensor
    positions: I64
    ranks: I64
    span: slice | None = None

    @property
    def where(self) -> slice | torch.Tensor:
        return self.index if self.span is None else self.span

    @property
    def rows(self) -> int:
        return len(self.positions)


@dataclass(slots=True)
class Layout:
    """The members of one task in one step, with resolved selectors cached by their text."""

    members: tuple[Member, ...]
    _picked: dict[tuple[str, int], Picked] = field(default_factory=dict)

    @property
    def stale(self) -> bool:
        """Whether some rows were collected before."""
        return any(m.fresh > m.first for m in self.members)

    def pick(self, selection: Selection, stage: int = 0) -> Picked:
        key = (selection.selector.text, stage)
        if key not in self._picked:
            self._picked[key] = self._pick(selection, stage)
        return self._picked[key]

    def _pick(self, selection: Selection, stage: int) -> Picked:
        if len(self.members) == 1:
            return _picked_of(selection, self.members[0], stage)
        found = [selected(selection, m) for m in self.members]
        index = [p - m.first + m.starts[stage] for p, m in zip(found, self.members, strict=True)]
        ranks = [_ranks(selection.rows[m.prompt].prompt, p) for p, m in zip(found, self.members, strict=True)]
        return Picked(
            torch.from_numpy(np.concatenate(index)),
            torch.from_numpy(np.repeat(np.arange(len(found)), [len(p) for p in found])),
            np.concatenate(found),
            np.concatenate(ranks),
        )

    def tags(self, picked: Picked) -> RowTags:
        """Which token each picked row belongs to."""
        members = [self.members[i] for i in picked.slots.tolist()]
        pairs = list(zip(members, picked.positions.tolist(), strict=True))
        return RowTags(
            prompts=np.asarray([m.prompt for m in members], dtype=np.int64),
            positions=picked.positions,
            token_ids=np.asarray([m.fed[p - m.first] for m, p in pairs], dtype=np.int64),
            phases=tuple("prompt" if p < m.length else "gen" for m, p in pairs),
        )

    def fresh(self, picked: Picked) -> I64 | None:
        """Indices of the picked rows that no earlier step has collected; None for all of them."""
        if not self.stale:
            return None
        floor = np.asarray([m.fresh for m in self.members])[picked.slots.numpy()]
        return np.flatnonzero(picked.positions >= floor)


def _picked_of(selection: Selection, member: Member, stage: int) -> Picked:
    """The same for one member alone, which is every step of a request with one prompt."""
    rows = selected(selection, member)
    index = rows + (member.starts[stage] - member.first)
    ranks = _ranks(selection.rows[member.prompt].prompt, rows)
    first, n = (int(index[0]), len(rows)) if len(rows) else (0, 0)
    span = slice(first, first + n) if n and index[-1] - first == n - 1 else None
    return Picked(torch.from_numpy(index), torch.zeros(n, dtype=torch.int64), rows, ranks, span)


def selected(selection: Selection, member: Member) -> I64:
    """Absolute positions of a selector that this member feeds in this step, ascending."""
    rows = selection.rows[member.prompt]
    if member.first >= member.length:
        return _generated(rows.gen, member)
    prompt = _within(rows.prompt, member.first, min(member.stop, member.length))
    if member.stop <= member.length or not rows.gen:
        return prompt
    return np.concatenate([prompt, _generated(rows.gen, member)])


def _within(rows: Sequence[int], first: int, stop: int) -> I64:
    if isinstance(rows, range):
        start = max(rows.start, first)
        return np.arange(start, max(start, min(rows.stop, stop)), dtype=np.int64)
    every = np.asarray(rows, dtype=np.int64)
    return every[np.searchsorted(every, first) : np.searchsorted(every, stop)]


def _generated(rows: range, member: Member) -> I64:
    first = max(member.first, member.length + rows.start)
    return np.arange(first, max(first, min(member.stop, member.length + rows.stop)), dtype=np.int64)


def _ranks(rows: Sequence[int], positions: I64) -> I64:
    """Where positions stand among the selected rows of their prompt (generated rows stand behind them all)."""
    if isinstance(rows, range):
        return positions - rows.start
    return np.searchsorted(np.asarray(rows, dtype=np.int64), positions)

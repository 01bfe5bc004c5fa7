"""Where rows lie in one step: the host computes every bound, programs never see the batch.

A step is one forward pass over a batch. At the first step sequence b occupies the flat rows b*T .. b*T+n-1
of the padded batch [B, T]; at later steps each sequence that is still fed has one row. A `Group` is the part of
one request that sits in this batch; `Layout.pick` turns a selector into the group's own rows and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from trocar.engine.protocol import I64, RowTags
from trocar.graph.scope import Selection


@dataclass(frozen=True, slots=True)
class Member:
    """One sequence of a group in one step.

    Attributes:
        slot: index within its group.
        prompt: index of the prompt within its request.
        start: flat row of its first token of this step.
        length: tokens of the prompt.
        fed: ids of the tokens fed in this step.
        gen: index of the generated token fed in this step, None at the first step.
    """

    slot: int
    prompt: int
    start: int
    length: int
    fed: tuple[int, ...]
    gen: int | None


@dataclass(frozen=True, slots=True)
class Picked:
    """Rows of one selector in one step: flat indices [N], owner slots [N] and tags."""

    index: torch.Tensor
    slots: torch.Tensor
    tags: RowTags

    @property
    def rows(self) -> int:
        return int(self.index.shape[0])


@dataclass(slots=True)
class Layout:
    """The members of one group in one step, with resolved selectors cached by their text."""

    members: tuple[Member, ...]
    _picked: dict[str, Picked] = field(default_factory=dict)

    def pick(self, selection: Selection) -> Picked:
        text = selection.selector.text
        if text not in self._picked:
            self._picked[text] = self._pick(selection)
        return self._picked[text]

    def _pick(self, selection: Selection) -> Picked:
        offsets = [_offsets(member, selection) for member in self.members]
        index = np.concatenate([m.start + o for m, o in zip(self.members, offsets, strict=True)] or [_none()])
        slots = np.concatenate(
            [np.full(len(o), m.slot) for m, o in zip(self.members, offsets, strict=True)] or [_none()]
        )
        return Picked(torch.from_numpy(index), torch.from_numpy(slots), _tags(self.members, offsets))


def _none() -> I64:
    return np.zeros(0, dtype=np.int64)


def _offsets(member: Member, selection: Selection) -> I64:
    """Row offsets of this member within the step."""
    rows = selection.rows[member.prompt]
    if member.gen is None:
        return np.arange(rows.prompt.start, rows.prompt.stop, dtype=np.int64)
    return np.zeros(1 if member.gen in rows.gen else 0, dtype=np.int64)


def _tags(members: tuple[Member, ...], offsets: list[I64]) -> RowTags:
    pairs = list(zip(members, offsets, strict=True))
    first = [m.length + m.gen if m.gen is not None else 0 for m in members]
    return RowTags(
        prompts=np.concatenate([np.full(len(o), m.prompt, dtype=np.int64) for m, o in pairs] or [_none()]),
        positions=np.concatenate([o + base for (_, o), base in zip(pairs, first, strict=True)] or [_none()]),
        token_ids=np.concatenate([np.asarray(m.fed, dtype=np.int64)[o] for m, o in pairs] or [_none()]),
        phases=tuple("gen" if m.gen is not None else "prompt" for m, o in pairs for _ in range(len(o))),
    )

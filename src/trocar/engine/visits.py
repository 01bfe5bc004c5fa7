"""What happens at each site of a step: every task's reads and edits in program order, each on its own rows.

Nodes of different tasks touch different rows, so the first nodes of all tasks go together, then the second
ones, and so on: reads are gathered, edits are fused. Attention patterns exist per sequence, so reads and
knockouts there are carried out by a `PatternVisit` of each sequence.

Shape letters: N rows of a stage, T query rows of one member, K key/value heads, G queries per key head, L context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Final

import numpy as np
import torch

from trocar import errors
from trocar.engine.edits import Write, apply, record
from trocar.engine.layout import Member, selected
from trocar.engine.protocol import I64
from trocar.engine.runs import SiteNode
from trocar.engine.values import Held, Step
from trocar.graph import ops
from trocar.sites import Site

PATTERN: Final = "attn_probs"


def visitors(steps: Sequence[Step], stage_of: Callable[[Site], int]) -> Mapping[Site, Visitor]:
    """One visitor per site that any of the tasks reads or edits in this pass."""
    table: dict[Site, list[tuple[Step, list[SiteNode]]]] = {}
    for step in steps:
        for site, nodes in step.run.by_site.items():
            stage = stage_of(site)
            led = step.leader is not None and stage < step.parted
            if site.name == PATTERN or led or not _computed(step, site):
                continue
            active = [n for n in nodes if step.pick(n.at, stage).rows]
            if active:
                table.setdefault(site, []).append((step, active))
    return {site: Visitor(entries, stage_of(site)) for site, entries in table.items()}


class Visitor:
    """Every task's nodes at one site, in one stage's rows."""

    def __init__(self, entries: list[tuple[Step, list[SiteNode]]], stage: int) -> None:
        self._entries = entries
        self._stage = stage
        self._waves = list(zip_longest(*(nodes for _, nodes in entries)))

    def __call__(self, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """Returns a written copy of the rows [1, N, D], None when nothing was written."""
        live_BTD, written = x_BTD, False
        for wave in self._waves:
            writes = self._wave(wave, live_BTD[0])
            if writes and not written:
                live_BTD, written = x_BTD.clone(), True
            if writes:
                apply(writes, live_BTD[0])
        return live_BTD if written else None

    def _wave(self, wave: tuple[SiteNode | None, ...], live_ND: torch.Tensor) -> list[Write]:
        """Carries out the reads, and gives the edits."""
        writes = []
        for (step, _), node in zip(self._entries, wave, strict=True):
            if node is None or step.run.failed is not None:
                continue
            if isinstance(node, ops.Read):
                _read(step, node, live_ND, self._stage)
            else:
                writes.append(Write(step, node, step.pick(node.at, self._stage)))
        return writes


def _computed(step: Step, site: Site) -> bool:
    """Whether the task's rows get that far; what nobody needs is not computed, and not read."""
    checked = step.run.task.checked
    if site.layer is not None:
        return site.layer < checked.depth
    return site.spec.phase == 0 or checked.needs_final


def _read(step: Step, node: ops.Read, live_ND: torch.Tensor, stage: int) -> None:
    picked = step.pick(node.at, stage)
    rows = live_ND.index_select(0, picked.index)
    columns = step.run.columns.get(node.id)
    step.read[node.id] = Held(rows if columns is None else rows[:, columns], picked.slots)


class PatternVisit:
    """One member's reads and knockouts on its attention patterns."""

    def __init__(self, step: Step, member: Member, layers: Mapping[int, list[SiteNode]]) -> None:
        self._step = step
        self._member = member
        self._layers = layers

    def wants(self, layer: int) -> bool:
        return layer in self._layers and self._step.run.failed is None

    def __call__(self, layer: int, probs_KGTL: torch.Tensor) -> None:
        for node in self._layers[layer]:
            queries = selected(self._step.run.task.checked.selections[node.at], self._member)
            if not len(queries) or self._step.run.failed is not None:
                continue
            if isinstance(node, ops.Read):
                self._read(node, queries, probs_KGTL)
            elif isinstance(node, ops.EditKnockout):
                self._cut(node, queries, probs_KGTL)

    def _keys(self, at: str | None) -> torch.Tensor:
        rows = self._step.run.task.checked.selections[at or "all"].rows[self._member.prompt]
        return torch.from_numpy(np.asarray(rows.prompt, dtype=np.int64))

    def _read(self, node: ops.Read, queries: I64, probs_KGTL: torch.Tensor) -> None:
        probs_HTL = probs_KGTL.flatten(0, 1)
        chosen = probs_HTL if node.heads is None else probs_HTL[list(node.heads)]
        at = torch.from_numpy(queries - self._member.first)
        keys = self._keys(node.keys)
        rows_TH = chosen[:, at][:, :, _reach(keys, probs_HTL.shape[-1])].transpose(0, 1)
        rows = torch.zeros(len(queries), chosen.shape[0], len(keys))
        rows[:, :, keys < probs_HTL.shape[-1]] = rows_TH
        self._put(node.id, rows.flatten(1))

    def _put(self, name: str, rows: torch.Tensor) -> None:
        """Members are visited in order, so rows line up with the layout's."""
        slots = torch.full((len(rows),), self._member.slot)
        held = self._step.read.get(name)
        if held is not None and held.slots is not None:
            rows, slots = torch.cat([held.data, rows]), torch.cat([held.slots, slots])
        self._step.read[name] = Held(rows, slots)

    def _cut(self, node: ops.EditKnockout, queries: I64, probs_KGTL: torch.Tensor) -> None:
        """Zero on the cut edges and the rest scaled up: what a softmax without those scores gives."""
        probs_HTL = probs_KGTL.flatten(0, 1)
        heads = torch.arange(len(probs_HTL)) if node.heads is None else torch.tensor(node.heads)
        at = torch.from_numpy(queries - self._member.first)
        keys = _reach(self._keys(node.keys), probs_HTL.shape[-1])
        before = probs_HTL[heads][:, at]
        after = before.clone()
        after[:, :, keys] = 0.0
        rest = after.sum(-1, keepdim=True)
        if not bool((rest > 0).all()):  # several knockouts together, or attention that was there alone
            self._step.fail(node.id, nothing_left(node))
            return
        after /= rest
        probs_HTL[heads[:, None], at[None]] = after
        self._count(node, queries, before, after)

    def _count(self, node: ops.EditKnockout, queries: I64, before: torch.Tensor, after: torch.Tensor) -> None:
        fresh = torch.from_numpy(queries >= self._member.fresh)
        sums = [
            float(x.transpose(0, 1).flatten(1).norm(dim=-1)[fresh].double().sum()) for x in (before, after)
        ]
        record(self._step, node.id, int(fresh.sum()), sums[0], sums[1])


def nothing_left(node: ops.EditKnockout) -> errors.TrocarError:
    return errors.refuse(
        "no_keys_left", node.id, f"{node.id!r} at {node.site} leaves a query no attention to renormalise"
    )


def _reach(keys: torch.Tensor, length: int) -> torch.Tensor:
    """Keys that exist in a pattern of this length."""
    return keys[keys < length]


def pattern_layers(step: Step) -> dict[int, list[SiteNode]]:
    """The nodes at attn_probs by layer."""
    return {
        s.layer: nodes for s, nodes in step.run.by_site.items() if s.name == PATTERN and s.layer is not None
    }


def follow(step: Step, stage_of: Callable[[Site], int]) -> None:
    """A sweep variant takes over what its leader's edits did for both, or that they failed for both."""
    leader = step.leader
    if leader is None:
        return
    shared = [n.id for s, nodes in step.run.by_site.items() if stage_of(s) < step.parted for n in nodes]
    for name in shared:
        if name in leader.broken:
            step.run.fail(leader.broken[name])
        elif name in leader.effects:
            step.run.tallies[name].add(*leader.effects[name])

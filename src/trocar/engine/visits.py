"""What happens at each site of a step: every task's reads and edits in program order, each on its own rows.

Nodes of different tasks touch different rows, so the first nodes of all tasks go together, then the second
ones, and so on: reads are gathered at once, edits are fused. Attention patterns exist per sequence, so reads and
knockouts there are carried out by a `PatternVisit` of each sequence.

Shape letters: N rows of a stage, T query rows of one member, K key/value heads, G queries per key head, L context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from typing import Final

import numpy as np
import torch

from trocar import errors
from trocar.engine.edits import Write, apply, norms
from trocar.engine.layout import Member, selected
from trocar.engine.protocol import I64
from trocar.engine.runs import SiteNode
from trocar.engine.values import Part, Step
from trocar.graph import ops
from trocar.sites import Site

PATTERN: Final = "attn_probs"


@dataclass(frozen=True, slots=True)
class Wave:
    """The n-th nodes at a site of all tasks that have so many; tasks stand there by their number.

    Attributes:
        reads: task, node and columns of each read.
        rows: task and selector of each read.
        group: equal for waves of a table that read the same rows.
        edits: task and node of each edit.
    """

    reads: tuple[tuple[int, str, torch.Tensor | None], ...]
    rows: tuple[tuple[int, str], ...]
    group: int
    edits: tuple[tuple[int, ops.EditNode], ...]


WaveAt = tuple[Site, int]
Bundle = tuple[tuple[WaveAt, ...], int]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task's read is found: a wave at a site, the read's number in it, and its columns."""

    wave: WaveAt
    number: int
    columns: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens at which site, and where each task finds what it reads; tasks stand here by their number.

    Attributes:
        bundles: by task and names, the waves and the one number in all of them; None when the names do not lie
            side by side.
        homes: the bundle that a wave belongs to, and its number there, once somebody has asked for the bundle; of
            bundles that share a wave the first.
    """

    table: Mapping[Site, tuple[Wave, ...]]
    places: tuple[Mapping[str, Place], ...]
    bundles: dict[tuple[int, tuple[str, ...]], Bundle | None] = field(default_factory=dict)
    homes: dict[WaveAt, tuple[tuple[WaveAt, ...], int]] = field(default_factory=dict)

    def bundle(self, task: int, names: tuple[str, ...]) -> Bundle | None:
        key = (task, names)
        if key not in self.bundles:
            found = self.bundles[key] = self._bundle(task, names)
            if found is not None and not any(wave in self.homes for wave in found[0]):
                self.homes.update({wave: (found[0], i) for i, wave in enumerate(found[0])})
        return self.bundles[key]

    def _bundle(self, task: int, names: tuple[str, ...]) -> Bundle | None:
        """Reads of whole rows, of one selector, at sites of one width, whose waves hold the same rows."""
        found = [self.places[task][n] for n in names if n in self.places[task]]
        groups = {self.table[p.wave[0]][p.wave[1]].group for p in found}
        alike = len(groups) == len({(p.number, p.wave[0].spec.width) for p in found}) == 1
        if len(found) < len(names) or not alike or any(p.columns is not None for p in found):
            return None
        return tuple(p.wave for p in found), found[0].number


class Plans:
    """Plans, remembered while the same tasks feed the same kinds of rows, step after step."""

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._plans: dict[object, Plan] = {}

    def visitors(
        self, steps: Sequence[Step], cuts: tuple[int, ...], stage_of: Callable[[Site], int]
    ) -> Mapping[Site, Visitor]:
        """One visitor per site that any of the tasks reads or edits in this pass.

        Args:
            cuts: first layer of each stage.
        """
        active = tuple(tuple(step.pick(at).rows > 0 for at in step.run.ats) for step in steps)
        parts = tuple((s.run.serial, s.parted if s.leader is not None else -1) for s in steps)
        plan = self._plans.pop((parts, active, cuts), None) or _plan(steps, active, stage_of)
        self._plans[parts, active, cuts] = plan  # the latest stands last
        while len(self._plans) > self._most:
            del self._plans[next(iter(self._plans))]
        gather = Gather(steps, plan)
        for number, step in enumerate(steps):
            step.reads = Reads(gather, number)
        return {
            site: Visitor(steps, site, waves, stage_of(site), gather) for site, waves in plan.table.items()
        }


def _plan(
    steps: Sequence[Step], active: tuple[tuple[bool, ...], ...], stage_of: Callable[[Site], int]
) -> Plan:
    table = _table(steps, active, stage_of)
    places: list[dict[str, Place]] = [{} for _ in steps]
    for site, waves in table.items():
        for number, wave in enumerate(waves):
            for k, (task, name, columns) in enumerate(wave.reads):
                places[task][name] = Place((site, number), k, columns)
    return Plan(table, tuple(places))


def _table(
    steps: Sequence[Step], active: tuple[tuple[bool, ...], ...], stage_of: Callable[[Site], int]
) -> Mapping[Site, tuple[Wave, ...]]:
    found: dict[Site, list[list[tuple[int, SiteNode]]]] = {}
    for number, (step, flags) in enumerate(zip(steps, active, strict=True)):
        there = dict(zip(step.run.ats, flags, strict=True))
        for site, nodes in step.run.by_site.items():
            led = step.leader is not None and stage_of(site) < step.parted
            if site.name == PATTERN or led or not _computed(step, site):
                continue
            chosen = [(number, n) for n in nodes if there[n.at]]
            if chosen:
                found.setdefault(site, []).append(chosen)
    groups: dict[object, int] = {}
    return {
        site: tuple(_wave(column, steps, groups) for column in zip_longest(*columns))
        for site, columns in found.items()
    }


def _wave(
    column: tuple[tuple[int, SiteNode] | None, ...], steps: Sequence[Step], groups: dict[object, int]
) -> Wave:
    pairs = [pair for pair in column if pair is not None]
    reads = [(i, n) for i, n in pairs if isinstance(n, ops.Read)]
    rows = tuple((i, n.at) for i, n in reads)
    return Wave(
        tuple((i, n.id, steps[i].run.columns.get(n.id)) for i, n in reads),
        rows,
        groups.setdefault(rows, len(groups)),
        tuple((i, n) for i, n in pairs if not isinstance(n, ops.Read)),
    )


Owned = list[tuple[int, int, torch.Tensor]]


@dataclass(slots=True)
class Gather:
    """What all tasks read in this pass: one copy per wave, whoever reads, and nobody's share until it is wanted.

    Attributes:
        taken: the rows of each wave that was seen, and per read where its own lie among them, with their owners.
    """

    steps: Sequence[Step]
    plan: Plan
    taken: dict[WaveAt, tuple[torch.Tensor, Owned]] = field(default_factory=dict)
    _known: dict[tuple[int, int], tuple[torch.Tensor, Owned]] = field(default_factory=dict)
    _stacks: dict[tuple[WaveAt, ...], torch.Tensor] = field(default_factory=dict)

    def take(self, where: WaveAt, wave: Wave, stage: int, live_ND: torch.Tensor) -> None:
        """Copies the rows of a wave; the same rows at another site need no second index."""
        key = (wave.group, stage)
        if key not in self._known:
            picks = [self.steps[i].pick(at, stage) for i, at in wave.rows]
            ends = list(accumulate(p.rows for p in picks))
            own = [(end - p.rows, end, p.slots) for p, end in zip(picks, ends, strict=True)]
            self._known[key] = torch.cat([p.index for p in picks]), own
        index, own = self._known[key]
        self.taken[where] = self._copied(where, index, live_ND), own

    def _copied(self, where: WaveAt, index: torch.Tensor, live_ND: torch.Tensor) -> torch.Tensor:
        """The rows, copied to where their bundle will want them."""
        waves, number = self.plan.homes.get(where, ((), 0))
        if not waves:
            return live_ND.index_select(0, index)
        shape = (len(waves), len(index), live_ND.shape[1])
        stack = self._stacks.get(waves)
        if stack is None or stack.shape != shape:
            stack = self._stacks[waves] = live_ND.new_empty(shape)
        return torch.index_select(live_ND, 0, index, out=stack[number])

    def stacked(self, waves: tuple[WaveAt, ...]) -> torch.Tensor:
        """The rows of several waves of one group, [L, N, D], once for all tasks; all of them were taken."""
        if waves not in self._stacks:
            self._stacks[waves] = torch.stack([self.taken[w][0] for w in waves])
        return self._stacks[waves]


@dataclass(frozen=True, slots=True)
class Reads:
    """One task's view of what was gathered."""

    gather: Gather
    task: int

    def get(self, name: str) -> Part | None:
        """The rows of a read; None when its site has not been seen, or not for this task."""
        place = self.gather.plan.places[self.task].get(name)
        if place is None or place.wave not in self.gather.taken:
            return None
        rows, owned = self.gather.taken[place.wave]
        start, stop, slots = owned[place.number]
        return Part(rows, start, stop, slots, place.columns)

    def bundle(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """The rows of several reads, [L, n, D], to be copied on; None when they do not lie side by side."""
        found = self.gather.plan.bundle(self.task, names)
        if found is None or any(w not in self.gather.taken for w in found[0]):
            return None
        waves, number = found
        owned = self.gather.taken[waves[0]][1]
        if any(self.gather.taken[w][1] is not owned for w in waves):  # read in different stages of the pass
            return None
        start, stop, _ = owned[number]
        return self.gather.stacked(waves)[:, start:stop]


class Visitor:
    """Every task's nodes at one site, in one stage's rows."""

    def __init__(
        self, steps: Sequence[Step], site: Site, waves: tuple[Wave, ...], stage: int, gather: Gather
    ) -> None:
        self._steps = steps
        self._site = site
        self._waves = waves
        self._stage = stage
        self._gather = gather

    def __call__(self, x_BTD: torch.Tensor) -> torch.Tensor | None:
        """Returns a written copy of the rows [1, N, D], None when nothing was written."""
        live_BTD, written = x_BTD, False
        for number, wave in enumerate(self._waves):
            if wave.reads:
                self._gather.take((self._site, number), wave, self._stage, live_BTD[0])
            writes = self._writes(wave)
            if writes and not written:
                live_BTD, written = x_BTD.clone(), True
            if writes:
                apply(writes, live_BTD[0])
        return live_BTD if written else None

    def _writes(self, wave: Wave) -> list[Write]:
        pairs = [(self._steps[i], node) for i, node in wave.edits]
        return [Write(s, n, s.pick(n.at, self._stage)) for s, n in pairs if s.run.failed is None]


def _computed(step: Step, site: Site) -> bool:
    """Whether the task's rows get that far; what nobody needs is not computed, and not read."""
    checked = step.run.task.checked
    if site.layer is not None:
        return site.layer < checked.depth
    return site.spec.phase == 0 or checked.needs_final


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
        before = self._step.patterns.get(name)
        if before is not None:
            rows, slots = torch.cat([before.rows, rows]), torch.cat([before.slots, slots])
        self._step.patterns[name] = Part(rows, 0, len(rows), slots, None)

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
        sizes = [norms(x.transpose(0, 1).flatten(1))[fresh] for x in (before, after)]
        self._step.pending.append((node.id, sizes[0], sizes[1]))


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

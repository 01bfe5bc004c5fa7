"""The device-side executor: a group's reads, edits and arithmetic inside one forward pass.

Every linear edit is h' = h + (A(Bh + b) + c) on the group's own rows. Reads are copies with their own
storage. A write is checked finite and bounded before it reaches the stream, so one program's NaN never meets
a neighbour; the offending group fails alone and its rows stay as they were.

Shape letters: N rows of one selector, D width of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from trocar import errors
from trocar.engine.layout import Layout, Picked
from trocar.engine.protocol import MAX_ABS_WRITE, EditEffect, Task
from trocar.graph import ops
from trocar.sites import Site, parse

EditNode = ops.EditAdd | ops.EditSet | ops.EditScale | ops.EditProjectOut
SiteNode = ops.Read | EditNode
SITE_NODES: Final = (ops.Read, ops.EditAdd, ops.EditSet, ops.EditScale, ops.EditProjectOut)


@dataclass(frozen=True, slots=True)
class Held:
    """A value on the device: data [D] for a vector, [N, D] or [N] otherwise; `slots` [N] owns each row."""

    data: torch.Tensor
    slots: torch.Tensor | None

    def at(self, slots: torch.Tensor, per_prompt: bool) -> torch.Tensor:
        """The data laid out for rows owned by `slots`."""
        return self.data[slots] if per_prompt else self.data


@dataclass(slots=True)
class Tally:
    """Running effect of one edit."""

    rows: int = 0
    before: float = 0.0
    after: float = 0.0

    def add(self, before_ND: torch.Tensor, after_ND: torch.Tensor) -> None:
        self.rows += before_ND.shape[0]
        self.before += float(before_ND.norm(dim=-1).sum())
        self.after += float(after_ND.norm(dim=-1).sum())


class Tallies:
    """Effects of all edits of one task, over all its groups."""

    def __init__(self, task: Task) -> None:
        self._by_id = {node.id: Tally() for node in task.checked.edits()}

    def __getitem__(self, edit: str) -> Tally:
        return self._by_id[edit]

    def effects(self) -> tuple[EditEffect, ...]:
        return tuple(
            EditEffect(
                name, t.rows, t.before / t.rows if t.rows else 0.0, t.after / t.rows if t.rows else 0.0
            )
            for name, t in self._by_id.items()
        )


@dataclass(slots=True)
class Group:
    """The part of one task that sits in one batch, with what it keeps between steps.

    Attributes:
        prompts: prompt index of each slot.
        kept: vectors, stored rows and per-prompt values, by node id.
        failed: why this group stopped editing, if it did.
    """

    task: Task
    prompts: tuple[int, ...]
    tallies: Tallies
    kept: dict[str, Held] = field(default_factory=dict)
    failed: errors.TrocarError | None = None

    def __post_init__(self) -> None:
        for name, vector in self.task.vectors.items():
            self.kept[name] = Held(torch.from_numpy(vector), None)
        for name, per_prompt in self.task.stored.items():
            rows = [per_prompt[p] for p in self.prompts]
            slots = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
            self.kept[name] = Held(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(slots))

    def site_nodes(self) -> dict[Site, list[SiteNode]]:
        """Reads and edits by site, each list in program order."""
        out: dict[Site, list[SiteNode]] = {}
        for node in self.task.checked.program.nodes:
            if isinstance(node, SITE_NODES):
                out.setdefault(parse(node.site), []).append(node)
        return out


class Step:
    """One group during one forward pass."""

    def __init__(self, group: Group, layout: Layout) -> None:
        self.group = group
        self.layout = layout
        self._values: dict[str, Held] = {}
        self._nodes = {n.id: n for n in group.task.checked.program.nodes}
        self._types = group.task.checked.values

    def pick(self, at: str) -> Picked:
        return self.layout.pick(self.group.task.checked.selections[at])

    def visit(
        self, node: SiteNode, flat_ND: torch.Tensor, out_ND: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Applies one node to the live rows; returns the buffer of written rows, if there is one.

        Args:
            flat_ND: the site's rows of the whole batch, never written.
            out_ND: a private copy that edits write to, None until the first edit.
        """
        picked = self.pick(node.at)
        if self.group.failed or not picked.rows:
            return out_ND
        rows_ND = (flat_ND if out_ND is None else out_ND).index_select(0, picked.index)
        if isinstance(node, ops.Read):
            self._values[node.id] = Held(rows_ND, picked.slots)
            return out_ND
        edited_ND = self._edit(node, rows_ND, picked)
        if not bool(edited_ND.abs().amax() <= MAX_ABS_WRITE):  # also false for NaN
            self.group.failed = _not_finite(node, self.group.task)
            return out_ND
        self.group.tallies[node.id].add(rows_ND, edited_ND)
        target = flat_ND.clone() if out_ND is None else out_ND
        return target.index_copy_(0, picked.index, edited_ND)

    def _edit(self, node: EditNode, rows_ND: torch.Tensor, picked: Picked) -> torch.Tensor:
        if isinstance(node, ops.EditScale):
            return rows_ND * node.by
        if node.value == ops.ZERO:
            return torch.zeros_like(rows_ND)
        value = self._operand(node.value, picked)
        if isinstance(node, ops.EditAdd):
            return rows_ND + node.coef * value
        if isinstance(node, ops.EditSet):
            return value.expand_as(rows_ND)
        scale = (rows_ND * value).sum(-1, keepdim=True) / value.square().sum(-1, keepdim=True)
        return rows_ND - scale * value

    def _operand(self, name: str, picked: Picked) -> torch.Tensor:
        return self.value(name).at(picked.slots, self._types[name].kind == "per_prompt")

    def has(self, name: str) -> bool:
        """Whether a value has rows in this step."""
        at = self._types[name].at
        return at is None or self.pick(at).rows > 0

    def value(self, name: str) -> Held:
        """The value of a node in this step; arithmetic is evaluated when first asked for."""
        if name in self.group.kept:
            return self.group.kept[name]
        if name not in self._values:
            self._values[name] = self._evaluate(self._nodes[name])
        return self._values[name]

    def _evaluate(self, node: ops.Node) -> Held:
        if isinstance(node, ops.Scale):
            of = self.value(node.of)
            return Held(of.data * node.by, of.slots)
        if isinstance(node, ops.Mean):
            return self._mean(self.value(node.of))
        if isinstance(node, ops.Add | ops.Sub | ops.Dot):
            a, b, slots = self._paired(node.a, node.b)
            if isinstance(node, ops.Dot):
                return Held((a * b).sum(-1), slots)
            return Held(a + b if isinstance(node, ops.Add) else a - b, slots)
        raise RuntimeError(f"{node.id!r} has no value in this step")

    def _paired(self, left: str, right: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        a, b = self.value(left), self.value(right)
        kinds = self._types[left].kind, self._types[right].kind
        slots = a.slots if kinds[0] in ("rows", "scalars") or b.slots is None else b.slots
        if slots is None:
            return a.data, b.data, None
        return a.at(slots, kinds[0] == "per_prompt"), b.at(slots, kinds[1] == "per_prompt"), slots

    def _mean(self, of: Held) -> Held:
        n = len(self.group.prompts)
        if of.slots is None:
            raise RuntimeError("the mean of a vector was not refused")
        total = torch.zeros(n, *of.data.shape[1:]).index_add_(0, of.slots, of.data)
        count = torch.bincount(of.slots, minlength=n)
        return Held(total / count.reshape(-1, *([1] * (total.ndim - 1))), torch.arange(n))

    def keep_per_prompt(self) -> None:
        """After the first step: keeps one-row-per-prompt values for the steps to come."""
        for name, value in self._types.items():
            if value.kind == "per_prompt":
                self.group.kept[name] = self.value(name)


def _not_finite(node: EditNode, task: Task) -> errors.TrocarError:
    index = next(i for i, n in enumerate(task.checked.program.nodes) if n.id == node.id)
    return errors.refuse(
        "edit_not_finite",
        f"program.nodes[{index}]",
        f"{node.op} at {node.site} wrote a value that is NaN, infinite or beyond {MAX_ABS_WRITE:g}",
    )


def visitors(steps: list[Step]) -> Mapping[Site, Visitor]:
    """One visitor per site that any of the groups reads or edits in this pass."""
    table: dict[Site, list[tuple[Step, list[SiteNode]]]] = {}
    for step in steps:
        for site, nodes in step.group.site_nodes().items():
            active = [n for n in nodes if step.pick(n.at).rows]
            if active:
                table.setdefault(site, []).append((step, active))
    return {site: Visitor(entries) for site, entries in table.items()}


class Visitor:
    """What happens at one site: every group's nodes in order, each on its own rows."""

    def __init__(self, entries: list[tuple[Step, list[SiteNode]]]) -> None:
        self._entries = entries

    def __call__(self, x_BTD: torch.Tensor) -> torch.Tensor | None:
        flat_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        out_ND: torch.Tensor | None = None
        for step, nodes in self._entries:
            for node in nodes:
                out_ND = step.visit(node, flat_ND, out_ND)
        return None if out_ND is None else out_ND.view_as(x_BTD)

"""Values of one task in one step: rows that were read, and arithmetic on them when it is first asked for.

Every tensor here is a copy that belongs to the task. What lines up with what was decided by the checker; this
module only follows it: request-wide values meet every row, prompt-wide values the rows of their prompt, rows
meet rows one to one. Stored rows are complete lists per prompt, of which a step takes those it needs.

Shape letters: N rows of this step, P members, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import torch

from trocar import errors
from trocar.engine.layout import Layout, Picked
from trocar.engine.runs import PROMPT_LEVEL, REQUEST_LEVEL, Run, top_k
from trocar.graph import ops


@dataclass(frozen=True, slots=True)
class Held:
    """A value: data [D] for the request, [P, ...] per prompt, else [N, ...] with the owner `slots` [N] of each row.

    Attributes:
        full: rows are complete lists per prompt, not those of one selector in this step.
    """

    data: torch.Tensor
    slots: torch.Tensor | None = None
    full: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A read: rows `start .. stop` of what was gathered for all tasks at once."""

    gathered: torch.Tensor
    start: int
    stop: int
    slots: torch.Tensor
    columns: torch.Tensor | None

    @property
    def rows(self) -> torch.Tensor:
        """A view, for whoever only copies it on."""
        here = self.gathered[self.start : self.stop]
        return here if self.columns is None else here[:, self.columns]

    def held(self) -> Held:
        """Rows with storage of their own, for programs to compute with."""
        return Held(self.rows.clone(), self.slots)


class Reads(Protocol):
    """What the sites have given to one task so far in this pass."""

    def get(self, name: str) -> Part | None: ...

    def bundle(self, names: tuple[str, ...]) -> torch.Tensor | None: ...


@dataclass(slots=True, eq=False)
class Step:
    """One task's members in one forward pass.

    Attributes:
        settled: every member's prompt has been seen, so prompt-wide values are kept ones.
        leader: the sweep variant whose rows this one shares below the layer where they part.
        parted: first stage with rows of its own.
        reads: rows at sites, once the pass has begun.
        patterns: rows at `attn_probs`.
        pending: edits that were carried out, with the norms of their rows before and after, for `effects`.
        effects: rows and sums of norms by edit.
        broken: edits that failed in this step, and why: variants that share them fail with them.
    """

    run: Run
    layout: Layout
    settled: bool
    leader: Step | None = None
    parted: int = 0
    reads: Reads | None = None
    patterns: dict[str, Part] = field(default_factory=dict)
    pending: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    effects: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    broken: dict[str, errors.TrocarError] = field(default_factory=dict)
    _made: dict[str, Held] = field(default_factory=dict)

    def fail(self, edit: str, error: errors.TrocarError) -> None:
        """Ends the task because of one of its edits."""
        self.broken[edit] = error
        self.run.fail(error)

    def pick(self, at: str, stage: int = 0) -> Picked:
        return self.layout.pick(self.run.task.checked.selections[at], stage)

    def has(self, name: str) -> bool:
        """Whether a value has rows in this step."""
        at = self.run.task.checked.values[name].at
        return at is None or self.pick(at).rows > 0

    def value(self, name: str) -> Held:
        if name not in self._made:
            found = self._found(name)
            self._made[name] = self._make(name) if found is None else found.held()
        return self._made[name]

    def rows(self, name: str) -> torch.Tensor:
        """The rows of a value, to be copied on and not computed with."""
        found = self._found(name)
        return self.value(name).data if found is None else found.rows

    def _found(self, name: str) -> Part | None:
        """What was read under this name; before they part, a sweep's leader reads for its variants."""
        found = self.patterns.get(name)
        if found is None and self.reads is not None:
            found = self.reads.get(name)
        return self.leader._found(name) if found is None and self.leader is not None else found

    def bundle(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """The rows of several reads that lie side by side, [L, n, D], to be copied on."""
        return None if self.reads is None else self.reads.bundle(names)

    def _make(self, name: str) -> Held:
        node, run = self.run.nodes[name], self.run
        if isinstance(node, ops.Tensor | ops.Vector):
            return Held(run.constants[name])
        if isinstance(node, ops.Stored):
            return self._stored(name)
        if run.kind(name) in PROMPT_LEVEL and self.settled and self._kept(name) is not None:
            return Held(torch.stack(self._kept(name) or []))
        return EVALUATE[type(node)](self, node)

    def _stored(self, name: str) -> Held:
        rows = [self.run.task.stored[name][m.prompt] for m in self.layout.members]
        slots = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        return Held(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(slots), full=True)

    def _kept(self, name: str) -> list[torch.Tensor] | None:
        found = [self.run.kept.get(m.prompt, {}).get(name) for m in self.layout.members]
        return [x for x in found if x is not None] if all(x is not None for x in found) else None

    def for_rows(self, name: str, picked: Picked) -> torch.Tensor:
        """A value laid out for the picked rows: [N, ...], or [D] for a request-wide one."""
        held, kind = self.value(name), self.run.kind(name)
        if kind in REQUEST_LEVEL:
            return held.data
        if kind in PROMPT_LEVEL:
            return held.data[picked.slots]
        return self._aligned(held, picked)

    def _aligned(self, held: Held, picked: Picked) -> torch.Tensor:
        if not held.full or held.slots is None:
            return held.data
        before = torch.bincount(held.slots, minlength=len(self.layout.members)).cumsum(0).roll(1)
        before[0] = 0
        return held.data[before[picked.slots] + torch.from_numpy(picked.ranks)]

    def keep(self) -> None:
        """Once the prompts have been seen: keeps prompt-wide values for the tokens to come."""
        values = self.run.task.checked.values
        for name in (n for n, v in values.items() if v.kind in PROMPT_LEVEL):
            data = self.value(name).data
            for slot, member in enumerate(self.layout.members):
                self.run.kept.setdefault(member.prompt, {})[name] = data[slot]

    # ---- lining up operands ----

    def line_up(self, *names: str) -> tuple[list[torch.Tensor], torch.Tensor | None, bool]:
        """Operands with one leading axis; the rows' owners, and whether they are complete lists."""
        kinds = [self.run.kind(n) for n in names]
        per_row = [n for n, k in zip(names, kinds, strict=True) if k not in PROMPT_LEVEL | REQUEST_LEVEL]
        if not per_row:
            return [self.value(n).data for n in names], None, False
        partial = [n for n in per_row if not self.value(n).full]
        if not partial:
            owner = self.value(per_row[0])
            return [self._beside(n, k, owner) for n, k in zip(names, kinds, strict=True)], owner.slots, True
        at = self.run.task.checked.values[partial[0]].at
        picked = self.pick(at or "all")
        return [self.for_rows(n, picked) for n in names], picked.slots, False

    def _beside(self, name: str, kind: str, owner: Held) -> torch.Tensor:
        data = self.value(name).data
        return data[owner.slots] if kind in PROMPT_LEVEL else data


def _each(apply: Callable[[torch.Tensor, ops.Node], torch.Tensor]) -> Callable[[Step, ops.Node], Held]:
    def evaluate(step: Step, node: ops.Node) -> Held:
        of = step.value(node.of)  # type: ignore[attr-defined]
        return Held(apply(of.data, node), of.slots, of.full)

    return evaluate


def _pair(apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Step, ops.Node], Held]:
    def evaluate(step: Step, node: ops.Node) -> Held:
        if not isinstance(node.b, str):  # type: ignore[attr-defined]
            of = step.value(node.a)  # type: ignore[attr-defined]
            return Held(apply(of.data, torch.tensor(node.b)), of.slots, of.full)  # type: ignore[attr-defined]
        (a, b), slots, full = step.line_up(node.a, node.b)  # type: ignore[attr-defined]
        return Held(apply(a, b), slots, full)

    return evaluate


def _scale(step: Step, node: ops.Node) -> Held:
    assert isinstance(node, ops.Scale)
    if not isinstance(node.by, str):
        of = step.value(node.of)
        return Held(of.data * node.by, of.slots, of.full)
    (rows, by), slots, full = step.line_up(node.of, node.by)
    wide = step.run.task.checked.values[node.of].kind in ("vector", "per_prompt", "rows")
    return Held(rows * (by.unsqueeze(-1) if wide else by), slots, full)


def _where(step: Step, node: ops.Node) -> Held:
    assert isinstance(node, ops.Where)
    (cond, a, b), slots, full = step.line_up(node.cond, node.a, node.b)
    wide = step.run.task.checked.values[node.a].kind in ("vector", "per_prompt", "rows")
    return Held(torch.where(cond.unsqueeze(-1) if wide else cond, a, b), slots, full)


def _mean(step: Step, node: ops.Node) -> Held:
    assert isinstance(node, ops.Mean)
    of = step.value(node.of)
    if node.over == "width":
        return Held(of.data.mean(-1), of.slots, of.full)
    if of.slots is None:
        raise RuntimeError("the mean of a value without rows was not refused")
    n = len(step.layout.members)
    total = torch.zeros(n, *of.data.shape[1:]).index_add_(0, of.slots, of.data)
    count = torch.bincount(of.slots, minlength=n)
    return Held(total / count.reshape(-1, *([1] * (total.ndim - 1))))


def _encode(step: Step, node: ops.Node) -> Held:
    assert isinstance(node, ops.Encode)
    of = step.value(node.of)
    return Held(step.run.dictionaries[node.sae].encode(of.data), of.slots, of.full)


def normalized(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their norm; zeros stay zero."""
    size = rows.norm(dim=-1, keepdim=True)
    return torch.where(size == 0, 0.0, rows / size)  # a NaN stays one, and is refused where it is written


EVALUATE: Final[dict[type[ops.Node], Callable[[Step, ops.Node], Held]]] = {
    ops.Add: _pair(torch.add),
    ops.Sub: _pair(torch.sub),
    ops.Dot: _pair(lambda a, b: (a * b).sum(-1)),
    ops.MatMul: _pair(torch.matmul),
    ops.Eq: _pair(torch.eq),
    ops.Gt: _pair(torch.gt),
    ops.Lt: _pair(torch.lt),
    ops.And: _pair(torch.logical_and),
    ops.Or: _pair(torch.logical_or),
    ops.Not: _each(lambda x, _: ~x),
    ops.Norm: _each(lambda x, _: x.norm(dim=-1)),
    ops.Normalize: _each(lambda x, _: normalized(x)),
    ops.Relu: _each(lambda x, _: x.relu()),
    ops.TopK: _each(lambda x, node: top_k(x, node.k)),  # type: ignore[attr-defined]
    ops.Scale: _scale,
    ops.Where: _where,
    ops.Mean: _mean,
    ops.Encode: _encode,
}

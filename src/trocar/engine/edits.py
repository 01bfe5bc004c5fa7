"""Edits at one site: every request's rows in one gather, one kernel, one check and one write.

Linear edits are h' = keep * h + c row by row, with c = A(Bh + b) + c0 where the edit has a low-rank part; a
gate blends h' with h. A write is checked finite and bounded before it reaches the stream, so one program's NaN
never meets a neighbour: the offending task fails alone and its rows stay as they were.

Shape letters: N rows of all edits of this wave, n rows of one edit, D width of the site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Final

import numpy as np
import torch

from trocar import errors
from trocar.engine.layout import Picked
from trocar.engine.protocol import MAX_ABS_WRITE
from trocar.engine.runs import REQUEST_LEVEL
from trocar.engine.values import Step, normalized
from trocar.graph import ops

Linear = tuple[float, torch.Tensor | float]
"""(keep, c): h' = keep * h + c."""


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """One edit node on its rows of this step."""

    step: Step
    node: ops.EditNode
    picked: Picked

    @property
    def columns(self) -> torch.Tensor | None:
        return self.step.run.columns.get(self.node.id)

    @property
    def plain(self) -> bool:
        """Whether it writes whole rows, always, and for the first time."""
        gated = isinstance(self.node, ops.Edit) and self.node.gate is not None
        return not gated and self.columns is None and not self.step.layout.stale

    def operand(self, name: str) -> torch.Tensor:
        """A value for these rows, [n, D] or [D]."""
        return self.step.for_rows(name, self.picked)


def apply(writes: Sequence[Write], live_ND: torch.Tensor) -> None:
    """Carries out edits on disjoint rows of `live_ND`, in place."""
    if len(writes) == 1 and writes[0].plain:
        _apply_one(writes[0], live_ND)
        return
    index = torch.cat([w.picked.index for w in writes])
    before_ND = live_ND.index_select(0, index)
    after_ND = _edited(writes, before_ND)
    sound = _sound(writes, before_ND, after_ND)
    live_ND.index_copy_(0, index, after_ND)
    _tally([w for w in writes if w in sound], writes, before_ND, after_ND)


def _apply_one(write: Write, live_ND: torch.Tensor) -> None:
    """The same for one plain edit alone at its site, the usual case, without what only many need."""
    before_nD = live_ND[write.picked.where]
    keep, c = LINEAR[type(write.node)](write, before_nD)
    after_nD = before_nD + c if keep == 1.0 else before_nD * keep + c
    before_n, after_n = norms(before_nD), norms(after_nD)
    # no number is larger than the norm of its row, which is needed anyway; false for NaN too
    if not float(after_n.amax()) <= MAX_ABS_WRITE and not float(after_nD.abs().amax()) <= MAX_ABS_WRITE:
        write.step.fail(write.node.id, not_finite(write.node, write.step))
        return
    live_ND[write.picked.where] = after_nD
    write.step.pending.append((write.node.id, before_n, after_n))


def _edited(writes: Sequence[Write], before_ND: torch.Tensor) -> torch.Tensor:
    """The fused kernel: h * keep + c over the rows of all edits, then columns and gates where there are any."""
    keep_N1 = torch.ones(len(before_ND), 1)
    c_ND = torch.zeros_like(before_ND)
    for write, rows in _spans(writes):
        if write.columns is None:
            keep, c = LINEAR[type(write.node)](write, before_ND[rows])
            keep_N1[rows] = keep
            c_ND[rows] = c
    after_ND = torch.addcmul(c_ND, before_ND, keep_N1)
    for write, rows in _spans(writes):
        if write.columns is not None:
            _edit_columns(write, write.columns, before_ND[rows], after_ND[rows])
        if isinstance(write.node, ops.Edit) and write.node.gate is not None:
            after_ND[rows] = _gated(write, write.node.gate, before_ND[rows], after_ND[rows])
    return after_ND


def _spans(writes: Sequence[Write]) -> list[tuple[Write, slice]]:
    out, start = [], 0
    for write in writes:
        out.append((write, slice(start, start + write.picked.rows)))
        start += write.picked.rows
    return out


def _edit_columns(
    write: Write, columns: torch.Tensor, before_nD: torch.Tensor, after_nD: torch.Tensor
) -> None:
    part = before_nD[:, columns]
    keep, c = LINEAR[type(write.node)](write, part)
    after_nD[:, columns] = part * keep + c


def _gated(write: Write, gate: str, before_nD: torch.Tensor, after_nD: torch.Tensor) -> torch.Tensor:
    open_n = write.operand(gate).unsqueeze(-1)
    if open_n.dtype == torch.bool:
        return torch.where(open_n, after_nD, before_nD)
    return before_nD + open_n * (after_nD - before_nD)


def _add(write: Write, _: torch.Tensor) -> Linear:
    node, run = write.node, write.step.run
    assert isinstance(node, ops.EditAdd)
    coef = node.coef * run.scale(node.id)
    key = f"{node.id}:add"
    if run.kind(node.value) in REQUEST_LEVEL:  # the same at every step
        if key not in run.constants:
            run.constants[key] = coef * _unit(node, write.operand(node.value))
        return 1.0, run.constants[key]
    return 1.0, coef * _unit(node, write.operand(node.value))


def _unit(node: ops.EditAdd, value: torch.Tensor) -> torch.Tensor:
    return normalized(value) if node.unit == "site_norm" else value


def _set(write: Write, _: torch.Tensor) -> Linear:
    assert isinstance(write.node, ops.EditSet)
    return 0.0, 0.0 if write.node.value == ops.ZERO else write.operand(write.node.value)


def _scale(write: Write, _: torch.Tensor) -> Linear:
    assert isinstance(write.node, ops.EditScale)
    return write.node.by, 0.0


def _project_out(write: Write, h_nD: torch.Tensor) -> Linear:
    assert isinstance(write.node, ops.EditProjectOut)
    v = write.operand(write.node.value)
    return 1.0, -((h_nD * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)) * v


def _affine(write: Write, h_nD: torch.Tensor) -> Linear:
    node = write.node
    assert isinstance(node, ops.EditAffine)
    inner = h_nD @ write.operand(node.down)
    if node.inner is not None:
        inner = inner + write.operand(node.inner)
    c = inner @ write.operand(node.up)
    return 1.0, c if node.bias is None else c + write.operand(node.bias)


def _clamp(write: Write, h_nD: torch.Tensor) -> Linear:
    node, scale = write.node, write.step.run.scale(write.node.id)
    assert isinstance(node, ops.EditClamp)
    v = normalized(write.operand(node.value))
    along = (h_nD * v).sum(-1, keepdim=True)
    low, high = (None if x is None else x * scale for x in (node.low, node.high))
    return 1.0, (along.clamp(low, high) - along) * v


def _sae(write: Write, h_nD: torch.Tensor) -> Linear:
    node = write.node
    assert isinstance(node, ops.EditSae)
    sae = write.step.run.dictionaries[node.sae]
    acts_nF = sae.encode(h_nD)
    moved_nF = acts_nF.clone()
    for feature in node.features:
        old = acts_nF[:, feature.index]
        moved_nF[:, feature.index] = feature.set if feature.set is not None else old * (feature.scale or 0.0)
    if not node.keep_error:
        return 0.0, sae.decode(moved_nF)
    changed = [f.index for f in node.features]
    return 1.0, (moved_nF - acts_nF)[:, changed] @ sae.w_dec[changed]


LINEAR: Final[dict[type[ops.Node], Callable[[Write, torch.Tensor], Linear]]] = {
    ops.EditAdd: _add,
    ops.EditSet: _set,
    ops.EditScale: _scale,
    ops.EditProjectOut: _project_out,
    ops.EditAffine: _affine,
    ops.EditClamp: _clamp,
    ops.EditSae: _sae,
}


def _sound(writes: Sequence[Write], before_ND: torch.Tensor, after_ND: torch.Tensor) -> set[Write]:
    """Edits whose rows are finite and bounded; the rows of the others are put back and their tasks fail."""
    if bool(after_ND.abs().amax() <= MAX_ABS_WRITE):  # false for NaN too
        return set(writes)
    good = set()
    for write, rows in _spans(writes):
        if bool(after_ND[rows].abs().amax() <= MAX_ABS_WRITE):
            good.add(write)
            continue
        after_ND[rows] = before_ND[rows]
        write.step.fail(write.node.id, not_finite(write.node, write.step))
    return good


def not_finite(node: ops.EditNode, step: Step) -> errors.TrocarError:
    nodes = step.run.task.checked.program.nodes
    index = next(i for i, n in enumerate(nodes) if n.id == node.id)
    return errors.refuse(
        "edit_not_finite",
        f"program.nodes[{index}]",
        f"{node.op} at {node.site} wrote a value that is NaN, infinite or beyond {MAX_ABS_WRITE:g}",
    )


def _tally(
    sound: Sequence[Write], writes: Sequence[Write], before_ND: torch.Tensor, after_ND: torch.Tensor
) -> None:
    """Notes the norms for the receipts; rows that an earlier step has counted are left out."""
    before_N, after_N = norms(before_ND), norms(after_ND)
    good = set(sound)
    for write, rows in _spans(writes):
        if write not in good:
            continue
        fresh = write.step.layout.fresh(write.picked)
        part: slice | torch.Tensor = slice(None) if fresh is None else torch.from_numpy(fresh)
        write.step.pending.append((write.node.id, before_N[rows][part], after_N[rows][part]))


norms = partial(torch.linalg.vector_norm, dim=-1)


def settle(steps: Sequence[Step]) -> None:
    """Adds what the edits of a pass did to their tasks' receipts, and to the steps, from where variants copy it.

    One sum over all edits of the pass: adding up each by itself would cost more than the edits.
    """
    noted = [(s, name, before, after) for s in steps for name, before, after in s.pending if len(before)]
    if not noted:
        return
    starts = [0, *accumulate(len(before) for *_, before, _ in noted)][:-1]
    both_2N = [torch.cat(side).double().numpy() for side in zip(*((b, a) for *_, b, a in noted), strict=True)]
    sums = [np.add.reduceat(side, starts).tolist() for side in both_2N]
    for (step, name, rows, _), before, after in zip(noted, *sums, strict=True):
        step.run.tallies[name].add(len(rows), before, after)
        old = step.effects.get(name, (0, 0.0, 0.0))
        step.effects[name] = (old[0] + len(rows), old[1] + before, old[2] + after)

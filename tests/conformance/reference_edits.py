"""Edits on the selected rows of one site, from the docstrings of the ops alone.

Every edit is h' = h + gate * (f(h) - h), on all columns of the site or on those of some heads or neurons.

Shape letters: N selected rows, D width of the edited columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference_values import ROW, Values, unit


def columns_of(node: Any, d_head: int) -> list[int] | None:
    """Columns that a read or an edit names by heads or neurons, in their order."""
    if getattr(node, "heads", None) is not None:
        return [c for head in node.heads for c in range(head * d_head, head * d_head + d_head)]
    neurons = getattr(node, "neurons", None)
    return None if neurons is None else list(neurons)


def edited(node: Any, h: torch.Tensor, values: Values, d_head: int, scale: float) -> torch.Tensor:
    """The rows [N, W] of a site after an edit.

    Args:
        scale: what a coefficient counts in: 1, or the mean norm of the site's rows.
    """
    columns = columns_of(node, d_head) or list(range(h.shape[-1]))
    part = h[:, columns]
    new = EDITS[node.op](node, part, values, scale)
    if node.gate is not None:
        gate = values.get(node.gate).data.reshape(-1, 1)
        whole = gate.dtype != torch.bool
        new = part + gate * (new - part) if whole else torch.where(gate, new, part)
    out = h.clone()
    out[:, columns] = new
    return out


def _value(node: Any, h: torch.Tensor, values: Values) -> torch.Tensor:
    """The edit's value as [N, D]."""
    value = values.get(node.value)
    assert value.wide
    assert value.level != ROW or len(value.data) == len(h), (node.id, value.data.shape, h.shape)
    return value.data.expand(h.shape)


def _add(node: Any, h: torch.Tensor, values: Values, scale: float) -> torch.Tensor:
    value = _value(node, h, values)
    return h + node.coef * scale * (unit(value) if node.unit == "site_norm" else value)


def _set(node: Any, h: torch.Tensor, values: Values, _scale: float) -> torch.Tensor:
    return torch.zeros_like(h) if node.value == "zero" else _value(node, h, values)


def _project_out(node: Any, h: torch.Tensor, values: Values, _scale: float) -> torch.Tensor:
    v = _value(node, h, values)
    return torch.stack([row - torch.dot(row, w) / torch.dot(w, w) * w for row, w in zip(h, v, strict=True)])


def _affine(node: Any, h: torch.Tensor, values: Values, _scale: float) -> torch.Tensor:
    low = torch.einsum("nd,dr->nr", h, values.constant(node.down))
    if node.inner is not None:
        low = low + values.constant(node.inner)
    out = h + torch.einsum("nr,rd->nd", low, values.constant(node.up))
    return out if node.bias is None else out + values.constant(node.bias)


def _clamp(node: Any, h: torch.Tensor, values: Values, scale: float) -> torch.Tensor:
    v = unit(_value(node, h, values))
    along = (h * v).sum(-1)
    kept = along.clone()
    if node.low is not None:
        kept = torch.maximum(kept, torch.full_like(kept, node.low * scale))
    if node.high is not None:
        kept = torch.minimum(kept, torch.full_like(kept, node.high * scale))
    rest = h - along[:, None] * v
    return torch.where((kept == along)[:, None], h, rest + kept[:, None] * v)


def _sae(node: Any, h: torch.Tensor, values: Values, _scale: float) -> torch.Tensor:
    sae = values.node(node.sae)
    f = values.encode(h, sae)
    wanted = f.clone()
    for feature in node.features:
        old = f[:, feature.index]
        wanted[:, feature.index] = old * feature.scale if feature.set is None else feature.set
    w_dec, b_dec = (values.constant(f"{sae.id}.{part}") for part in ("w_dec", "b_dec"))
    return h + (wanted - f) @ w_dec if node.keep_error else wanted @ w_dec + b_dec


EDITS: dict[str, Callable[[Any, torch.Tensor, Values, float], torch.Tensor]] = {
    "edit.add": _add,
    "edit.set": _set,
    "edit.scale": lambda node, h, _values, _scale: h * node.by,
    "edit.project_out": _project_out,
    "edit.affine": _affine,
    "edit.clamp": _clamp,
    "edit.sae": _sae,
}

"""Values of one prompt in one pass, from the docstrings of the ops alone.

A value is one for the request, one for the prompt, or one per selected row; wide (a row of numbers), a number, or
a truth value. Where a result hangs on a comparison, how near it was is noted in `near`: a program whose margins
are smaller than rounding says nothing about an engine.

Shape letters: N selected rows, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Nodes = Sequence[Any]
Constants = Mapping[str, torch.Tensor]
REQUEST, PROMPT, ROW = 0, 1, 2


@dataclass(frozen=True)
class Val:
    """`data` is [D] or [] for a request or a prompt, [N, D] or [N] for rows."""

    data: torch.Tensor
    level: int
    wide: bool

    def beside(self, other: Val) -> torch.Tensor:
        """The data so that it meets that of `other` row by row."""
        return self.data.unsqueeze(-1) if other.wide and not self.wide else self.data


@dataclass
class Values:
    """What the nodes of a program are worth for one prompt.

    Attributes:
        constants: by node id (and `id.w_enc` for an array of a dictionary): what the request carries.
        known: values that are one for the prompt, from the pass over the bare prompt.
        read: rows that sites have shown so far in this pass.
        near: how near each comparison was, relative.
    """

    nodes: Nodes
    constants: Constants
    dtype: torch.dtype
    known: Mapping[str, Val] = field(default_factory=dict)
    read: dict[str, torch.Tensor] = field(default_factory=dict)
    near: list[float] = field(default_factory=list)

    def node(self, name: str) -> Any:
        return next(n for n in self.nodes if n.id == name)

    def constant(self, name: str) -> torch.Tensor:
        return torch.as_tensor(self.constants[name]).to(self.dtype)

    def get(self, name: str) -> Val:
        if name in self.known:
            return self.known[name]
        node = self.node(name)
        if node.op in ("tensor", "vector"):
            return Val(self.constant(name), REQUEST, wide=True)
        if node.op == "stored":
            return Val(self.constant(name), ROW, wide=True)
        if node.op == "read":
            return Val(self.read[name], ROW, wide=True)
        return RULES[node.op](self, node)

    def prompt_wide(self) -> dict[str, Val]:
        """Every value that is one for the prompt; the rest of a generation sees these."""
        made = [n.id for n in self.nodes if n.op in RULES and self._whole(n)]
        found = {name: self.get(name) for name in made}
        return {name: value for name, value in found.items() if value.level == PROMPT}

    def _whole(self, node: Any) -> bool:
        """Whether all rows that a value needs have been read (those of generated tokens may be missing)."""
        if node.op == "read":
            return node.id in self.read
        return all(self._whole(self.node(name)) for name in operands(node))

    def encode(self, rows: torch.Tensor, sae: Any) -> torch.Tensor:
        """Features [N, F] (or [F]) of rows under a dictionary."""
        centred = rows - self.constant(f"{sae.id}.b_dec") if sae.center else rows
        raw = centred @ self.constant(f"{sae.id}.w_enc") + self.constant(f"{sae.id}.b_enc")
        if sae.activation == "jumprelu":
            threshold = self.constant(f"{sae.id}.threshold")
            self.compared(raw, threshold)
            return raw * (raw > threshold)
        return self.largest(raw.relu(), sae.k) if sae.activation == "topk" else raw.relu()

    def largest(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        """Rows with all but their k largest numbers zero; of equal numbers the first stays."""
        flat = rows.reshape(-1, rows.shape[-1])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        for i, row in enumerate(flat.tolist()):
            order = sorted(range(len(row)), key=lambda j: (-row[j], j))
            kept[i, order[:k]] = True
            if k < len(row):
                self.compared(flat[i, order[k - 1]], flat[i, order[k]])
        return torch.where(kept, flat, torch.zeros_like(flat)).reshape(rows.shape)

    def compared(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Notes how near two sides of a comparison were; equal ones are equal by construction."""
        gap, size = (a - b).abs(), torch.maximum(a.abs(), b.abs() + torch.zeros_like(a)).clamp_min(1.0)
        apart = gap[gap > 0] / size[gap > 0]
        if apart.numel():
            self.near.append(float(apart.min()))


def operands(node: Any) -> list[str]:
    """Ids that a node of arithmetic names."""
    given = [getattr(node, name, None) for name in ("a", "b", "of", "by", "cond")]
    return [name for name in given if isinstance(name, str)]


def _pair(
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, near: bool = False
) -> Callable[[Values, Any], Val]:
    def rule(values: Values, node: Any) -> Val:
        a = values.get(node.a)
        b = (
            values.get(node.b)
            if isinstance(node.b, str)
            else Val(_number(values, node.b), REQUEST, wide=False)
        )
        if near:
            values.compared(*torch.broadcast_tensors(a.data, b.data))
        return Val(apply(a.data, b.data), max(a.level, b.level), a.wide)

    return rule


def _number(values: Values, number: float) -> torch.Tensor:
    """A number of the request, as the float32 that travels."""
    return torch.tensor(number, dtype=torch.float32).to(values.dtype)


def _rowwise(apply: Callable[[Values, Any, torch.Tensor], torch.Tensor]) -> Callable[[Values, Any], Val]:
    def rule(values: Values, node: Any) -> Val:
        of = values.get(node.of)
        return Val(apply(values, node, of.data), of.level, of.wide)

    return rule


def _scale(values: Values, node: Any) -> Val:
    of = values.get(node.of)
    if not isinstance(node.by, str):
        return Val(of.data * node.by, of.level, of.wide)
    by = values.get(node.by)
    return Val(of.data * by.beside(of), max(of.level, by.level), of.wide)


def _dot(values: Values, node: Any) -> Val:
    a, b = values.get(node.a), values.get(node.b)
    return Val((a.data * b.data).sum(-1), max(a.level, b.level), wide=False)


def _matmul(values: Values, node: Any) -> Val:
    a = values.get(node.a)
    return Val(torch.einsum("...d,dr->...r", a.data, values.constant(node.b)), a.level, wide=True)


def _norm(values: Values, node: Any) -> Val:
    of = values.get(node.of)
    return Val(of.data.square().sum(-1).sqrt(), of.level, wide=False)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their Euclidean norm; zeros stay zero."""
    size = rows.square().sum(-1, keepdim=True).sqrt()
    return rows / torch.where(size == 0, torch.ones_like(size), size)


def _mean(values: Values, node: Any) -> Val:
    of = values.get(node.of)
    if node.over == "width":
        return Val(of.data.mean(-1), of.level, wide=False)
    assert of.level == ROW
    return Val(of.data.mean(0), PROMPT, of.wide)


def _encode(values: Values, node: Any) -> Val:
    of = values.get(node.of)
    return Val(values.encode(of.data, values.node(node.sae)), of.level, wide=True)


def _where(values: Values, node: Any) -> Val:
    cond, a, b = (values.get(name) for name in (node.cond, node.a, node.b))
    level = max(cond.level, a.level, b.level)
    return Val(torch.where(cond.beside(a), a.data, b.data), level, a.wide)


RULES: dict[str, Callable[[Values, Any], Val]] = {
    "add": _pair(lambda a, b: a + b),
    "sub": _pair(lambda a, b: a - b),
    "eq": _pair(lambda a, b: a == b, near=True),
    "gt": _pair(lambda a, b: a > b, near=True),
    "lt": _pair(lambda a, b: a < b, near=True),
    "and": _pair(lambda a, b: a & b),
    "or": _pair(lambda a, b: a | b),
    "not": _rowwise(lambda _, __, x: x.logical_not()),
    "normalize": _rowwise(lambda _, __, x: unit(x)),
    "relu": _rowwise(lambda _, __, x: x * (x > 0)),
    "topk": _rowwise(lambda values, node, x: values.largest(x, node.k)),
    "scale": _scale,
    "dot": _dot,
    "matmul": _matmul,
    "norm": _norm,
    "mean": _mean,
    "encode": _encode,
    "where": _where,
}

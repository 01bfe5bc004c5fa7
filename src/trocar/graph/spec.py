"""The table of the language: one row per op. Checker, prices, hints, capabilities and docs come from it.

An op exists when it has a row here; `tests/unit/graph` holds the table and the `Node` union together.
`takes` names the operand fields and which kinds of value they accept; `rule` is the type rule; `bits` is what
an output may release at most; `label` says how an output's result leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from trocar.graph import cost, ops, rules
from trocar.graph.cost import Prices
from trocar.graph.scope import Walk
from trocar.graph.shapes import Kind, Value

Group = Literal["read", "constant", "arithmetic", "edit", "output"]
Declassifier = Literal["none", "scalars", "top_k", "tokens", "handle"]
ROWLIKE: Final[tuple[Kind, ...]] = ("rows", "per_prompt")
VECTORLIKE: Final[tuple[Kind, ...]] = ("vector", "per_prompt", "rows")
ANY: Final[tuple[Kind, ...]] = ("vector", "per_prompt", "rows", "scalars")


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One row.

    Attributes:
        op: the name on the wire.
        node: its frozen model.
        group: read, constant, arithmetic, edit or output.
        rule: type rule `(node, walk, path) -> Value | None`.
        takes: operand fields and the kinds they accept.
        gives: what the result is, in words, for the docs.
        declassifier: how a result leaves.
        bits: most bits released, for outputs.
        lane: where it runs; A is the shared batch.
    """

    op: str
    node: type[ops.Node]
    group: Group
    rule: Callable[[Any, Walk, str], Value | None]
    gives: str
    takes: Mapping[str, tuple[Kind, ...]] = field(default_factory=dict)
    declassifier: Declassifier = "none"
    bits: Callable[[Any, Walk, Prices], int] | None = None
    lane: Literal["A"] = "A"

    @property
    def doc(self) -> str:
        return " ".join((self.node.__doc__ or "").split())


_TABLE: Final = (
    OpSpec("read", ops.Read, "read", rules.read, "rows of the site"),
    OpSpec("tensor", ops.Tensor, "constant", rules.tensor, "vector"),
    OpSpec("vector", ops.Vector, "constant", rules.vector, "vector"),
    OpSpec("stored", ops.Stored, "constant", rules.stored, "rows"),
    OpSpec("add", ops.Add, "arithmetic", rules.add, "the larger operand's kind", {"a": ANY, "b": ANY}),
    OpSpec("sub", ops.Sub, "arithmetic", rules.add, "the larger operand's kind", {"a": ANY, "b": ANY}),
    OpSpec("scale", ops.Scale, "arithmetic", rules.scale, "the operand's kind", {"of": ANY}),
    OpSpec("dot", ops.Dot, "arithmetic", rules.dot, "scalars", {"a": VECTORLIKE, "b": VECTORLIKE}),
    OpSpec("mean", ops.Mean, "arithmetic", rules.mean, "one row per prompt", {"of": ("rows",)}),
    OpSpec("edit.add", ops.EditAdd, "edit", rules.edit_with_value, "edit", {"value": VECTORLIKE}),
    OpSpec("edit.set", ops.EditSet, "edit", rules.edit_with_value, "edit", {"value": VECTORLIKE}),
    OpSpec("edit.scale", ops.EditScale, "edit", rules.edit_scale, "edit"),
    OpSpec(
        "edit.project_out", ops.EditProjectOut, "edit", rules.edit_with_value, "edit", {"value": VECTORLIKE}
    ),
    OpSpec(
        "capture",
        ops.Capture,
        "output",
        rules.capture,
        "handle",
        {"of": ("rows",)},
        "handle",
        cost.capture_bits,
    ),
    OpSpec(
        "lens",
        ops.Lens,
        "output",
        rules.lens,
        "top-k tokens per row",
        {"of": ROWLIKE},
        "top_k",
        cost.lens_bits,
    ),
    OpSpec(
        "logprobs",
        ops.Logprobs,
        "output",
        rules.logprobs,
        "numbers per row",
        {},
        "scalars",
        cost.logprobs_bits,
    ),
    OpSpec(
        "score",
        ops.Score,
        "output",
        rules.score,
        "a number per row",
        {"of": ("rows", "scalars")},
        "scalars",
        cost.score_bits,
    ),
    OpSpec("text", ops.Text, "output", rules.text, "text per prompt", {}, "tokens", cost.text_bits),
)
SPEC: Final[dict[str, OpSpec]] = {row.op: row for row in _TABLE}
EDITS: Final = frozenset(row.op for row in _TABLE if row.group == "edit")
OUTPUTS: Final = frozenset(row.op for row in _TABLE if row.group == "output")


def field_names() -> tuple[str, ...]:
    """Every field name of every node, for hints."""
    return tuple(sorted({name for row in _TABLE for name in row.node.model_fields}))

"""The table of the language: one row per op. Checker, prices, hints, capabilities and docs come from it.

An op exists when it has a row here; `tests/unit/graph` holds the table and the `Node` union together.
`takes` names the operand fields and which kinds of value they accept; `rule` is the type rule; `bits` is what
an output may release at most; `label` says how an output's result leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from trocar.graph import cost, ops
from trocar.graph import rules_arithmetic as arith
from trocar.graph import rules_edits as edits
from trocar.graph import rules_outputs as outs
from trocar.graph import rules_values as values
from trocar.graph.cost import Prices
from trocar.graph.scope import Walk
from trocar.graph.shapes import Kind, Value

Group = Literal["read", "constant", "arithmetic", "edit", "output", "control"]
Lane = Literal["A", "A*"]
Declassifier = Literal["none", "scalars", "top_k", "tokens", "metric", "raw", "handle"]
Gives = Literal["user", "act", "join", "none"]
ROWLIKE: Final[tuple[Kind, ...]] = ("rows", "per_prompt")
WIDE: Final[tuple[Kind, ...]] = ("vector", "per_prompt", "rows")
NUMBERS: Final[tuple[Kind, ...]] = ("scalars", "prompt_scalars")
MASKS: Final[tuple[Kind, ...]] = ("mask", "prompt_mask")
MATRIX: Final[tuple[Kind, ...]] = ("matrix",)
VECTOR: Final[tuple[Kind, ...]] = ("vector",)
DICTIONARY: Final[tuple[Kind, ...]] = ("dictionary",)
ANY: Final = WIDE + NUMBERS
AB: Final = {"a": ANY, "b": ANY}
NUMBERED: Final = {"a": NUMBERS, "b": NUMBERS}
MASKED: Final = {"a": MASKS, "b": MASKS}
GATE: Final = NUMBERS + MASKS
EDIT: Final = {"gate": GATE}
VALUED: Final = {"value": WIDE, "gate": GATE}
WIDEST: Final = "the widest operand's structure"


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One row.

    Attributes:
        op: the name on the wire.
        node: its frozen model.
        group: read, constant, arithmetic, edit, output or control.
        rule: type rule `(node, walk, path) -> Value | None`.
        takes: operand fields and the kinds they accept; a number or nothing may stand there too where the
            node says so.
        gives: what the result is, in words, for the docs.
        label: what a result may reveal: what the caller sent (`user`), what came out of the model (`act`), or the
            highest of its operands (`join`); outputs and edits have no value (`none`).
        declassifier: how a result leaves.
        bits: most bits released, for outputs.
        unit: what is charged, in words, for the docs.
        flops: work beside the pass itself; see `work`.
        stored: bytes added to the store.
        lane: where it runs: A is the shared batch, A* the same with attention patterns written out.
    """

    op: str
    node: type[ops.Node]
    group: Group
    rule: Callable[[Any, Walk, str], Value | None]
    gives: str
    takes: Mapping[str, tuple[Kind, ...]] = field(default_factory=dict)
    declassifier: Declassifier = "none"
    bits: Callable[[Any, Walk, Prices], int] | None = None
    unit: str = ""
    lane: Lane = "A"
    flops: Callable[[Any, Walk], int] | None = None
    stored: Callable[[Any, Walk], int] | None = None

    @property
    def work(self) -> Callable[[Any, Walk], int] | None:
        """Floating-point operations beside the pass: of its own, or of every op of its group."""
        usual = {"arithmetic": cost.row_flops, "edit": cost.edit_flops}
        return self.flops or usual.get(self.group)

    @property
    def label(self) -> Gives:
        if self.group in ("edit", "output", "control"):
            return "none"
        if self.group == "arithmetic":
            return "join"
        return "user" if self.op in ("tensor", "sae") else "act"

    @property
    def doc(self) -> str:
        return " ".join((self.node.__doc__ or "").split())


# fmt: off
_READS: Final = (
    OpSpec("read", ops.Read, "read", values.read, "rows of the site"),
    OpSpec("tensor", ops.Tensor, "constant", values.tensor, "vector or matrix"),
    OpSpec("vector", ops.Vector, "constant", values.vector, "vector"),
    OpSpec("stored", ops.Stored, "constant", values.stored, "rows"),
    OpSpec("sae", ops.Sae, "constant", values.sae, "dictionary"),
)
_ARITHMETIC: Final = (
    OpSpec("add", ops.Add, "arithmetic", arith.add, WIDEST, AB),
    OpSpec("sub", ops.Sub, "arithmetic", arith.add, WIDEST, AB),
    OpSpec("scale", ops.Scale, "arithmetic", arith.scale, WIDEST, {"of": ANY, "by": NUMBERS}),
    OpSpec("dot", ops.Dot, "arithmetic", arith.dot, "scalars or prompt_scalars", {"a": WIDE, "b": WIDE}),
    OpSpec(
        "matmul", ops.MatMul, "arithmetic", arith.matmul, "a's kind", {"a": WIDE, "b": MATRIX},
        flops=cost.matmul_flops,
    ),
    OpSpec("norm", ops.Norm, "arithmetic", arith.norm, "scalars or prompt_scalars", {"of": ROWLIKE}),
    OpSpec("normalize", ops.Normalize, "arithmetic", arith.rowwise, "the operand's kind", {"of": WIDE}),
    OpSpec("relu", ops.Relu, "arithmetic", arith.rowwise, "the operand's kind", {"of": ANY}),
    OpSpec("topk", ops.TopK, "arithmetic", arith.topk, "the operand's kind", {"of": WIDE}),
    OpSpec(
        "mean", ops.Mean, "arithmetic", arith.mean, "one row, or number, per prompt; over width a number per row",
        {"of": ("rows", "scalars", "per_prompt")},
    ),
    OpSpec(
        "encode", ops.Encode, "arithmetic", arith.encode, "the operand's kind", {"of": ROWLIKE, "sae": DICTIONARY},
        flops=cost.encode_flops,
    ),
    OpSpec("eq", ops.Eq, "arithmetic", arith.compare, "mask or prompt_mask", NUMBERED),
    OpSpec("gt", ops.Gt, "arithmetic", arith.compare, "mask or prompt_mask", NUMBERED),
    OpSpec("lt", ops.Lt, "arithmetic", arith.compare, "mask or prompt_mask", NUMBERED),
    OpSpec("and", ops.And, "arithmetic", arith.both, "mask or prompt_mask", MASKED),
    OpSpec("or", ops.Or, "arithmetic", arith.both, "mask or prompt_mask", MASKED),
    OpSpec("not", ops.Not, "arithmetic", arith.negate, "the operand's kind", {"of": MASKS}),
    OpSpec("where", ops.Where, "arithmetic", arith.where, WIDEST, {"cond": MASKS, **AB}),
)
_EDITS: Final = (
    OpSpec("edit.add", ops.EditAdd, "edit", edits.edit_add, "edit", VALUED),
    OpSpec("edit.set", ops.EditSet, "edit", edits.edit_set, "edit", VALUED),
    OpSpec("edit.scale", ops.EditScale, "edit", edits.edit_scale, "edit", EDIT),
    OpSpec("edit.project_out", ops.EditProjectOut, "edit", edits.edit_set, "edit", VALUED),
    OpSpec(
        "edit.affine", ops.EditAffine, "edit", edits.edit_affine, "edit",
        {"down": MATRIX, "up": MATRIX, "inner": VECTOR, "bias": VECTOR, **EDIT},
    ),
    OpSpec("edit.clamp", ops.EditClamp, "edit", edits.edit_clamp, "edit", VALUED),
    OpSpec(
        "edit.sae", ops.EditSae, "edit", edits.edit_sae, "edit", {"sae": DICTIONARY, **EDIT}, flops=cost.sae_flops
    ),
    OpSpec("edit.knockout", ops.EditKnockout, "edit", edits.knockout, "edit", lane="A*"),
)
_OUTPUTS: Final = (
    OpSpec(
        "capture", ops.Capture, "output", outs.capture, "handle", {"of": ("rows",)}, "handle", cost.capture_bits,
        "nothing: rows stay", stored=cost.stored_bytes,
    ),
    OpSpec(
        "lens", ops.Lens, "output", outs.lens, "top-k tokens per row", {"of": ROWLIKE}, "top_k", cost.lens_bits,
        "a token and a number, k per row", flops=cost.lens_flops,
    ),
    OpSpec(
        "logprobs", ops.Logprobs, "output", outs.logprobs, "numbers per row", {}, "scalars", cost.logprobs_bits,
        "a number per row and token", flops=cost.logprobs_flops,
    ),
    OpSpec(
        "score", ops.Score, "output", outs.score, "a number per row, or per prompt",
        {"of": ("rows", *NUMBERS, *MASKS)}, "scalars", cost.score_bits, "a number per row; a bit per truth value",
    ),
    OpSpec(
        "metric", ops.Metric, "output", outs.metric, "a number per prompt", {"to": ("rows",)}, "metric",
        cost.metric_bits, "a number per prompt", flops=cost.metric_flops,
    ),
    OpSpec(
        "pattern", ops.Pattern, "output", outs.pattern, "a number per row, head and key", {"of": ("rows",)},
        "scalars", cost.pattern_bits, "a number per row, head and key", "A*",
    ),
    OpSpec(
        "raw", ops.Raw, "output", outs.raw, "rows", {"of": ("rows",)}, "raw", cost.raw_bits,
        "width numbers and a scale per row",
    ),
    OpSpec(
        "text", ops.Text, "output", outs.text, "text per prompt", {}, "tokens", cost.text_bits,
        "a token each, and one for the end",
    ),
)
_CONTROL: Final = (OpSpec("stop_after", ops.StopAfter, "control", outs.stop_after, "nothing"),)
_TABLE: Final = (*_READS, *_ARITHMETIC, *_EDITS, *_OUTPUTS, *_CONTROL)
# fmt: on
SPEC: Final[dict[str, OpSpec]] = {row.op: row for row in _TABLE}
EDITS: Final = frozenset(row.op for row in _TABLE if row.group == "edit")
OUTPUTS: Final = frozenset(row.op for row in _TABLE if row.group == "output")
CONTROLS: Final = frozenset(row.op for row in _TABLE if row.group == "control")


def field_names() -> tuple[str, ...]:
    """Every field name of every node, for hints."""
    return tuple(sorted({name for row in _TABLE for name in row.node.model_fields}))

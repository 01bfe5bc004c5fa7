"""One program, many settings: which variants a sweep has, whether each is legal, what all of them cost.

An axis gives one field of one node several values; several axes make their product, the last one changing
fastest. Every variant is an ordinary program and is checked as one. Nothing here runs anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from trocar import errors, sites, strict
from trocar.graph import check, ops, words
from trocar.graph.canonical import canonical_sites
from trocar.graph.check import Checked
from trocar.graph.cost import Cost, Prices
from trocar.graph.program import Node, Program
from trocar.graph.scope import Scope
from trocar.graph.spec import SPEC
from trocar.strict import Strict

MAX_VARIANTS: Final = 256
MAX_SEQUENCES: Final = 4096
AxisField = Literal["coef", "by", "low", "high", "site", "at", "layer", "value"]
Setting = Annotated[int, Field(ge=-(2**53), le=2**53)] | float | Annotated[str, Field(max_length=400)]


class Axis(Strict):
    """The values that one field of one node takes in turn.

    Attributes:
        node: id of the node.
        field: `coef`, `by`, `low`, `high`, `site`, `at`, `value`, or `layer`: the layer of the node's site.
        values: numbers, or texts where the field holds a text.
    """

    node: words.Id
    field: AxisField
    values: Annotated[tuple[Setting, ...], Field(min_length=1, max_length=MAX_VARIANTS, fail_fast=True)]

    @property
    def label(self) -> str:
        return f"{self.node}.{self.field}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One program of a sweep, and what it sets: values by `node.field`."""

    settings: Mapping[str, int | float | str]
    checked: Checked


# ---- the programs ----


def settings(axes: Sequence[Axis]) -> list[dict[str, int | float | str]]:
    """What each variant sets, in the order of the variants."""
    labels = [axis.label for axis in axes]
    return [dict(zip(labels, one, strict=True)) for one in itertools.product(*(a.values for a in axes))]


def expand(program: Program, axes: Sequence[Axis]) -> tuple[Program, ...]:
    """The program of every variant.

    Raises:
        ProgramError: `unknown_ref`, `unknown_field`, `bad_value` or `too_expensive`, with the axis in the path.
    """
    places = [_place(program, axes, i) for i in range(len(axes))]
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_VARIANTS:
        raise errors.refuse(
            "too_expensive", "sweep", f"{count} variants; one sweep has at most {MAX_VARIANTS}",
            next_step="Give the axes fewer values, or split the sweep.",
        )  # fmt: skip
    out = []
    for chosen in itertools.product(*(range(len(a.values)) for a in axes)):
        nodes = list(program.nodes)
        for i, (axis, place, value) in enumerate(zip(axes, places, chosen, strict=True)):
            nodes[place] = _set(nodes[place], axis, value, f"sweep[{i}].values[{value}]")
        out.append(program.model_copy(update={"nodes": tuple(nodes)}))
    return tuple(out)


def _place(program: Program, axes: Sequence[Axis], index: int) -> int:
    """Where the node of an axis stands, after everything that an axis alone can get wrong."""
    axis, path = axes[index], f"sweep[{index}]"
    known = [node.id for node in program.nodes]
    if axis.node not in known:
        near = errors.closest(axis.node, known)
        raise errors.refuse("unknown_ref", f"{path}.node", f"no node has the id {axis.node!r}", closest=near)
    place = known.index(axis.node)
    fields = _fields(program.nodes[place])
    if axis.field not in fields:
        reason = f"{program.nodes[place].op} has no field {axis.field!r}; it has {', '.join(fields)}"
        step = "Sweep a field that the node has."
        near = errors.closest(axis.field, fields)
        raise errors.refuse("unknown_field", f"{path}.field", reason, closest=near, next_step=step)
    _require_distinct(axes, index, path)
    return place


def _require_distinct(axes: Sequence[Axis], index: int, path: str) -> None:
    axis = axes[index]
    for i, value in enumerate(axis.values):
        if value in axis.values[:i]:
            raise errors.refuse(
                "bad_value", f"{path}.values[{i}]", f"{value!r} is a value of this axis already",
                next_step="Name each value once.",
            )  # fmt: skip
    same = {"site", "layer"} if axis.field in ("site", "layer") else {axis.field}
    if any(a.node == axis.node and a.field in same for a in axes[:index]):
        raise errors.refuse(
            "bad_value", f"{path}.field", f"another axis sets the {' or '.join(sorted(same))} of {axis.node!r}",
            next_step="Put both into one axis.",
        )  # fmt: skip


def _fields(node: Node) -> tuple[str, ...]:
    """The fields of a node that an axis may set."""
    has = set(type(node).model_fields)
    if "site" in has:
        has.add("layer")
    return tuple(f for f in AxisField.__args__ if f in has)  # type: ignore[attr-defined]


def _set(node: Node, axis: Axis, index: int, path: str) -> Node:
    value, name = axis.values[index], str(axis.field)
    if name == "layer" and "layer" not in type(node).model_fields:
        name, value = "site", _moved(node, value, path)
    fields = {f: getattr(node, f) for f in type(node).model_fields}
    try:
        return strict.make(type(node), **{**fields, name: value})
    except errors.ProgramError as e:
        reason = f"{axis.field} of {node.id!r}: {e.refusals[0].reason}"
        raise errors.refuse("bad_value", path, reason) from None


def _moved(node: Node, layer: object, path: str) -> str:
    """The node's site at another layer."""
    text = getattr(node, "site", None)
    site = sites.parse(text, path) if isinstance(text, str) else None
    if site is None or site.layer is None:
        raise errors.refuse("bad_value", path, f"{node.id!r} is at {text!r}, which has no layer")
    if not isinstance(layer, int) or layer < 0:
        raise errors.refuse("bad_value", path, f"{layer!r} is not a layer; layers count from 0")
    return str(sites.Site(site.name, layer))


# ---- the check ----


def variants(program: Program, axes: Sequence[Axis], scope: Scope, prices: Prices) -> tuple[Variant, ...]:
    """Checks every variant; without axes there is one, the program itself.

    Raises:
        ProgramError: each refusal once, with the axis's value as its path where the swept node is at fault,
            and the settings of the first variant that has it in its reason.
    """
    program = canonical_sites(program, scope.model)
    programs = expand(program, axes)
    _require_room(len(programs), program, scope)
    out, found = [], dict[tuple[str, str, str], errors.Refusal]()
    for one, chosen in zip(programs, settings(axes), strict=True):
        try:
            out.append(Variant(chosen, check.check(canonical_sites(one, scope.model), scope, prices)))
        except errors.TrocarError as e:
            for refusal in e.refusals:
                key = (refusal.code, refusal.path, refusal.reason)
                found.setdefault(key, _named(refusal, program, axes, chosen))
        if len(found) >= check.MAX_REFUSALS:
            break
    if found:
        raise check.failed(list(found.values()))
    _require_affordable(out)
    return tuple(out)


def _require_room(count: int, program: Program, scope: Scope) -> None:
    """Bounds the checker's own work before it starts."""
    if count == 1:
        return
    prompts, tokens, nodes = len(scope.lengths), sum(scope.lengths), len(program.nodes)
    limits = (
        (prompts * count, MAX_SEQUENCES, f"{count} variants of {prompts} prompts"),
        (tokens * count, check.MAX_TOKENS, f"{count} variants of {tokens} tokens"),
        (
            nodes * prompts * count,
            check.MAX_NODE_PROMPTS,
            f"{count} variants of {nodes} nodes on {prompts} prompts",
        ),
    )
    for size, limit, what in limits:
        if size > limit:
            raise errors.refuse(
                "too_expensive", "sweep", f"{what} make {size}; the limit is {limit}",
                next_step="Give the axes fewer values, or send fewer prompts at a time.",
            )  # fmt: skip


def _require_affordable(found: Sequence[Variant]) -> None:
    tokens = sum(v.checked.cost.tokens for v in found)
    flops = sum(v.checked.cost.flops for v in found)
    if tokens > check.MAX_TOKENS or flops > check.MAX_FLOPS:
        raise errors.refuse(
            "too_expensive", "sweep", f"{tokens} tokens and {flops:.1e} FLOPs over all variants; the limits are "
            f"{check.MAX_TOKENS} and {check.MAX_FLOPS:.0e}",
            next_step="Give the axes fewer values, or send fewer prompts at a time.",
        )  # fmt: skip


def _named(
    refusal: errors.Refusal, program: Program, axes: Sequence[Axis], chosen: Mapping[str, object]
) -> errors.Refusal:
    """The refusal of a variant, said of the sweep."""
    if not axes or not refusal.path.startswith("program.nodes["):
        return refusal
    place, _, field = refusal.path.removeprefix("program.nodes[").partition("]")
    node = program.nodes[int(place)]
    mine = [i for i, axis in enumerate(axes) if axis.node == node.id]
    said = {"site": ("site", "layer")}.get(field.lstrip("."), (field.lstrip("."),))
    exact = [i for i in mine if axes[i].field in said]
    path = refusal.path
    for i in (exact or mine)[:1]:
        path = f"sweep[{i}].values[{axes[i].values.index(chosen[axes[i].label])}]"
    settings = ", ".join(f"{label}={value!r}" for label, value in chosen.items())
    return errors.Refusal(
        refusal.code, path, f"with {settings}: {refusal.reason}", refusal.next_step, refusal.closest
    )


def cost(found: Sequence[Variant]) -> Cost:
    """The sum over the variants, with one overhead: a sweep is one request."""
    every = [v.checked.cost for v in found]
    names = dict.fromkeys(name for c in every for name in c.bits_out)
    bits = {name: sum(c.bits_out.get(name, 0) for c in every) for name in names}
    bits["overhead"] = every[0].bits_out["overhead"]
    return Cost(
        tokens=sum(c.tokens for c in every),
        rows_read=sum(c.rows_read for c in every),
        flops=sum(c.flops for c in every),
        bytes_stored=sum(c.bytes_stored for c in every),
        bits_out=bits,
        total_bits=sum(bits.values()),
        download_bits=sum(c.download_bits for c in every),
    )


# ---- what the variants share ----


def fork_layer(programs: Sequence[Program], n_layers: int) -> int:
    """How many layers, from the first, all variants compute alike.

    It is the lowest layer at which a node stands that differs between them, or that uses the value of one
    that does. A variant that stops earlier than another shares what both compute.
    """
    first = programs[0]
    moved = {
        node.id
        for i, node in enumerate(first.nodes)
        if any(p.nodes[i] is not node and p.nodes[i] != node for p in programs[1:])
    }
    lowest = n_layers
    for i, node in enumerate(first.nodes):
        if node.id in moved or moved & set(_operands(node)):
            moved.add(node.id)
            lowest = min(lowest, *(_layer(p.nodes[i], n_layers) for p in programs))
    return lowest


def _operands(node: Node) -> list[str]:
    given = [getattr(node, name) for name in SPEC[node.op].takes]
    return [ref for g in given for ref in (g if isinstance(g, tuple) else (g,)) if isinstance(ref, str)]


def _layer(node: Node, n_layers: int) -> int:
    """The layer at which a node stands; a constant, arithmetic or an output stands behind them all."""
    if isinstance(node, ops.StopAfter):
        return min(node.layer + 1, n_layers)
    if not isinstance(node, (ops.Read, *ops.EDIT_NODES)):
        return n_layers
    site = sites.parse(node.site)
    if site.layer is not None:
        return min(site.layer, n_layers)
    return 0 if site.spec.phase == 0 else n_layers

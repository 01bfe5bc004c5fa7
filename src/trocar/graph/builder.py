"""The recording front end: ordinary Python operators that write down typed nodes. Nothing runs here.

    t.resid_post[12][-1]              rows of the last prompt token at layer 12
    t.resid_post[14] += 6.0 * v       edit.add at every token
    t.resid_post[14][-1] = other      edit.set at the last prompt token
    t.lens(t.resid_post[:][-1])       a family of layers

A value is recorded where the expression stands: a read before an edit of the same site sees the rows before
it. Between sites the forward pass decides: a read sees every edit of an earlier site, wherever it stands.
There is no source inspection. Reads nobody uses are dropped when the program is built.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, Final

from trocar import aliases, errors, sites, strict
from trocar.graph import ops, rules_values
from trocar.graph.builder_expr import (
    Content,
    EditOp,
    EditSpec,
    Expr,
    Held,
    Position,
    Sae,
    indices,
    number,
    rank,
    selector,
)
from trocar.graph.builder_sites import Patterns, Place, SiteFamily, SiteProxy, SiteRows
from trocar.graph.canonical import expand
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Node, Program
from trocar.graph.spec import CONTROLS, EDITS, OUTPUTS, SPEC

__all__ = [
    "EditOp",
    "EditSpec",
    "Expr",
    "Held",
    "NoSuchSite",
    "Patterns",
    "Place",
    "Position",
    "Recorder",
    "Sae",
    "SiteFamily",
    "SiteProxy",
    "SiteRows",
    "indices",
    "selector",
    "vectors_of",
]

_GIVES: Final[dict[type[ops.Node], Content]] = {
    ops.Dot: "number",
    ops.Norm: "number",
    ops.Eq: "truth",
    ops.Gt: "truth",
    ops.Lt: "truth",
    ops.Sae: "dictionary",
    ops.Encode: "wide",
}
_NUMBER_FIELD: Final = {"edit.add": "coef", "edit.scale": "by"}
_ARRAYS: Final = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")


class NoSuchSite(errors.ProgramError, AttributeError):
    """`t.resid_pots`: a refusal that is also an AttributeError, so that `hasattr` keeps working."""


class Recorder:
    """Writes nodes down in order and builds the program."""

    def __init__(self, model: ModelFacts) -> None:
        self.model: Final = model
        self.vectors: Final[dict[str, Any]] = {}
        self._nodes: list[Node] = []
        self._contents: dict[str, Content] = {}
        self._saes: dict[Sae, str] = {}
        self._ids: set[str] = set()
        self._expected: SiteRows | None = None
        self._closed = False

    # ---- what the front end calls ----

    def at_site(self, name: str) -> SiteProxy | SiteRows:
        """The proxy for a site's name.

        Raises:
            NoSuchSite: with the closest name.
        """
        if name not in sites.SITES:
            near = errors.closest(name, sites.SITES)
            raise NoSuchSite([errors.refusal("unknown_site", name, f"{name!r} is not a site", closest=near)])
        if sites.SITES[name].layered:
            return SiteProxy(self, name)
        return SiteRows(self, Place(sites.Site(name)))

    def named(self, text: str) -> SiteRows:
        """Rows of a site by its name in any accepted spelling, with its layer.

        Raises:
            ProgramError: `unknown_site` or `ambiguous_site`.
        """
        return SiteRows(self, Place(aliases.resolve(text, self.model)))

    def emit(self, kind: type[Any], **fields: Any) -> Expr:
        node = strict.make(kind, id=self._new_id(), **fields)
        self._append(node)
        return Expr(self, node.id, self._content(node, kind))

    def _content(self, node: Node, kind: type[Any]) -> Content:
        """What a value is made of, as far as operators here need to know."""
        if kind is ops.Mean and node.over == "width":  # type: ignore[union-attr]
            content: Content = "number"
        elif kind in _GIVES:
            content = _GIVES[kind]
        else:
            first = getattr(node, "of", None) or getattr(node, "a", None)
            content = self._contents.get(first, "wide") if isinstance(first, str) else "wide"
        self._contents[node.id] = content
        return content

    def output(self, name: str, kind: type[Any], **fields: Any) -> str:
        """Records an output under the name its result will have."""
        self._append(strict.make(kind, id=name, **fields))
        return name

    def binary(self, kind: type[Any], a: Any, b: Any) -> Expr:
        left, right = self.value(a), self.value(b)
        return self.emit(kind, a=left, b=right)

    def scaled(self, expr: Expr, by: Any) -> Expr:
        if isinstance(by, Expr):
            if expr.content == by.content == "wide":
                raise errors.refuse(
                    "bad_argument", by.id, f"{by.id!r} is not a number or one number per row: rows are "
                    "combined with dot, + or -",
                )  # fmt: skip
            return self.emit(ops.Scale, of=self.value(expr), by=self.value(by))
        return self.emit(ops.Scale, of=expr.id, by=number(by, expr.id))

    def compared(self, kind: type[Any], a: Expr, b: Any) -> Expr:
        """A mask; `b` is a number or an expression."""
        return self.emit(kind, a=a.id, b=self.value(b) if isinstance(b, Expr) else number(b, a.id))

    def apply(self, edit: EditSpec) -> None:
        """Records an edit; `resid_post.*` edits every layer."""
        edit = self._written(edit)
        for place in expand(edit.site, self.model, "edit.site"):
            self._edit(edit, str(place))

    def _written(self, edit: EditSpec) -> EditSpec:
        """The edit with its local arrays recorded, once for all layers."""

        def written(value: Any) -> Any:
            local = _arraylike(value) and not isinstance(value, Expr | Held | Sae)
            return self._expr(value, edit.site) if local else value

        operands = {k: written(v) for k, v in edit.operands.items()}
        return replace(edit, value=written(edit.value), operands=operands)

    def _expr(self, value: Any, site: str | None) -> Expr:
        ref = self.value(value, site)
        return Expr(self, ref, self._contents[ref])

    def expect(self, rows: SiteRows) -> None:
        """Remembers that Python may assign these rows back to their place: the tail of `+=`."""
        self._expected = rows

    def assign(self, place: Place, value: Any) -> None:
        """`=` on a site: the tail of an augmented assignment, or edit.set."""
        tail, self._expected = self._expected, None
        if tail is not None and value is tail and tail.place == place:
            return
        zero = isinstance(value, Real) and not isinstance(value, bool) and value == 0
        self.apply(place.edit("edit.set", ops.ZERO if zero else value))

    def constant(self, value: Any, site: str | None = None) -> Expr:
        """A constant as an expression."""
        return self._expr(value, site)

    def value(self, value: Any, site: str | None = None) -> str:
        """The id of a value: an expression, something held on the server, or a local array."""
        if isinstance(value, Expr):
            if value._recorder is not self:
                raise errors.refuse(
                    "bad_argument",
                    value.id,
                    f"{value.id!r} belongs to another trace; capture it and use the handle",
                )
            return value.id
        if isinstance(value, Sae):
            return self._sae(value)
        if isinstance(value, Held):
            node, coef = value.operand(self._new_id(), site)
            self._append(node)
            self._contents[node.id] = "wide"
            return node.id if coef == 1.0 else self.emit(ops.Scale, of=node.id, by=coef).id
        if not _arraylike(value):
            raise errors.refuse("bad_argument", site or "value", f"{value!r} is not a vector")
        made = self.emit(ops.Tensor, name=self._carry(value))
        if rank(value) == 2:
            self._contents[made.id] = "matrix"
        return made.id

    def _carry(self, array: Any) -> str:
        """The name under which the request carries an array."""
        name = f"v{len(self.vectors)}"
        # A copy: what the caller's array becomes later is not what was written here.
        self.vectors[name] = copy.deepcopy(array.detach() if hasattr(array, "detach") else array)
        return name

    def _sae(self, sae: Sae) -> str:
        """The id of a dictionary, recorded once."""
        if sae not in self._saes:
            arrays = {f: getattr(sae, f) for f in _ARRAYS if getattr(sae, f) is not None}
            fields = {f: self._carry(a) for f, a in arrays.items()}
            node = self.emit(ops.Sae, **fields, activation=sae.activation, k=sae.k, center=sae.center)
            self._saes[sae] = node.id
        return self._saes[sae]

    def build(self, alternatives: Collection[str] = ()) -> Program:
        """The program, without reads nobody uses; `alternatives` are values that a sweep may use instead."""
        wanted = {n.id for n in self._nodes if n.op in EDITS | OUTPUTS | CONTROLS} | {*alternatives}
        for node in reversed(self._nodes):
            if node.id in wanted:
                wanted.update(_operands(node))
        kept = tuple(n for n in self._nodes if n.id in wanted)
        if not kept:
            raise errors.refuse("nothing_returned", "program.nodes", "the trace recorded no output")
        return strict.make(Program, nodes=kept)

    def close(self) -> None:
        self._closed = True

    # ---- inside ----

    def _append(self, node: Node) -> None:
        if self._closed:
            raise errors.refuse(
                "bad_argument", node.id, "the trace is finished; open a new one to record more"
            )
        if node.id in self._ids or node.id in ops.RESERVED:
            taken = "has a meaning of its own" if node.id in ops.RESERVED else "is taken in this trace"
            raise errors.refuse("duplicate_id", node.id, f"the name {node.id!r} {taken}")
        if node.op in EDITS:
            self._expected = None
        self._ids.add(node.id)
        self._nodes.append(node)

    def _edit(self, edit: EditSpec, site: str) -> None:
        fields: dict[str, Any] = {"site": site, "at": edit.at, **edit.fields}
        for name, part in (("heads", edit.heads), ("neurons", edit.neurons)):
            if part is not None:
                fields[name] = part
        if "value" in SPEC[edit.op].takes:
            zero = isinstance(edit.value, str) and edit.value == ops.ZERO
            fields["value"] = ops.ZERO if zero else self.value(edit.value, site)
        for name, value in (*edit.operands.items(), ("gate", edit.gate)):
            if value is not None:
                fields[name] = self.value(value, site)
        if edit.op in _NUMBER_FIELD:
            fields[_NUMBER_FIELD[edit.op]] = number(edit.number, site)
        self.emit(SPEC[edit.op].node, **fields)

    def _new_id(self) -> str:
        index = len(self._nodes)
        while f"n{index}" in self._ids:  # a user's output may be called n7
            index += 1
        return f"n{index}"


def _arraylike(value: Any) -> bool:
    """Whether a value may be a local array; what it holds is looked at when the request is made."""
    if isinstance(value, list | tuple):
        return not any(isinstance(x, Expr | Patterns) for x in value)
    return not (value is None or isinstance(value, str | Real | SiteProxy | SiteFamily | Patterns))


def _operands(node: Node) -> Iterator[str]:
    for name in SPEC[node.op].takes:
        given = getattr(node, name)
        yield from (x for x in (given if isinstance(given, tuple) else (given,)) if isinstance(x, str))


def vectors_of(recorder: Recorder, program: Program) -> Mapping[str, Any]:
    """The arrays that the built program still names."""
    named = {n.name for n in program.nodes if isinstance(n, ops.Tensor)}
    named |= {
        name for n in program.nodes if isinstance(n, ops.Sae) for name in rules_values.arrays(n).values()
    }
    return {name: v for name, v in recorder.vectors.items() if name in named}

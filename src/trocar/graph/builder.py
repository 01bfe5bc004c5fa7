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
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, Literal, Protocol, SupportsIndex, runtime_checkable

from trocar import errors, sites, strict
from trocar.graph import ops
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Node, Program
from trocar.graph.spec import EDITS, OUTPUTS, SPEC

Position = SupportsIndex | slice | str
EditOp = Literal["edit.add", "edit.set", "edit.scale", "edit.project_out"]


class NoSuchSite(errors.ProgramError, AttributeError):
    """`t.resid_pots`: a refusal that is also an AttributeError, so that `hasattr` keeps working."""


@runtime_checkable
class Held(Protocol):
    """Something that lives on the server and can be an operand: a direction, stored rows."""

    def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
        """The constant node that names it, and a coefficient.

        Args:
            node_id: id for the node.
            site: where it will be used, for artifacts with one vector per site.
        """
        ...


@dataclass(frozen=True, slots=True)
class EditSpec:
    """One edit as a value: `trocar.edit.add(...)` makes it, a trace or `generate` applies it.

    Attributes:
        value: an expression, an array [width], something held on the server, or None.
        number: `coef` of edit.add, `by` of edit.scale.
    """

    op: EditOp
    site: str
    at: str
    value: Any = None
    number: float = 1.0


def selector(position: Position) -> str:
    """Spells a Python index as a selector: -1 -> prompt[-1], 3:7 -> prompt[3:7], text as it is.

    Raises:
        ClientError: `bad_argument` for a step or another type.
    """
    if isinstance(position, str):
        return position
    if not isinstance(position, slice):
        return f"prompt[{_whole(position, 'position', 'an index, a slice or a selector')}]"
    if position.step is not None:
        raise errors.refuse("bad_argument", "position", f"{position!r}: a step is not supported")
    if position.start is None and position.stop is None:
        return "prompt[*]"
    start, stop = (
        "" if n is None else _whole(n, "position", "a bound of a slice")
        for n in (position.start, position.stop)
    )
    return f"prompt[{start}:{stop}]"


def _whole(number: Any, argument: str, wanted: str) -> int:
    """An int, also from a numpy integer; True is not 1."""
    if isinstance(number, bool) or not isinstance(number, SupportsIndex):
        raise errors.refuse("bad_argument", argument, f"{number!r} is not {wanted}")
    return operator.index(number)


class Expr:
    """A value in a program: rows, scalars or a vector that exists only on the server."""

    __array_ufunc__ = None  # `array + expr` asks `__radd__`, not numpy

    def __init__(self, recorder: Recorder, node_id: str) -> None:
        self._recorder = recorder
        self.id: Final = node_id

    def __add__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Add, self, other)

    def __radd__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Add, other, self)

    def __sub__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Sub, self, other)

    def __rsub__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Sub, other, self)

    def __mul__(self, by: float) -> Expr:
        return self._recorder.scaled(self, by)

    __rmul__ = __mul__

    def __neg__(self) -> Expr:
        return self._recorder.scaled(self, -1.0)

    def dot(self, other: Any) -> Expr:
        """Inner product per row with a vector or with other rows."""
        return self._recorder.binary(ops.Dot, self, other)

    __matmul__ = dot

    def __rmatmul__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Dot, other, self)

    def mean(self) -> Expr:
        """Mean over the selected positions of each prompt."""
        return self._recorder.emit(ops.Mean, of=self.id)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.id!r}: lives on the server; save it with lens, score or capture>"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise errors.refuse(
            "not_here", self.id, f"{self.id!r} is a value inside the server's forward pass, not a local array"
        )

    def __bool__(self) -> bool:
        raise errors.refuse(
            "not_here",
            self.id,
            f"{self.id!r} has no truth value here: programs have no data-dependent branches",
        )

    def __float__(self) -> float:
        raise errors.refuse("not_here", self.id, f"{self.id!r} is not a local number")

    def __iter__(self) -> Iterator[Any]:
        raise errors.refuse("not_here", self.id, f"{self.id!r} cannot be iterated locally")


class SiteRows(Expr):
    """Rows of one site: `t.resid_post[12]`, and `[...]` on it selects positions."""

    def __init__(self, recorder: Recorder, site: sites.Site, at: str = "all") -> None:
        self.site: Final = str(site)
        self.at: Final = at
        self._site = site
        super().__init__(recorder, recorder.emit(ops.Read, site=self.site, at=at).id)

    def __getitem__(self, position: Position) -> SiteRows:
        return SiteRows(self._recorder, self._site, selector(position))

    def __setitem__(self, position: Position, value: Any) -> None:
        self._recorder.assign(self.site, selector(position), value)

    def __iadd__(self, value: Any) -> SiteRows:
        return self._edited(EditSpec("edit.add", self.site, self.at, value))

    def __isub__(self, value: Any) -> SiteRows:
        return self._edited(EditSpec("edit.add", self.site, self.at, value, -1.0))

    def __imul__(self, by: float) -> SiteRows:
        return self._edited(EditSpec("edit.scale", self.site, self.at, None, by))

    def _edited(self, edit: EditSpec) -> SiteRows:
        """The rows after the edit: after `h += v` the name h means those."""
        self._recorder.apply(edit)
        rows = SiteRows(self._recorder, self._site, self.at)
        self._recorder.expect(rows)
        return rows


class SiteFamily:
    """The same site at several layers: `t.resid_post[:]`; `[...]` selects positions in each."""

    def __init__(self, recorder: Recorder, places: Sequence[sites.Site]) -> None:
        self._recorder = recorder
        self._places = tuple(places)
        self.members: Final = tuple(SiteRows(recorder, place) for place in self._places)

    def __getitem__(self, position: Position) -> Sequence[SiteRows]:
        at = selector(position)
        return tuple(SiteRows(self._recorder, place, at) for place in self._places)

    def __iter__(self) -> Iterator[SiteRows]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)


class SiteProxy:
    """`t.resid_post`: indexing gives one layer, slicing gives a family."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def __getitem__(self, layer: SupportsIndex | slice | Sequence[SupportsIndex]) -> Any:
        if isinstance(layer, slice):
            return SiteFamily(self._recorder, [self._place(i) for i in self._range(layer)])
        if isinstance(layer, list | tuple | range):
            return SiteFamily(self._recorder, [self._place(i) for i in layer])
        return SiteRows(self._recorder, self._place(layer))

    def __setitem__(self, layer: SupportsIndex, value: Any) -> None:
        self._recorder.assign(str(self._place(layer)), "all", value)

    def _place(self, layer: Any) -> sites.Site:
        count = self._recorder.model.n_layers
        number = _whole(layer, "layer", "a layer")
        if not -count <= number < count:
            raise self._outside(layer)
        return sites.Site(self._name, number % count)

    def _range(self, layers: slice) -> range:
        count = self._recorder.model.n_layers
        if any(n is not None and not -count <= n <= count for n in (layers.start, layers.stop)):
            raise self._outside(layers)
        return range(*layers.indices(count))

    def _outside(self, layer: Any) -> errors.TrocarError:
        model = self._recorder.model
        return errors.refuse(
            "layer_out_of_range", "layer", f"{self._name}[{layer}]: {model.name} has {model.n_layers} layers"
        )


class Recorder:
    """Writes nodes down in order and builds the program."""

    def __init__(self, model: ModelFacts) -> None:
        self.model: Final = model
        self.vectors: Final[dict[str, Any]] = {}
        self._nodes: list[Node] = []
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
        return SiteRows(self, sites.Site(name))

    def emit(self, kind: type[Any], **fields: Any) -> Expr:
        node = strict.make(kind, id=self._new_id(), **fields)
        self._append(node)
        return Expr(self, node.id)

    def output(self, name: str, kind: type[Any], **fields: Any) -> str:
        """Records an output under the name its result will have."""
        self._append(strict.make(kind, id=name, **fields))
        return name

    def binary(self, kind: type[Any], a: Any, b: Any) -> Expr:
        left, right = self.value(a), self.value(b)
        return self.emit(kind, a=left, b=right)

    def scaled(self, expr: Expr, by: float) -> Expr:
        return self.emit(ops.Scale, of=expr.id, by=_number(by, expr.id))

    def apply(self, edit: EditSpec) -> None:
        """Records an edit; `resid_post.*` edits every layer."""
        for place in sites.expand(edit.site, self.model.n_layers, "edit.site"):
            self._edit(edit, str(place))

    def expect(self, rows: SiteRows) -> None:
        """Remembers that Python may assign these rows back to their place: the tail of `+=`."""
        self._expected = rows

    def assign(self, site: str, at: str, value: Any) -> None:
        """`=` on a site: the tail of an augmented assignment, or edit.set."""
        tail, self._expected = self._expected, None
        if tail is not None and value is tail and (tail.site, tail.at) == (site, at):
            return
        self.apply(EditSpec("edit.set", site, at, value))

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
        if isinstance(value, Held):
            node, coef = value.operand(self._new_id(), site)
            self._append(node)
            return node.id if coef == 1.0 else self.emit(ops.Scale, of=node.id, by=coef).id
        if not _arraylike(value):
            raise errors.refuse("bad_argument", site or "value", f"{value!r} is not a vector")
        name = f"v{len(self.vectors)}"
        # A copy: what the caller's array becomes later is not what was written here.
        self.vectors[name] = copy.deepcopy(value.detach() if hasattr(value, "detach") else value)
        return self.emit(ops.Tensor, name=name).id

    def build(self) -> Program:
        """The program, without reads nobody uses."""
        wanted = {n.id for n in self._nodes if n.op in EDITS or n.op in OUTPUTS}
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
        fields: dict[str, Any] = {"site": site, "at": edit.at}
        if edit.op == "edit.scale":
            fields["by"] = _number(edit.number, site)
        elif isinstance(edit.value, str) and edit.value == ops.ZERO:
            fields["value"] = ops.ZERO
        else:
            fields["value"] = self.value(edit.value, site)
        if edit.op == "edit.add":
            fields["coef"] = _number(edit.number, site)
        self.emit(SPEC[edit.op].node, **fields)

    def _new_id(self) -> str:
        number = len(self._nodes)
        while f"n{number}" in self._ids:  # a user's output may be called n7
            number += 1
        return f"n{number}"


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise errors.refuse(
            "bad_argument", where, f"{value!r} is not a number; two values are combined with dot, + or -"
        )
    return float(value)


def _arraylike(value: Any) -> bool:
    """Whether a value may be a local array; what it holds is looked at when the request is made."""
    if isinstance(value, list | tuple):
        return not any(isinstance(x, Expr) for x in value)
    return not (value is None or isinstance(value, str | Real | SiteProxy | SiteFamily))


def _operands(node: Node) -> Iterator[str]:
    for name in SPEC[node.op].takes:
        given = getattr(node, name)
        yield from given if isinstance(given, tuple) else (given,)


def vectors_of(recorder: Recorder, program: Program) -> Mapping[str, Any]:
    """The arrays that the built program still names."""
    named = {n.name for n in program.nodes if isinstance(n, ops.Tensor)}
    return {name: v for name, v in recorder.vectors.items() if name in named}

"""Values of a recording: Python operators that write down typed nodes. Nothing runs here.

    (h @ v) > 0.5         a mask        h @ matrix            rows times a [D, R] matrix
    h * (h @ v)           each row times its own number        h.norm(), h.normalize(), h.relu(), h.topk(8)
    mask & ~other         masks         h.mean(), h.mean(over="width"), h.encode(sae)

What may be combined is the checker's business; here it is only written down.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, SupportsIndex, runtime_checkable

from trocar import errors
from trocar.graph import ops
from trocar.graph.program import Node

if TYPE_CHECKING:
    from trocar.graph.builder import Recorder

Position = SupportsIndex | slice | str
Content = Literal["wide", "number", "truth", "matrix", "dictionary"]
EditOp = Literal[
    "edit.add",
    "edit.set",
    "edit.scale",
    "edit.project_out",
    "edit.affine",
    "edit.clamp",
    "edit.sae",
    "edit.knockout",
]


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
        gate: an expression: a mask or numbers.
        operands: values of other operand fields, by field.
        fields: everything else that the node says, by field.
    """

    op: EditOp
    site: str
    at: str
    value: Any = None
    number: float = 1.0
    gate: Any = None
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    operands: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Sae:
    """A sparse autoencoder from local arrays: w_enc [D, F], b_enc [F], w_dec [F, D], b_dec [D].

    Attributes:
        activation: relu, topk (needs `k`) or jumprelu (needs `threshold` [F]).
        center: whether b_dec is subtracted before encoding.
    """

    w_enc: Any
    b_enc: Any
    w_dec: Any
    b_dec: Any
    activation: Literal["relu", "topk", "jumprelu"] = "relu"
    k: int | None = None
    threshold: Any = None
    center: bool = True


def selector(position: Position) -> str:
    """Spells a Python index as a selector: -1 -> prompt[-1], 3:7 -> prompt[3:7], text as it is.

    Raises:
        ClientError: `bad_argument` for a step or another type.
    """
    if isinstance(position, str):
        return position
    if not isinstance(position, slice):
        return f"prompt[{whole(position, 'position', 'an index, a slice or a selector')}]"
    if position.step is not None:
        raise errors.refuse("bad_argument", "position", f"{position!r}: a step is not supported")
    if position.start is None and position.stop is None:
        return "prompt[*]"
    start, stop = (
        "" if n is None else whole(n, "position", "a bound of a slice")
        for n in (position.start, position.stop)
    )
    return f"prompt[{start}:{stop}]"


def whole(number: Any, argument: str, wanted: str) -> int:
    """An int, also from a numpy integer; True is not 1."""
    if isinstance(number, bool) or not isinstance(number, SupportsIndex):
        raise errors.refuse("bad_argument", argument, f"{number!r} is not {wanted}")
    return operator.index(number)


def indices(given: Any, argument: str) -> tuple[int, ...] | None:
    """Heads or neurons: one index, several, or None."""
    if given is None:
        return None
    if isinstance(given, SupportsIndex) and not hasattr(given, "__len__"):
        return (whole(given, argument, "an index"),)
    try:
        several = list(given)
    except TypeError:
        raise errors.refuse(
            "bad_argument", argument, f"{given!r} is not an index or a list of them"
        ) from None
    return tuple(whole(i, argument, "an index") for i in several)


def number(value: Any, where: str) -> float:
    """A float, from any real number; True is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise errors.refuse(
            "bad_argument", where, f"{value!r} is not a number; two values are combined with dot, + or -"
        )
    return float(value)


def rank(value: Any) -> int:
    """Dimensions of an array or of nested lists, seen from its first entry."""
    given = getattr(value, "ndim", None)
    if isinstance(given, int):
        return given
    depth = 0
    while isinstance(value, list | tuple) and value:
        depth, value = depth + 1, value[0]
    return depth


class Expr:
    """A value in a program: rows, numbers, a mask or a constant that exists only on the server."""

    __array_ufunc__ = None  # `array + expr` asks `__radd__`, not numpy

    def __init__(self, recorder: Recorder, node_id: str, content: Content = "wide") -> None:
        self._recorder = recorder
        self.id: Final = node_id
        self.content: Final = content

    def __add__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Add, self, other)

    def __radd__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Add, other, self)

    def __sub__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Sub, self, other)

    def __rsub__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Sub, other, self)

    def __mul__(self, by: Any) -> Expr:
        if isinstance(by, Expr) and self.content == "number" and by.content == "wide":
            return self._recorder.scaled(by, self)
        return self._recorder.scaled(self, by)

    __rmul__ = __mul__

    def __neg__(self) -> Expr:
        return self._recorder.scaled(self, -1.0)

    def dot(self, other: Any) -> Expr:
        """Inner product per row with a vector or with other rows."""
        return self._recorder.binary(ops.Dot, self, other)

    def __matmul__(self, other: Any) -> Expr:
        """`dot`, or with a matrix [D, R] each row times the matrix."""
        matrix = other.content == "matrix" if isinstance(other, Expr) else rank(other) == 2
        return self._recorder.binary(ops.MatMul if matrix else ops.Dot, self, other)

    def __rmatmul__(self, other: Any) -> Expr:
        if rank(other) == 2:
            raise errors.refuse(
                "bad_argument", self.id, "a matrix stands on the right: rows @ matrix, with the matrix [D, R]"
            )
        return self._recorder.binary(ops.Dot, other, self)

    def norm(self) -> Expr:
        """Euclidean norm of each row."""
        return self._recorder.emit(ops.Norm, of=self.id)

    def normalize(self) -> Expr:
        """Each row divided by its norm."""
        return self._recorder.emit(ops.Normalize, of=self.id)

    def relu(self) -> Expr:
        """max(x, 0), number by number."""
        return self._recorder.emit(ops.Relu, of=self.id)

    def topk(self, k: int) -> Expr:
        """Each row with all but its k largest numbers set to zero."""
        return self._recorder.emit(ops.TopK, of=self.id, k=whole(k, "k", "a whole number"))

    def mean(self, over: Literal["positions", "width"] = "positions") -> Expr:
        """Mean over the selected positions of each prompt, or over the numbers of each row."""
        return self._recorder.emit(ops.Mean, of=self.id, over=over)

    def encode(self, sae: Expr | Sae) -> Expr:
        """Feature activations [F] of rows under a dictionary."""
        return self._recorder.emit(ops.Encode, of=self.id, sae=self._recorder.value(sae))

    # ---- masks ----

    def __gt__(self, other: Any) -> Expr:
        return self._recorder.compared(ops.Gt, self, other)

    def __lt__(self, other: Any) -> Expr:
        return self._recorder.compared(ops.Lt, self, other)

    def __ge__(self, other: Any) -> Expr:
        return ~self._recorder.compared(ops.Lt, self, other)

    def __le__(self, other: Any) -> Expr:
        return ~self._recorder.compared(ops.Gt, self, other)

    def __eq__(self, other: object) -> Expr:  # type: ignore[override]
        return self._recorder.compared(ops.Eq, self, other)

    def __ne__(self, other: object) -> Expr:  # type: ignore[override]
        return ~self._recorder.compared(ops.Eq, self, other)

    __hash__ = object.__hash__  # by identity: == writes a node

    def __and__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.And, self, other)

    def __or__(self, other: Any) -> Expr:
        return self._recorder.binary(ops.Or, self, other)

    def __invert__(self) -> Expr:
        return self._recorder.emit(ops.Not, of=self.id)

    # ---- what it is not ----

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

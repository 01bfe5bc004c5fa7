"""Values as the checker sees them: kind, width, how many rows of which tokens, and when they exist.

A kind is a structure (one for the request, one per prompt, one per token) and a content (a wide row, a number,
a truth value). `ready` is the place in the forward pass where a value becomes known (0 = before it starts),
comparable with `sites.order`. Nothing is broadcast silently: what is one for the request or one per prompt
applies to every row by definition; rows meet rows only when they select the same tokens, or equally many
static ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

from trocar import errors
from trocar.graph.labels import Label, join
from trocar.sites import Site

Kind = Literal[
    "matrix",
    "vector",
    "per_prompt",
    "rows",
    "scalars",
    "prompt_scalars",
    "mask",
    "prompt_mask",
    "dictionary",
]
Content = Literal["wide", "number", "truth", "constant"]
Form = Literal["made", "read", "part", "stored", "pattern"]


class Structure(IntEnum):
    REQUEST = 0
    PROMPT = 1
    ROW = 2


_FORMS: Final[dict[Kind, tuple[Structure, Content]]] = {
    "matrix": (Structure.REQUEST, "constant"),
    "dictionary": (Structure.REQUEST, "constant"),
    "vector": (Structure.REQUEST, "wide"),
    "per_prompt": (Structure.PROMPT, "wide"),
    "rows": (Structure.ROW, "wide"),
    "prompt_scalars": (Structure.PROMPT, "number"),
    "scalars": (Structure.ROW, "number"),
    "prompt_mask": (Structure.PROMPT, "truth"),
    "mask": (Structure.ROW, "truth"),
}
_KINDS: Final = {form: kind for kind, form in _FORMS.items() if form[1] != "constant"}


@dataclass(frozen=True, slots=True)
class Value:
    """One typed value.

    Attributes:
        kind: what `ops` says of it.
        width: numbers in a row (1 for numbers and truth values); columns of a matrix; D of a dictionary.
        counts: static rows of each prompt; empty for what is one for the request.
        at: canonical selector that produced the rows, None when they do not come from this pass.
        gen: whether rows of generated tokens are among them.
        ready: place in the pass where it is known.
        sites: where it was read, in order.
        form: a site's rows as they were `read`; some columns of them (`part`); rows `stored` before; an
            attention `pattern`; or `made` by arithmetic.
        height: rows of a matrix.
        features: F of a dictionary.
        live: whether it comes from this pass.
        crossed: whether a row of it depends on rows of other tokens of this pass.
    """

    kind: Kind
    width: int
    label: Label
    counts: tuple[int, ...] = ()
    at: str | None = None
    gen: bool = False
    ready: int = 0
    sites: tuple[Site, ...] = ()
    form: Form = "made"
    height: int = 0
    features: int = 0
    live: bool = False
    crossed: bool = False

    @property
    def structure(self) -> Structure:
        return _FORMS[self.kind][0]

    @property
    def content(self) -> Content:
        return _FORMS[self.kind][1]

    @property
    def plain(self) -> bool:
        """Whether it is a site's rows as they were read, without arithmetic."""
        return self.form == "read"


def kind_of(structure: Structure, content: Content) -> Kind:
    """The kind of a structure and a content; there is no single number for a request."""
    return _KINDS[structure, content]


def combine(a: Value, b: Value, path: str) -> Value:
    """The value of a row-by-row op on `a` and `b`, which must be alike.

    Raises:
        ProgramError: `width_mismatch`, `rows_mismatch` or `wrong_operand`.
    """
    if a.content != b.content:
        raise errors.refuse("wrong_operand", path, f"{a.kind} and {b.kind} cannot be combined row by row")
    if a.width != b.width:
        raise errors.refuse("width_mismatch", path, f"widths {a.width} and {b.width} differ")
    return joined((a, b), a.content, a.width, path)


def joined(values: Sequence[Value], content: Content, width: int, path: str) -> Value:
    """The value of a row-by-row op: the widest structure of its operands, with another content and width.

    Raises:
        ProgramError: `rows_mismatch`.
    """
    shape = max(values, key=lambda v: (v.structure, v.at is not None))
    rows = [v for v in values if v.structure is Structure.ROW]
    for value in rows:
        if value is not shape:
            require_aligned(shape, value.at, value.counts, value.gen, path)
    selectors = {v.at for v in rows if v.live}
    return Value(
        kind_of(shape.structure, content),
        width,
        join(*(v.label for v in values)),
        shape.counts,
        shape.at,
        shape.gen,
        max(v.ready for v in values),
        tuple(dict.fromkeys(s for v in values for s in v.sites)),
        live=any(v.live for v in values),
        crossed=any(v.crossed for v in values) or len(selectors) > 1,
    )


def require_aligned(value: Value, at: str | None, counts: tuple[int, ...], gen: bool, path: str) -> None:
    """Refuses rows that do not pair up one to one with the rows selected by `at`."""
    if value.at is not None and value.at == at:
        return
    if value.gen or gen:
        raise errors.refuse(
            "rows_mismatch",
            path,
            f"rows of {value.at!r} and {at!r} cannot be paired: generated rows pair only with the same selector",
        )
    if value.counts != counts:
        first = next(i for i, (x, y) in enumerate(zip(value.counts, counts, strict=True)) if x != y)
        raise errors.refuse(
            "rows_mismatch",
            path,
            f"prompt {first}: {value.counts[first]} rows on one side and {counts[first]} on the other",
        )

"""Values as the checker sees them: kind, width, how many rows of which tokens, and when they exist.

`ready` is the place in the forward pass where a value becomes known (0 = before it starts), comparable with
`sites.order`. Nothing is broadcast silently: a `vector` and a `per_prompt` value apply to every row by
definition; rows meet rows only when they select the same tokens, or equally many static ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from trocar import errors
from trocar.graph.labels import Label, join
from trocar.sites import Site

Kind = Literal["vector", "per_prompt", "rows", "scalars"]


@dataclass(frozen=True, slots=True)
class Value:
    """One typed value.

    Attributes:
        kind: `vector` one for the whole request; `per_prompt` one row per prompt; `rows` one per selected
            token; `scalars` one number per selected token.
        width: numbers in a row (1 for scalars).
        counts: static rows of each prompt; empty for vectors.
        at: canonical selector that produced the rows, None when they do not come from this pass.
        gen: whether rows of generated tokens are among them.
        ready: place in the pass where it is known.
        sites: where it was read, in order.
        plain: whether it is a site's rows as they were read, without arithmetic.
    """

    kind: Kind
    width: int
    label: Label
    counts: tuple[int, ...] = ()
    at: str | None = None
    gen: bool = False
    ready: int = 0
    sites: tuple[Site, ...] = ()
    plain: bool = False


def combine(a: Value, b: Value, path: str) -> Value:
    """The value of a row-by-row op on `a` and `b`.

    Raises:
        ProgramError: `width_mismatch`, `rows_mismatch` or `wrong_operand`.
    """
    if "scalars" in (a.kind, b.kind) and a.kind != b.kind:
        raise errors.refuse("wrong_operand", path, f"{a.kind} and {b.kind} cannot be combined row by row")
    if a.width != b.width:
        raise errors.refuse("width_mismatch", path, f"widths {a.width} and {b.width} differ")
    shape = _rank(a, b)
    if a.kind in ("rows", "scalars") and b.kind in ("rows", "scalars"):
        require_aligned(a, b.at, b.counts, b.gen, path)
    return replace(
        shape,
        label=join(a.label, b.label),
        ready=max(a.ready, b.ready),
        sites=tuple(dict.fromkeys(a.sites + b.sites)),
        plain=False,
    )


def _rank(a: Value, b: Value) -> Value:
    ranks = {"vector": 0, "per_prompt": 1, "rows": 2, "scalars": 2}
    return a if ranks[a.kind] >= ranks[b.kind] else b


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

"""Which rows a selector means: Python's own slicing, from `docs/positions.md` alone.

`span`, `role` and `mask` are looked up in lists that the test itself gives; the reference knows no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

FORM = re.compile(r"(?P<base>prompt|gen|(?:span|role|mask)\(.*\))(?:\[(?P<inside>[^\]]*)\])?", re.DOTALL)
FAR = 100_000
Marked = Mapping[str, Sequence[int]]


def rows_at(at: str, prompt: int, generated: int, marked: Marked | None = None) -> list[int]:
    """Absolute rows, ascending, in a sequence of `prompt` and then `generated` tokens.

    Args:
        marked: rows by selector without its index, such as `mask("m")`.
    """
    if at == "all":
        return list(range(prompt + generated))
    found = FORM.fullmatch(at)
    assert found is not None, at
    base, inside = found["base"], found["inside"] or "*"
    if base == "prompt":
        every = list(range(prompt))
    elif base == "gen":
        every = list(range(prompt, prompt + FAR))
    else:
        every = list((marked or {})[base])
    return [row for row in _picked(every, inside) if row < prompt + generated]


def _picked(every: list[int], inside: str) -> list[int]:
    if inside == "*":
        return every
    if ":" in inside:
        start, stop = (int(x) if x else None for x in inside.split(":"))
        return every[start:stop]
    return sorted(every[int(i)] for i in inside.split(","))


def in_generated(at: str) -> bool:
    """Whether a selector reaches generated tokens."""
    return at == "all" or at.startswith("gen")

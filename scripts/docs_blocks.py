"""Fenced blocks of Markdown pages, and the parts of pages that are generated. Standard library only.

A generated part stands between `<!-- generated: NAME -->` and `<!-- /generated -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^```([a-z]*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PART = re.compile(r"(<!-- generated: ([a-z0-9-]+) -->\n)(.*?)(<!-- /generated -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language, the words after it, its text, the line it starts on."""

    language: str
    info: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    return [
        Block(m[1], m[2].strip(), m[3], page.count("\n", 0, m.start()) + 2) for m in _FENCE.finditer(page)
    ]


def parts(page: str) -> dict[str, str]:
    """Text of every generated part, by name."""
    return {m[2]: m[3] for m in _PART.finditer(page)}


def fill(page: str, texts: dict[str, str]) -> str:
    """The page with its generated parts replaced.

    Raises:
        KeyError: for a part that has no text.
    """
    return _PART.sub(lambda m: m[1] + texts[m[2]] + m[4], page)

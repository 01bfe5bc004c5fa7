"""Hostile text made safe to show: what a token looks like in a figure, how wide it is, how it is escaped.

The convention, everywhere in this room (SVG, HTML, terminal):
leading, trailing and repeated spaces are `·`, a newline is `⏎`, a tab `⇥`, a carriage return `␍`; other
control characters are their Unicode pictures (`␛`), and everything else that Unicode calls unprintable
(direction overrides, zero-width characters, lone surrogates) is its Python escape (`\\u202e`). Single spaces
between words stay. Because a real `·` looks the same, hover titles also give the exact `repr`.
`Markup` is text that went through `escape`; only `Markup` may be put between tags. Fonts are not known here:
widths are estimates, on the wide side.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Final, NewType
from xml.sax.saxutils import escape as _escape

Markup = NewType("Markup", str)

MOST_SHOWN: Final = 200
_NAMED: Final = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
_SPACES: Final = re.compile(r"^ +| +$| {2,}")
_QUOTES: Final = {'"': "&quot;", "'": "&#39;"}
_MONO_EM: Final = 0.605
_NARROW: Final = frozenset("iljtfrI.,:;'|!()[]{}/\\ -·")
_WIDE: Final = frozenset("mwMW@%—…→")


def visible(text: str) -> str:
    """The text as a reader should see it: one line, every character printable, safe in a terminal."""
    out = "".join(c if c == " " or c.isprintable() else _sign(c) for c in text)
    return _SPACES.sub(lambda run: "·" * len(run[0]), out)


def _sign(char: str) -> str:
    if char in _NAMED:
        return _NAMED[char]
    return chr(0x2400 + ord(char)) if ord(char) < 32 else ascii(char)[1:-1]


def escape(text: str) -> Markup:
    """Visible text, escaped for XML and HTML, for element content and quoted attributes alike."""
    return Markup(_escape(visible(text), _QUOTES))


def columns(text: str) -> int:
    """Terminal columns that visible text takes: 2 for wide East Asian characters, 0 for combining marks."""
    return sum(_columns_of(c) for c in text)


def _columns_of(char: str) -> int:
    if unicodedata.category(char) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in {"W", "F"} else 1


def width_px(text: str, size_px: float, *, mono: bool = False) -> float:
    """Estimated width of visible text in pixels, in a common sans-serif or monospaced font."""
    if mono:
        return columns(text) * _MONO_EM * size_px
    return sum(_ems(c) for c in text) * size_px


def _ems(char: str) -> float:
    if char in _NARROW:
        return 0.37
    if char in _WIDE:
        return 0.98
    if char.isupper():
        return 0.72
    return 0.61 * _columns_of(char)


def shorten(text: str, room_px: float, size_px: float, *, mono: bool = False) -> str:
    """Visible form of `text`, cut with an ellipsis to fit `room_px`; empty when nothing fits."""
    shown = visible(text[: MOST_SHOWN + 1])
    if len(text) <= MOST_SHOWN and width_px(shown, size_px, mono=mono) <= room_px:
        return shown
    return _cut(shown, lambda part: width_px(part, size_px, mono=mono) <= room_px)


def clip(text: str, most_columns: int) -> str:
    """Visible form of `text`, cut with an ellipsis to `most_columns` terminal columns."""
    shown = visible(text[: MOST_SHOWN + 1])
    if len(text) <= MOST_SHOWN and columns(shown) <= most_columns:
        return shown
    return _cut(shown, lambda part: columns(part) <= most_columns)


def pad(text: str, wide: int) -> str:
    """Visible form of `text` in exactly `wide` terminal columns, left-aligned."""
    shown = clip(text, wide)
    return shown + " " * (wide - columns(shown))


def _cut(shown: str, fits: Callable[[str], bool]) -> str:
    for end in range(min(len(shown) - 1, MOST_SHOWN), 0, -1):
        if fits(shown[:end] + "…"):
            return shown[:end] + "…"
    return ""


def wrap(text: str, room_px: float, size_px: float) -> tuple[str, ...]:
    """Visible text broken at spaces into lines that fit; a word longer than a line is shortened."""
    lines: list[str] = []
    for word in visible(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_px(longer, size_px) <= room_px:
            lines[-1] = longer
        else:
            lines.append(shorten(word, room_px, size_px))
    return tuple(lines)

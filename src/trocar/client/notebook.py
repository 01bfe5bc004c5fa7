"""How SDK objects look: text tables, HTML tables for notebooks, and one live progress line in a terminal."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Sequence
from typing import Final, TextIO

from trocar.wire.results import FINAL, JobView

_STYLE = "border-collapse:collapse;font:13px system-ui,sans-serif"
_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top;border-bottom:1px solid #8884"


def html_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; every text is escaped."""
    top = "".join(f"<th style='{_CELL}'>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td style='{_CELL}'>{html.escape(str(c))}</td>" for c in row) + "</tr>"
        for row in rows
    )
    name = f"<caption style='text-align:left'>{html.escape(caption)}</caption>"
    return f"<table style='{_STYLE}'>{name}<tr>{top}</tr>{body}</table>"


def text_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as aligned text."""
    cells = [tuple(head), *[tuple(str(c) for c in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([caption, *[f"  {line}" for line in lines]])


def bits_text(bits: int) -> str:
    """Bits in human units: `12.3 kbit (1.5 kB)`."""
    for unit, size in (("Gbit", 10**9), ("Mbit", 10**6), ("kbit", 10**3)):
        if bits >= size:
            return f"{bits / size:.1f} {unit} ({bytes_text(bits / 8)})"
    return f"{bits} bit"


def bytes_text(size: float) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size:.0f} B"


class ProgressLine:
    """One line, rewritten in place while a job runs; silent when the stream is not a terminal."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self.live: Final = self._stream.isatty() and not quiet
        self._started_s = time.monotonic()

    def show(self, view: JobView) -> None:
        if not self.live:
            return
        ahead = f"  {view.ahead} ahead" if view.ahead else ""
        took_s = time.monotonic() - self._started_s
        line = f"{view.state:<9} {view.job[:12]}  {view.done}/{view.total}{ahead}  {took_s:.1f}s"
        self._stream.write(f"\r\x1b[2K{line}" + ("\n" if view.state in FINAL else ""))
        self._stream.flush()

"""Figures for terminals: blocks of eight heights, sparklines and small grids, never over 100 columns.

When a grid or a line has more columns than fit, every k-th is shown and the text says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from trocar.plots.colours import Scale
from trocar.plots.figure import TEXT_COLUMNS
from trocar.plots.glyphs import clip, columns, pad, visible
from trocar.plots.numbers import show

BLOCKS: Final = "▁▂▃▄▅▆▇█"
_MOST_ROWS: Final = 48
_LABEL_COLUMNS: Final = 24


def block(share: float) -> str:
    """A block whose height is a share (0 to 1) of the line; a dot for NaN."""
    return "·" if math.isnan(share) else BLOCKS[min(7, int(share * 8))]


def sparkline(values: Sequence[float], low: float, high: float, most: int) -> tuple[str, int]:
    """Blocks for at most `most` of the values, and how many values each block steps over."""
    every = max(1, math.ceil(len(values) / most))
    shares = (
        min(1.0, max(0.0, (v - low) / (high - low))) if not math.isnan(v) else v for v in values[::every]
    )
    return "".join(map(block, shares)), every


def cell(value: float, scale: Scale) -> str:
    """Two columns for one value: sign and height when diverging, a doubled block otherwise."""
    if math.isnan(value):
        return " ·"
    if not scale.diverging:
        return block(scale.share(value)) * 2
    sign = "−" if value < 0 else "+" if value > 0 else " "
    return sign + block(min(1.0, abs(value) / scale.high))


def grid_text(
    values: Sequence[Sequence[float]],
    *,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    scale: Scale,
    lower: bool,
    head: tuple[str, str],
) -> str:
    """A grid of blocks with row labels, a line of column numbers, and the column labels under it.

    Args:
        head: title and summary, for the first two lines.
        lower: whether row 0 is the lowest.
    """
    wide = min(max(columns(visible(y)) for y in y_labels), _LABEL_COLUMNS)
    every_x = max(1, math.ceil(len(x_labels) * 3 / (TEXT_COLUMNS - wide - 2)))
    every_y = max(1, math.ceil(len(y_labels) / _MOST_ROWS))
    shown = range(0, len(x_labels), every_x)
    rows = [
        f"{pad(y_labels[r], wide)}  " + " ".join(cell(values[r][c], scale) for c in shown)
        for r in range(0, len(y_labels), every_y)
    ]
    numbers = " " * (wide + 2) + " ".join(f"{c % 100:>2}" for c in shown)
    notes = [f"shown: every {every_x}. column, every {every_y}. row"] if every_x > 1 or every_y > 1 else []
    notes += ["column numbers over the labels: the last two digits"] if len(x_labels) > 100 else []
    names = flow([f"{c}={clip(x_labels[c], _LABEL_COLUMNS)}" for c in shown][:60])
    return lines_text(*head, *(reversed(rows) if lower else rows), numbers, *names, *notes)


def flow(items: Sequence[str], gap: str = "  ") -> list[str]:
    """Items side by side, in as many lines as needed."""
    out: list[str] = []
    for item in items:
        if out and columns(out[-1]) + columns(gap) + columns(item) <= TEXT_COLUMNS:
            out[-1] += gap + item
        else:
            out.append(item)
    return out


def lines_text(title: str, summary: str, *lines: str) -> str:
    """Title, summary and the lines, joined; the title and summary are made visible and cut to the width."""
    head = [clip(text, TEXT_COLUMNS) for text in (title, summary) if text]
    return "\n".join([*head, *lines])


def range_text(values: Sequence[float]) -> str:
    """`0.51 to 0.98` over the values that are not NaN."""
    known = [v for v in values if not math.isnan(v)]
    return f"{show(min(known))} to {show(max(known))}" if known else "no values"

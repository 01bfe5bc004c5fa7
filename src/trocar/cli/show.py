"""How verbs print: one table or one JSON document on stdout, amounts in words that people read.

Colours follow the terminal and NO_COLOR (rich does both). Cells are plain text: nothing in them is markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PIPE_COLUMNS: Final = 240
_STEPS: Final = ("k", "M", "G", "T", "P", "E")


def as_json(value: Any) -> None:
    """Prints one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; in a pipe it is as wide as it needs to be."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    drawing(drawn)


def drawing(*parts: RenderableType) -> None:
    """Prints what rich draws, one part per line; lines are folded in a terminal only."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    with console.capture() as drawn:
        for part in parts:
            console.print(part, soft_wrap=not sys.stdout.isatty())
    # through print, not rich: rich ends the process itself (code 1) when the reader of a pipe has gone
    print(drawn.get(), end="", flush=True)


def bits(amount: int | None) -> str:
    """An amount of bits to three digits; exact below ten thousand; None is not capped.

    >>> bits(9999), bits(1_120_000_000), bits(None)
    ('9999 bit', '1.12 Gbit', 'uncapped')
    """
    return "uncapped" if amount is None else _scaled(amount, "bit")


def size(amount_bytes: int) -> str:
    """A number of bytes to three digits, in powers of 1000."""
    return _scaled(amount_bytes, "B")


def _scaled(amount: int, unit: str) -> str:
    if abs(amount) < 10_000:
        return f"{amount} {unit}"
    value, step = amount / 1000, 0
    while abs(value) >= 999.5 and step < len(_STEPS) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_STEPS[step]}{unit}"


def when(time_ms: int | None) -> str:
    """A moment in UTC to the second; empty for None."""
    if time_ms is None:
        return ""
    return datetime.fromtimestamp(time_ms / 1000, tz=UTC).strftime("%Y-%m-%d %H:%M:%SZ")

"""A list of rows as an HTML table: what a figure shows, for readers who want numbers or cannot see colours.

All cells are escaped. Only the first `most` rows are written, and the caption says so when there are more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trocar import errors
from trocar.plots.glyphs import Markup, escape
from trocar.plots.numbers import show
from trocar.plots.svg import join, node

Cell = str | int | float | bool | None


def html_table(rows: Sequence[Mapping[str, Cell]], *, most: int = 500) -> Markup:
    """The rows as a `<table>`, with the keys of the first row as header.

    Raises:
        ClientError: `bad_argument` when rows have different keys.
    """
    names = list(rows[0]) if rows else []
    for i, row in enumerate(rows):
        if list(row) != names:
            raise errors.refuse(
                "bad_argument", f"rows[{i}]", f"columns {list(row)} differ from the first row's {names}"
            )
    head = node("tr", *(node("th", escape(name), scope="col", align=_side(rows, name)) for name in names))
    body = join(node("tr", *(_cell(row[name]) for name in names)) for row in rows[:most])
    return node("table", *_caption(len(rows), most), node("thead", head), node("tbody", body))


def _caption(n_rows: int, most: int) -> list[Markup]:
    if n_rows <= most:
        return []
    return [node("caption", escape(f"The first {most:,} of {n_rows:,} rows; to_table() has them all."))]


def _side(rows: Sequence[Mapping[str, Cell]], name: str) -> str:
    return "right" if _is_number(rows[0][name]) else "left"


def _cell(value: Cell) -> Markup:
    # an empty string between the tags keeps `<td></td>`, since HTML does not know `<td/>`
    return node("td", escape(cell_text(value)), align="right" if _is_number(value) else "left")


def _is_number(value: Cell) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell_text(value: Cell) -> str:
    """One cell as visible text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return show(value) if isinstance(value, int | float) else value

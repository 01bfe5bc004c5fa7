"""A grid of values, such as layer by position: logit lenses, patching grids, attention.

Row 0 is at the bottom unless `origin="upper"`, so that layers rise as in a drawing of the stream. NaN is an
empty cell. Up to 20,000 cells are drawn one by one with exact values on hover; above that the grid becomes
one embedded image, and exact values are in `to_table()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Final, Literal

from trocar import errors
from trocar.plots import png, svg
from trocar.plots.axes import COLOUR_BAR_PX, Frame, bottom_title, colour_bar, left_title, widest
from trocar.plots.colours import Scale, fit_scale, ink
from trocar.plots.figure import PAD_PX, Drawing, Figure, heading
from trocar.plots.glyphs import Markup, shorten, visible, width_px
from trocar.plots.numbers import floats, same_length, strings, thinning
from trocar.plots.shades import grid_text, range_text
from trocar.plots.table import Cell

MOST_CELLS: Final = 20_000
_LABEL_PX: Final = 150.0
_SLANTED_PX: Final = 120.0
_TEXT_PX: Final = 10.5
_SLANT: Final = math.sqrt(0.5)
_MOST_COLUMN_PX: Final = 130.0
_MOST_HEIGHT_PX: Final = 440.0
_TEXT_ROW_PX: Final = 19.0
_MOST_TEXT_ROWS: Final = 100


@dataclass(frozen=True, repr=False)
class Heatmap(Figure):
    """Coloured cells with labels on both sides.

    Attributes:
        values: [rows][columns] finite numbers or NaN.
        x_labels: one per column, for example tokens.
        y_labels: one per row, for example layers.
        title: shown on top; empty for none.
        x_title: what the columns are.
        y_title: what the rows are.
        value_title: what the colour means, with its unit.
        cell_texts: [rows][columns] text inside the cells, shown where it fits, for example the top token.
        text_title: what `cell_texts` are, for the hover text.
        diverging: red to blue around 0 (negative is red) instead of dark to light.
        vmin: value of the first colour; None for the smallest value.
        vmax: value of the last colour; None for the largest value.
        origin: whether row 0 is the lowest or the uppermost.

    Raises:
        ClientError: `bad_argument` for ragged rows, infinities, a wrong number of labels, or only NaN.

    Example:
        Heatmap([[0.1, 0.9]], ["<bos>", " Paris"], ["0"], "Lens", "token", "layer", "p(top token)").to_svg()
    """

    values: Sequence[Sequence[float]]
    x_labels: Sequence[str]
    y_labels: Sequence[str]
    title: str
    x_title: str
    y_title: str
    value_title: str
    cell_texts: Sequence[Sequence[str]] | None = None
    text_title: str = "text"
    diverging: bool = False
    vmin: float | None = None
    vmax: float | None = None
    origin: Literal["lower", "upper"] = "lower"

    def __post_init__(self) -> None:
        x_labels, y_labels = strings(self.x_labels, "x_labels"), strings(self.y_labels, "y_labels")
        rows = tuple(floats(row, f"values[{i}]", nan=True) for i, row in enumerate(self.values))
        same_length("values", len(rows), len(y_labels), "y_labels")
        for i, row in enumerate(rows):
            same_length(f"values[{i}]", len(row), len(x_labels), "x_labels")
        for name, value in (("x_labels", x_labels), ("y_labels", y_labels), ("values", rows)):
            object.__setattr__(self, name, value)
        if self.cell_texts is not None:
            object.__setattr__(self, "cell_texts", self._accept_texts(self.cell_texts))
        if self.origin not in {"lower", "upper"}:
            raise errors.refuse("bad_argument", "origin", f"{self.origin!r} is neither 'lower' nor 'upper'")
        _ = self._scale

    def _accept_texts(self, texts: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
        rows = tuple(strings(row, f"cell_texts[{i}]") for i, row in enumerate(texts))
        same_length("cell_texts", len(rows), len(self.y_labels), "y_labels")
        for i, row in enumerate(rows):
            same_length(f"cell_texts[{i}]", len(row), len(self.x_labels), "x_labels")
        return rows

    @cached_property
    def _scale(self) -> Scale:
        return fit_scale(chain(*self.values), diverging=self.diverging, vmin=self.vmin, vmax=self.vmax)

    @property
    def n_cells(self) -> int:
        return len(self.x_labels) * len(self.y_labels)

    def summary(self) -> str:
        known = [v for v in chain(*self.values) if not math.isnan(v)]
        blank = f", {self.n_cells - len(known):,} blank" if len(known) < self.n_cells else ""
        rows = f"{len(self.y_labels)} {self.y_title or 'rows'}"
        columns = f"{len(self.x_labels)} {self.x_title or 'columns'}"
        return f"{rows} x {columns}, {self.value_title or 'value'} {range_text(known)}{blank}"

    def to_table(self) -> list[dict[str, Cell]]:
        """One row per cell: y_index, y, x_index, x, value, and text when there are cell texts."""
        out: list[dict[str, Cell]] = []
        for r, y in enumerate(self.y_labels):
            for c, x in enumerate(self.x_labels):
                row: dict[str, Cell] = {
                    "y_index": r,
                    "y": y,
                    "x_index": c,
                    "x": x,
                    "value": self.values[r][c],
                }
                out.append(row | ({"text": self.cell_texts[r][c]} if self.cell_texts else {}))
        return out

    def to_text(self) -> str:
        return grid_text(
            self.values,
            x_labels=self.x_labels,
            y_labels=self.y_labels,
            scale=self._scale,
            lower=self.origin == "lower",
            head=(self.title, self.summary()),
        )

    def _draw(self, width: float, key: str) -> Drawing:
        top = heading(self.title, width)
        grid = self._grid(width, top.height + COLOUR_BAR_PX)
        bottom, x_labels = self._column_labels(grid)
        parts = [
            top.body,
            colour_bar(self._scale, self.value_title, max(grid.right, 260.0), top.height, key),
            self._cells(grid) if self.n_cells <= MOST_CELLS else self._raster(grid),
            self._row_labels(grid),
            x_labels,
            left_title(self.y_title, grid.frame),
            bottom_title(self.x_title, grid.frame, bottom + 8),
        ]
        return Drawing(svg.join(parts), bottom + (20 if self.x_title else 4))

    def _grid(self, width: float, top: float) -> _Grid:
        n_rows, n_columns = len(self.y_labels), len(self.x_labels)
        labels = min(widest(tuple(map(visible, self.y_labels)), mono=True), _LABEL_PX)
        left = PAD_PX + (16 if self.y_title else 0) + labels + 8
        cell_w = min((width - PAD_PX - 6 - left) / n_columns, _MOST_COLUMN_PX)
        slanted = min(widest(tuple(map(visible, self.x_labels)), mono=True), _SLANTED_PX)
        if slanted > cell_w - 6:
            # the first slanted labels reach to the left of their columns
            left = max(left, PAD_PX + slanted * _SLANT - cell_w / 2 + 12)
            cell_w = min((width - PAD_PX - 6 - left) / n_columns, _MOST_COLUMN_PX)
        cell_h = _row_px(n_rows, cell_w, with_text=self.cell_texts is not None)
        return _Grid(left, top, cell_w, cell_h, n_rows, n_columns, self.origin == "lower")

    def _cells(self, grid: _Grid) -> Markup:
        return svg.join(self._cell(grid, r, c) for r in range(grid.n_rows) for c in range(grid.n_columns))

    def _cell(self, grid: _Grid, r: int, c: int) -> Markup:
        value, blank = self.values[r][c], math.isnan(self.values[r][c])
        colour = None if blank else self._scale.colour(value)
        gap = 1.0 if min(grid.cell_w, grid.cell_h) >= 8 else 0.0
        title = svg.tip(*self._hover(r, c))
        box = {"x": grid.x(c), "y": grid.y(r), "width": grid.cell_w - gap, "height": grid.cell_h - gap}
        paint: dict[str, str | float | None] = {"fill": colour.css} if colour else {"fill_opacity": 0.05}
        crisp = None if gap else "crispEdges"
        text = shorten(self.cell_texts[r][c], grid.cell_w - 6, _TEXT_PX, mono=True) if self.cell_texts else ""
        if not text or grid.cell_h < 13:
            return svg.node("rect", title, **box, **paint, shape_rendering=crisp)
        x, y = grid.x(c) + (grid.cell_w - gap) / 2, grid.y(r) + (grid.cell_h - gap) / 2
        shown = svg.words(
            text, x, y, size=_TEXT_PX, anchor="middle", mono=True, fill=ink(colour) if colour else None
        )
        return svg.group(title, svg.node("rect", **box, **paint), shown)

    def _hover(self, r: int, c: int) -> list[str]:
        value = self.values[r][c]
        lines = [
            f"{self.y_title or 'row'} {self.y_labels[r]!r}",
            f"{self.x_title or 'column'} {c}: {self.x_labels[c]!r}",
            f"{self.value_title or 'value'} = {'no value' if math.isnan(value) else repr(value)}",
        ]
        return lines + ([f"{self.text_title} {self.cell_texts[r][c]!r}"] if self.cell_texts else [])

    def _raster(self, grid: _Grid) -> Markup:
        order = reversed(self.values) if grid.lower else self.values
        clear = bytes(4)
        pixels = b"".join(
            clear if math.isnan(v) else bytes((*self._scale.colour(v), 255))
            for v in chain.from_iterable(order)
        )
        # smooth scaling when a cell is smaller than a pixel, or whole rows would vanish
        rendering = "pixelated" if min(grid.cell_w, grid.cell_h) >= 1 else None
        return svg.node(
            "image",
            svg.tip(f"{self.n_cells:,} cells, drawn as an image; exact values: to_table()"),
            x=grid.left,
            y=grid.top,
            width=grid.right - grid.left,
            height=grid.bottom - grid.top,
            preserveAspectRatio="none",
            image_rendering=rendering,
            href=png.data_uri(png.encode(grid.n_columns, grid.n_rows, pixels)),
        )

    def _row_labels(self, grid: _Grid) -> Markup:
        every = thinning(grid.n_rows, grid.cell_h, 12.0)
        return svg.join(
            svg.words(
                shorten(self.y_labels[r], _LABEL_PX, svg.SMALL_PX, mono=True),
                grid.left - 6,
                grid.y(r) + grid.cell_h / 2 - 0.5,
                anchor="end",
                mono=True,
                full=self.y_labels[r],
            )
            for r in range(0, grid.n_rows, every)
        )

    def _column_labels(self, grid: _Grid) -> tuple[float, Markup]:
        """Where the labels end, and the labels: level if all fit, otherwise slanted and perhaps thinned."""
        shown = tuple(map(visible, self.x_labels))
        slanted = widest(shown, mono=True) > grid.cell_w - 6
        every = thinning(grid.n_columns, grid.cell_w, 16.0) if slanted else 1
        parts, deepest = [], 10.0
        for c in range(0, grid.n_columns, every):
            text = shorten(self.x_labels[c], _SLANTED_PX if slanted else _LABEL_PX, svg.SMALL_PX, mono=True)
            x, y = grid.x(c) + grid.cell_w / 2 + (3 if slanted else 0), grid.bottom + (8 if slanted else 10)
            anchor, turn = ("end", -45.0) if slanted else ("middle", None)
            parts.append(svg.words(text, x, y, anchor=anchor, mono=True, turn=turn, full=self.x_labels[c]))
            deepest = max(deepest, width_px(text, svg.SMALL_PX, mono=True) * _SLANT) if slanted else deepest
        return grid.bottom + deepest + 10, svg.join(parts)


def _row_px(n_rows: int, cell_w: float, *, with_text: bool) -> float:
    """Height of a row: one line of text, or as high as wide between 14 and 32 px, in 440 px altogether."""
    if with_text and n_rows <= _MOST_TEXT_ROWS:
        return _TEXT_ROW_PX
    return min(max(min(cell_w, 32.0), 14.0), _MOST_HEIGHT_PX / n_rows)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where the cells are, in pixels."""

    left: float
    top: float
    cell_w: float
    cell_h: float
    n_rows: int
    n_columns: int
    lower: bool

    @property
    def right(self) -> float:
        return self.left + self.cell_w * self.n_columns

    @property
    def bottom(self) -> float:
        return self.top + self.cell_h * self.n_rows

    @property
    def frame(self) -> Frame:
        return Frame(self.left, self.top, self.right, self.bottom)

    def x(self, column: int) -> float:
        return self.left + self.cell_w * column

    def y(self, row: int) -> float:
        return self.top + self.cell_h * (self.n_rows - 1 - row if self.lower else row)

"""Running text with one colour per token: probe scores, surprisal, attributions.

Tokens keep their order and wrap like words; a newline inside a token is shown as `⏎` and also ends the row.
A token without a value (NaN) is framed, not coloured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from trocar import errors
from trocar.plots import svg
from trocar.plots.axes import COLOUR_BAR_PX, colour_bar
from trocar.plots.colours import Scale, fit_scale, ink
from trocar.plots.figure import PAD_PX, Drawing, Figure, heading
from trocar.plots.glyphs import Markup, clip, shorten, width_px
from trocar.plots.numbers import floats, same_length, strings
from trocar.plots.shades import cell, flow, lines_text, range_text
from trocar.plots.table import Cell

_TOKEN_PX: Final = 13.0
_ROW_PX: Final = 26.0
_CHIP_PX: Final = 22.0


class _Chip(NamedTuple):
    place: int
    shown: str
    x: float
    row: int
    wide: float


@dataclass(frozen=True, repr=False)
class TokenStrip(Figure):
    """Coloured tokens.

    Attributes:
        tokens: at least one.
        values: one per token, finite or NaN.
        title: shown on top; empty for none.
        value_title: what the colour means, with its unit.
        diverging: red to blue around 0 (negative is red) instead of dark to light.
        vmin: value of the first colour; None for the smallest value.
        vmax: value of the last colour; None for the largest value.

    Raises:
        ClientError: `bad_argument` for unequal lengths, infinities, or only NaN.

    Example:
        TokenStrip(("<bos>", "The", " Eiffel"), (0.1, 0.2, 0.9), "Probe score").to_svg()
    """

    tokens: Sequence[str]
    values: Sequence[float]
    title: str
    value_title: str = ""
    diverging: bool = False
    vmin: float | None = None
    vmax: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", strings(self.tokens, "tokens"))
        object.__setattr__(self, "values", floats(self.values, "values", nan=True))
        same_length("values", len(self.values), len(self.tokens), "tokens")
        if not self.tokens:
            raise errors.refuse("bad_argument", "tokens", "there is no token to draw")
        _ = self._scale

    @cached_property
    def _scale(self) -> Scale:
        return fit_scale(self.values, diverging=self.diverging, vmin=self.vmin, vmax=self.vmax)

    def summary(self) -> str:
        return f"{len(self.tokens)} tokens, {self.value_title or 'value'} {range_text(self.values)}"

    def to_table(self) -> list[dict[str, Cell]]:
        """One row per token: index, token and value."""
        return [
            {"index": i, "token": t, "value": v}
            for i, (t, v) in enumerate(zip(self.tokens, self.values, strict=True))
        ]

    def to_text(self) -> str:
        chips = [
            f"{clip(token, 40)}{cell(value, self._scale).strip()}"
            for token, value in zip(self.tokens, self.values, strict=True)
        ]
        return lines_text(self.title, self.summary(), *flow(chips))

    def _draw(self, width: float, key: str) -> Drawing:
        top = heading(self.title, width)
        chips = self._chips(width)
        first = top.height + COLOUR_BAR_PX
        parts = [
            top.body,
            colour_bar(self._scale, self.value_title, width - PAD_PX - 12, top.height, key),
            *(self._chip(chip, first) for chip in chips),
        ]
        return Drawing(svg.join(parts), first + _ROW_PX * (chips[-1].row + 1) + 4)

    def _chips(self, width: float) -> list[_Chip]:
        chips: list[_Chip] = []
        x, row = PAD_PX, 0
        for i, token in enumerate(self.tokens):
            shown = shorten(token, width - 2 * PAD_PX - 8, _TOKEN_PX, mono=True)
            wide = max(width_px(shown, _TOKEN_PX, mono=True), 4.0) + 7
            if x > PAD_PX and x + wide > width - PAD_PX:
                x, row = PAD_PX, row + 1
            chips.append(_Chip(i, shown, x, row, wide))
            x, row = (PAD_PX, row + 1) if "\n" in token else (x + wide + 1, row)
        return chips

    def _chip(self, chip: _Chip, top: float) -> Markup:
        value = self.values[chip.place]
        colour = None if math.isnan(value) else self._scale.colour(value)
        y = top + _ROW_PX * chip.row
        paint: dict[str, str | float | None] = (
            {"fill": colour.css}
            if colour
            else {"fill": "none", "stroke": "currentColor", "stroke_opacity": 0.3}
        )
        seen = "no value" if colour is None else repr(value)
        return svg.group(
            svg.tip(f"{chip.place}: {self.tokens[chip.place]!r}", f"{self.value_title or 'value'} = {seen}"),
            svg.node("rect", x=chip.x, y=y, width=chip.wide, height=_CHIP_PX, rx=3.0, **paint),
            svg.words(
                chip.shown,
                chip.x + chip.wide / 2,
                y + _CHIP_PX / 2,
                size=_TOKEN_PX,
                anchor="middle",
                mono=True,
                fill=ink(colour) if colour else None,
            ),
        )

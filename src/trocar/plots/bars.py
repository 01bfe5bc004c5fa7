"""Horizontal bars with their values written out, on a linear or a logarithmic axis.

Linear bars start at 0. Logarithmic bars start at the power of ten below the smallest value, and the axis
says that it is logarithmic, because the lengths of such bars cannot be compared as ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trocar import errors
from trocar.plots import svg
from trocar.plots.axes import Axis, Frame, bottom_axis, bottom_title, widest
from trocar.plots.colours import SERIES
from trocar.plots.figure import PAD_PX, TEXT_COLUMNS, Drawing, Figure, heading
from trocar.plots.glyphs import Markup, clip, columns, pad, shorten, visible
from trocar.plots.numbers import drawable, floats, same_length, show, strings
from trocar.plots.shades import lines_text, range_text
from trocar.plots.table import Cell

_BAR_PX: Final = 18.0
_STEP_PX: Final = 27.0


@dataclass(frozen=True, repr=False)
class Bars(Figure):
    """One bar per name, in the order given.

    Attributes:
        names: at least one.
        values: one finite number per name; above 0 when `log`.
        title: shown on top; empty for none.
        value_title: what the length means, with its unit.
        log: logarithmic axis.
        value_texts: written at the bars instead of the numbers, for example "37 kB".

    Raises:
        ClientError: `bad_argument` for no bars, unequal lengths, or log of a value that is not above 0.

    Example:
        Bars(("released", "download"), (3e5, 4e9), "What left the server", "bits", log=True).to_svg()
    """

    names: Sequence[str]
    values: Sequence[float]
    title: str
    value_title: str
    log: bool = False
    value_texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", strings(self.names, "names"))
        object.__setattr__(self, "values", floats(self.values, "values"))
        same_length("values", len(self.values), len(self.names), "names")
        if self.value_texts is not None:
            object.__setattr__(self, "value_texts", strings(self.value_texts, "value_texts"))
            same_length("value_texts", len(self.value_texts), len(self.names), "names")
        if not self.names:
            raise errors.refuse("bad_argument", "names", "there is no bar to draw")
        for i, value in enumerate(self.values):
            if self.log and value <= 0:
                raise errors.refuse(
                    "bad_argument", f"values[{i}]", f"{value!r} has no place on a logarithmic axis"
                )

    @property
    def _texts(self) -> tuple[str, ...]:
        return tuple(self.value_texts) if self.value_texts is not None else tuple(map(show, self.values))

    @property
    def _axis_title(self) -> str:
        return f"{self.value_title} (logarithmic)".strip() if self.log else self.value_title

    def summary(self) -> str:
        return f"{len(self.names)} bars, {self.value_title or 'value'} {range_text(self.values)}"

    def to_table(self) -> list[dict[str, Cell]]:
        """One row per bar: name and value."""
        return [{"name": name, "value": value} for name, value in zip(self.names, self.values, strict=True)]

    def to_text(self) -> str:
        wide = min(36, max(columns(visible(name)) for name in self.names))
        texts = [clip(text, 20) for text in self._texts]
        axis = self._axis(0, float(TEXT_COLUMNS - wide - 4 - max(map(columns, texts))))
        zero = 0.0 if self.log else axis.px(0)
        rows = []
        for name, value, text in zip(self.names, self.values, texts, strict=True):
            start, end = sorted((round(zero), round(axis.px(value))))
            rows.append(f"{pad(name, wide)}  {' ' * start}{'█' * (end - start) or '▏'} {text}")
        return lines_text(self.title, f"{self.summary()}{', logarithmic' if self.log else ''}", *rows)

    def _axis(self, start: float, end: float) -> Axis:
        if self.log:
            first = math.ceil(math.log10(min(self.values)) - 1e-9) - 1
            last = max(math.ceil(math.log10(max(self.values)) - 1e-9), first + 1)
            return Axis(10.0**first, 10.0**last, start, end, log=True)
        low, high = min(0.0, *self.values), max(0.0, *self.values)
        return Axis(low, high, start, end) if drawable(low, high) else Axis(0.0, 1.0, start, end)

    def _draw(self, width: float, key: str) -> Drawing:
        top = heading(self.title, width)
        names = min(widest(tuple(map(visible, self.names))), width * 0.4)
        texts = widest(tuple(map(visible, self._texts))) + 8
        left = PAD_PX + names + 10 + (texts if min(self.values) < 0 else 0)
        frame = Frame(
            left, top.height + 2, width - PAD_PX - texts, top.height + 2 + _STEP_PX * len(self.names)
        )
        axis = self._axis(frame.left, frame.right)
        about = max(2, round((frame.right - frame.left) / 70))
        marks = axis.level_ticks(about if self.log else min(about, 6))
        zero = self._zero(axis)
        parts = [
            top.body,
            bottom_axis(axis, frame, marks, grid=True),
            *(self._bar(i, axis, frame, names) for i in range(len(self.names))),
            svg.line(zero, frame.top, zero, frame.bottom, opacity=0.5),
            bottom_title(self._axis_title, frame, frame.bottom + 31),
        ]
        return Drawing(svg.join(parts), frame.bottom + (42 if self._axis_title else 24))

    def _zero(self, axis: Axis) -> float:
        return axis.start if self.log else axis.px(0)

    def _bar(self, i: int, axis: Axis, frame: Frame, names_px: float) -> Markup:
        name, value, text = self.names[i], self.values[i], self._texts[i]
        y = frame.top + _STEP_PX * (i + 0.5)
        start, end = sorted((self._zero(axis), axis.px(value)))
        negative = value < 0
        lines = [visible(name), f"{self.value_title or 'value'} = {value!r}"] + (
            [text] if self.value_texts else []
        )
        return svg.group(
            svg.tip(*lines),
            svg.node(
                "rect",
                x=start,
                y=y - _BAR_PX / 2,
                width=max(end - start, 1.0),
                height=_BAR_PX,
                rx=2.0,
                fill=SERIES[0],
            ),
            svg.words(
                shorten(name, names_px + 1, svg.SMALL_PX),
                PAD_PX + names_px,
                y,
                anchor="end",
                full=visible(name),
            ),
            svg.words(text, start - 5 if negative else end + 5, y, anchor="end" if negative else None),
        )

"""Axes: from values to pixels, and the grid, ticks and titles around a plot area.

`Axis` maps one range of values to one range of pixels, linear or logarithmic. `Frame` is the rectangle the
data is drawn in. What is drawn inside is the figure's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trocar.plots import svg
from trocar.plots.colours import Scale
from trocar.plots.figure import PAD_PX
from trocar.plots.glyphs import Markup, shorten, width_px
from trocar.plots.numbers import decades, scientific, tick_labels, ticks

BAR_PX = 10.0
_KEY_STEPS = 24


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: values low..high at pixels start..end (end may be smaller: upwards)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def px(self, value: float) -> float:
        """Place of a value in pixels; outside [start, end] for values outside the range."""
        low, high, v = map(math.log10 if self.log else float, (self.low, self.high, value))
        return self.start + (v - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int, *, whole: bool = False) -> tuple[float, ...]:
        if self.log:
            return decades(self.low, self.high, about)
        return ticks(self.low, self.high, about, whole=whole)

    def level_ticks(self, most: int, *, whole: bool = False) -> tuple[float, ...]:
        """Ticks of a horizontal axis, fewer than `most` when their labels would touch; perhaps only one."""
        for about in range(most, 0, -1):
            values = self.ticks(about, whole=whole)
            room = abs(self.end - self.start) / max(len(values), 1)
            if widest(self.labels(values)) + 8 <= room:
                return values
        return values[:1]

    def labels(self, values: tuple[float, ...]) -> tuple[str, ...]:
        return tuple(scientific(v) for v in values) if self.log else tick_labels(values)


@dataclass(frozen=True, slots=True)
class Frame:
    """The plot area, in pixels from the top left corner of the figure."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def middle_x(self) -> float:
        return (self.left + self.right) / 2

    @property
    def middle_y(self) -> float:
        return (self.top + self.bottom) / 2


def bottom_axis(axis: Axis, frame: Frame, values: tuple[float, ...], *, grid: bool) -> Markup:
    """Tick marks and labels under the frame, with vertical grid lines when asked for."""
    parts = [svg.line(frame.left, frame.bottom, frame.right, frame.bottom, opacity=0.5)]
    for value, label in zip(values, axis.labels(values), strict=True):
        x = axis.px(value)
        if grid:
            parts.append(svg.line(x, frame.top, x, frame.bottom))
        parts.append(svg.line(x, frame.bottom, x, frame.bottom + 4, opacity=0.5))
        parts.append(svg.words(label, x, frame.bottom + 13, anchor="middle"))
    return svg.join(parts)


def left_axis(axis: Axis, frame: Frame, values: tuple[float, ...]) -> Markup:
    """Horizontal grid lines with their labels left of the frame."""
    parts = []
    for value, label in zip(values, axis.labels(values), strict=True):
        y = axis.px(value)
        parts.append(svg.line(frame.left, y, frame.right, y))
        parts.append(svg.words(label, frame.left - 7, y, anchor="end"))
    return svg.join(parts)


def left_title(text: str, frame: Frame) -> Markup:
    """The title of the vertical axis, turned, at the left edge; cut if longer than the frame is high."""
    if not text:
        return Markup("")
    shown = shorten(text, max(frame.bottom - frame.top, 60) + 20, svg.SMALL_PX)
    return svg.words(shown, PAD_PX + 5, frame.middle_y, anchor="middle", turn=-90, soft=True, full=text)


def bottom_title(text: str, frame: Frame, y: float) -> Markup:
    """The title of the horizontal axis, centred under the frame."""
    if not text:
        return Markup("")
    shown = shorten(text, frame.right - frame.left + 60, svg.SMALL_PX)
    return svg.words(shown, frame.middle_x, y, anchor="middle", soft=True, full=text)


def colour_bar(
    scale: Scale, title: str, right: float, top: float, key: str, *, left: float = PAD_PX
) -> Markup:
    """A horizontal colour bar of at most 180 px that ends at `right`, its title before it, ticks under it.

    A pointed end says that values beyond the scale share the colour of that end.
    """
    wide = min(180.0, (right - left) * 0.45)
    axis = Axis(scale.low, scale.high, right - wide, right)
    marks = axis.level_ticks(5)
    stops = (
        svg.node("stop", offset=k / _KEY_STEPS, stop_color=scale.at(k / _KEY_STEPS).css)
        for k in range(_KEY_STEPS + 1)
    )
    parts = [
        svg.node("defs", svg.node("linearGradient", *stops, id=f"{key}-scale")),
        svg.node("path", d=_bar_outline(scale, axis, top), fill=f"url(#{key}-scale)"),
    ]
    for value, label in zip(marks, axis.labels(marks), strict=True):
        x = axis.px(value)
        parts.append(svg.line(x, top + BAR_PX, x, top + BAR_PX + 3, opacity=0.5))
        parts.append(svg.words(label, x, top + BAR_PX + 10, anchor="middle", size=10))
    room = axis.start - 10 - left
    parts.append(
        svg.words(
            shorten(title, room, svg.SMALL_PX),
            axis.start - 10,
            top + BAR_PX / 2,
            anchor="end",
            soft=True,
            full=title,
        )
    )
    return svg.join(parts)


COLOUR_BAR_PX = 34.0
"""Height to keep free for a colour bar with its ticks."""


def _bar_outline(scale: Scale, axis: Axis, top: float) -> str:
    left = axis.start - (6 if scale.below else 0)
    right = axis.end + (6 if scale.above else 0)
    bottom, middle = top + BAR_PX, top + BAR_PX / 2
    corners = [
        (axis.start, top),
        (axis.end, top),
        (right, middle),
        (axis.end, bottom),
        (axis.start, bottom),
        (left, middle),
    ]
    return "M" + " L".join(f"{svg.coordinate(x)} {svg.coordinate(y)}" for x, y in corners) + " Z"


def widest(labels: tuple[str, ...], size: float = svg.SMALL_PX, *, mono: bool = False) -> float:
    """Width of the widest label in pixels, 0 when there are none."""
    return max((width_px(label, size, mono=mono) for label in labels), default=0.0)

"""Curves with confidence bands: probe quality by layer, dose and response, loss by step.

The legend stands above the plot area, so it cannot cover data. Series differ in colour and in the shape of
their marker. NaN interrupts a line. With a `y_range` narrower than the data, lines are cut at the frame and
a note under the plot says how many points lie outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from trocar import errors
from trocar.plots import svg
from trocar.plots.axes import Axis, Frame, bottom_axis, bottom_title, left_axis, left_title, widest
from trocar.plots.figure import PAD_PX, Drawing, Figure, heading
from trocar.plots.glyphs import Markup, clip, columns, pad, shorten, visible, width_px
from trocar.plots.numbers import drawable, floats, show, widened
from trocar.plots.series import Line, Reference
from trocar.plots.shades import lines_text, range_text, sparkline
from trocar.plots.strokes import PENS, SWATCH_PX, area, band_swatch, dotted, pen, spots
from trocar.plots.table import Cell

_NAME_PX: Final = 240.0


@dataclass(frozen=True, repr=False)
class Lines(Figure):
    """Curves over one pair of axes.

    Attributes:
        series: at least one, at most 28.
        title: shown on top; empty for none.
        x_title: with its unit.
        y_title: with its unit.
        y_range: (lowest, highest) value shown; None fits the data, bands and references.
        references: lines across the plot.
        band_title: what the bands are, for the legend, for example "95 % bootstrap interval".

    Raises:
        ClientError: `bad_argument` for no series, too many, no point with a value, or an empty y_range.

    Example:
        Lines((Line("probe", (0, 1, 2), (0.5, 0.7, 0.9)),), "AUROC by layer", "layer", "AUROC").to_svg()
    """

    series: Sequence[Line]
    title: str
    x_title: str
    y_title: str
    y_range: tuple[float, float] | None = None
    references: Sequence[Reference] = ()
    band_title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "series", tuple(self.series))
        object.__setattr__(self, "references", tuple(self.references))
        if not 1 <= len(self.series) <= PENS:
            reason = f"{len(self.series)} series; 1 to {PENS} can be told apart"
            raise errors.refuse("bad_argument", "series", reason)
        if all(math.isnan(y) for line in self.series for y in line.y):
            raise errors.refuse("bad_argument", "series", "no point has a value, so there is nothing to draw")
        if self.y_range is not None:
            low, high = floats(self.y_range, "y_range")
            if not drawable(low, high):
                raise errors.refuse("bad_argument", "y_range", f"{low!r} is not below {high!r}")
            object.__setattr__(self, "y_range", (low, high))

    @property
    def _xs(self) -> list[float]:
        return [x for line in self.series for x in line.x]

    @property
    def _ys(self) -> list[float]:
        return [y for line in self.series for y in line.y if not math.isnan(y)]

    def summary(self) -> str:
        n = f"{len(self.series)} series" if len(self.series) > 1 else f"{len(self._xs)} points"
        over = f"{self.x_title or 'x'} {range_text(self._xs)}"
        return f"{n}, {self.y_title or 'y'} {range_text(self._ys)} over {over}"

    def to_table(self) -> list[dict[str, Cell]]:
        """One row per point: series, x, y, low and high (None without a band)."""
        rows: list[dict[str, Cell]] = []
        for line in self.series:
            for i, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
                low, high = line.band[i] if line.band else (None, None)
                rows.append({"series": line.name, "x": x, "y": y, "low": low, "high": high})
        return rows

    def to_text(self) -> str:
        wide = min(28, max(columns(visible(line.name)) for line in self.series))
        axis = self._y_axis(0, 1)
        rows, notes = [], []
        for line in self.series:
            spark, every = sparkline(line.y, axis.low, axis.high, 36)
            rows.append(f"{pad(line.name, wide)}  {spark}  {range_text(line.y)}")
            notes += [f"shown: every {every}. point of {clip(line.name, 60)}"] if every > 1 else []
        marks = [
            clip(f"{ref.name or 'reference'}: {ref.axis} = {show(ref.value)}", 96) for ref in self.references
        ]
        return lines_text(self.title, self.summary(), *rows, *marks, *notes)

    def _draw(self, width: float, key: str) -> Drawing:
        top = heading(self.title, width)
        legend = self._legend(width, top.height)
        frame = self._frame(width, legend.height + 8)
        x, y = self._x_axis(frame.left, frame.right), self._y_axis(frame.bottom, frame.top)
        title_px = 18 if self.x_title else 0
        note = self._note(frame.left, frame.bottom + 31 + title_px)
        whole = all(v == round(v) for v in self._xs)
        about_x = max(2, round((frame.right - frame.left) / 70))
        parts = [
            top.body,
            legend.body,
            left_axis(y, frame, y.ticks(5)),
            bottom_axis(x, frame, x.level_ticks(about_x, whole=whole), grid=False),
            self._inside(x, y, frame, key),
            left_title(self.y_title, frame),
            bottom_title(self.x_title, frame, frame.bottom + 31),
            note,
        ]
        return Drawing(svg.join(parts), frame.bottom + 24 + title_px + (16 if note else 0))

    def _frame(self, width: float, top: float) -> Frame:
        axis = self._y_axis(0, 1)
        labels = widest(axis.labels(axis.ticks(5)))
        left = PAD_PX + (18 if self.y_title else 0) + labels + 8
        return Frame(left, top, width - PAD_PX - 12, top + min(320.0, max(180.0, width * 0.42)))

    def _inside(self, x: Axis, y: Axis, frame: Frame, key: str) -> Markup:
        """References under bands under curves, all cut at the frame, then whole markers on top."""
        bands, strokes, marks = [], [], []
        for i, line in enumerate(self.series):
            look = pen(i, dashed=line.dashed)
            points = [(x.px(a), y.px(b)) for a, b in zip(line.x, line.y, strict=True)]
            edges = [
                (x.px(a), y.px(low), y.px(high)) for a, (low, high) in zip(line.x, line.band, strict=False)
            ]
            bands.append(area(edges, look))
            strokes.append(look.stroke(points))
            tips = [self._hover(line, k) for k in range(len(line.x))]
            marks.append(spots(points, tips, look, frame.top - 0.01, frame.bottom + 0.01))
        references = [_reference(ref, x, y, frame) for ref in self.references]
        cut = svg.group(*references, *bands, *strokes, clip_path=f"url(#{key}-clip)")
        return svg.join([_clipping(frame, key), cut, *marks])

    def _x_axis(self, start: float, end: float) -> Axis:
        values = self._xs + [ref.value for ref in self.references if ref.axis == "x"]
        return _around(values, 0.02, start, end)

    def _y_axis(self, start: float, end: float) -> Axis:
        if self.y_range is not None:
            return Axis(*self.y_range, start, end)
        edges = (edge for line in self.series for edge in chain(*line.band) if not math.isnan(edge))
        references = (ref.value for ref in self.references if ref.axis == "y")
        return _around([*self._ys, *edges, *references], 0.05, start, end)

    def _legend(self, width: float, top: float) -> Drawing:
        """Swatches and names in rows above the plot area."""
        entries = [
            (line.name, pen(i, dashed=line.dashed).swatch())
            for i, line in enumerate(self.series)
            if line.name
        ]
        entries += [(ref.name, dotted(0, 0, SWATCH_PX, 0)) for ref in self.references if ref.name]
        if self.band_title and any(line.band for line in self.series):
            entries.append((self.band_title, band_swatch()))
        x, y, parts = PAD_PX, top + 8, []
        for name, swatch in entries:
            shown = shorten(name, _NAME_PX, svg.SMALL_PX)
            wide = SWATCH_PX + 6 + width_px(shown, svg.SMALL_PX) + 16
            if x > PAD_PX and x + wide > width - PAD_PX:
                x, y = PAD_PX, y + 18
            place = f"translate({svg.coordinate(x)} {svg.coordinate(y)})"
            parts.append(svg.group(swatch, svg.words(shown, SWATCH_PX + 6, 0, full=name), transform=place))
            x += wide
        return Drawing(svg.join(parts), y + 10 if entries else top)

    def _hover(self, line: Line, k: int) -> list[str]:
        out = [line.name] if line.name else []
        out += [f"{self.x_title or 'x'} = {line.x[k]!r}", f"{self.y_title or 'y'} = {line.y[k]!r}"]
        if line.band:
            out.append(f"{self.band_title or 'band'}: {line.band[k][0]!r} to {line.band[k][1]!r}")
        return out

    def _note(self, x: float, y: float) -> Markup:
        low, high = self.y_range or (-math.inf, math.inf)
        outside = sum(not low <= v <= high for v in self._ys)
        text = f"{outside} of {len(self._ys)} points lie outside the vertical range shown"
        return svg.words(text, x, y, soft=True, size=10) if outside else Markup("")


def _around(values: Sequence[float], share: float, start: float, end: float) -> Axis:
    """An axis over all values with a margin, a share of their range, at both ends."""
    low, high = widened(min(values), max(values))
    margin = (high - low) * share
    return Axis(low - margin, high + margin, start, end)


def _reference(ref: Reference, x: Axis, y: Axis, frame: Frame) -> Markup:
    at = x.px(ref.value) if ref.axis == "x" else y.px(ref.value)
    ends = (at, frame.top, at, frame.bottom) if ref.axis == "x" else (frame.left, at, frame.right, at)
    return svg.group(svg.tip(f"{ref.name or 'reference'}: {ref.axis} = {ref.value!r}"), dotted(*ends))


def _clipping(frame: Frame, key: str) -> Markup:
    """The frame, a hair higher, so that a line on its edge keeps its full width."""
    width, height = frame.right - frame.left, frame.bottom - frame.top
    box = svg.node("rect", x=frame.left, y=frame.top - 1.5, width=width, height=height + 3)
    return svg.node("defs", svg.node("clipPath", box, id=f"{key}-clip"))

"""Curves in pixels: paths, markers, bands and legend swatches.

Works on points that are already in pixels, and knows nothing of axes or values. NaN in y lifts the pen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trocar.plots import svg
from trocar.plots.colours import SERIES
from trocar.plots.glyphs import Markup

SHAPES: Final = ("circle", "square", "diamond", "triangle")
PENS: Final = len(SERIES) * len(SHAPES)
"""Series that can be told apart: 7 colours and 4 markers have no common factor, so all 28 pairs occur."""

SWATCH_PX: Final = 26.0
_BAND: Final = 0.18
_CROWDED_PX: Final = 7.0
_CORNERS: Final = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
    "triangle": ((0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
}
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Pen:
    """How one series looks."""

    colour: str
    shape: str
    dashed: bool

    def stroke(self, points: Sequence[Point]) -> Markup:
        return svg.node(
            "path",
            d=path(points),
            fill="none",
            stroke=self.colour,
            stroke_width=2.0,
            stroke_linejoin="round",
            stroke_dasharray="6 4" if self.dashed else None,
        )

    def marker(self, x: float, y: float) -> Markup:
        return svg.node("path", d=_outline(self.shape, x, y), fill=self.colour)

    def swatch(self) -> Markup:
        """The legend's sample, starting at (0, 0)."""
        return svg.group(self.stroke([(0, 0), (SWATCH_PX, 0)]), self.marker(SWATCH_PX / 2, 0))


def pen(i: int, *, dashed: bool) -> Pen:
    """The look of the i-th series, 0 <= i < `PENS`."""
    return Pen(SERIES[i % len(SERIES)], SHAPES[i % len(SHAPES)], dashed)


def path(points: Sequence[Point]) -> str:
    """Path commands through the points, interrupted where y is NaN."""
    out, pen_up = [], True
    for x, y in points:
        if not math.isnan(y):
            out.append(f"{'M' if pen_up else 'L'}{svg.coordinate(x)} {svg.coordinate(y)}")
        pen_up = math.isnan(y)
    return " ".join(out)


def spots(
    points: Sequence[Point], tips: Sequence[Sequence[str]], look: Pen, top: float, bottom: float
) -> Markup:
    """Markers (left out where they would touch) and hover titles, for the points from top to bottom."""
    crowded = len(points) > 1 and abs(points[-1][0] - points[0][0]) / (len(points) - 1) < _CROWDED_PX
    out = []
    for k, (x, y) in enumerate(points):
        if not top <= y <= bottom:
            continue
        seen = [] if crowded and not _alone(points, k) else [look.marker(x, y)]
        # a wide invisible target makes the hover title easy to reach
        target = svg.node("circle", cx=x, cy=y, r=7.0, fill="none", pointer_events="all")
        out.append(svg.group(svg.tip(*tips[k]), *seen, target))
    return svg.join(out)


def _alone(points: Sequence[Point], k: int) -> bool:
    """Whether no line reaches this point, so that without a marker it would be invisible."""
    return all(math.isnan(y) for _, y in [*points[max(k - 1, 0) : k], *points[k + 1 : k + 2]])


def area(edges: Sequence[tuple[float, float, float]], look: Pen) -> Markup:
    """The band between (x, y_low, y_high), one closed path per stretch without NaN."""
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for x, low, high in edges:
        if math.isnan(low + high):
            stretches.append([])
        else:
            stretches[-1].append((x, low, high))
    closed = " ".join(_around(part) for part in stretches if part)
    return svg.node("path", d=closed, fill=look.colour, fill_opacity=_BAND) if closed else Markup("")


def _around(part: Sequence[tuple[float, float, float]]) -> str:
    return path([(x, high) for x, _, high in part] + [(x, low) for x, low, _ in reversed(part)]) + " Z"


def dotted(x1: float, y1: float, x2: float, y2: float) -> Markup:
    """A reference line."""
    return svg.line(x1, y1, x2, y2, opacity=0.7, stroke_dasharray="2 4")


def band_swatch() -> Markup:
    return svg.node("rect", x=2.0, y=-6.0, width=SWATCH_PX - 4, height=12.0, fill_opacity=_BAND)


def _outline(shape: str, x: float, y: float, r: float = 3.2) -> str:
    """Path of one marker centred on (x, y)."""
    if shape != "circle":
        return path([(x + r * a, y + r * b) for a, b in _CORNERS[shape]]) + " Z"
    size, wide = svg.coordinate(r), svg.coordinate(2 * r)
    start = f"M{svg.coordinate(x - r)} {svg.coordinate(y)}"
    return f"{start} a{size} {size} 0 1 0 {wide} 0 a{size} {size} 0 1 0 -{wide} 0 Z"

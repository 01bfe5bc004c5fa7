"""Colours: two continuous scales, one categorical palette, and black or white text on top of them.

The sequential scale was made for this project in OKLCH: lightness rises linearly from dark purple to yellow,
so equal steps of value look like equal steps of colour, also in grey. The diverging scale is red, near-white,
blue with mirrored lightness (RdBu as interpretability notebooks use it: red is negative, blue is positive).
Series use Okabe and Ito's palette (2008), which survives the common colour-vision deficiencies; its yellow
and black are left out because one vanishes on white and the other on dark backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from trocar import errors
from trocar.plots.numbers import drawable, floats, widened


class Rgb(NamedTuple):
    """A colour, 8 bits a channel."""

    red: int
    green: int
    blue: int

    @property
    def css(self) -> str:
        return f"#{self.red:02x}{self.green:02x}{self.blue:02x}"


def _stops(*codes: str) -> tuple[Rgb, ...]:
    return tuple(Rgb(*bytes.fromhex(code)) for code in codes)


SEQUENTIAL: Final = _stops(
    "350956",
    "362770",
    "314186",
    "1f5d95",
    "007899",
    "279196",
    "17ab97",
    "41c389",
    "7fd672",
    "bde45d",
    "f8ee4b",
)
DIVERGING: Final = _stops(
    "842a25",
    "ac473f",
    "d6645a",
    "e3978e",
    "eac8c3",
    "f5f5f5",
    "bed4eb",
    "80b3e7",
    "3b90e0",
    "1d6fb6",
    "004e8e",
)
SERIES: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor")
"""Okabe-Ito blue, vermillion, green, purple, orange, sky blue, then the colour of the text."""


def luminance(colour: Rgb) -> float:
    """Relative luminance, 0 to 1 (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink(background: Rgb) -> str:
    """Black or white, whichever contrasts more with the background."""
    light = luminance(background)
    return "#000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#fff"


@dataclass(frozen=True, slots=True)
class Scale:
    """A continuous colour scale over [low, high].

    Attributes:
        low: value of the first colour; a diverging scale has low == -high.
        high: value of the last colour.
        diverging: red to blue around 0, instead of dark to light.
        below: whether values lie under `low` and share its colour (drawn as a pointed end of the colour bar).
        above: whether values lie over `high` and share its colour.
    """

    low: float
    high: float
    diverging: bool
    below: bool
    above: bool

    @property
    def stops(self) -> tuple[Rgb, ...]:
        return DIVERGING if self.diverging else SEQUENTIAL

    def share(self, value: float) -> float:
        """Where the value lies between low (0) and high (1)."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def colour(self, value: float) -> Rgb:
        """Colour of a value; outside [low, high] it is that of the end, see `below` and `above`."""
        return self.at(self.share(value))

    def at(self, share: float) -> Rgb:
        """Colour at a share of the scale, 0 to 1."""
        place = share * (len(self.stops) - 1)
        i = min(int(place), len(self.stops) - 2)
        return Rgb(
            *(round(a + (b - a) * (place - i)) for a, b in zip(self.stops[i], self.stops[i + 1], strict=True))
        )


def fit_scale(values: Iterable[float], *, diverging: bool, vmin: float | None, vmax: float | None) -> Scale:
    """The scale for some values.

    Args:
        values: finite numbers or NaN; NaN is ignored.
        diverging: centre on 0 and reach equally far to both sides.
        vmin: value of the first colour, or None for the smallest value.
        vmax: value of the last colour, or None for the largest value.

    Raises:
        ClientError: `bad_argument` when nothing is to be drawn, when vmin >= vmax, or when a diverging
            scale is not given symmetric ends.
    """
    for name, end in (("vmin", vmin), ("vmax", vmax)):
        floats([] if end is None else [end], name)
    known = [v for v in values if not math.isnan(v)]
    if not known:
        raise errors.refuse("bad_argument", "values", "every value is NaN, so there is nothing to draw")
    low, high = _ends(min(known), max(known), diverging, vmin, vmax)
    if not drawable(low, high):
        raise errors.refuse("bad_argument", "vmin", f"vmin {low!r} is not below vmax {high!r}")
    return Scale(low, high, diverging, min(known) < low, max(known) > high)


def _ends(
    low: float, high: float, diverging: bool, vmin: float | None, vmax: float | None
) -> tuple[float, float]:
    if not diverging:
        low, high = widened(low, high)
        return (low if vmin is None else vmin), (high if vmax is None else vmax)
    if vmin is not None and vmax is not None and vmin != -vmax:
        raise errors.refuse(
            "bad_argument",
            "vmin",
            f"a diverging scale is centred on 0, so vmin must be {-vmax!r}, not {vmin!r}",
        )
    if vmin is not None:
        return vmin, -vmin
    if vmax is not None:
        return -vmax, vmax
    reach = max(abs(low), abs(high))
    return widened(-reach, reach)

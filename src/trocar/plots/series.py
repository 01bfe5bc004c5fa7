"""What a plot of curves is made of: one line with its confidence band, one reference value.

Plain checked values; how they are drawn is decided in `strokes` and `lines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trocar import errors
from trocar.plots.numbers import floats, same_length


@dataclass(frozen=True, slots=True)
class Line:
    """One series.

    Attributes:
        name: in the legend; empty for none.
        x: finite numbers, in drawing order.
        y: one per x; NaN interrupts the line.
        low: lower edge of the confidence band, one per x, together with `high`; NaN interrupts the band.
        high: upper edge of the confidence band.
        dashed: for controls and baselines.

    Raises:
        ClientError: `bad_argument` for unequal lengths, half a band, or low above high.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False

    def __post_init__(self) -> None:
        where = f"Line({self.name!r})"
        object.__setattr__(self, "x", floats(self.x, f"{where}.x"))
        if (self.low is None) != (self.high is None):
            raise errors.refuse("bad_argument", f"{where}.low", "a band needs both low and high")
        for name in ("y", "low", "high"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, floats(given, f"{where}.{name}", nan=True))
                same_length(f"{where}.{name}", len(getattr(self, name)), len(self.x), "x")
        for i, (low, high) in enumerate(self.band):
            if low > high:
                raise errors.refuse("bad_argument", f"{where}.low[{i}]", f"{low!r} is above high, {high!r}")

    @property
    def band(self) -> tuple[tuple[float, float], ...]:
        """(low, high) by point; empty without a band."""
        if self.low is None or self.high is None:
            return ()
        return tuple(zip(self.low, self.high, strict=True))


@dataclass(frozen=True, slots=True)
class Reference:
    """A dotted line across the plot at one value, such as chance or an unsteered baseline.

    Attributes:
        value: finite.
        name: in the legend; empty for none.
        axis: the axis that `value` is on; "y" draws a horizontal line.
    """

    value: float
    name: str
    axis: Literal["x", "y"] = "y"

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", floats([self.value], f"Reference({self.name!r})")[0])
        if self.axis not in {"x", "y"}:
            raise errors.refuse("bad_argument", "axis", f"{self.axis!r} is neither 'x' nor 'y'")

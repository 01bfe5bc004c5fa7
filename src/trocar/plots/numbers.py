"""Numbers for readers: how a value is written, where ticks go, and which values a figure accepts.

Values are written with four significant digits, a true minus sign, and powers of ten instead of `e+09`.
Nothing here knows about pixels or markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, SupportsFloat

from trocar import errors

_RAISED: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_HUGE, _TINY = 1e6, 1e-3
_LARGEST: Final = 1e300
_SMALLEST: Final = 1e-290
_NARROWEST: Final = 1e-9


def floats(values: Iterable[float], path: str, *, nan: bool = False) -> tuple[float, ...]:
    """The values as Python floats.

    Args:
        values: numbers (Python, numpy or anything with `__float__`), never text.
        path: the argument's name, for the refusal.
        nan: whether NaN, meaning "no value", is accepted. Infinities and sizes over 1e300 never are.

    Raises:
        ClientError: `bad_argument` for anything that is not such a number.
    """
    out = []
    for i, value in enumerate(values):
        if not isinstance(value, SupportsFloat):
            raise errors.refuse("bad_argument", f"{path}[{i}]", f"{value!r} is not a number")
        number = float(value)
        if abs(number) > _LARGEST or (math.isnan(number) and not nan):
            raise errors.refuse("bad_argument", f"{path}[{i}]", f"{number} cannot be drawn")
        out.append(number)
    return tuple(out)


def strings(values: Iterable[str], path: str) -> tuple[str, ...]:
    """The values as a tuple of text; refuses a bare string, which would become one label per character."""
    if isinstance(values, str):
        raise errors.refuse(
            "bad_argument", path, f"{values!r} is one string; a sequence of strings is needed"
        )
    out = tuple(values)
    for i, value in enumerate(out):
        if not isinstance(value, str):
            raise errors.refuse("bad_argument", f"{path}[{i}]", f"{value!r} is not a string")
    return out


def same_length(path: str, found: int, expected: int, what: str) -> None:
    """Refuses a sequence that does not match the one it belongs to."""
    if found != expected:
        raise errors.refuse("bad_argument", path, f"{found} items for {expected} {what}")


def drawable(low: float, high: float) -> bool:
    """Whether a range can be divided into ticks: low below high by more than rounding."""
    return high - low > max(_SMALLEST, _NARROWEST * max(abs(low), abs(high)))


def widened(low: float, high: float) -> tuple[float, float]:
    """The range, or one half as wide as its size to both sides when it is too narrow to draw."""
    if drawable(low, high):
        return low, high
    size = max(abs(low), abs(high))
    half = size / 2 if size > 1e-280 else 0.5
    return low - half, high + half


def show(value: float) -> str:
    """One value for a reader: `0.9731`, `−2`, `12,500`, `4×10⁹`; `–` for NaN."""
    if math.isnan(value):
        return "–"
    size = abs(value)
    if size and (size >= _HUGE or size < _TINY):
        return scientific(value)
    whole = value == round(value) or size >= 1000
    return minus(f"{value:,.0f}" if whole else f"{value:.4g}")


def scientific(value: float, decimals: int = 2) -> str:
    """The value as a power of ten without trailing zeros: `3.05×10⁵`, `10⁹`, `−2×10⁻⁷`."""
    digits, exponent = f"{value:.{decimals}e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(_RAISED)
    sign = "−" if digits.startswith("-") else ""
    digits = digits.lstrip("-")
    return sign + (power if digits == "1" else f"{digits}×{power}")


def minus(text: str) -> str:
    return text.replace("-", "−")


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> tuple[float, ...]:
    """Round values inside [low, high], roughly `about` of them: steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    steps = (power * k for k in (1, 2, 5, 10) if not whole or power * k >= 1)
    # when whole numbers are asked for and even steps of 10 are below 1, the step is 1
    step = min(steps, key=lambda s: abs((high - low) / s - about), default=1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{k * step:.15g}") for k in range(first, last + 1))


def tick_labels(values: Sequence[float]) -> tuple[str, ...]:
    """Labels with as many digits as tell neighbours apart, the same number of decimals each."""
    if len(values) < 2:
        return tuple(show(v) for v in values)
    step, size = min(b - a for a, b in pairwise(values)), max(map(abs, values))
    coarse = size >= _HUGE and step >= size / 200
    if coarse or size >= _HUGE * 1000 or size < _TINY:
        decimals = max(2, math.ceil(math.log10(size / step)))
        return tuple("0" if v == 0 else scientific(v, decimals) for v in values)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return tuple(minus(f"{v:,.{decimals}f}") for v in values)


def decades(low: float, high: float, most: int) -> tuple[float, ...]:
    """Powers of ten in [low, high], every one or every k-th so that at most `most` remain."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / most))
    return tuple(10.0**k for k in range(first, last + 1, stride))


def thinning(n: int, step_px: float, room_px: float) -> int:
    """Of `n` items `step_px` apart, every how-manieth (1, 2, 5, 10, ...) has `room_px` for a label."""
    steps = (base * int(10**power) for power in range(9) for base in (1, 2, 5))
    return next(k for k in steps if k * step_px >= room_px or k >= n)

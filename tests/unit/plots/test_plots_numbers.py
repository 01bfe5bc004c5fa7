"""Numbers, ticks and colours, checked against definitions written out here."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar import errors
from trocar.plots import colours, numbers, png
from trocar.plots.axes import Axis


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.97312, "0.9731"),
        (-2.0, "−2"),
        (12_500.0, "12,500"),
        (4e9, "4×10⁹"),
        (1e9, "10⁹"),
        (-2e-7, "−2×10⁻⁷"),
        (9.999e9, "10¹⁰"),
        (0.0, "0"),
        (math.nan, "–"),
        (1234.5, "1,234"),
    ],
)
def test_show(value: float, shown: str) -> None:
    assert numbers.show(value) == shown


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(1, 12), st.booleans())
def test_ticks_are_inside_even_and_few(low: float, span: float, about: int, whole: bool) -> None:
    high = low + span
    if not numbers.drawable(low, high):
        return
    found = numbers.ticks(low, high, about, whole=whole)
    slack = max((high - low) * 1e-6, 1e-8 if whole else 0.0)
    assert all(low - slack <= t <= high + slack for t in found)
    assert len(found) <= 2 * about + 2
    gaps = np.diff(found)
    if len(gaps) > 1:
        assert np.allclose(gaps, gaps[0], rtol=1e-4)
    if whole:
        assert all(t == round(t) for t in found)
    labels = numbers.tick_labels(found)
    assert len(set(labels)) == len(found)
    assert all(len(label) <= 24 for label in labels)


def test_ticks_of_a_probability() -> None:
    assert numbers.ticks(0.0, 1.0, 5) == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert numbers.tick_labels((0.0, 0.2, 1.0)) == ("0.0", "0.2", "1.0")
    assert numbers.decades(2e5, 3e10, 9) == (1e6, 1e7, 1e8, 1e9, 1e10)


def test_a_log_axis_puts_equal_ratios_at_equal_distances() -> None:
    axis = Axis(1e5, 1e10, 0, 500, log=True)
    assert [axis.px(10.0**k) for k in range(5, 11)] == pytest.approx([0, 100, 200, 300, 400, 500])


def test_labels_that_would_touch_are_thinned() -> None:
    wide = Axis(0, 1e9, 0, 600).level_ticks(6)
    narrow = Axis(0, 1e9, 0, 150).level_ticks(6)
    assert len(wide) > len(narrow) >= 1
    assert len(Axis(1e5, 9e5, 0, 30).level_ticks(6)) <= 1


@pytest.mark.parametrize("size", [0.0, 5e-324, 1e-285, 1.0, -7e200])
def test_a_flat_range_is_widened_around_its_value(size: float) -> None:
    low, high = numbers.widened(size, size)
    assert low < size < high
    assert numbers.drawable(low, high)
    assert numbers.widened(0.0, 2.0) == (0.0, 2.0)


def test_labels_of_very_large_and_very_close_ticks() -> None:
    assert numbers.tick_labels((0.0, 1e9, 2e9)) == ("0", "10⁹", "2×10⁹")
    assert numbers.tick_labels((0.0, 1e-5)) == ("0", "10⁻⁵")
    assert numbers.tick_labels((-0.5,)) == ("−0.5",)
    assert numbers.tick_labels((1_000_000.0, 1_000_100.0)) == ("1,000,000", "1,000,100")
    assert numbers.tick_labels((1e12, 1e12 + 1e6)) == ("10¹²", "1.000001×10¹²")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, "3", None, 1e308])
def test_values_that_cannot_be_drawn(bad: object) -> None:
    with pytest.raises(errors.ClientError) as caught:
        numbers.floats([1.0, bad], "values")  # type: ignore[list-item]
    assert caught.value.code == "bad_argument"
    assert caught.value.path == "values[1]"


def test_numpy_numbers_become_floats() -> None:
    found = numbers.floats(np.array([1, 2], dtype=np.float32), "values")
    assert found == (1.0, 2.0)
    assert all(type(v) is float for v in found)


def test_a_bare_string_is_not_a_list_of_labels() -> None:
    with pytest.raises(errors.ClientError, match="one string"):
        numbers.strings("abc", "names")


def _linear(colour: tuple[int, ...]) -> np.ndarray:
    c = np.array(colour) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lightness(colour: tuple[int, ...]) -> float:
    """CIE L*, from the definition."""
    y = float(_linear(colour) @ [0.2126, 0.7152, 0.0722])
    return 116 * (y ** (1 / 3) if y > 216 / 24389 else (24389 / 27 * y + 16) / 116) - 16


def test_the_sequential_scale_is_even_in_lightness() -> None:
    scale = colours.Scale(0, 1, diverging=False, below=False, above=False)
    steps = np.diff([_lightness(scale.at(k / 20)) for k in range(21)])
    assert steps.min() > 0
    assert steps.max() < 2 * steps.mean()
    assert steps.min() > 0.4 * steps.mean()


def test_the_diverging_scale_is_red_below_blue_above_and_mirrored() -> None:
    scale = colours.fit_scale([-1.0, 4.0], diverging=True, vmin=None, vmax=None)
    assert (scale.low, scale.high) == (-4.0, 4.0)
    assert scale.colour(-4).red > scale.colour(-4).blue
    assert scale.colour(4).blue > scale.colour(4).red
    centre = scale.colour(0)
    assert max(centre) - min(centre) <= 2
    for v in (1.0, 2.0, 4.0):
        assert _lightness(scale.colour(v)) == pytest.approx(_lightness(scale.colour(-v)), abs=6)


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_ink_has_the_better_contrast(colour: tuple[int, int, int]) -> None:
    y = float(_linear(colour) @ [0.2126, 0.7152, 0.0722])
    on_black, on_white = (y + 0.05) / 0.05, 1.05 / (y + 0.05)
    chosen = on_black if colours.ink(colours.Rgb(*colour)) == "#000" else on_white
    assert chosen >= max(on_black, on_white) - 1e-6
    assert chosen >= 4.5


def test_scale_ends() -> None:
    assert not colours.fit_scale([1.0, 2.0], diverging=False, vmin=None, vmax=None).above
    cut = colours.fit_scale([0.0, 9.0], diverging=False, vmin=1.0, vmax=5.0)
    assert (cut.below, cut.above) == (True, True)
    flat = colours.fit_scale([3.0, 3.0], diverging=False, vmin=None, vmax=None)
    assert flat.low < 3.0 < flat.high
    assert colours.fit_scale([0.0], diverging=True, vmin=None, vmax=None).high > 0
    assert colours.fit_scale([1.0], diverging=True, vmin=-3.0, vmax=None).high == 3.0


@pytest.mark.parametrize(
    ("values", "diverging", "vmin", "vmax", "path"),
    [
        ([math.nan], False, None, None, "values"),
        ([1.0], False, 2.0, 1.0, "vmin"),
        ([1.0], True, -1.0, 2.0, "vmin"),
        ([1.0], False, math.nan, None, "vmin[0]"),
        ([1.0], True, None, -1.0, "vmin"),
    ],
)
def test_scales_that_make_no_sense(
    values: list[float], diverging: bool, vmin: float | None, vmax: float | None, path: str
) -> None:
    with pytest.raises(errors.ClientError) as caught:
        colours.fit_scale(values, diverging=diverging, vmin=vmin, vmax=vmax)
    assert caught.value.path == path


def test_a_png_holds_the_pixels_it_was_given() -> None:
    pixels = bytes(range(48))
    raw = png.encode(4, 3, pixels)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        kind, data = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + length
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (4, 3, 8, 6, 0, 0, 0)
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == 3 * 17
    assert b"".join(rows[17 * r + 1 : 17 * (r + 1)] for r in range(3)) == pixels

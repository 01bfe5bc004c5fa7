"""Rows as few bits: what is packed comes back within half a step, in exactly the bytes that were counted."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trocar import errors
from trocar.wire import packing
from trocar.wire.packing import Packed, from_bytes, pack, packed_bytes, to_bytes, unpack

COARSE = st.sampled_from((4, 8, 16))
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 7)), elements=NUMBERS)


def least_scale(most: float) -> Fraction:
    """The smallest number of nine significant binary digits that is not below `most`, counted by hand."""
    if most == 0 or most < 2.0**-100:
        return Fraction(0)
    unit = Fraction(2) ** (math.frexp(most)[1] - 9)
    return -(-Fraction(most) // unit) * unit


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_a_scale_is_the_smallest_that_clips_nothing(rows: Any) -> None:
    for row, scale in zip(rows, packing.scale_of(rows), strict=True):
        assert Fraction(float(scale)) == least_scale(float(np.abs(row).max()))
        assert scale == 0 or np.abs(row).max() <= scale


@pytest.mark.parametrize("exact", [1.0, 511.0 / 256, 2.0**-99, 2.0**126])
def test_a_scale_is_exact_to_the_last_float(exact: float) -> None:
    """One float32 above a scale is above it already, one below is not."""
    above, below = (np.nextafter(np.float32(exact), np.float32(to)) for to in (np.inf, 0))
    found = packing.scale_of(np.array([[below], [exact], [above]], np.float32))
    assert [Fraction(float(x)) for x in found] == [least_scale(float(x)) for x in (below, exact, above)]
    assert found[0] == found[1] == exact < found[2]


@settings(max_examples=200, deadline=None)
@given(ROWS, COARSE)
def test_what_comes_back_is_the_nearest_step(rows: Any, bits: int) -> None:
    packed = pack(rows, bits)
    back = unpack(packed, rows.shape[1], bits)
    assert back.shape == rows.shape
    assert back.dtype == np.float32
    most = 2 ** (bits - 1) - 1
    for row, near, scale in zip(rows, back, packed.scales, strict=True):
        step = Fraction(float(scale)) / most
        for x, y in zip(row, near, strict=True):
            if step == 0:
                assert y == 0
                continue
            whole = round(Fraction(float(y)) / step)
            assert abs(whole) <= most
            assert y == np.float32(float(whole * step))  # nothing but the step and the scale is in it
            assert abs(Fraction(float(x)) - whole * step) <= step / 2 * (1 + Fraction(1, 10**9))


@settings(max_examples=100, deadline=None)
@given(ROWS, COARSE)
def test_packing_what_came_back_gives_it_again(rows: Any, bits: int) -> None:
    """At 16 bits the largest number may fall below a coarser scale: then it moves by a step at most."""
    back = unpack(pack(rows, bits), rows.shape[1], bits)
    again = unpack(pack(back, bits), rows.shape[1], bits)
    if bits == 16:
        steps = packing.scale_of(rows)[:, None] / (2**15 - 1)
        assert (np.abs(again - back) <= steps * 0.51).all()
    else:
        assert (again == back).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9), st.sampled_from(packing.WIDTHS))
def test_sizes_are_exact(n: int, width: int, bits: int) -> None:
    packed = pack(np.ones((n, width), np.float32), bits)
    assert len(packed.data) == n * packing.row_bytes(width, bits) == n * -(-width * bits // 8)
    assert packed.scales.shape == ((0,) if bits == 32 else (n,))
    assert unpack(packed, width, bits).shape == (n, width)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(1, 5)), elements=st.floats(width=32)))
def test_float32_is_itself(rows: Any) -> None:
    packed = pack(rows, 32)
    assert packed.data == rows.astype("<f4").tobytes()
    assert unpack(packed, rows.shape[1], 32).tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("row", "bits", "data", "scale"),
    [
        ([7, -7, 1], 4, "9701", 7.0),  # first in the low half; an odd row is padded with zeros
        ([0, 0, 0, 0], 4, "0000", 0.0),
        ([1, -1], 8, "7f81", 1.0),
        ([1, 0.5, -0.25], 8, "7f40e0", 1.0),  # 63.5 and -31.75: ties to even, to the nearest
        ([3, -1.5], 16, "ff7f00c0", 3.0),
        ([2.0**-101, -(2.0**-101)], 8, "0000", 0.0),
        ([2.0**-100, 0], 8, "7f00", 2.0**-100),
        ([-0.0, 1e-45], 16, "00000000", 0.0),
        ([257, 1], 8, "7f00", 257.0),
        ([513, 1], 8, "7f00", 514.0),  # ten digits are one too many: the scale is rounded up
        ([9.99e37, -9.99e37], 8, "7f81", 1.0002440668281492e38),
    ],
)
def test_by_hand(row: list[float], bits: int, data: str, scale: float) -> None:
    packed = pack(np.array([row], np.float32), bits)
    assert packed.data.hex() == data
    assert packed.scales.tolist() == [np.float32(scale)]


@pytest.mark.parametrize("bits", packing.WIDTHS)
def test_no_rows_are_no_bytes(bits: int) -> None:
    packed = pack(np.zeros((0, 3), np.float32), bits)
    assert (packed.data, len(packed.scales)) == (b"", 0)
    assert unpack(packed, 3, bits).shape == (0, 3)


def test_every_nibble_comes_back() -> None:
    row = np.arange(-7, 8, dtype=np.float32)[None]
    assert (unpack(pack(row, 4), 15, 4) == row).all()


def test_scales_work_over_any_shape() -> None:
    values = np.array([[[1, -2], [0, 0]]], np.float32)
    scales = packing.scale_of(values)
    assert scales.tolist() == [[2.0, 0.0]]
    steps = packing.to_steps(values, scales, 4)
    assert steps.tolist() == [[[4, -7], [0, 0]]]  # 3.5 is a tie
    assert packing.from_steps(steps, scales, 4).tolist() == [[[np.float32(8 / 7), -2], [0, 0]]]
    assert packing.scale_of(np.zeros((2, 0), np.float32)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bits", [0, 1, 5, 12, 31, 33, -8])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        pack(np.ones((1, 2), np.float32), bits)
    assert (caught.value.code, caught.value.path) == ("bad_bits", "bits")
    assert str(bits) in caught.value.reason
    with pytest.raises(errors.ServerFault, match="no rows of 2"):
        unpack(Packed(b"", np.zeros(0, np.float32)), 2, bits)


@pytest.mark.parametrize(
    ("data", "width", "bits"),
    [(b"abc", 4, 8), (b"abc", 3, 4), (b"abc", 1, 16), (b"a", 0, 8), (b"abc", 1, 32)],
)
def test_bytes_that_are_not_whole_rows_are_refused(data: bytes, width: int, bits: int) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        unpack(Packed(data, np.ones(3, np.float32)), width, bits)
    assert (caught.value.code, caught.value.path) == ("bad_bits", "data")
    assert f"{len(data)} bytes" in caught.value.reason


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from(packing.WIDTHS))
def test_bytes_have_the_declared_length_and_hold_all_of_it(rows: Any, bits: int) -> None:
    n, width = rows.shape
    packed = pack(rows, bits)
    raw = to_bytes(packed)
    assert len(raw) == packed_bytes(n, width, bits) == n * (-(-width * bits // 8) + (0 if bits == 32 else 2))
    back = from_bytes(raw, n, width, bits)
    assert (back.data, back.scales.tolist()) == (packed.data, packed.scales.tolist())
    assert to_bytes(pack(np.asfortranarray(rows), bits)) == raw


@settings(max_examples=200, deadline=None)
@given(ROWS, COARSE)
def test_a_code_times_its_step_is_the_number(rows: Any, bits: int) -> None:
    """What a reader of a file does who knows nothing of this module."""
    packed = pack(rows, bits)
    codes = packing.whole(packing.codes(packed, rows.shape[1], bits), rows.shape[1], bits)
    steps = packing.step_of(packed.scales, bits)
    assert steps.dtype == np.float32
    numbers = codes.astype(np.float32) * steps[:, None]
    assert numbers == pytest.approx(unpack(packed, rows.shape[1], bits), rel=1e-6, abs=0)
    assert (np.abs(numbers - rows)[packed.scales > 0] <= steps[packed.scales > 0][:, None] * 0.5001).all()


@settings(max_examples=100, deadline=None)
@given(ROWS, COARSE)
def test_a_row_is_packed_by_itself_and_signs_are_alike(rows: Any, bits: int) -> None:
    packed = pack(rows, bits)
    assert b"".join(pack(row[None], bits).data for row in rows) == packed.data
    width = rows.shape[1]
    assert (unpack(pack(-rows, bits), width, bits) == -unpack(packed, width, bits)).all()


@settings(max_examples=100, deadline=None)
@given(ROWS, COARSE)
def test_low_bits_of_the_numbers_do_not_leave(rows: Any, bits: int) -> None:
    """Numbers that differ by less than a float32 in the middle of a step give the same code or the next."""
    found = [
        packing.codes(pack(x, bits), rows.shape[1], bits) for x in (rows, np.nextafter(rows, np.float32(0)))
    ]
    one, other = (packing.whole(stored, rows.shape[1], bits) for stored in found)
    same = packing.scale_of(rows) == packing.scale_of(np.nextafter(rows, np.float32(0)))
    assert (np.abs(one - other)[same] <= 1).all()


def test_the_bytes_by_hand() -> None:
    packed = pack(np.array([[7, -7, 3.4], [0, 0, 0]], np.float32), 4)
    assert to_bytes(packed).hex() == "c0810000" + "97030000"  # 7.0 is 0x40e00000: its bits 15 to 30
    assert to_bytes(pack(np.array([[254, -2, 1.1]], np.float32), 8)).hex() == "fc86" + "7fff01"
    assert packing.codes(packed, 3, 4).tolist() == [[0x97, 0x03], [0, 0]]
    assert packing.step_of(packed.scales, 4).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38, -3.4e38])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_has_no_scale_is_refused(bad: float, bits: int) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        pack(np.array([[1.0, 2.0], [bad, 0.0]], np.float32), bits)
    assert caught.value.code == "rows_not_finite"


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("size", [9.9e37, 1e20, 1e-20, 1e-29])
def test_tiny_and_huge_rows_are_as_fine_as_others(size: float, bits: int) -> None:
    row = (np.array([[1.0, -0.5, 0.25]]) * size).astype(np.float32)
    back = unpack(pack(row, bits), 3, bits)
    assert back == pytest.approx(row, abs=size / (2**bits - 2) * 1.01)
    assert np.isfinite(back).all()


@pytest.mark.parametrize("bits", packing.WIDTHS)
def test_bytes_of_another_length_are_refused(bits: int) -> None:
    raw = to_bytes(pack(np.ones((2, 3), np.float32), bits))
    for damaged in (raw + b"x", raw[:-1], b""):
        with pytest.raises(errors.ServerFault) as caught:
            from_bytes(damaged, 2, 3, bits)
        assert caught.value.code == "bad_bits"
    with pytest.raises(errors.ServerFault):
        from_bytes(raw, 2, 3, 5)


def test_many_rows_are_packed_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    for bits in (4, 8, 16):
        whole = to_bytes(pack(rows, bits))
        for block in (1, 7, 11):
            monkeypatch.setattr(packing, "_BLOCK", block)
            assert to_bytes(pack(rows, bits)) == whole
        monkeypatch.undo()

"""Packed rows: the declared size, the declared error, and nothing in the bytes but scales and codes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trocar.errors import TrocarError
from trocar.gate.packing import pack, packed_bytes, parts, unpack

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
ROWS = hnp.arrays(np.float32, SHAPES, elements=st.floats(-400_000, 400_000, width=32))
BITS = st.sampled_from((4, 8))


@given(ROWS, BITS)
def test_size_and_error_are_as_declared(rows: Any, bits: int) -> None:
    raw = pack(rows, bits)
    assert len(raw) == packed_bytes(*rows.shape, bits) == len(rows) * (2 + -(-rows.shape[1] * bits // 8))
    back = unpack(raw, *rows.shape, bits)
    assert back.dtype == np.float32
    assert back.shape == rows.shape
    scales, codes = parts(raw, *rows.shape, bits)
    assert np.abs(codes.astype(int)).max() <= 2 ** (bits - 1) - 1
    slack = 1e-6 * np.abs(rows)  # of the float32 product
    assert (np.abs(back - rows) <= scales.astype(np.float64)[:, None] / 2 + slack).all()


@given(ROWS, BITS)
def test_a_scale_is_as_small_as_it_can_be(rows: Any, bits: int) -> None:
    scales, _ = parts(pack(rows, bits), *rows.shape, bits)
    needed = np.abs(rows).max(axis=1).astype(np.float64) / (2 ** (bits - 1) - 1)
    assert (scales.astype(np.float64) >= needed).all()
    below = np.nextafter(scales, np.float16(-1)).astype(np.float64)
    assert ((below < needed) | (scales == 0)).all()


@given(ROWS, BITS)
def test_the_bytes_follow_from_the_rows_alone(rows: Any, bits: int) -> None:
    raw = pack(rows, bits)
    assert pack(np.asfortranarray(rows), bits) == raw
    assert pack(rows.copy(), bits) == raw
    negated = unpack(pack(-rows, bits), *rows.shape, bits)
    assert (negated == -unpack(raw, *rows.shape, bits)).all()
    assert b"".join(pack(row[None], bits)[:2] for row in rows) == raw[: 2 * len(rows)]


@given(ROWS, BITS)
def test_low_bits_of_the_numbers_do_not_leave(rows: Any, bits: int) -> None:
    """Two rows that differ by less than the float32 in the middle of a step give the same bytes or one step."""
    other = np.nextafter(rows, np.float32(0)).astype(np.float32)
    a, b = (parts(pack(x, bits), *x.shape, bits)[1].astype(int) for x in (rows, other))
    assert np.abs(a - b).max() <= 1


def test_the_layout_by_hand() -> None:
    rows = np.array([[7.0, -7.0, 3.4], [0.0, 0.0, 0.0]], np.float32)
    assert pack(rows, 4) == struct.pack("<2e", 1.0, 0.0) + bytes([0x97, 0x03, 0x00, 0x00])
    rows = np.array([[254.0, -2.0, 1.1]], np.float32)
    assert pack(rows, 8) == struct.pack("<e3b", 2.0, 127, -1, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiny_numbers_are_not_clipped(bits: int) -> None:
    """Where float16 has few scales left, the scale is rounded up, not the number down."""
    rows = np.array([[1e-6, -3e-7], [1e-12, 0.0]], np.float32)
    back = unpack(pack(rows, bits), 2, 2, bits)
    scales, _ = parts(pack(rows, bits), 2, 2, bits)
    assert np.abs(back - rows)[0].max() <= float(scales[0]) / 2 * (1 + 1e-6)
    assert np.abs(back[0]).min() > 0
    assert back[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_has_no_scale_is_refused(bad: float, bits: int) -> None:
    with pytest.raises(TrocarError) as e:
        pack(np.array([[1.0, 2.0], [bad, 0.0]], np.float32), bits)
    assert e.value.code == "rows_not_finite"


def test_the_largest_row_that_has_a_scale() -> None:
    largest = np.float32(65504 * 127)
    assert unpack(pack(np.array([[largest]]), 8), 1, 1, 8) == largest


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (1, 1, 1)])
def test_only_rows_are_packed(shape: tuple[int, ...]) -> None:
    with pytest.raises(TrocarError) as e:
        pack(np.zeros(shape, np.float32), 8)
    assert e.value.code == "bad_value"


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 16, 32, -8])
def test_only_4_and_8_bits_exist(bits: int) -> None:
    for attempt in (lambda: pack(np.zeros((1, 1), np.float32), bits), lambda: packed_bytes(1, 1, bits)):
        with pytest.raises(TrocarError) as e:
            attempt()
        assert e.value.code == "bad_value"


@pytest.mark.parametrize("change", [b"", b"x" * 1])
def test_bytes_of_another_length_are_refused(change: bytes) -> None:
    raw = pack(np.ones((2, 3), np.float32), 8)
    damaged = raw + change if change else raw[:-1]
    with pytest.raises(TrocarError) as e:
        unpack(damaged, 2, 3, 8)
    assert e.value.code == "store_damaged"

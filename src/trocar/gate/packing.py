"""Rows of numbers as they leave: 4 or 8 bits a number, one float16 scale a row, a size known beforehand.

    scales: rows x float16, little-endian | codes: rows x ceil(width * bits / 8) bytes

A code is a whole number in [-7, 7] or [-127, 127]; a number is its code times its row's scale. A scale is
never rounded down, so no number is clipped and each is at most half a scale from what it was. Codes of 4 bits
stand two to a byte, the first in the low half. Rounding is the whole point: what reviewers look at, what is
charged and what leaves are these bytes, and nothing of the float32 numbers is in them but what they say.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors

WIDTHS: Final = (4, 8)
"""Bits of one number that may be asked for."""

SCALE_BYTES: Final = 2
_LARGEST: Final = float(np.finfo(np.float16).max)

Floats = npt.NDArray[np.float32]
Scales = npt.NDArray[np.float16]
Codes = npt.NDArray[np.int8]


def row_bytes(width: int, bits: int) -> int:
    """Bytes of the codes of one row of `width` numbers.

    Raises:
        ProgramError: `bad_value` for a number of bits that is not in `WIDTHS`.
    """
    if bits not in WIDTHS:
        raise errors.refuse("bad_value", "bits", f"a number leaves in 4 or 8 bits, not {bits!r}")
    return (width * bits + 7) // 8


def packed_bytes(rows: int, width: int, bits: int) -> int:
    """The exact length of `pack`'s answer, for `rows` rows of `width` numbers."""
    return rows * (SCALE_BYTES + row_bytes(width, bits))


def pack(values: Floats, bits: int) -> bytes:
    """Rounds and packs float32 numbers `[rows, width]`.

    Raises:
        ProgramError: `bad_value` for another shape, `rows_not_finite` for NaN, an infinity, or a number so
            large that its row has no float16 scale.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise errors.refuse("bad_value", "values", f"rows have two dimensions, not the shape {values.shape}")
    levels = _levels(bits)
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(axis=1)
    if not (largest <= _LARGEST * levels).all():  # also true for NaN
        reason = f"numbers must be finite and below {_LARGEST * levels:.3g}"
        raise errors.refuse("rows_not_finite", "values", reason)
    scales = _rounded_up(largest / levels)
    divisors = np.where(scales > 0, scales.astype(np.float64), 1.0)
    codes = np.rint(exact / divisors[:, None]).astype(np.int8)
    return scales.astype("<f2").tobytes() + _joined(codes, bits).tobytes()


def split(raw: bytes, rows: int, width: int, bits: int) -> tuple[Scales, npt.NDArray[Any]]:
    """The scales `[rows]` and the codes as they are stored, in what `pack` made; neither is copied.

    Returns:
        Codes of 8 bits as int8 `[rows, width]`, those of 4 bits as bytes `[rows, ceil(width / 2)]`.

    Raises:
        ServerFault: `store_damaged` when the length is not that of the shape.
    """
    if len(raw) != packed_bytes(rows, width, bits):
        raise errors.refuse("store_damaged", "", "packed rows do not have the length of their shape")
    scales = np.frombuffer(raw, "<f2", rows)
    stored = np.frombuffer(raw, np.uint8 if bits == 4 else np.int8, offset=rows * SCALE_BYTES)
    return scales, stored.reshape(rows, -1)


def parts(raw: bytes, rows: int, width: int, bits: int) -> tuple[Scales, Codes]:
    """The scales `[rows]` and the codes `[rows, width]` in what `pack` made.

    Raises:
        ServerFault: `store_damaged`.
    """
    scales, stored = split(raw, rows, width, bits)
    return scales, stored if bits == 8 else _nibbles(stored)[:, :width]


def unpack(raw: bytes, rows: int, width: int, bits: int) -> Floats:
    """The float32 numbers `[rows, width]` that packed bytes stand for."""
    scales, codes = parts(raw, rows, width, bits)
    return codes.astype(np.float32) * scales.astype(np.float32)[:, None]


def _levels(bits: int) -> int:
    row_bytes(1, bits)  # refuses another width
    return int(2 ** (bits - 1) - 1)


def _rounded_up(exact: npt.NDArray[np.float64]) -> Scales:
    """The smallest float16 not below each number."""
    near = exact.astype(np.float16)
    with np.errstate(over="ignore"):  # above the largest is an infinity, and is not taken
        above = np.nextafter(near, np.float16(np.inf))
    return np.where(near.astype(np.float64) < exact, above, near)


def _joined(codes: Codes, bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return codes.view(np.uint8)
    nibbles = codes.view(np.uint8) & np.uint8(0x0F)
    even = np.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)))
    pairs: npt.NDArray[np.uint8] = even[:, 0::2] | (even[:, 1::2] << np.uint8(4))
    return pairs


def _nibbles(stored: npt.NDArray[np.uint8]) -> Codes:
    apart = np.stack((stored & np.uint8(0x0F), stored >> np.uint8(4)), axis=2).reshape(len(stored), -1)
    # a nibble's sign is its highest bit: shift it to the byte's and back
    return (apart << np.uint8(4)).view(np.int8) >> np.int8(4)

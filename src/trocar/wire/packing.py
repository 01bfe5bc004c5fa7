"""Rows as few bits: whole numbers of 4, 8 or 16 bits with one scale per row, or float32 as they are.

    bytes: scales, rows x 16 bits | codes, rows x ceil(width * bits / 8) bytes; little-endian

A row's scale is its largest absolute number as a 16-bit float (8 exponent and 8 mantissa bits, rounded up), so a
packed row is exactly `width * bits + 16` bits of information and no number is clipped: each is at most half a step
from what it was. Codes of 4 bits stand two to a byte, the first in the low half. A number is its code times its
row's step, which is the scale over the largest code. Both ends of the wire and the airlock use this file: what is
looked at, what is charged and what a client unpacks are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors

F32 = npt.NDArray[np.float32]
WIDTHS: Final = (4, 8, 16, 32)
FLOAT_BITS: Final = 32
SCALE_BITS: Final = 16
LARGEST: Final = 1e38
"""Nothing that is rounded is larger: rounding up must not make an infinity."""
_SCALE_BYTES: Final = SCALE_BITS // 8
_DROP: Final = 24 - 1 - 8
_TINY: Final = np.float32(2.0**-100)
_BLOCK: Final = 1 << 20
"""Numbers that are rounded at once: in between they are eight bytes each."""
_STORED: Final = {4: "<u1", 8: "<i1", 16: "<i2", 32: "<f4"}


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows on their way.

    Attributes:
        data: codes, row after row.
        scales: float32 [rows]; empty for 32 bits.
    """

    data: bytes
    scales: F32


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one packed row's numbers; a row of 4-bit numbers is padded to whole bytes."""
    return (width * bits + 7) // 8


def packed_bytes(rows: int, width: int, bits: int) -> int:
    """The exact length of `to_bytes` of so many rows, scales included."""
    return rows * (row_bytes(width, bits) + (0 if bits == FLOAT_BITS else _SCALE_BYTES))


def scale_of(values: F32) -> F32:
    """The smallest 16-bit float that is no smaller than any absolute number, over the last axis; 0 for zeros."""
    most = np.abs(values).max(axis=-1, initial=0.0).astype(np.float32)
    raw = most.view(np.uint32)
    up = (raw + np.uint32((1 << _DROP) - 1)) & np.uint32(0xFFFFFFFF << _DROP & 0xFFFFFFFF)
    rounded = up.view(np.float32)
    return np.where(most < _TINY, np.float32(0.0), rounded).astype(np.float32)


def to_steps(values: F32, scale: F32, bits: int) -> npt.NDArray[np.int64]:
    """Whole numbers in [-(2^(bits-1) - 1), 2^(bits-1) - 1]: the nearest steps of `scale` [...] to values [..., n]."""
    safe = np.where(scale == 0, np.float32(1.0), scale).astype(np.float64)[..., None]
    steps = np.rint(values.astype(np.float64) / safe * _most(bits))
    steps[scale == 0] = 0
    return steps.astype(np.int64)


def from_steps(steps: npt.NDArray[np.int64], scale: F32, bits: int) -> F32:
    """Float32 [..., n] from whole numbers and scales [...]."""
    return (steps.astype(np.float64) * scale.astype(np.float64)[..., None] / _most(bits)).astype(np.float32)


def step_of(scale: F32, bits: int) -> F32:
    """What one step of each scale is worth, float32: a code times it is the number."""
    return (scale.astype(np.float64) / _most(bits)).astype(np.float32)


def pack(rows: F32, bits: int) -> Packed:
    """Packs float32 [N, D].

    Raises:
        ServerFault: `bad_bits`.
        ProgramError: `rows_not_finite` for NaN and numbers from 1e38 on, which have no scale; at 32 bits all pass.
    """
    _require_width(bits)
    if bits == FLOAT_BITS:
        return Packed(np.ascontiguousarray(rows, dtype="<f4").tobytes(), np.zeros(0, np.float32))
    if not (np.abs(rows) < LARGEST).all():  # also true for NaN
        raise errors.refuse("rows_not_finite", "values", f"numbers must be finite and below {LARGEST:g}")
    scales, each = scale_of(rows), max(1, _BLOCK // rows.shape[1])
    blocks = (slice(i, i + each) for i in range(0, len(rows), each))
    return Packed(b"".join(_stored(rows[block], scales[block], bits) for block in blocks), scales)


def unpack(packed: Packed, width: int, bits: int) -> F32:
    """Float32 [N, width] from packed rows.

    Raises:
        ServerFault: `bad_bits` when the bytes are not whole rows.
    """
    stored = codes(packed, width, bits)
    if bits == FLOAT_BITS:
        return stored.astype(np.float32)
    return from_steps(whole(stored, width, bits), packed.scales, bits)


def codes(packed: Packed, width: int, bits: int) -> npt.NDArray[Any]:
    """The codes as they are stored, without a copy: int8, int16 or float32 [N, width]; 4 bits as bytes.

    Raises:
        ServerFault: `bad_bits` when the bytes are not whole rows.
    """
    each = row_bytes(width, bits)
    n_rows = len(packed.data) // each if each else 0
    if bits not in WIDTHS or len(packed.data) != n_rows * each:
        reason = f"{len(packed.data)} bytes are no rows of {width} x {bits} bits"
        raise errors.refuse("bad_bits", "data", reason)
    stored = np.frombuffer(packed.data, _STORED[bits])
    return stored.reshape(n_rows, each if bits == 4 else width)


def whole(stored: npt.NDArray[Any], width: int, bits: int) -> npt.NDArray[np.int64]:
    """The codes [N, width] in what `codes` gives, or what a file holds."""
    return _halves(stored, width) if bits == 4 else stored.astype(np.int64)


def to_bytes(packed: Packed) -> bytes:
    """Packed rows as one string of bytes, the scales first, as 16 bits each."""
    return (packed.scales.view(np.uint32) >> np.uint32(_DROP)).astype("<u2").tobytes() + packed.data


def from_bytes(raw: bytes, rows: int, width: int, bits: int) -> Packed:
    """The other way.

    Raises:
        ServerFault: `bad_bits` when the length is not that of the shape.
    """
    if bits not in WIDTHS or len(raw) != packed_bytes(rows, width, bits):
        reason = f"{len(raw)} bytes are not {rows} rows of {width} x {bits} bits"
        raise errors.refuse("bad_bits", "data", reason)
    n_scales = 0 if bits == FLOAT_BITS else rows
    scales = np.frombuffer(raw, "<u2", n_scales).astype(np.uint32) << np.uint32(_DROP)
    return Packed(raw[n_scales * _SCALE_BYTES :], scales.view(np.float32))


def _most(bits: int) -> int:
    """The largest code."""
    return (1 << (bits - 1)) - 1


def _require_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise errors.refuse("bad_bits", "bits", f"rows leave with 4, 8, 16 or 32 bits per number, not {bits}")


def _stored(rows: F32, scales: F32, bits: int) -> bytes:
    steps = to_steps(rows, scales, bits)
    return (_nibbles(steps) if bits == 4 else steps.astype(_STORED[bits])).tobytes()


def _nibbles(steps: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    even = np.pad(steps, ((0, 0), (0, steps.shape[1] % 2))) & 15
    return (even[:, 0::2] | even[:, 1::2] << 4).astype(np.uint8)


def _halves(data: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.int64]:
    pairs = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), 2 * data.shape[1])
    both = pairs[:, :width].astype(np.int64)
    return np.where(both > 7, both - 16, both)

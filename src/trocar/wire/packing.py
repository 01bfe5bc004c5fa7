"""Rows as few bits: whole numbers of 4, 8 or 16 bits with one scale per row, or float32 as they are.

A row's scale is its largest absolute number as a 16-bit float (8 exponent and 8 mantissa bits, rounded up), so a
packed row is exactly `width * bits + 16` bits of information and no number is clipped. Both ends of the wire use
this file: what a client unpacks is what the gate charged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from trocar import errors

F32 = npt.NDArray[np.float32]
WIDTHS: Final = (4, 8, 16, 32)
FLOAT_BITS: Final = 32
SCALE_BITS: Final = 16
_DROP: Final = 24 - 1 - 8
_TINY: Final = np.float32(2.0**-100)


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows on their way.

    Attributes:
        data: row after row; 4-bit numbers two to a byte, the first in the low half; little-endian.
        scales: float32 [rows]; empty for 32 bits.
    """

    data: bytes
    scales: F32


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one packed row's numbers; a row of 4-bit numbers is padded to whole bytes."""
    return (width * bits + 7) // 8


def scale_of(values: F32) -> F32:
    """The smallest 16-bit float that is no smaller than any absolute number, over the last axis; 0 for zeros."""
    most = np.abs(values).max(axis=-1, initial=0.0).astype(np.float32)
    raw = most.view(np.uint32)
    up = (raw + np.uint32((1 << _DROP) - 1)) & np.uint32(0xFFFFFFFF << _DROP & 0xFFFFFFFF)
    rounded = up.view(np.float32)
    return np.where(most < _TINY, np.float32(0.0), rounded).astype(np.float32)


def to_steps(values: F32, scale: F32, bits: int) -> npt.NDArray[np.int64]:
    """Whole numbers in [-(2^(bits-1) - 1), 2^(bits-1) - 1]: the nearest steps of `scale` [...] to values [..., n]."""
    most = (1 << (bits - 1)) - 1
    safe = np.where(scale == 0, np.float32(1.0), scale).astype(np.float64)[..., None]
    steps = np.rint(values.astype(np.float64) / safe * most)
    steps[scale == 0] = 0
    return steps.astype(np.int64)


def from_steps(steps: npt.NDArray[np.int64], scale: F32, bits: int) -> F32:
    """Float32 [..., n] from whole numbers and scales [...]."""
    most = (1 << (bits - 1)) - 1
    return (steps.astype(np.float64) * scale.astype(np.float64)[..., None] / most).astype(np.float32)


def pack(rows: F32, bits: int) -> Packed:
    """Packs float32 [N, D].

    Raises:
        ServerFault: `bad_bits`.
    """
    if bits not in WIDTHS:
        raise errors.refuse("bad_bits", "bits", f"rows leave with 4, 8, 16 or 32 bits per number, not {bits}")
    if bits == FLOAT_BITS:
        return Packed(np.ascontiguousarray(rows, dtype="<f4").tobytes(), np.zeros(0, np.float32))
    scales = scale_of(rows)
    steps = to_steps(rows, scales, bits)
    if bits == 4:
        return Packed(_nibbles(steps).tobytes(), scales)
    return Packed(steps.astype("<i1" if bits == 8 else "<i2").tobytes(), scales)


def unpack(packed: Packed, width: int, bits: int) -> F32:
    """Float32 [N, width] from packed rows.

    Raises:
        ServerFault: `bad_bits` when the bytes are not whole rows.
    """
    each = row_bytes(width, bits)
    n_rows = len(packed.data) // each if each else 0
    if bits not in WIDTHS or len(packed.data) != n_rows * each:
        raise errors.refuse(
            "bad_bits", "data", f"{len(packed.data)} bytes are no rows of {width} x {bits} bits"
        )
    if bits == FLOAT_BITS:
        return np.frombuffer(packed.data, dtype="<f4").reshape(n_rows, width).astype(np.float32)
    if bits == 4:
        steps = _halves(np.frombuffer(packed.data, np.uint8).reshape(n_rows, each), width)
    else:
        kind = "<i1" if bits == 8 else "<i2"
        steps = np.frombuffer(packed.data, dtype=kind).reshape(n_rows, width).astype(np.int64)
    return from_steps(steps, packed.scales, bits)


def _nibbles(steps: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    even = np.pad(steps, ((0, 0), (0, steps.shape[1] % 2))) & 15
    return (even[:, 0::2] | even[:, 1::2] << 4).astype(np.uint8)


def _halves(data: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.int64]:
    both = (
        np.stack([data & 15, data >> 4], axis=-1)
        .reshape(len(data), 2 * data.shape[1])[:, :width]
        .astype(np.int64)
    )
    return np.where(both > 7, both - 16, both)

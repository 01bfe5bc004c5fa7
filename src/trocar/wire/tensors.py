"""Tensors on the network: one frame of JSON and safetensors, checked before anything is copied.

    b"TRCR" | version u8 | json length u32 big-endian | json | safetensors

A request without arrays is plain JSON. Frames carry at most `MAX_TENSORS` dense float vectors and matrices;
every other dtype, rank, NaN or infinity is refused. Nothing here can execute, and nothing is compressed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trocar import errors, strict

MEDIA_TYPE: Final = "application/vnd.trocar.frame"
MAGIC: Final = b"TRCR\x01"
MAX_TENSORS: Final = 256
MAX_WIDTH: Final = 1 << 17
MAX_ABS: Final = 1e6
_HEAD: Final = struct.Struct(">5sI")

Vectors = Mapping[str, npt.NDArray[np.float32]]


def pack(body: bytes, vectors: Vectors) -> bytes:
    """Makes a frame of UTF-8 JSON and named float32 arrays, `[width]` or `[rows, columns]`.

    Raises:
        BadRequest: `bad_tensor` or `not_finite`, with the vector's name.
    """
    for name, vector in vectors.items():
        _check_vector(name, vector)
    dense = {name: np.ascontiguousarray(v, dtype=np.float32) for name, v in vectors.items()}
    tail: bytes = save(dense)
    return _HEAD.pack(MAGIC, len(body)) + body + tail


def unpack(frame: bytes) -> tuple[bytes, dict[str, npt.NDArray[np.float32]]]:
    """Splits a frame into its JSON bytes and its arrays (float32, `[width]` or `[rows, columns]`).

    Raises:
        BadRequest: `bad_frame`, `bad_tensor`, `not_finite` or `too_large`.
    """
    if len(frame) < _HEAD.size or not frame.startswith(MAGIC):
        raise errors.refuse("bad_frame", "$", "the body does not start with a frame header")
    _, length = _HEAD.unpack_from(frame)
    end = _HEAD.size + length
    if end > len(frame):
        raise errors.refuse(
            "bad_frame", "$", f"the header promises {length} bytes of JSON, {len(frame) - _HEAD.size} follow"
        )
    return frame[_HEAD.size : end], _read_vectors(frame[end:])


def _read_vectors(raw: bytes) -> dict[str, npt.NDArray[np.float32]]:
    _check_header(raw)
    try:
        loaded: dict[str, Any] = load(raw)
    except SafetensorError as e:
        raise errors.refuse("bad_tensor", "tensors", f"not a safetensors block: {e}") from None
    out = {}
    for name, vector in loaded.items():
        _check_vector(name, vector)
        out[name] = vector.astype(np.float32)
    return out


def _check_header(raw: bytes) -> None:
    """Counts entries and dtypes from the header alone, before the library builds arrays."""
    if len(raw) < 8:
        raise errors.refuse("bad_tensor", "tensors", "the safetensors block is shorter than its header")
    length = int.from_bytes(raw[:8], "little")
    if length > min(len(raw) - 8, MAX_TENSORS * 512):
        raise errors.refuse("bad_tensor", "tensors", f"a safetensors header of {length} bytes")
    header = _header(raw[8 : 8 + length])
    if len(header) > MAX_TENSORS:
        raise errors.refuse("too_large", "tensors", f"a frame carries at most {MAX_TENSORS} tensors")
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in ("F32", "F16"):
            raise errors.refuse(
                "bad_tensor", f"tensors.{name[:64]}", "only dense F32 and F16 vectors are accepted"
            )


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = strict.read_json(raw, most_keys=4 * MAX_TENSORS)
    except errors.TrocarError as e:
        raise errors.refuse("bad_tensor", "tensors", f"the safetensors header: {e.reason}") from None
    if not isinstance(header, dict):
        raise errors.refuse("bad_tensor", "tensors", "the safetensors header is not a JSON object")
    return header


def _check_vector(name: str, vector: npt.NDArray[Any]) -> None:
    path = f"tensors.{name[:64]}"
    sizes_fit = all(0 < n <= MAX_WIDTH for n in vector.shape)
    if vector.ndim not in (1, 2) or not sizes_fit or vector.dtype.kind != "f":
        raise errors.refuse(
            "bad_tensor", path, f"{name[:64]!r} has shape {vector.shape} and dtype {vector.dtype}"
        )
    finite = np.isfinite(vector)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        index = where[0] if len(where) == 1 else list(where)
        raise errors.refuse("not_finite", path, f"{name[:64]!r} is {vector[where]} at index {index}")
    largest = float(np.abs(vector).max())
    if largest > MAX_ABS:
        raise errors.refuse(
            "bad_tensor", path, f"{name[:64]!r} has a number of size {largest:.3g}; the limit is {MAX_ABS:g}"
        )

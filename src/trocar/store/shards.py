"""The bytes of a vector shard: one safetensors file with one float32 tensor, `rows` [n, width].

The header is a function of (n, width) alone and is padded with spaces so that the data starts at 4 KiB, as
memory maps like it. A reader therefore compares the header with the one it expects, byte by byte, and never
parses one. Any safetensors reader opens these files.
"""

from __future__ import annotations

import json
import mmap
from typing import Final

import numpy as np
import numpy.typing as npt

from trocar.store.depot import damaged

Vectors = npt.NDArray[np.float32]
ITEM_BYTES: Final = 4
_PAGE_BYTES: Final = 4096


def header(n_rows: int, width: int) -> bytes:
    """The first bytes of a shard, up to its data."""
    row = {"dtype": "F32", "shape": [n_rows, width], "data_offsets": [0, n_rows * width * ITEM_BYTES]}
    text = json.dumps({"rows": row}, separators=(",", ":")).encode()
    padded = text.ljust(_PAGE_BYTES - 8)
    return len(padded).to_bytes(8, "little") + padded


def parts(vectors: Vectors) -> list[bytes | memoryview]:
    """Header and data of a shard holding `vectors` [n, width], little-endian, C order."""
    data = np.ascontiguousarray(vectors, dtype="<f4")
    return [header(*data.shape), data.data.cast("B")]


def view(mapped: mmap.mmap, n_rows: int, width: int, path: str) -> Vectors:
    """The rows of a mapped shard, [n, width], without copying; read-only.

    Raises:
        ServerFault: `store_damaged` when the header is not the one of such a shard.
    """
    start = header(n_rows, width)
    if mapped[: len(start)] != start or len(mapped) != len(start) + n_rows * width * ITEM_BYTES:
        raise damaged(f"{path} is not a shard of {n_rows} rows of width {width}")
    return np.frombuffer(mapped, dtype="<f4", offset=len(start)).reshape(n_rows, width)

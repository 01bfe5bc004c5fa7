"""The bytes of a vector shard: one safetensors file with one tensor, `rows` [n, width], F32, BF16 or F16.

The header is a function of (n, width, type) alone and is padded with spaces so that the data starts at 4 KiB, as
memory maps like it. A reader therefore compares the header with the one it expects, byte by byte, and never
parses one. Any safetensors reader opens these files.
"""

from __future__ import annotations

import json
from typing import Final, cast

import numpy as np

from trocar.store.dtypes import ITEM_BYTES, SAFETENSORS, Dtype, Words, words_of
from trocar.store.shelf import damaged

HEADER_BYTES: Final = 4096


def header(n_rows: int, width: int, dtype: Dtype) -> bytes:
    """The first bytes of a shard, up to its data."""
    size = n_rows * width * ITEM_BYTES[dtype]
    row = {"dtype": SAFETENSORS[dtype], "shape": [n_rows, width], "data_offsets": [0, size]}
    text = json.dumps({"rows": row}, separators=(",", ":")).encode()
    padded = text.ljust(HEADER_BYTES - 8)
    return len(padded).to_bytes(8, "little") + padded


def parts(words: Words, dtype: Dtype) -> list[bytes | memoryview]:
    """Header and data of a shard holding `words` [n, width], little-endian, C order."""
    data = np.ascontiguousarray(words, dtype=words_of(dtype))
    return [header(data.shape[0], data.shape[1], dtype), data.data.cast("B")]


def view(raw: bytes | memoryview, n_rows: int, width: int, dtype: Dtype, path: str) -> Words:
    """The rows of a whole shard, [n, width], without copying.

    Raises:
        ServerFault: `store_damaged` when the header is not the one of such a shard.
    """
    start, size = header(n_rows, width, dtype), n_rows * width * ITEM_BYTES[dtype]
    if raw[:HEADER_BYTES] != start or len(raw) != HEADER_BYTES + size:
        raise damaged(f"{path} is not a shard of {n_rows} rows of width {width} in {dtype}")
    rows = np.frombuffer(raw, dtype=words_of(dtype), offset=HEADER_BYTES).reshape(n_rows, width)
    return cast("Words", rows)

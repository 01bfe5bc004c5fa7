"""PNG files from raw pixels, for heatmaps too large to draw cell by cell.

Writes 8-bit RGBA without interlacing (PNG specification, third edition, sections 5 and 11). Reads nothing.
"""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from typing import Final

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def encode(width: int, height: int, rgba: bytes) -> bytes:
    """A PNG file.

    Args:
        width: columns of pixels.
        height: rows of pixels.
        rgba: 4 * width * height bytes, row by row from the top.
    """
    stride = 4 * width
    assert len(rgba) == stride * height, (len(rgba), width, height)
    # each row is preceded by its filter type; 0 is none
    rows = b"".join(b"\x00" + rgba[i : i + stride] for i in range(0, len(rgba), stride))
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return (
        _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 6)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_uri(png: bytes) -> str:
    """The file as a `data:` address, so that a figure stays one self-contained text."""
    return "data:image/png;base64," + b64encode(png).decode("ascii")

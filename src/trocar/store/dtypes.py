"""The numbers of a stored vector: float32, bfloat16 or float16 in the file, float32 for whoever reads.

Rounding is to the nearest, ties to even. A finite number that the narrower type would turn into an infinity is
refused; infinities and NaN stay what they are. Stored rows are arrays of 16- or 32-bit words here, and torch,
which is loaded when a 16-bit type is first used, converts them: numpy has no bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from trocar import errors

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
Vectors = npt.NDArray[np.float32]
Words = npt.NDArray[np.float32] | npt.NDArray[np.uint16]

SAFETENSORS: Final[dict[Dtype, str]] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES: Final[dict[Dtype, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
# The least finite float32 that rounds to an infinity: half a step above the largest number of the type.
_TOO_LARGE: Final = {"bfloat16": np.float32(255.5 * 2.0**120), "float16": np.float32(65_520)}


def require(text: str, path: str) -> Dtype:
    """`text` as one of the three types.

    Raises:
        ProgramError: `bad_value`, with the closest spelling.
    """
    if text not in get_args(Dtype):
        near = errors.closest(text, get_args(Dtype))
        raise errors.refuse("bad_value", path, f"{text!r} is not a type of stored numbers", closest=near)
    return cast("Dtype", text)


def words_of(dtype: Dtype) -> npt.DTypeLike:
    """The numpy type of a stored word, little-endian."""
    return "<f4" if dtype == "float32" else "<u2"


def empty(n_rows: int, width: int, dtype: Dtype) -> Words:
    """Room for that many stored rows."""
    shape = (n_rows, width)
    return np.empty(shape, np.float32) if dtype == "float32" else np.empty(shape, np.uint16)


def require_fits(vectors: Vectors, dtype: Dtype, path: str) -> None:
    """Refuses a finite number that would become an infinity (`bad_value`)."""
    if dtype == "float32" or not vectors.size:
        return
    least, largest = _tensor(np.require(vectors, requirements="W"), "float32").aminmax()
    limit = _TOO_LARGE[dtype]
    if -limit < float(least) and float(largest) < limit:
        return
    magnitude = np.abs(vectors)  # NaN or an infinity hides what lies below it
    over = np.isfinite(vectors) & (magnitude >= limit)
    if over.any():
        row = int(np.flatnonzero(over.any(axis=1))[0])
        reason = f"row {row} holds {vectors[row][over[row]][0]:.6g}, which {dtype} cannot hold"
        raise errors.refuse("bad_value", path, reason, next_step="Store these rows as float32.")


def encode(vectors: Vectors, dtype: Dtype, out: Words) -> None:
    """Rounds `vectors` into `out`, of the same shape."""
    if dtype == "float32":
        out[...] = vectors
    else:
        given = np.require(vectors, requirements="W")
        _tensor(out, dtype).copy_(_tensor(given, "float32"))


class Widening:
    """Widens rows of one array of words, block by block, into one buffer of float32."""

    def __init__(self, words: Words, dtype: Dtype, buffer: Vectors) -> None:
        self._buffer = buffer
        self._from, self._into = _tensor(words, dtype), _tensor(buffer, "float32")

    def rows(self, start: int, stop: int) -> Vectors:
        """The rows from `start` to `stop`, not included; valid until the next call."""
        n = stop - start
        self._into[:n].copy_(self._from[start:stop])
        return self._buffer[:n]


def decode(words: Words, dtype: Dtype, out: Vectors) -> None:
    """Widens `words` into `out`, of the same shape; every stored number is a float32."""
    if dtype == "float32":
        out[...] = words
    else:
        _tensor(out, "float32").copy_(_tensor(words, dtype))


def _tensor(array: npt.NDArray[Any], dtype: Dtype) -> torch.Tensor:
    """A tensor on the memory of `array`, which must be writable: torch knows no other memory."""
    import torch

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    return torch.from_numpy(array).view(kind)

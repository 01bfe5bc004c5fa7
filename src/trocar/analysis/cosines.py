"""Cosines between directions: how much two probes, features or differences of means say the same."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis.neighbours import unit
from trocar.analysis.source import Block

MAX_DIRECTIONS: Final = 4096


def cosines(directions: npt.NDArray[Any], others: npt.NDArray[Any] | None = None) -> Block:
    """float32 [m, k]: the cosine of each of m directions with each of k others, or with each other.

    Random directions of width D have cosines of about 1 / sqrt(D); residual streams are far from uniform, so
    compare with cosines between directions of the same site before calling two of them alike.

    Args:
        directions, others: float [m, D] and [k, D]; up to 4096 each.

    Raises:
        ProgramError: `width_mismatch`, `bad_value` for a vector of zeros.
        BadRequest: `not_finite`.
    """
    a = _units(directions, "directions")
    b = a if others is None else _units(others, "others")
    if a.shape[1] != b.shape[1]:
        reason = f"directions are {a.shape[1]} wide on one side and {b.shape[1]} on the other"
        raise errors.refuse("width_mismatch", "others", reason)
    out: Block = np.clip(a.astype(np.float64) @ b.T.astype(np.float64), -1, 1).astype(np.float32)
    return out


def _units(vectors: npt.NDArray[Any], path: str) -> Block:
    if vectors.ndim != 2:
        raise errors.refuse("width_mismatch", path, f"{path} have rank {vectors.ndim}, not 2")
    if not 1 <= len(vectors) <= MAX_DIRECTIONS:
        raise errors.refuse("bad_value", path, f"{len(vectors)} is not between 1 and {MAX_DIRECTIONS}")
    return unit(vectors.astype(np.float32), path)

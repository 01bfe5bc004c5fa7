"""What an attack brings home, how wrong it is, and how wrong it must be for the bits that were released.

The bound is Shannon's: n independent Gaussian weights, of which b bits are known, cannot be told with a relative
error below 2^(-b/n). Weights of trained models are not quite Gaussian, so the comparison leaves `TOLERANCE`.
The true weights are an argument here, from whoever scores; an attack never has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Upto = Literal["nothing", "mean", "rotation"]
TOLERANCE: Final = 0.05
CLOSE: Final = 0.1
_HALVINGS: Final = 200


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one matrix as an attack believes it to be.

    Attributes:
        matrix: its name, as the scorer knows it (`embed`, `unembed`, `mlp.down.0`).
        rows: which rows of the matrix the estimate's rows are.
        estimate: float64 [rows, columns], zero where nothing is known; with upto="rotation" an orthonormal
            basis [rows, rank] of what the columns span.
        known: of which entries the attack knows something, bool as `estimate`.
        upto: what the estimate leaves open: `mean` is the mean of every column over the rows, `rotation` an
            invertible map of the columns.
    """

    matrix: str
    rows: I64
    estimate: F64
    known: npt.NDArray[np.bool_]
    upto: Upto = "nothing"

    @classmethod
    def of(cls, matrix: str, rows: Sequence[int] | I64, values: F64, upto: Upto = "nothing") -> Piece:
        """From values with NaN where nothing is known."""
        known = np.isfinite(values)
        return cls(matrix, np.asarray(rows, dtype=np.int64), np.where(known, values, 0.0), known, upto)

    @classmethod
    def guessed(cls, matrix: str, rows: Sequence[int], values: F64, known: npt.NDArray[np.bool_]) -> Piece:
        """From values of which only some are determined and the others the best guess."""
        return cls(matrix, np.asarray(rows, dtype=np.int64), np.nan_to_num(values), known)


@dataclass(frozen=True, slots=True)
class Fact:
    """A public-looking number that an attack found out, such as a width."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Loot:
    """All that an attack brings home."""

    pieces: tuple[Piece, ...] = ()
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """How good a loot is.

    Attributes:
        attacked: weights that were aimed at.
        matrix: weights of the matrices that they are part of.
        recovered: weights known to a tenth of the matrix's root mean square.
        error: relative error over the attacked weights; 1 is a guess of zero.
        matrix_error: over the whole matrices.
        free: dimensions that the scorer fitted with the true weights in hand, because the loot leaves them open.
    """

    attacked: int
    matrix: int
    recovered: int
    error: float
    matrix_error: float
    free: int = 0

    def floor(self, bits: int) -> float:
        """Smallest relative error over the attacked weights that `bits` bits allow."""
        return floor(bits, self.attacked, self.free)

    def matrix_floor(self, bits: int) -> float:
        return floor(bits, self.matrix, self.free)

    def breaks(self, bits: int) -> bool:
        """Whether the loot is better than the released bits allow: a hole in the gate, or in this arithmetic."""
        pairs = ((self.error, self.floor(bits)), (self.matrix_error, self.matrix_floor(bits)))
        return self.attacked > 0 and any(error < (1.0 - TOLERANCE) * least for error, least in pairs)


def score(loot: Loot, truth: Mapping[str, F64], facts: Mapping[str, float]) -> Score:
    """Compares with the true weights, [rows, columns] by name; with pieces of several matrices, over all of them."""
    parts = [_parts(piece, truth[piece.matrix]) for piece in loot.pieces]
    if not parts:
        off = max((abs(f.value - facts[f.name]) / facts[f.name] for f in loot.facts), default=1.0)
        return Score(0, 0, 0, off, off)
    whole = {p.matrix: truth[p.matrix] for p in loot.pieces}
    missed, aimed = (sum(p[i] for p in parts) for i in (0, 1))
    norm = sum(float(np.sum(m**2)) for m in whole.values())
    return Score(
        attacked=sum(int(p[2]) for p in parts),
        matrix=sum(m.size for m in whole.values()),
        recovered=sum(int(p[3]) for p in parts),
        error=math.sqrt(missed / aimed),
        matrix_error=math.sqrt(max(0.0, norm - aimed + missed) / norm),
        free=sum(int(p[4]) for p in parts),
    )


def _parts(piece: Piece, truth_RC: F64) -> tuple[float, float, int, int, int]:
    """Squared error, squared norm of the attacked rows, weights attacked and recovered, dimensions left free."""
    aimed_RC = truth_RC[piece.rows]
    if piece.upto == "rotation":
        missed_RC = aimed_RC - piece.estimate @ (piece.estimate.T @ aimed_RC)
        free = piece.estimate.shape[1] * truth_RC.shape[1]
        return float(np.sum(missed_RC**2)), float(np.sum(aimed_RC**2)), aimed_RC.size, 0, free
    if piece.upto == "mean":
        aimed_RC = aimed_RC - aimed_RC.mean(axis=0)
    off_RC = piece.estimate - aimed_RC
    scale = CLOSE * math.sqrt(float(np.mean(truth_RC**2)))
    close = int(np.sum((np.abs(off_RC) < scale) & piece.known))
    return float(np.sum(off_RC**2)), float(np.sum(aimed_RC**2)), aimed_RC.size, close, 0


def floor(bits: int, weights: int, free: int = 0) -> float:
    """Smallest relative error over `weights` Gaussian weights of which `bits` bits are known.

    With `free` dimensions fitted afterwards the rest must be small by luck: the chance that a sum of k squares is
    x times its mean is at most (x e^(1-x))^(k/2), and 2^bits answers are 2^bits tries.
    """
    if weights <= 0 or free >= weights:
        return 0.0
    left = weights - free
    if free == 0:
        return float(2.0 ** (-bits / weights))
    wanted = 2.0 * bits * math.log(2.0) / left
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle > 0.0 and -math.log(middle) - (1.0 - middle) < wanted:
            high = middle
        else:
            low = middle
    return math.sqrt(high * left / weights)

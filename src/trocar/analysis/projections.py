"""Projections of rows on directions, and concepts followed through transcripts (Sofroniew et al. 2026).

Legend: N rows, D width, K directions, P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.neighbours import require_vectors, unit
from trocar.analysis.source import Block, Source

MAX_DIRECTIONS: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Attributes:
    scores: float32 [N, K].
    """

    scores: Block

    def numbers(self) -> list[dict[str, float]]:
        """The numbers of `NUMBERS["projection"]`, of each direction."""
        s = self.scores.astype(np.float64)
        columns = {
            "mean": s.mean(axis=0),
            "deviation": s.std(axis=0),
            "lowest": s.min(axis=0),
            "highest": s.max(axis=0),
        }
        return [{name: float(v[i]) for name, v in columns.items()} for i in range(s.shape[1])]


def project(
    source: Source,
    directions: npt.NDArray[Any],
    *,
    biases: npt.NDArray[Any] | None = None,
    normalise: bool = False,
) -> Projection:
    """Scores `rows @ directions.T + biases`, in one pass; the scores are in memory, the rows are not.

    Products are float64, so a large mean that the bias takes away costs no digits.

    Args:
        directions: float [K, D], weights of probes or directions; 1 to 1024.
        biases: float [K]; none when left out.
        normalise: directions of length 1 first: scores are then in units of the rows.

    Raises:
        ProgramError: `width_mismatch`, `bad_value`, `too_few_rows`, `rows_not_finite`.
        BadRequest: `not_finite`.
    """
    if directions.ndim != 2 or directions.shape[1] != source.width:
        reason = f"directions are {list(directions.shape)}, not [n, {source.width}]"
        raise errors.refuse("width_mismatch", "directions", reason)
    k = len(directions)
    if not 1 <= k <= MAX_DIRECTIONS:
        raise errors.refuse("bad_value", "directions", f"{k} is not between 1 and {MAX_DIRECTIONS}")
    if biases is not None and biases.shape != (k,):
        raise errors.refuse("width_mismatch", "biases", f"biases are {list(biases.shape)}, not [{k}]")
    if not len(source):
        raise errors.refuse("too_few_rows", "rows", "there are no rows")
    given = require_vectors(directions.astype(np.float32), "directions")
    given = unit(given, "directions") if normalise else given
    weights, start = given.T.astype(np.float64), 0
    shift = np.zeros(k) if biases is None else biases.astype(np.float64)
    scores = np.empty((len(source), k), dtype=np.float32)
    for block in streams.finite(source):
        scores[start : start + len(block)] = block.astype(np.float64) @ weights + shift
        start += len(block)
    return Projection(scores)


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """Scores in the order in which the tokens were read.

    Attributes:
        order: int64 [N], the row at each place: by prompt, then by position.
        prompts: [P], ascending; `starts`: int64 [P + 1], the first place of each prompt.
        scores: float32 [N, K]. `running`: their mean over the last `window` tokens of the same prompt, or over
            fewer at its start.
        prompt_mean, prompt_max: float32 [P, K].
    """

    order: Ints
    prompts: npt.NDArray[Any]
    starts: Ints
    scores: Block
    running: Block
    prompt_mean: Block
    prompt_max: Block


def track(
    scores: npt.NDArray[Any], prompt: npt.NDArray[Any], position: npt.NDArray[Any], *, window: int = 16
) -> Track:
    """Orders the scores of a projection by prompt and position and smooths them.

    Args:
        scores: float [N, K]. prompt, position: ints [N], in any order; no position twice in a prompt.
        window: tokens, 1 to 1,000,000.

    Raises:
        ProgramError: `rows_mismatch`, `too_few_rows`, `bad_value`.
    """
    n = len(scores)
    for name, column in (("prompt", prompt), ("position", position)):
        if len(column) != n:
            raise errors.refuse("rows_mismatch", name, f"{len(column)} for {n} scores")
    if n == 0:
        raise errors.refuse("too_few_rows", "rows", "there are no rows")
    if not 1 <= window <= 1_000_000:
        raise errors.refuse("bad_value", "window", f"{window!r} is not between 1 and 1000000")
    order = np.lexsort((position, prompt))
    p, at = prompt[order], position[order]
    if ((p[1:] == p[:-1]) & (at[1:] == at[:-1])).any():
        raise errors.refuse("bad_value", "position", "a prompt has the same position twice")
    ordered = np.asarray(scores[order], dtype=np.float64)
    first = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
    starts = np.append(first, n)
    mean = np.add.reduceat(ordered, first) / np.diff(starts)[:, None]
    top, running = np.maximum.reduceat(ordered, first), _running(ordered, starts, window)
    parts = (part.astype(np.float32) for part in (ordered, running, mean, top))
    return Track(order, p[first], starts, *parts)


def _running(scores: Floats, starts: Ints, window: int) -> Floats:
    """Means over the last `window` rows of the same stretch; sums begin anew in each, so errors do not travel."""
    out = np.empty_like(scores)
    for start, end in pairwise(starts):
        total = np.cumsum(scores[start:end], axis=0)
        total[window:] -= total[:-window].copy()
        out[start:end] = total / np.minimum(np.arange(1, end - start + 1), window)[:, None]
    return out

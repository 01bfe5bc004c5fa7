"""Nearest rows of given vectors, exactly, for all vectors in one scan.

Legend: Q queries, N rows, D width, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.labels import Ints
from trocar.analysis.source import Block, Source

Metric = Literal["cosine", "dot"]
METRICS: Final = ("cosine", "dot")
MAX_QUERIES: Final = 4096
MAX_K: Final = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The K best rows of each query, best first; among equal scores, the first row.

    Attributes:
        rows: int64 [Q, K], numbers of rows.
        scores: float32 [Q, K]; a cosine with a row of zeros is 0.
    """

    rows: Ints
    scores: Block


def nearest(
    source: Source,
    queries: npt.NDArray[Any],
    k: int,
    *,
    metric: Metric = "cosine",
    leave_out: Ints | None = None,
) -> Neighbours:
    """Exact search: one pass, in which each block is multiplied with all queries.

    Args:
        queries: float [Q, D], directions or rows; 1 to 4096 of them.
        k: 1 to 1000.
        metric: `dot` favours long rows; residual streams have some that are a hundred times longer than most.
        leave_out: int64 [Q], a row that may not be found by each query (its own); -1 for none.

    Raises:
        ProgramError: `width_mismatch`, `bad_value`, `not_finite`, `too_few_rows` for fewer rows than K,
            `rows_not_finite`.
    """
    given = _queries(source, queries, k, metric, leave_out)
    own = np.full(len(given), -1) if leave_out is None else leave_out
    best = np.full((len(given), k), -np.inf, dtype=np.float32)
    rows, start = np.full((len(given), k), -1, dtype=np.int64), 0
    for block in streams.finite(source):
        scores = given @ block.T
        if metric == "cosine":
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
            scores *= np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        here = np.flatnonzero((own >= start) & (own < start + len(block)))
        scores[here, own[here] - start] = -np.inf
        better = np.flatnonzero((scores > best[:, -1:]).any(axis=1))
        if len(better):
            numbers = np.broadcast_to(np.arange(start, start + len(block)), (len(better), len(block)))
            both = np.hstack([best[better], scores[better]])
            order = np.argsort(-both, axis=1, kind="stable")[
                :, :k
            ]  # earlier rows stand first, so they win ties
            best[better] = np.take_along_axis(both, order, axis=1)
            rows[better] = np.take_along_axis(np.hstack([rows[better], numbers]), order, axis=1)
        start += len(block)
    return Neighbours(rows, best)


def nearest_to_rows(source: Source, index: Ints, k: int, *, metric: Metric = "cosine") -> Neighbours:
    """The neighbours of rows with the numbers `index` [Q], themselves left out.

    Raises:
        ProgramError: as `nearest`, and `bad_value` for a number that no row has or a row of zeros.
    """
    return nearest(source, streams.rows_at(source, index), k, metric=metric, leave_out=index)


def _queries(source: Source, queries: npt.NDArray[Any], k: int, metric: str, leave_out: Ints | None) -> Block:
    if metric not in METRICS:
        near = errors.closest(str(metric), METRICS)
        raise errors.refuse("bad_value", "metric", f"{metric!r} is not a metric", closest=near)
    if queries.ndim != 2 or queries.shape[1] != source.width:
        reason = f"queries are {list(queries.shape)}, not [n, {source.width}]"
        raise errors.refuse("width_mismatch", "queries", reason)
    if not 1 <= len(queries) <= MAX_QUERIES:
        raise errors.refuse("bad_value", "queries", f"{len(queries)} is not between 1 and {MAX_QUERIES}")
    if not 1 <= k <= MAX_K:
        raise errors.refuse("bad_value", "k", f"{k!r} is not between 1 and {MAX_K}")
    if leave_out is not None and len(leave_out) != len(queries):
        reason = f"{len(leave_out)} rows to leave out for {len(queries)} queries"
        raise errors.refuse("bad_value", "leave_out", reason)
    if len(source) - (leave_out is not None) < k:
        raise errors.refuse("too_few_rows", "k", f"there are {len(source)} rows to find {k} in")
    given = queries.astype(np.float32)
    return unit(given, "queries") if metric == "cosine" else require_vectors(given, "queries")


def require_vectors(vectors: Block, path: str) -> Block:
    """Refuses with `not_finite` what cannot be multiplied."""
    if not (np.abs(vectors) <= streams.LARGEST).all():
        reason = f"a vector holds NaN, an infinity or a number beyond {streams.LARGEST:g}"
        raise errors.refuse("not_finite", path, reason)
    return vectors


def unit(vectors: Block, path: str) -> Block:
    """Vectors [n, D] of length 1.

    Raises:
        ProgramError: `bad_value` for a vector of zeros.
        BadRequest: `not_finite`.
    """
    lengths = np.linalg.norm(require_vectors(vectors, path).astype(np.float64), axis=1)
    if not (lengths > 0).all():
        empty = int(np.flatnonzero(lengths == 0)[0])
        raise errors.refuse("bad_value", f"{path}[{empty}]", "a vector of zeros has no direction")
    out: Block = (vectors / lengths[:, None]).astype(np.float32)
    return out

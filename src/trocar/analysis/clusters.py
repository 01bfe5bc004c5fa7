"""k-means over rows that stream by: seeded on a sample by scikit-learn, then exact passes over all rows.

A pass of Lloyd's algorithm (Lloyd 1982) needs only sums and counts per cluster, so it is the same whether
rows are in memory or not.

Legend: N rows, D width, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.moments import moments
from trocar.analysis.source import Block, Source

MAX_CLUSTERS: Final = 4096
SAMPLE_ROWS: Final = 16_384
SETTLED: Final = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """Centroids of k-means, largest cluster first.

    Attributes:
        centroids: float32 [K, D].
        sizes: int64 [K], rows that are nearest to each centroid; a later cluster wins no tie.
        inertia: sum of squared distances of all rows to their nearest centroid.
        explained: 1 minus inertia over the sum of squared distances to the mean of all rows.
        passes: over all rows, the last one counted.
        settled: whether the last pass lowered the inertia by less than 1e-4 of itself.
    """

    centroids: Block
    sizes: Ints
    inertia: float
    explained: float
    passes: int
    settled: bool

    def assign(self, source: Source) -> npt.NDArray[np.int32]:
        """The nearest centroid of each row: int32 [N], streamed.

        Raises:
            ProgramError: `width_mismatch`, `rows_not_finite`.
        """
        if source.width != self.centroids.shape[1]:
            reason = f"the centroids are {self.centroids.shape[1]} wide and the rows {source.width}"
            raise errors.refuse("width_mismatch", "rows", reason)
        found, start = np.empty(len(source), dtype=np.int32), 0
        nearest = _Nearest(self.centroids)
        for block in streams.finite(source):
            found[start : start + len(block)] = nearest.of(block)
            start += len(block)
        return found

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What stays behind."""
        return {"centroids": self.centroids}

    def numbers(self) -> dict[str, float]:
        """The numbers of `NUMBERS["kmeans"]`; `sizes` leaves beside them."""
        return {
            "inertia": self.inertia,
            "explained": self.explained,
            "smallest": float(self.sizes.min()),
            "largest": float(self.sizes.max()),
            "passes": float(self.passes),
            "settled": float(self.settled),
        }


class _Nearest:
    """Nearest of fixed centroids; distances run about the mean of the centroids, so offsets cost no digits."""

    def __init__(self, centroids: Block) -> None:
        self._centre = centroids.mean(axis=0)
        self._about = centroids - self._centre
        self._half = 0.5 * np.einsum("kd,kd->k", self._about, self._about)

    def of(self, block: Block) -> Ints:
        return np.asarray(np.argmax((block - self._centre) @ self._about.T - self._half, axis=1))


def kmeans(source: Source, clusters: int, *, seed: int = 0, restarts: int = 3, passes: int = 20) -> Clusters:
    """k-means by k-means++ (Arthur and Vassilvitskii 2007) on a sample, then exact passes over all rows.

    The sample (up to 16,384 rows, and a quarter of `streams.BUFFER_BYTES`) is clustered from `restarts` starts
    by scikit-learn; the best goes on over all rows until a pass lowers the inertia by less than 1e-4 of itself.
    A cluster that loses all its rows keeps its centroid. Memory: the sample and three times the centroids.

    Args:
        clusters: K, 1 to 4096.
        restarts: 1 to 100. passes: 1 to 1000.

    Raises:
        ProgramError: `bad_value`, `rows_not_finite`, `too_few_rows` when the sample has fewer than K
            different rows.
    """
    for name, value, top in (
        ("clusters", clusters, MAX_CLUSTERS),
        ("restarts", restarts, 100),
        ("passes", passes, 1000),
    ):
        if not 1 <= value <= top:
            raise errors.refuse("bad_value", name, f"{value!r} is not between 1 and {top}")
    if seed < 0:
        raise errors.refuse("bad_value", "seed", f"{seed!r} is negative")
    centroids = _start(source, clusters, seed, restarts)
    (every,) = moments(source, gram=False)
    inertia, settled, done = np.inf, False, 0
    while not settled and done < passes:
        sums, sizes, found = _pass(source, centroids, every.mean)
        done, settled, inertia = done + 1, inertia - found <= SETTLED * found, found
        if not settled and done < passes:
            centroids = _moved(centroids, sums, sizes, every.mean)
    order = np.argsort(-sizes, kind="stable")
    total = float(every.variance.sum()) * len(source)
    explained = 1 - inertia / total if total > 0 else 1.0
    return Clusters(centroids[order], sizes[order], inertia, explained, done, settled)


def _start(source: Source, clusters: int, seed: int, restarts: int) -> Block:
    most = max(clusters, min(SAMPLE_ROWS, streams.buffer_rows(source.width) // 4))
    rows = streams.rows_at(source, streams.sample(len(source), most, seed))
    different = len(np.unique(rows, axis=0))
    if different < clusters:
        reason = f"{len(rows)} rows were drawn, of which {different} differ; there are {clusters} clusters"
        raise errors.refuse(
            "too_few_rows", "rows", reason, next_step="Capture more rows, or ask for fewer clusters."
        )
    model = KMeans(clusters, n_init=restarts, random_state=seed, algorithm="lloyd").fit(rows)
    return np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)


def _pass(source: Source, centroids: Block, mean: Floats) -> tuple[Floats, Ints, float]:
    """Sums about the mean [K, D], sizes [K] and the inertia of an assignment to fixed centroids."""
    sums, sizes = np.zeros(centroids.shape), np.zeros(len(centroids), dtype=np.int64)
    nearest, inertia = _Nearest(centroids), 0.0
    for block in streams.finite(source):
        chosen = nearest.of(block)
        apart = block - centroids[chosen]
        inertia += float(np.einsum("nd,nd->", apart, apart, dtype=np.float64))
        sizes += np.bincount(chosen, minlength=len(centroids))
        order = np.argsort(chosen, kind="stable")
        present, first = np.unique(chosen[order], return_index=True)
        sums[present] += np.add.reduceat(block[order] - mean, first, axis=0)
    return sums, sizes, inertia


def _moved(centroids: Block, sums: Floats, sizes: Ints, mean: Floats) -> Block:
    means = sums / np.maximum(sizes, 1)[:, None] + mean
    return np.where(sizes[:, None] > 0, means, centroids).astype(np.float32)

"""Maps of rows in two dimensions, of which only places on a grid of 256 by 256 leave.

PCA (streamed, exact) or t-SNE (van der Maaten and Hinton 2008) of a sample, by scikit-learn, which is here
anyway; UMAP would bring a compiler with it. Places have no units: the grid spans the middle of the map, and
what lies beyond is drawn on its border and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from sklearn.manifold import TSNE

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.joined import Subset
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.moments import moments
from trocar.analysis.source import Block, Source

Method = Literal["pca", "tsne"]
METHODS: Final = ("pca", "tsne")
CELLS: Final = 256
MAX_POINTS: Final = 100_000
TSNE_POINTS: Final = 5_000
COMPONENTS: Final = 50
MARGIN: Final = 0.005


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Attributes:
    cells: uint8 [points, 2], place of each point from left to right and from bottom to top.
    rows: int64 [points], the row of each point, ascending.
    explained: share of the variance along the first and second principal component of all rows.
    outside: points that lie beyond the grid and are drawn on its border.
    """

    cells: npt.NDArray[np.uint8]
    rows: Ints
    explained: tuple[float, float]
    outside: int

    def numbers(self) -> dict[str, float]:
        """The numbers of `NUMBERS["map"]`; `cells` and `rows` leave beside them."""
        first, second = self.explained
        return {"explained_first": first, "explained_second": second, "outside": float(self.outside)}


def picture(
    source: Source, method: Method = "pca", *, points: int = 2000, perplexity: float = 30.0, seed: int = 0
) -> Picture:
    """A map of a sample of the rows.

    - `pca`: the first two principal components of all rows. A component points where its largest loading is
      positive.
    - `tsne`: of the sample alone, reduced to up to 50 principal components, from a PCA start. Distances between
      clusters and their sizes mean nothing (Wattenberg et al. 2016).

    The grid spans all but half a percent of the points at each side, per axis, so that a few rows of enormous
    norm do not squeeze the others into one cell.

    Args:
        points: drawn at random; 3 to 100,000, and up to 5,000 for t-SNE.
        perplexity: of t-SNE, 2 to a third of the points.

    Raises:
        ProgramError: `too_few_rows` for fewer than 3 rows or rows that are all equal, `width_mismatch`,
            `rows_not_finite`, `bad_value`.
    """
    n = min(points, len(source))
    _require(source, method, points, perplexity, n, seed)
    (every,) = moments(source)
    values, vectors = np.linalg.eigh(every.covariance)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    if not values[0] > 0:
        raise errors.refuse("too_few_rows", "rows", f"the {len(source)} rows are all equal")
    axes = vectors[:, : 2 if method == "pca" else COMPONENTS]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] >= 0, 1.0, -1.0)
    index = streams.sample(len(source), n, seed)
    places = _places(source, index, every.mean, axes)
    if method == "tsne":
        model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, method="barnes_hut", n_jobs=1)
        places = model.fit_transform(places.astype(np.float32)).astype(np.float64)
    cells, outside = _cells(places)
    share = values / values.sum()
    explained = float(share[0]), float(share[1]) if len(share) > 1 else 0.0
    return Picture(cells, index, explained, outside)


def _require(source: Source, method: str, points: int, perplexity: float, n: int, seed: int) -> None:
    if method not in METHODS:
        near = errors.closest(str(method), METHODS)
        raise errors.refuse("bad_value", "method", f"{method!r} is not a method", closest=near)
    most = MAX_POINTS if method == "pca" else TSNE_POINTS
    if not 3 <= points <= most:
        raise errors.refuse("bad_value", "points", f"{points!r} is not between 3 and {most}")
    if seed < 0:
        raise errors.refuse("bad_value", "seed", f"{seed!r} is negative")
    if len(source) < 3:
        raise errors.refuse("too_few_rows", "rows", f"a map needs 3 rows, not {len(source)}")
    if source.width < 2:
        raise errors.refuse("width_mismatch", "rows", "a map in two dimensions needs rows of width 2 or more")
    if method == "tsne" and not 2 <= perplexity <= n / 3:
        raise errors.refuse("bad_value", "perplexity", f"{perplexity!r} is not between 2 and {n / 3:g}")


def _places(source: Source, index: Ints, mean: Floats, axes: Floats) -> Floats:
    keep = np.zeros(len(source), dtype=bool)
    keep[index] = True
    out, start = np.empty((len(index), axes.shape[1])), 0
    for block in Subset(source, keep).blocks():
        out[start : start + len(block)] = (block - mean) @ axes
        start += len(block)
    return out


def _cells(places: Floats) -> tuple[npt.NDArray[np.uint8], int]:
    """Rounds to the grid: the middle of the points spans it, per axis."""
    low, high = np.quantile(places, [MARGIN, 1 - MARGIN], axis=0)
    span = np.where(high > low, high - low, 1.0)
    found = np.floor((places - low) / span * (CELLS - 1) + 0.5)
    outside = int(((found < 0) | (found > CELLS - 1)).any(axis=1).sum())
    return np.clip(found, 0, CELLS - 1).astype(np.uint8), outside


def counts(cells: npt.NDArray[np.uint8], of: Block | Ints | None = None) -> Ints:
    """Points in each cell, [256, 256]; of points where `of` is true, if given."""
    chosen = cells if of is None else cells[np.asarray(of, dtype=bool)]
    flat = chosen[:, 1].astype(np.int64) * CELLS + chosen[:, 0]
    return np.bincount(flat, minlength=CELLS * CELLS).reshape(CELLS, CELLS)

"""How well a dictionary describes rows, what its features do there, and the rows where each is strongest.

One pass each; held are sums per feature and the chosen rows' numbers, never rows. Token texts are joined by whoever
knows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.joined import Beside
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.source import Block, Source
from trocar.dictionaries.dictionary import Dictionary

NUMBERS: Final = ("rows", "fvu", "l0", "dead")
MOST_EXAMPLES: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """Of a dictionary on a source.

    Attributes:
        rows: how many there were.
        fvu: share of the variance, about the mean row, that reconstructions leave unexplained; 0 is perfect, 1 is
            as good as the mean, and worse is more.
        l0: active features per row, on average.
        dead: features that no row activates.
        density: float64 [features], share of rows in which each is active.
        mean: float64 [features], mean activation where it is active; 0 for dead ones.
        largest: float32 [features].
    """

    rows: int
    fvu: float
    l0: float
    dead: int
    density: Floats
    mean: Floats
    largest: npt.NDArray[np.float32]

    def numbers(self) -> dict[str, float]:
        """The numbers of `NUMBERS`."""
        return {"rows": float(self.rows), "fvu": self.fvu, "l0": self.l0, "dead": float(self.dead)}


def measure(dictionary: Dictionary, source: Source, target: Source | None = None) -> Measures:
    """Encodes and reconstructs every row.

    Args:
        target: the rows that a transcoder should give, the same tokens as `source`.

    Raises:
        ProgramError: `width_mismatch`, `rows_mismatch`, `rows_not_finite`, `too_few_rows` for rows that do not vary.
    """
    wanted = source if target is None else target
    dictionary.require(source)
    if wanted.width != dictionary.width_out:
        reason = f"the dictionary gives rows of width {dictionary.width_out}, not {wanted.width}"
        raise errors.refuse("width_mismatch", "target", reason)
    size = dictionary.features
    active, total = np.zeros(size, dtype=np.int64), np.zeros(size)
    largest = np.zeros(size, dtype=np.float32)
    spread, left = _Spread(wanted.width), 0.0
    for x, y in _pairs(source, target, dictionary.block_rows):
        acts, out = dictionary.both(x)
        active += np.count_nonzero(acts, axis=0)
        total += acts.sum(axis=0, dtype=np.float64)
        np.maximum(largest, acts.max(axis=0), out=largest)
        spread.add(y)
        left += float(np.square(out - y, dtype=np.float64).sum())
    variance = spread.total()
    if not variance > 0:
        raise errors.refuse("too_few_rows", "rows", f"the {len(source)} rows are all equal")
    return Measures(
        rows=len(source),
        fvu=left / variance,
        l0=float(active.sum()) / len(source),
        dead=int((active == 0).sum()),
        density=active / len(source),
        mean=np.divide(total, active, out=np.zeros(size), where=active > 0),
        largest=largest,
    )


def _pairs(source: Source, target: Source | None, most: int) -> Iterator[tuple[Block, Block]]:
    if target is None:
        yield from ((block, block) for block in streams.finite(source, most=most))
    else:
        for both in streams.finite(Beside(source, target), most=most):
            x = np.ascontiguousarray(both[:, : source.width])
            yield x, both[:, source.width :]


class _Spread:
    """The sum of squared distances from the mean, in float64, about the mean of the first block."""

    def __init__(self, width: int) -> None:
        self._pilot: Floats | None = None
        self._sum, self._square, self._rows = np.zeros(width), 0.0, 0

    def add(self, block: Block) -> None:
        if self._pilot is None:
            self._pilot = block.mean(axis=0, dtype=np.float64)
        away = block - self._pilot
        self._sum += away.sum(axis=0)
        self._square += float(np.square(away).sum())
        self._rows += len(block)

    def total(self) -> float:
        return max(self._square - float(self._sum @ self._sum) / max(self._rows, 1), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """The rows in which features are strongest.

    Attributes:
        features: int64 [f].
        rows: int64 [f, k], the strongest first, of equals the earlier; -1 where fewer rows activate the feature.
        values: float32 [f, k], the activations; 0 there.
    """

    features: Ints
    rows: Ints
    values: npt.NDArray[np.float32]


def top_examples(
    dictionary: Dictionary, source: Source, k: int = 16, features: Sequence[int] | Ints | None = None
) -> Examples:
    """Finds them in one pass.

    Args:
        k: rows of each feature, 1 to 256.
        features: their numbers; all when left out.

    Raises:
        ProgramError: `bad_value`, `width_mismatch`, `rows_not_finite`.
    """
    dictionary.require(source)
    if not 1 <= k <= MOST_EXAMPLES:
        raise errors.refuse("bad_value", "k", f"{k!r} is not between 1 and {MOST_EXAMPLES}")
    chosen = np.arange(dictionary.features) if features is None else np.asarray(features, dtype=np.int64)
    outside = chosen[(chosen < 0) | (chosen >= dictionary.features)]
    if len(outside):
        reason = f"there is no feature {outside[0]}: they run to {dictionary.features - 1}"
        raise errors.refuse("bad_value", "features", reason)
    best = np.zeros((len(chosen), k), dtype=np.float32)
    rows, start = np.full((len(chosen), k), -1, dtype=np.int64), 0
    for block in streams.finite(source, most=dictionary.block_rows):
        acts = dictionary.encode(block)[:, chosen].T
        better = np.flatnonzero((acts > best[:, -1:]).any(axis=1))
        numbers = np.broadcast_to(np.arange(start, start + len(block)), (len(better), len(block)))
        both = np.hstack([best[better], acts[better]])
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]  # earlier rows stand first, so they win ties
        best[better] = np.take_along_axis(both, order, axis=1)
        rows[better] = np.take_along_axis(np.hstack([rows[better], numbers]), order, axis=1)
        start += len(block)
    return Examples(chosen, rows, best)

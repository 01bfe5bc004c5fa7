"""One pass over the rows for any number of logistic objectives at once: their losses and gradients.

The rows are read once and multiplied with the weights of all the probes together, so a hundred probes cost little more
than the products. Standardisation is folded into the weights by who calls; what is made here is plain sums of log
losses, without penalties. Sums over shards add up: `Sharded` is the same objective over many sources.

Shapes: K probes of C columns (1 for two classes), d features, n rows, blocks of b rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from trocar.analysis.labels import Floats, Ints
from trocar.analysis.moments import Precision
from trocar.analysis.source import BLOCK_ROWS, Block, Source
from trocar.analysis.standard import Far

Array = npt.NDArray[Any]
Signs = npt.NDArray[np.int8]
_FEW: Final = 3
"""Up to so many columns, one product with a vector each is faster than a product of matrices."""

NONE_FAR: Final = Far(np.empty(0, dtype=np.int64), np.empty(0))


@dataclass(frozen=True, slots=True, eq=False)
class Slope:
    """Sum of losses [K], and its gradient by raw weights [K, C, d] and by bias [K, C]."""

    loss: Floats
    weights: Floats
    bias: Floats

    def plus(self, other: Slope) -> Slope:
        return Slope(self.loss + other.loss, self.weights + other.weights, self.bias + other.bias)


class Objective(Protocol):
    """K sums of losses over rows."""

    @property
    def probes(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def at(self, chosen: Ints, weights: Floats, bias: Floats) -> Slope:
        """One pass for the probes `chosen` [k], with raw weights [k, C, d] and bias [k, C]."""
        ...


class Scores:
    """Blocks of scores `weights @ x + bias`, [k, b], and of rows, in order; buffers are reused.

    Args of the constructor:
        far: features to be centred first.
    """

    def __init__(self, source: Source, precision: Precision, far: Far = NONE_FAR) -> None:
        self._source, self._dtype, self._far = source, np.dtype(precision), far
        self._centre = far.centre.astype(self._dtype)
        self._room = np.empty((BLOCK_ROWS, source.width), self._dtype)

    def blocks(self, weights: Floats, bias: Floats) -> Iterator[tuple[slice, Array, Array, Array]]:
        """Rows covered, the rows [b, d], those of their features that are far [b, f], centred, and scores [k, b]."""
        columns = self._far.columns
        far_weights = weights[:, columns]
        w, far_w = weights.astype(self._dtype), far_weights.astype(self._dtype)
        w[:, columns] = 0
        c = (bias + far_weights @ self._far.centre).astype(self._dtype)[:, None]
        scores = np.empty((len(w), BLOCK_ROWS), self._dtype)
        row = 0
        for block in self._source.blocks(BLOCK_ROWS):
            x = self._cast(block)
            out = scores[:, : len(x)]
            if len(w) <= _FEW:
                for line, vector in zip(out, w, strict=True):
                    np.matmul(x, vector, out=line)
            else:
                out = scores.reshape(-1)[: len(w) * len(x)].reshape(len(w), len(x))
                np.matmul(w, x.T, out=out)
            centred = x[:, columns] - self._centre
            if len(columns):
                out += far_w @ centred.T
            out += c
            yield slice(row, row + len(x)), x, centred, out
            row += len(x)

    def _cast(self, block: Block) -> Array:
        if block.dtype == self._dtype:
            return block
        room = self._room[: len(block)]
        np.copyto(room, block)
        return room

    def gradient(self, residual: Array, x: Array, centred: Array) -> Floats:
        """`residual @ x` for residuals [k, b]; of features that are far, about their centre."""
        few = len(residual) <= _FEW
        products = np.stack([line @ x for line in residual]) if few else residual @ x
        out: Floats = products.astype(np.float64)
        if len(self._far.columns):
            out[:, self._far.columns] = residual @ centred
        return out

    def raw(self, gradient: Floats, by_bias: Floats) -> Floats:
        """The gradient by raw weights [k, d], from the sum of `gradient` and that by bias [k]."""
        gradient[:, self._far.columns] += by_bias[:, None] * self._far.centre
        return gradient


class Binary:
    """K two-class objectives: the sum over rows of log(1 + exp(-sign * score)).

    Args:
        signs: int8 [K, n]; +1 and -1 are the classes, 0 leaves a row out.
        class_weights: [K, 2], what a row of the lower and of the upper class counts.
    """

    columns = 1

    def __init__(
        self,
        source: Source,
        signs: Signs,
        precision: Precision,
        class_weights: Floats | None = None,
        far: Far = NONE_FAR,
    ) -> None:
        self._scores, self._signs, self._dtype = Scores(source, precision, far), signs, np.dtype(precision)
        self._weights = class_weights
        self._idle = (signs == 0).sum(axis=1)

    @property
    def probes(self) -> int:
        return len(self._signs)

    def at(self, chosen: Ints, weights: Floats, bias: Floats) -> Slope:
        k, _, d = weights.shape
        loss, by_weight, by_bias = np.zeros((2, k)), np.zeros((k, d)), np.zeros(k)
        whole = len(chosen) == len(self._signs)
        signs = self._signs if whole else self._signs[chosen]
        uneven = None if self._weights is None else self._weights[chosen]
        for here, x, centred, scores in self._scores.blocks(weights[:, 0], bias[:, 0]):
            sign = signs[:, here].astype(self._dtype)
            residual = self._losses(scores, sign, loss, uneven)
            by_weight += self._scores.gradient(residual, x, centred)
            by_bias += residual.sum(axis=1)
        total = loss[0] - self._idle[chosen] * np.log(2.0)
        if uneven is not None:
            total = uneven[:, 0] * (total - loss[1]) + uneven[:, 1] * loss[1]
        return Slope(total, self._scores.raw(by_weight, by_bias)[:, None], by_bias[:, None])

    def _losses(self, scores: Array, sign: Array, loss: Floats, uneven: Floats | None) -> Array:
        """Adds up the losses of all rows and of the upper class; gives their derivatives by the score.

        The logarithms of up to 512 factors between 1 and 2 are the logarithm of their product.
        """
        margin = scores * sign
        small = np.exp(-np.abs(margin))
        linear = np.minimum(margin, self._dtype.type(0))
        factors = np.add(small, 1.0, dtype=np.float64)
        loss[0] += np.log(np.multiply.reduce(factors, axis=1)) - linear.sum(axis=1)
        if uneven is not None:
            upper = sign > 0
            factors[~upper] = 1.0
            loss[1] += np.log(np.multiply.reduce(factors, axis=1)) - (linear * upper).sum(axis=1)
        wrong = np.maximum(small, (margin <= 0).astype(self._dtype))  # exp(-margin) or 1, over 1 + small
        small += 1
        wrong /= small
        wrong *= sign
        if uneven is not None:
            wrong *= np.where(sign > 0, uneven[:, 1:], uneven[:, :1]).astype(self._dtype)
        np.negative(wrong, out=wrong)
        residual: Array = wrong
        return residual


class Softmax:
    """K objectives of C classes: the sum over rows of -log softmax(scores)[class].

    Args:
        classes: [K, n], from 0 to C - 1; -1 leaves a row out.
        class_weights: [K, C], what a row of each class counts.
    """

    def __init__(
        self,
        source: Source,
        classes: npt.NDArray[np.int16],
        columns: int,
        precision: Precision,
        class_weights: Floats | None = None,
        far: Far = NONE_FAR,
    ) -> None:
        self._scores, self._classes, self.columns = Scores(source, precision, far), classes, columns
        self._dtype = np.dtype(precision)
        weights = np.ones((len(classes), columns)) if class_weights is None else class_weights
        self._weights = np.hstack([weights, np.zeros((len(classes), 1))])  # the class -1 counts nothing

    @property
    def probes(self) -> int:
        return len(self._classes)

    def at(self, chosen: Ints, weights: Floats, bias: Floats) -> Slope:
        k, c, d = weights.shape
        loss, by_weight, by_bias = np.zeros(k), np.zeros((k * c, d)), np.zeros(k * c)
        counts = self._weights[chosen]
        which = np.arange(k)[:, None]
        for here, x, centred, flat in self._scores.blocks(weights.reshape(k * c, d), bias.reshape(k * c)):
            label = self._classes[chosen, here].astype(np.int64)
            weight = counts[which, label]
            scores = flat.reshape(k, c, -1)
            scores -= scores.max(axis=1, keepdims=True)
            own = np.take_along_axis(scores, np.maximum(label, 0)[:, None], axis=1)[:, 0]
            p = np.exp(scores)
            total = p.sum(axis=1)
            loss += (weight * (np.log(total) - own)).sum(axis=1)
            p /= total[:, None]
            p[which, np.maximum(label, 0), np.arange(len(x))] -= 1
            p *= weight[:, None].astype(self._dtype)
            residual = p.reshape(k * c, -1)
            by_weight += self._scores.gradient(residual, x, centred)
            by_bias += residual.sum(axis=1)
        by_weight = self._scores.raw(by_weight, by_bias)
        return Slope(loss, by_weight.reshape(k, c, d), by_bias.reshape(k, c))


@dataclass(frozen=True, slots=True, eq=False)
class Sharded:
    """The objective over all rows, of parts that each have some of them.

    Attributes:
        each: applies a function to the parts, `map` or that of a pool of workers; the order of its results is kept.
    """

    parts: Sequence[Objective]
    each: Callable[[Callable[[Objective], Slope], Sequence[Objective]], Iterable[Slope]] = map

    @property
    def probes(self) -> int:
        return self.parts[0].probes

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    def at(self, chosen: Ints, weights: Floats, bias: Floats) -> Slope:
        return reduce(Slope.plus, self.each(lambda part: part.at(chosen, weights, bias), self.parts))

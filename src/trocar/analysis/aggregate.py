"""Running aggregates over the rows of many prompts: mean, maximum and attention, one block at a time.

What is kept per prompt and head is a count, a sum, a maximum, or the three numbers of a softmax computed
online (Milakov and Gimelshein 2018). A prompt may be cut anywhere, between blocks or between tokens as they
are generated: the totals are the same.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis.labels import Floats, Ints
from trocar.analysis.source import Block

How = Literal["mean", "max", "attention", "multimax"]
HOW: Final[tuple[How, ...]] = ("mean", "max", "attention", "multimax")


def starts_of(prompt: npt.NDArray[Any], n: int) -> Ints:
    """First row of each prompt, and `n` at the end: int64 [P + 1].

    Raises:
        ProgramError: `rows_mismatch` unless there is a prompt for each of `n` rows and each prompt's rows are
            neighbours; `too_few_rows` for no rows.
    """
    if len(prompt) != n:
        raise errors.refuse("rows_mismatch", "prompt", f"{len(prompt)} prompts for {n} rows")
    if n == 0:
        raise errors.refuse("too_few_rows", "rows", "there are no rows")
    first: Ints = np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1]])
    if len(np.unique(prompt[first])) != len(first):
        raise errors.refuse("rows_mismatch", "prompt", "the rows of a prompt are not neighbours")
    return np.append(first, n)


class Running:
    """Totals of prompts so far; what each `how` means is in `sequences`."""

    def __init__(self, how: How, prompts: int, heads: int) -> None:
        self._how = how
        self._weight = np.zeros((prompts, heads))
        self._sum = np.zeros((prompts, heads))
        self._top = np.full((prompts, heads), -np.inf)

    def add(self, number: Ints, values: Block, logits: Block) -> None:
        """Adds rows [n] whose prompts have these numbers; rows of a prompt are neighbours."""
        if not len(number):
            return
        first = np.flatnonzero(np.r_[True, number[1:] != number[:-1]])
        at, value = number[first], values.astype(np.float64)
        if self._how in ("max", "multimax"):
            self._top[at] = np.maximum(self._top[at], np.maximum.reduceat(value, first))
            return
        if self._how == "mean":
            weight = np.ones_like(value)
        else:
            weight = self._weights(at, number, first, logits.astype(np.float64))
        self._weight[at] += np.add.reduceat(weight, first)
        self._sum[at] += np.add.reduceat(weight * value, first)

    def _weights(self, at: Ints, number: Ints, first: Ints, logits: Floats) -> Floats:
        """Of the new rows, relative to the largest logit so far, to which the old sums are brought too."""
        top = np.maximum(self._top[at], np.maximum.reduceat(logits, first))
        shrink = np.exp(self._top[at] - top)
        self._weight[at] *= shrink
        self._sum[at] *= shrink
        self._top[at] = top
        weights: Floats = np.exp(logits - self._top[number])
        return weights

    def totals(self) -> Floats:
        """float64 [P]: the sum over heads; each prompt has a row."""
        per_head = self._top if self._how in ("max", "multimax") else self._sum / self._weight
        return np.asarray(per_head.sum(axis=1))

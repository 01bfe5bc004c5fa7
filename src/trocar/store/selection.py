"""Which rows a view means: the steps that lead to them, worked out when somebody asks and then kept.

The result of a step is a list of `Some`, one for each handle that was joined: a reader and the ids of its rows, in
canonical order, or None for all of them. Steps know columns and numbers; vectors are nobody's business here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.store import filters
from trocar.store.filters import Condition
from trocar.store.index import RowIndex
from trocar.store.rows import Ints


@dataclass(frozen=True, slots=True, eq=False)
class Some:
    """Rows of one handle; `ids` is None for all of them."""

    index: RowIndex
    ids: Ints | None

    def __len__(self) -> int:
        return len(self.index) if self.ids is None else len(self.ids)

    def take(self, keep: Ints | npt.NDArray[np.bool_]) -> Some:
        """Those of the rows that `keep` chooses."""
        return Some(self.index, (self.index.ids if self.ids is None else self.ids)[keep])


class Step(Protocol):
    """Anything that can say which rows it means."""

    @property
    def found(self) -> Sequence[Some]: ...


@dataclass(frozen=True, eq=False)
class Whole:
    """Every row of one handle."""

    index: RowIndex

    @property
    def found(self) -> Sequence[Some]:
        return [Some(self.index, None)]


@dataclass(frozen=True, eq=False)
class Joined:
    """The rows of several steps, one after the other."""

    steps: Sequence[Step]

    @property
    def found(self) -> Sequence[Some]:
        return [some for step in self.steps for some in step.found]


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows that meet conditions; `parts` is the one on which of the joined handles they are of."""

    step: Step
    conditions: Mapping[str, Condition]
    parts: Condition | None

    @cached_property
    def found(self) -> Sequence[Some]:
        return [self._of(number, some) for number, some in enumerate(self.step.found)]

    def _of(self, number: int, some: Some) -> Some:
        if self.parts is not None and not _meets(number, self.parts):
            return some.take(np.empty(0, np.int64))
        if not self.conditions:
            return some
        ids = filters.matching(some.index, self.conditions)
        if some.ids is None:
            return Some(some.index, ids)
        return some.take(np.isin(some.ids, ids))


def _meets(number: int, condition: Condition) -> bool:
    if isinstance(condition, filters.Values):
        return number in condition.given
    low, high = condition.low, condition.high
    return (low is None or low <= number) and (high is None or number < high)


@dataclass(frozen=True, eq=False)
class Sampled:
    """`n` rows drawn at random without putting any back, in canonical order."""

    step: Step
    n: int
    seed: int

    @cached_property
    def found(self) -> Sequence[Some]:
        source = self.step.found
        ends = np.cumsum([0, *map(len, source)])
        if self.n > ends[-1]:
            reason = f"{self.n} rows cannot be drawn from {ends[-1]}"
            raise errors.refuse("too_few_rows", "sample.n", reason, next_step="Draw fewer rows.")
        drawn = np.sort(np.random.default_rng(self.seed).choice(ends[-1], self.n, replace=False))
        cuts = np.searchsorted(drawn, ends)
        spans = zip(source, ends, cuts, cuts[1:], strict=False)
        return [some.take(drawn[a:b] - start) for some, start, a, b in spans]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows in two sides by the values of a column; equal values stand on one side.

    Attributes:
        by: a column; "row" to let every row stand for itself. Prompts of different handles are different.
    """

    step: Step
    fraction: float
    seed: int
    by: str

    @cached_property
    def _first(self) -> npt.NDArray[np.bool_]:
        """For all rows of the step, whether they are on the first side."""
        groups, member = np.unique(self._groups(), return_inverse=True)
        n = round(self.fraction * len(groups))
        if not 0 < n < len(groups):
            reason = f"{self.fraction:g} of {len(groups)} leaves one side without any"
            raise errors.refuse("too_few_rows", "split.fraction", reason, next_step="Split more, or by rows.")
        first = np.zeros(len(groups), bool)
        first[np.random.default_rng(self.seed).permutation(len(groups))[:n]] = True
        return first[member]

    def _groups(self) -> npt.NDArray[np.int64]:
        """int64 by row, equal where rows belong together."""
        source = self.step.found
        if self.by == "row":
            return np.arange(sum(map(len, source)))
        columns = [some.index.column(self.by, some.ids) for some in source]
        codes = np.unique(np.concatenate(columns), return_inverse=True)[1].astype(np.int64)
        if self.by != "prompt":
            return codes
        part = np.repeat(np.arange(len(source)), [len(c) for c in columns])
        return codes * len(source) + part

    def side(self, *, first: bool) -> Sequence[Some]:
        out, start = [], 0
        for some in self.step.found:
            out.append(some.take(self._first[start : start + len(some)] == first))
            start += len(some)
        return out


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a split."""

    split: Split
    first: bool

    @cached_property
    def found(self) -> Sequence[Some]:
        return self.split.side(first=self.first)

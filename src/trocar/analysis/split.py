"""The held-out split: which rows are fitted and which are kept for the test, the same for every site.

All rows of a group fall on one side, so that a test never sees a group that was fitted (rows of one prompt
resemble each other, and a row split would score that resemblance). Groups are drawn per stratum: groups of
class 0, of class 1, and mixed ones, each split by the same fraction. Deterministic in the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from trocar import errors
from trocar.analysis.labels import Floats, Ints

_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Row numbers of the two sides, ascending; int64."""

    train: Ints
    test: Ints


def strata(y: Floats, group: Ints) -> Ints:
    """Of each group: its class when all its rows are of one, and one more than the last class when it is mixed.

    int64 [n_groups].
    """
    n_groups, mixed = int(group.max()) + 1, int(y.max()) + 1
    low, high = np.full(n_groups, np.inf), np.full(n_groups, -np.inf)
    np.minimum.at(low, group, y)
    np.maximum.at(high, group, y)
    return np.where(low == high, low, mixed).astype(np.int64)


def draw(stratum: Ints, group: Ints, test_fraction: float, seed: int) -> Split:
    """Draws round(test_fraction * n) of the n groups of each stratum for the test side.

    A stratum of two or more groups has at least one on each side; a single group is fitted.
    """
    rng = np.random.default_rng([seed, 0])
    held = np.zeros(len(stratum), dtype=bool)
    for value in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == value))
        n_test = round(test_fraction * len(members))
        held[members[: min(max(n_test, 1), len(members) - 1)]] = True
    return Split(np.flatnonzero(~held[group]), np.flatnonzero(held[group]))


def folds(stratum: Ints, group: Ints, count: int, seed: int) -> Ints:
    """Number of the fold of each row, int64 [n]: groups of each stratum are dealt out, whole, in random order."""
    rng = np.random.default_rng([seed, 3])
    dealt = np.empty(len(stratum), dtype=np.int64)
    first = 0
    for value in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == value))
        dealt[members] = (first + np.arange(len(members))) % count
        first += len(members)
    return dealt[group]


def require_classes(y: Floats, split: Split) -> None:
    """Refuses with `too_few_rows` when a side lacks a class."""
    n_classes = int(y.max()) + 1
    for name, side in (("train", split.train), ("test", split.test)):
        counts = np.bincount(y[side].astype(np.int64), minlength=n_classes)
        if counts.min() == 0:
            reason = (
                f"the {name} side has {counts[0]} rows of the lower class and {counts[-1]} of the upper one"
            )
            if n_classes > 2:
                reason = f"the {name} side has no row of {int((counts == 0).sum())} of {n_classes} classes"
            raise errors.refuse("too_few_rows", "labels", reason)


def require_spread(y: Floats, split: Split) -> None:
    """Refuses with `too_few_rows` when the targets of a side do not differ beyond rounding."""
    least = _ROUNDING * float(np.abs(y).max(initial=0))
    for name, side in (("train", split.train), ("test", split.test)):
        if len(side) < 2 or np.ptp(y[side]) <= least:
            reason = f"the {name} side has {len(side)} rows, and their labels do not differ"
            raise errors.refuse("too_few_rows", "labels", reason)


def shuffled(y: Floats, group: Ints, split: Split, seed: int) -> Floats:
    """The labels of a control: permuted within each side, so that they say nothing about the rows.

    When all rows of every group have one label, whole groups swap labels, so that the control has the same
    resemblance within groups as the labels; otherwise rows swap.
    """
    rng = np.random.default_rng([seed, 1])
    first = y[np.unique(group, return_index=True)[1]]
    whole = np.array_equal(first[group], y)
    out = y.copy()
    for side in (split.train, split.test):
        if whole:
            members, row_member = np.unique(group[side], return_inverse=True)
            out[side] = rng.permutation(first[members])[row_member]
        else:
            out[side] = rng.permutation(y[side])
    return out

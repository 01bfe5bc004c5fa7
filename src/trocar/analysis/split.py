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
    """Of each group: 0 or 1 when all its rows are of that class, 2 when it is mixed; int64 [n_groups]."""
    size = np.bincount(group)
    ones = np.bincount(group, weights=y)
    return np.where(ones == 0, 0, np.where(ones == size, 1, 2)).astype(np.int64)


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


def require_classes(y: Floats, split: Split) -> None:
    """Refuses with `too_few_rows` when a side lacks a class."""
    for name, side in (("train", split.train), ("test", split.test)):
        lower, upper = int((y[side] == 0).sum()), int((y[side] == 1).sum())
        if min(lower, upper) == 0:
            reason = f"the {name} side has {lower} rows of the lower class and {upper} of the upper one"
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

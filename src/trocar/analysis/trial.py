"""A trial: what every site of one fit has in common, decided before any row is read.

Checked labels, groups, the held-out split, and the shuffled labels of the control. It depends on labels,
groups and the seed alone, so it is the same for every site, and a refusal costs no fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from trocar.analysis import labels as given
from trocar.analysis.labels import Floats, Given, Ints
from trocar.analysis.results import Kind
from trocar.analysis.split import Split, draw, folds, require_classes, require_spread, shuffled, strata

MOST_CLASSES: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Attributes:
    y: float64 [n]; 0, 1, ... for classes.
    control: `y` shuffled within each side.
    group: int64 [n], group of each row.
    stratum: int64 [n_groups].
    classes: the label values that 0, 1, ... stand for; None for ridge.
    folds: int64 [n], the fold of each row; None without cross-validation.
    """

    kind: Kind
    y: Floats
    control: Floats
    group: Ints
    stratum: Ints
    classes: tuple[int, ...] | None
    split: Split
    seed: int
    folds: Ints | None = None

    @property
    def n_folds(self) -> int:
        return 0 if self.folds is None else int(self.folds.max()) + 1


def plan(
    kind: Kind, labels: Given, groups: Given | None, test_fraction: float, seed: int, n_folds: int = 0
) -> Trial:
    """Checks labels and groups and draws the split, and the folds when there are any.

    Raises:
        ProgramError: `bad_labels` or `too_few_rows`.
    """
    most = MOST_CLASSES if kind == "multinomial" else 2
    y, classes = (given.targets(labels), None) if kind == "ridge" else given.classes(labels, most)
    group = given.groups(groups, len(y))
    n_groups = len(np.unique(group))
    stratum = np.zeros(n_groups, dtype=np.int64) if classes is None else strata(y, group)
    split = draw(stratum, group, test_fraction, seed)
    require = require_spread if classes is None else require_classes
    require(y, split)
    dealt = folds(stratum, group, n_folds, seed) if n_folds else None
    for fold in range(n_folds):
        require(y, Split(np.flatnonzero(dealt != fold), np.flatnonzero(dealt == fold)))
    return Trial(kind, y, shuffled(y, group, split, seed), group, stratum, classes, split, seed, dealt)

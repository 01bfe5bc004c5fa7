"""A trial: what every site of one fit has in common, decided before any row is read.

Checked labels, groups, the held-out split, and the shuffled labels of the control. It depends on labels,
groups and the seed alone, so it is the same for every site, and a refusal costs no fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trocar.analysis import labels as given
from trocar.analysis.labels import Floats, Given, Ints
from trocar.analysis.results import Kind
from trocar.analysis.split import Split, draw, require_classes, require_spread, shuffled, strata


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Attributes:
    y: float64 [n]; 0 and 1 for classes.
    control: `y` shuffled within each side.
    group: int64 [n], group of each row.
    stratum: int64 [n_groups].
    classes: the label values that 0 and 1 stand for; None for ridge.
    """

    kind: Kind
    y: Floats
    control: Floats
    group: Ints
    stratum: Ints
    classes: tuple[int, int] | None
    split: Split
    seed: int


def plan(kind: Kind, labels: Given, groups: Given | None, test_fraction: float, seed: int) -> Trial:
    """Checks labels and groups and draws the split.

    Raises:
        ProgramError: `bad_labels` or `too_few_rows`.
    """
    y, classes = (given.targets(labels), None) if kind == "ridge" else given.classes(labels)
    group = given.groups(groups, len(y))
    n_groups = len(np.unique(group))
    stratum = np.zeros(n_groups, dtype=np.int64) if classes is None else strata(y, group)
    split = draw(stratum, group, test_fraction, seed)
    if classes is None:
        require_spread(y, split)
    else:
        require_classes(y, split)
    return Trial(kind, y, shuffled(y, group, split, seed), group, stratum, classes, split, seed)

"""Labels: what a value may reveal. They join upwards, and only an output op brings one down.

    PUBLIC < USER < ACT < GRAD < WEIGHT

A value made from two values has the higher label. Outputs are declassifiers: each names how its result
leaves (scalars, top-k, tokens) and what a unit of it costs in bits.
"""

from __future__ import annotations

from enum import IntEnum


class Label(IntEnum):
    PUBLIC = 0
    USER = 1
    ACT = 2
    GRAD = 3
    WEIGHT = 4


def join(*labels: Label) -> Label:
    return max(labels, default=Label.PUBLIC)

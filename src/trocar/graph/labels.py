"""Labels: what a value may reveal, and the rules for what may leave.

    PUBLIC < USER < ACT < GRAD < WEIGHT

A value made from two values has the higher label. Outputs are declassifiers, the only way down: each names how
its result leaves (scalars, top-k, tokens, a handle, raw rows) and what a unit of it costs in bits. Bits bound how
much leaves; the rules here forbid the few shapes in which bits are worth most. They are tripwires beside the
budget, not a second boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal


class Label(IntEnum):
    """How close a value is to the weights.

    PUBLIC is known to everybody, USER was sent by the caller, ACT came out of a forward pass, GRAD out of a backward
    pass, WEIGHT is a number of the weights or determines one.
    """

    PUBLIC = 0
    USER = 1
    ACT = 2
    GRAD = 3
    WEIGHT = 4


def join(*labels: Label) -> Label:
    return max(labels, default=Label.PUBLIC)


RawDoor = Literal["direct", "airlock", "never"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What may leave, besides what it costs; public policy of one caller on one model.

    Attributes:
        raw: rows as they are: in an answer, through the airlock only, or never.
        first_raw_layer: rows of layers before it stay; at 2, the embeddings and what two blocks make of them.
        least_blocks: full blocks that must lie between a write and rows that leave.
        linear_maps: whether rows of both ends of one linear map may leave.
        own_targets: whether fits may have activations as targets: such a fit is a piece of the weights.
    """

    raw: RawDoor = "direct"
    first_raw_layer: int = 0
    least_blocks: int = 0
    linear_maps: bool = True
    own_targets: bool = True


FREE: Final = Rules()
"""For weights that anybody may download."""
STRICT: Final = Rules("airlock", first_raw_layer=2, least_blocks=1, linear_maps=False, own_targets=False)
"""For weights that are a secret."""

"""What a role may do: one table, and the questions that are asked of it.

Nothing here knows a key. Separation of duties is in the rows: whoever runs the server cannot review what
leaves it, whoever reviews cannot run anything, and only an owner changes the policy. A role is above another
when it may do something that the other may not, so nobody mints his way up.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from trocar import errors
from trocar.gate.policy import Role


class Power(StrEnum):
    """One thing that a role may allow."""

    run = "run"
    """Run programs, sessions and fits."""
    mint = "mint"
    """Make and end keys."""
    change_policy = "change_policy"
    """Change prices, fractions and limits."""
    review = "review"
    """Approve or reject what waits in the airlock."""
    read_log = "read_log"
    """Read the log of all keys."""
    operate = "operate"
    """See and steer the engine."""


POWERS: Final[Mapping[Role, frozenset[Power]]] = MappingProxyType(
    {
        Role.owner: frozenset(Power),
        Role.checker: frozenset({Power.review, Power.read_log}),
        Role.operator: frozenset({Power.run, Power.mint, Power.read_log, Power.operate}),
        Role.auditor: frozenset({Power.read_log}),
        Role.researcher: frozenset({Power.run}),
        Role.agent: frozenset({Power.run}),
    }
)


def may(role: Role, power: Power) -> bool:
    """Whether `role` has `power`; a word that is no role is a KeyError, never a yes."""
    return power in POWERS[role]


def require(role: Role, power: Power) -> None:
    """Refuses a role without `power`, naming the roles that have it.

    Raises:
        PolicyRefusal: `not_allowed`.
    """
    if not may(role, power):
        able = " or ".join(repr(other.value) for other in Role if may(other, power))
        raise errors.refuse("not_allowed", "", f"this needs the role {able}; the key has {role.value!r}")


def require_mint(role: Role, made: Role) -> None:
    """Refuses a role that may not make a key of the role `made`: no mint, or a role above its own.

    Raises:
        PolicyRefusal: `not_allowed`.
    """
    require(role, Power.mint)
    above = POWERS[made] - POWERS[role]
    if above:
        reason = f"a key of the role {made.value!r} may {', '.join(sorted(above))}; the role {role.value!r} may not"
        raise errors.refuse("not_allowed", "role", reason)


def delegated(role: Role, *, agent: bool) -> Role:
    """The role of a token made for a key of `role`: researcher at most, and agent once and for all.

    Raises:
        PolicyRefusal: `not_allowed` when the key may not run programs itself.
    """
    require(role, Power.run)
    return Role.agent if agent or role is Role.agent else Role.researcher

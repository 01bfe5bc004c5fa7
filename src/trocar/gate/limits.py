"""Amounts of bits, limits on them and who pays: the words that policy and ledger share.

Pure arithmetic of whole numbers. It does not know why a limit is what it is (`policy.py`) nor what has been
spent of it (`accounts.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trocar import errors

MAX_BITS: Final = 2**62
"""Largest amount of bits anywhere in the gate; sums of two still fit a signed 64-bit column."""

EVERYONE: Final = "*"
"""Owner of a lineage's own account, which every operation touches."""

_OWNER: Final = re.compile(r"\*|(key|project|token):[A-Za-z0-9._/:@+-]{1,190}")


def whole_bits(value: int, name: str, *, least: int = 0) -> int:
    """Returns `value` if it is an exact amount of bits.

    Args:
        value: the amount; `True`, `1.0` and numpy integers are not amounts.
        name: the argument's name, for the refusal.
        least: the smallest amount accepted.

    Raises:
        ServerFault: `bad_bits` when it is not of type int, or not in [least, 2**62].
    """
    if type(value) is not int:
        raise errors.refuse("bad_bits", name, f"{name} is a {type(value).__name__}, not an int")
    if not least <= value <= MAX_BITS:
        shown = str(value) if abs(value) <= MAX_BITS else f"an integer of {value.bit_length()} binary digits"
        raise errors.refuse("bad_bits", name, f"{name} is {shown}; it must be in [{least}, 2**62]")
    return value


@dataclass(frozen=True, slots=True)
class Limits:
    """How many bits an account may use; None: counted, not capped.

    Attributes:
        life_bits: for ever; never refills.
        day_bits: within one day of UTC, beside the lifetime limit.

    Raises:
        ServerFault: `bad_bits`.
    """

    life_bits: int | None
    day_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("life_bits", "day_bits"):
            if getattr(self, name) is not None:
                whole_bits(getattr(self, name), name)


@dataclass(frozen=True, slots=True)
class Payer:
    """An account that an operation touches, with the limits that it has.

    Attributes:
        owner: `key:ID`, `project:NAME` or `token:REVOCATION_ID`, at most 200 characters; or `EVERYONE`.
        limits: as the policy gives them now.

    Raises:
        ProgramError: `bad_value` for an owner outside the grammar.
    """

    owner: str
    limits: Limits

    def __post_init__(self) -> None:
        if not _OWNER.fullmatch(self.owner):
            reason = f"{self.owner[:80]!r} is no payer: key:ID, project:NAME or token:ID"
            raise errors.refuse("bad_value", "payers", reason)


def with_everyone(payers: Sequence[Payer], limits: Limits) -> tuple[Payer, ...]:
    """The payers and, last, the lineage's own account; no two are one, or a bit would be counted twice.

    Raises:
        ProgramError: `bad_value`.
    """
    every = (*payers, Payer(EVERYONE, limits))
    owners = [payer.owner for payer in every]
    twice = sorted({owner for owner in owners if owners.count(owner) > 1})
    if twice:
        raise errors.refuse("bad_value", "payers", f"{twice[0]!r} would pay twice")
    return every

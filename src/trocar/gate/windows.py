"""One account and the moves on it, as values: a lifetime window that never refills and a window of one day.

Per account, at every moment: `charged + held <= limit` and `day_bits <= day_limit`, unless the limit was
lowered below what was used by then. A day is a number of days since 1970 in UTC and only grows: a clock that
was set back stays in the day that was begun, so no day's window is had twice. What is held when a new day
begins counts into it; what is refunded comes off the day in which it is refunded.

A limit that configuration lowers is taken over; one that it raises is ignored, so that no budget grows by
editing a file. A raise needs an approval and holds until configuration asks for less than ever before.
Nothing here knows a database or a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from trocar import errors
from trocar.gate.limits import MAX_BITS, Limits

DAY_MS: Final = 86_400_000
Window = Literal["life", "today"]


@dataclass(frozen=True, slots=True)
class Account:
    """What one owner has used of one lineage, in bits; the columns of a row.

    Attributes:
        owner: a payer's name, or `EVERYONE`.
        lineage: name of the lineage.
        charged_bits: spent for good.
        held_bits: reserved by operations that still run.
        limit_bits: for life; None: counted, not capped.
        asked_bits: the lowest lifetime limit that configuration ever asked for.
        grace_bits: how far the use stood above the limit when the limit was last moved.
        day: the day that `day_bits` counts.
        day_bits: charged on that day, or held.
        day_limit_bits, day_asked_bits, day_grace_bits: the same three for the window of a day.
    """

    owner: str
    lineage: str
    charged_bits: int
    held_bits: int
    limit_bits: int | None
    asked_bits: int | None
    grace_bits: int
    day: int
    day_bits: int
    day_limit_bits: int | None
    day_asked_bits: int | None
    day_grace_bits: int

    @property
    def used_bits(self) -> int:
        return self.charged_bits + self.held_bits

    @property
    def left_life_bits(self) -> int | None:
        """What the lifetime window has left; None when it is not capped."""
        return _left(self.limit_bits, self.used_bits)

    @property
    def left_today_bits(self) -> int | None:
        """What the window of the account's day has left; None when it is not capped."""
        return _left(self.day_limit_bits, self.day_bits)

    @property
    def left_bits(self) -> int | None:
        """What can still be reserved now: the smaller of the two windows."""
        left = (self.left_life_bits, self.left_today_bits)
        return min((bits for bits in left if bits is not None), default=None)


def opened(owner: str, lineage: str, limits: Limits, day: int) -> Account:
    """A new account, of which nothing is used."""
    life, daily = limits.life_bits, limits.day_bits
    return Account(owner, lineage, 0, 0, life, life, 0, day, 0, daily, daily, 0)


def rolled(account: Account, day: int) -> Account:
    """The account on `day`; unchanged when that day was begun already, or a later one."""
    if day <= account.day:
        return account
    held = account.held_bits
    return replace(account, day=day, day_bits=held, day_grace_bits=_over(account.day_limit_bits, held))


def lowered(account: Account, limits: Limits) -> Account:
    """The account after configuration asked for `limits`: lower ones hold from now on, higher ones do not."""
    if _less(limits.life_bits, account.asked_bits):
        bits = limits.life_bits if _less(limits.life_bits, account.limit_bits) else account.limit_bits
        grace = _over(bits, account.used_bits)
        account = replace(account, limit_bits=bits, asked_bits=limits.life_bits, grace_bits=grace)
    if _less(limits.day_bits, account.day_asked_bits):
        bits = limits.day_bits if _less(limits.day_bits, account.day_limit_bits) else account.day_limit_bits
        grace = _over(bits, account.day_bits)
        account = replace(account, day_limit_bits=bits, day_asked_bits=limits.day_bits, day_grace_bits=grace)
    return account


def raised(account: Account, limits: Limits) -> Account:
    """The account after an approved raise.

    Raises:
        ProgramError: `bad_value` when a limit would sink, or a cap would be lifted: a raise names a number.
    """
    pairs = (("life_bits", limits.life_bits, account.limit_bits),
             ("day_bits", limits.day_bits, account.day_limit_bits))  # fmt: skip
    for name, new, old in pairs:
        if _less(new, old) or (new is None and old is not None):
            reason = f"a raise from {old} to {'no limit' if new is None else new} is none"
            raise errors.refuse("bad_value", name, reason)
    return replace(
        account,
        limit_bits=limits.life_bits,
        grace_bits=_over(limits.life_bits, account.used_bits),
        day_limit_bits=limits.day_bits,
        day_grace_bits=_over(limits.day_bits, account.day_bits),
    )


def lacking(account: Account, bits: int) -> Window | None:
    """The window that has no room for `bits`; None when both have."""
    # `bits > ceiling - used`, not `used + bits > ceiling`: no sum leaves 64 bits
    life = MAX_BITS if account.limit_bits is None else account.limit_bits
    if bits > life - account.used_bits:
        return "life"
    if account.day_limit_bits is not None and bits > account.day_limit_bits - account.day_bits:
        return "today"
    return None


def held(account: Account, bits: int) -> Account:
    """The account after `bits` moved from left to held; ask `lacking` first."""
    return replace(account, held_bits=account.held_bits + bits, day_bits=account.day_bits + bits)


def closed(account: Account, held_bits: int, charged_bits: int) -> Account:
    """The account after a hold ended: `charged_bits` of it are spent, the rest is left again."""
    return replace(
        account,
        held_bits=account.held_bits - held_bits,
        charged_bits=account.charged_bits + charged_bits,
        day_bits=account.day_bits - held_bits + charged_bits,
    )


def _left(limit_bits: int | None, used_bits: int) -> int | None:
    return None if limit_bits is None else max(0, limit_bits - used_bits)


def _less(bits: int | None, than: int | None) -> bool:
    """Whether one limit is lower than another; None is no limit."""
    return bits is not None and (than is None or bits < than)


def _over(limit_bits: int | None, used_bits: int) -> int:
    return 0 if limit_bits is None else max(0, used_bits - limit_bits)

"""Two kinds of account and the four moves on them: open, hold, close, look.

An account counts bits of one lineage for one owner: a key, or `EVERYONE` (the lineage's own account, which
every operation of every key also touches). Per account `charged + held <= limit` at all times. A limit is
fixed when the account is opened; configuration that implies another one is refused, so a budget cannot be
raised by editing a file. All functions run inside the caller's transaction and commit nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, func, insert, select, update

from trocar import errors
from trocar.gate import chain
from trocar.gate.chain import Kind
from trocar.gate.database import unavailable
from trocar.gate.policy import MAX_BITS, Lineage
from trocar.gate.tables import ACCOUNTS, LINEAGES

EVERYONE: Final = "*"
"""Owner of a lineage's own account; not a key id."""


@dataclass(frozen=True, slots=True)
class Account:
    """What one owner has used of one lineage, in bits.

    Attributes:
        owner: a key id, or `EVERYONE`.
        lineage: name of the lineage.
        limit_bits: for life; None: counted, not capped.
        charged_bits: spent for good.
        held_bits: reserved by operations that still run.
    """

    owner: str
    lineage: str
    limit_bits: int | None
    charged_bits: int
    held_bits: int

    @property
    def left_bits(self) -> int | None:
        """What can still be reserved; None when not capped."""
        return None if self.limit_bits is None else self.limit_bits - self.charged_bits - self.held_bits


@dataclass(frozen=True, slots=True)
class Balance:
    """The two accounts that an operation of one key on one lineage touches."""

    key: Account
    everyone: Account

    @property
    def left_bits(self) -> int | None:
        """What the key can still reserve: the smaller of what the two accounts have left."""
        left = [a.left_bits for a in (self.key, self.everyone) if a.left_bits is not None]
        return min(left, default=None)


def declare(connection: Connection, lineage: Lineage, limit_bits: int | None) -> None:
    """Enters a lineage and opens its own account, once.

    Raises:
        PolicyRefusal: `limit_changed` when it was declared with other numbers.
    """
    row = connection.execute(select(LINEAGES).where(LINEAGES.c.name == lineage.name)).one_or_none()
    said = (lineage.secret_bits, str(lineage.cap or ""))
    if row is None:
        connection.execute(insert(LINEAGES).values(name=lineage.name, secret_bits=said[0], cap=said[1]))
        detail: dict[str, str | int] = {"secret_bits": said[0], "cap": said[1]}
        chain.append(connection, Kind.lineage_declared, lineage=lineage.name, detail=detail)
    elif (row.secret_bits, row.cap) != said:
        was, now = (
            f"{bits} bits capped as {cap or 'open'!r}" for bits, cap in ((row.secret_bits, row.cap), said)
        )
        raise errors.refuse(
            "limit_changed", "lineage", f"{lineage.name!r} was declared with {was}, not {now}"
        )
    ensure(connection, EVERYONE, lineage.name, limit_bits)


def ensure(connection: Connection, owner: str, lineage: str, limit_bits: int | None) -> None:
    """Opens the account unless it is open.

    Raises:
        PolicyRefusal: `limit_changed` when it was opened with another limit.
    """
    account = find(connection, owner, lineage)
    if account is None:
        values = {"owner": owner, "lineage": lineage, "limit_bits": limit_bits}
        connection.execute(insert(ACCOUNTS).values(**values, charged_bits=0, held_bits=0))
        key_id = "" if owner == EVERYONE else owner
        detail = {"limit_bits": limit_bits}
        chain.append(connection, Kind.account_opened, key_id=key_id, lineage=lineage, detail=detail)
    elif account.limit_bits != limit_bits:
        reason = f"{_name(account)} was opened with a limit of {account.limit_bits} bits, not {limit_bits}"
        raise errors.refuse("limit_changed", "policy", reason)


def hold(connection: Connection, owner: str, lineage: str, bits: int) -> None:
    """Moves `bits` from left to held.

    Raises:
        PolicyRefusal: `budget_exhausted`, naming the bits asked and left.
    """
    ceiling = func.coalesce(ACCOUNTS.c.limit_bits, MAX_BITS)
    # `used <= ceiling - bits`, not `used + bits <= ceiling`: no sum can leave 64 bits
    room = ACCOUNTS.c.charged_bits + ACCOUNTS.c.held_bits <= ceiling - bits
    moved = connection.execute(
        update(ACCOUNTS).where(_is(owner, lineage), room).values(held_bits=ACCOUNTS.c.held_bits + bits)
    )
    if moved.rowcount != 1:
        raise _exhausted(must_find(connection, owner, lineage), bits)


def close(connection: Connection, owner: str, lineage: str, *, held_bits: int, charged_bits: int) -> None:
    """Ends a hold of `held_bits`: `charged_bits` of it are spent, the rest is left again."""
    moved = connection.execute(
        update(ACCOUNTS)
        .where(_is(owner, lineage), ACCOUNTS.c.held_bits >= held_bits)
        .values(
            held_bits=ACCOUNTS.c.held_bits - held_bits,
            charged_bits=ACCOUNTS.c.charged_bits + charged_bits,
        )
    )
    if moved.rowcount != 1:
        raise unavailable("an account does not hold what its reservations say")


def find(connection: Connection, owner: str, lineage: str) -> Account | None:
    """The account, if it was opened."""
    row = connection.execute(select(ACCOUNTS).where(_is(owner, lineage))).mappings().one_or_none()
    return None if row is None else Account(**row)


def must_find(connection: Connection, owner: str, lineage: str) -> Account:
    """The account of an operation that was admitted, so it is there (else the transaction fails)."""
    return Account(**connection.execute(select(ACCOUNTS).where(_is(owner, lineage))).mappings().one())


def every(connection: Connection) -> tuple[Account, ...]:
    """All accounts, by lineage, the lineage's own first."""
    query = select(ACCOUNTS).order_by(ACCOUNTS.c.lineage, ACCOUNTS.c.owner)
    return tuple(Account(**row) for row in connection.execute(query).mappings())


def _is(owner: str, lineage: str) -> ColumnElement[bool]:
    return and_(ACCOUNTS.c.owner == owner, ACCOUNTS.c.lineage == lineage)


def _exhausted(account: Account, bits: int) -> errors.TrocarError:
    limit = MAX_BITS if account.limit_bits is None else account.limit_bits
    left = limit - account.charged_bits - account.held_bits
    reason = f"the request may release {bits} bits; {_name(account)} has {left} of {limit} bits left"
    return errors.refuse("budget_exhausted", "", reason)


def _name(account: Account) -> str:
    whose = "everyone" if account.owner == EVERYONE else f"key {account.owner}"
    return f"the account of {whose} on {account.lineage!r}"

"""Lineages and accounts in the database: declare, touch, hold, close, raise, freeze, look.

An account counts bits of one lineage for one owner: a key, a project, a token, or `EVERYONE` (the lineage's
own account, which every operation touches). The arithmetic is in `windows.py`; here its results are stored,
each only over the row that it was computed from. All functions run inside the caller's transaction, which no
other writer can enter, and commit nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, bindparam, insert, select, update

from trocar import errors
from trocar.gate import chain, windows
from trocar.gate.chain import Head, Kind
from trocar.gate.database import unavailable
from trocar.gate.limits import EVERYONE, MAX_BITS, Limits, Payer
from trocar.gate.tables import ACCOUNTS, LINEAGES
from trocar.gate.windows import DAY_MS, Account, Window

if TYPE_CHECKING:
    from trocar.gate.policy import Lineage

__all__ = ["EVERYONE", "Account", "Balance", "Limits", "Payer"]
_KEY: Final = "key:"
_WAS: Final = "was_"
_COUNTED: Final = ("owner", "lineage", "charged_bits", "held_bits", "day", "day_bits")
# built once: making a statement costs more than running it
_UPDATE: Final = (
    update(ACCOUNTS)
    .where(*(ACCOUNTS.c[name] == bindparam(_WAS + name) for name in _COUNTED))
    .values({column.name: bindparam(column.name) for column in ACCOUNTS.c if not column.primary_key})
)
_FIND: Final = select(ACCOUNTS).where(
    ACCOUNTS.c.lineage == bindparam("lineage"), ACCOUNTS.c.owner.in_(bindparam("owners", expanding=True))
)


@dataclass(frozen=True, slots=True)
class Balance:
    """The accounts that an operation on one lineage touches, as a reservation made now would find them."""

    payers: tuple[Account, ...]
    everyone: Account

    @property
    def left_bits(self) -> int | None:
        """What can still be reserved: the smallest of what all windows have left; None: nothing is capped."""
        left = (account.left_bits for account in (*self.payers, self.everyone))
        return min((bits for bits in left if bits is not None), default=None)


@dataclass(frozen=True, slots=True)
class Touched:
    """Accounts of an operation, as they are stored.

    Attributes:
        lowered: whether a limit was taken down: that stays, also when the operation is refused.
    """

    accounts: tuple[Account, ...]
    lowered: bool


def declare(connection: Connection, lineage: Lineage, limits: Limits, now_ms: int) -> None:
    """Enters a lineage and opens its own account, once.

    Raises:
        PolicyRefusal: `limit_changed` when it was declared with other numbers.
    """
    enter(connection, lineage, now_ms)
    touch(connection, lineage.name, (Payer(EVERYONE, limits),), now_ms)


def enter(connection: Connection, lineage: Lineage, now_ms: int) -> None:
    """Enters a lineage, or finds it as it was declared.

    Raises:
        PolicyRefusal: `limit_changed`.
    """
    row = connection.execute(select(LINEAGES).where(LINEAGES.c.name == lineage.name)).one_or_none()
    said = (lineage.secret_bits, str(lineage.cap or ""))
    if row is None:
        values: dict[str, str | int] = {"secret_bits": said[0], "cap": said[1]}
        connection.execute(insert(LINEAGES).values(name=lineage.name, frozen="", **values))
        chain.append(connection, Kind.lineage_declared, lineage=lineage.name, detail=values, time_ms=now_ms)
    elif (row.secret_bits, row.cap) != said:
        was, now = (
            f"{bits} bits capped as {cap or 'open'!r}" for bits, cap in ((row.secret_bits, row.cap), said)
        )
        raise errors.refuse(
            "limit_changed", "lineage", f"{lineage.name!r} was declared with {was}, not {now}"
        )


def touch(connection: Connection, lineage: str, payers: Sequence[Payer], now_ms: int) -> Touched:
    """Opens what is not open, and takes over limits that are lower than before."""
    found = find(connection, lineage, [payer.owner for payer in payers])
    ready, lowered = [], False
    for payer in payers:
        account = found.get(payer.owner) or _open(connection, lineage, payer, now_ms)
        seen = _seen(account, payer, now_ms)
        if (seen.asked_bits, seen.day_asked_bits) != (account.asked_bits, account.day_asked_bits):
            lowered = True
            _enter(connection, Kind.limit_lowered, lineage, payer, now_ms)
            _store(connection, account, seen)
            account = seen
        ready.append(account)
    return Touched(tuple(ready), lowered)


def hold(connection: Connection, accounts: Iterable[Account], bits: int, now_ms: int) -> None:
    """Moves `bits` from left to held, in each of the accounts.

    Raises:
        PolicyRefusal: `budget_exhausted`, naming the first account and window that lack room.
    """
    for account in accounts:
        today = windows.rolled(account, now_ms // DAY_MS)
        window = windows.lacking(today, bits)
        if window is not None:
            raise _exhausted(today, bits, window)
        _store(connection, account, windows.held(today, bits))


def close(
    connection: Connection,
    owners: Sequence[str],
    lineage: str,
    *,
    held_bits: int,
    charged_bits: int,
    now_ms: int,
) -> Balance:
    """Ends a hold of `held_bits` in the accounts of `owners` and in the lineage's own.

    Raises:
        ServerFault: `ledger_unavailable` when one of them does not hold that much.
    """
    names = (*owners, EVERYONE)
    found = find(connection, lineage, names)
    after = []
    for owner in names:
        account = found.get(owner)
        if account is None or account.held_bits < held_bits:
            raise unavailable("an account does not hold what its reservations say")
        today = windows.rolled(account, now_ms // DAY_MS)
        after.append(windows.closed(today, held_bits, charged_bits))
        _store(connection, account, after[-1])
    return Balance(tuple(after[:-1]), after[-1])


def raise_limits(
    connection: Connection, owner: str, lineage: str, limits: Limits, *, approval: str, now_ms: int
) -> Head:
    """Gives an account larger limits, under the id of the approval that allows it.

    Raises:
        ProgramError: `bad_value` when there is no such account, or a limit would sink.
    """
    account = find(connection, lineage, (owner,)).get(owner)
    if account is None:
        raise errors.refuse("bad_value", "owner", f"no account of {owner[:80]!r} is open on {lineage[:80]!r}")
    today = windows.rolled(account, now_ms // DAY_MS)
    _store(connection, account, windows.raised(today, limits))
    detail = {"owner": owner, **asdict(limits), "approval": approval}
    return chain.append(
        connection, Kind.limit_raised, key_id=key_of(owner), lineage=lineage, detail=detail, time_ms=now_ms
    )


def require_not_frozen(connection: Connection, lineage: str) -> None:
    """Refuses a lineage that was frozen: nothing is admitted, charged or repeated for it.

    Raises:
        PolicyRefusal: `lineage_frozen`.
    """
    frozen = connection.execute(select(LINEAGES.c.frozen).where(LINEAGES.c.name == lineage)).scalar()
    if frozen:
        raise errors.refuse("lineage_frozen", "", f"the lineage {lineage!r} is frozen: {frozen}")


def freeze(connection: Connection, lineage: str, reason: str, *, key_id: str, now_ms: int) -> Head:
    """Stops a lineage; nothing changes when it is stopped already.

    Raises:
        ProgramError: `bad_value` when it was never declared, or for a reason that is not 1 to 200 printable characters.
    """
    if not 1 <= len(reason) <= 200 or not reason.isprintable():
        raise errors.refuse("bad_value", "reason", "a reason is 1 to 200 printable characters")
    return _stop(connection, lineage, reason, Kind.frozen, key_id, now_ms)


def thaw(connection: Connection, lineage: str, *, key_id: str, now_ms: int) -> Head:
    """Lets a stopped lineage go on; nothing changes when it is not stopped.

    Raises:
        ProgramError: `bad_value` when it was never declared.
    """
    return _stop(connection, lineage, "", Kind.thawed, key_id, now_ms)


def _stop(connection: Connection, lineage: str, reason: str, kind: Kind, key_id: str, now_ms: int) -> Head:
    query = select(LINEAGES.c.name, LINEAGES.c.frozen)
    found = {row.name: row.frozen for row in connection.execute(query)}
    if lineage not in found:
        near = errors.closest(lineage, found)
        raise errors.refuse("bad_value", "lineage", f"no lineage {lineage[:80]!r} was declared", closest=near)
    if bool(found[lineage]) == bool(reason):
        return chain.head(connection)
    connection.execute(update(LINEAGES).where(LINEAGES.c.name == lineage).values(frozen=reason))
    return chain.append(
        connection, kind, key_id=key_id, lineage=lineage, detail={"reason": reason}, time_ms=now_ms
    )


def balance(connection: Connection, lineage: str, payers: Sequence[Payer], now_ms: int) -> Balance:
    """The accounts as a reservation made now would find them; nothing is stored.

    Args:
        payers: the lineage's own account comes last.
    """
    found = find(connection, lineage, [payer.owner for payer in payers])
    seen = [
        _seen(found.get(p.owner) or windows.opened(p.owner, lineage, p.limits, now_ms // DAY_MS), p, now_ms)
        for p in payers
    ]
    return Balance(tuple(seen[:-1]), seen[-1])


def find(connection: Connection, lineage: str, owners: Sequence[str]) -> dict[str, Account]:
    """The accounts of `owners` that are open, by owner."""
    rows = connection.execute(_FIND, {"lineage": lineage, "owners": list(owners)}).mappings()
    return {row["owner"]: Account(**row) for row in rows}


def every(connection: Connection) -> tuple[Account, ...]:
    """All accounts, by lineage, the lineage's own first."""
    found = (Account(**row) for row in connection.execute(select(ACCOUNTS)).mappings())
    return tuple(sorted(found, key=lambda a: (a.lineage, a.owner)))


def owner_of(key_id: str) -> str:
    """The owner of a key's account."""
    return _KEY + key_id


def key_of(owner: str) -> str:
    """The key id in the owner of a key's account; empty for others."""
    return owner.removeprefix(_KEY) if owner.startswith(_KEY) else ""


def _open(connection: Connection, lineage: str, payer: Payer, now_ms: int) -> Account:
    account = windows.opened(payer.owner, lineage, payer.limits, now_ms // DAY_MS)
    connection.execute(insert(ACCOUNTS), [asdict(account)])
    _enter(connection, Kind.account_opened, lineage, payer, now_ms)
    return account


def _enter(connection: Connection, kind: Kind, lineage: str, payer: Payer, now_ms: int) -> None:
    detail = {"owner": payer.owner, **asdict(payer.limits)}
    key_id = key_of(payer.owner)
    chain.append(connection, kind, key_id=key_id, lineage=lineage, detail=detail, time_ms=now_ms)


def _seen(account: Account, payer: Payer, now_ms: int) -> Account:
    return windows.lowered(windows.rolled(account, now_ms // DAY_MS), payer.limits)


def _store(connection: Connection, before: Account, after: Account) -> None:
    """Writes one account over the row that it was computed from, and over no other."""
    row = asdict(after)
    row.update({_WAS + name: getattr(before, name) for name in _COUNTED})
    if connection.execute(_UPDATE, row).rowcount != 1:
        raise unavailable("an account is not the one that was read")


def _exhausted(account: Account, bits: int, window: Window) -> errors.TrocarError:
    asked = f"the request may release {bits} bits; {_name(account)} has"
    if window == "life":
        limit = MAX_BITS if account.limit_bits is None else account.limit_bits
        left = max(0, limit - account.used_bits)
        return errors.refuse("budget_exhausted", "", f"{asked} {left} of {limit} bits left for life")
    limit = account.day_limit_bits or 0
    opens = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=account.day + 1)
    step = f"Release less, or wait: the window of a day opens again on {opens:%Y-%m-%d} at 00:00 UTC."
    if bits > limit:
        step = f"Release less: no day has more than {limit} bits."
    reason = f"{asked} {account.left_today_bits} of {limit} bits left today"
    return errors.refuse("budget_exhausted", "", reason, next_step=step)


def _name(account: Account) -> str:
    kind, _, name = account.owner.partition(":")
    whose = "everyone" if account.owner == EVERYONE else f"{kind} {name[:64]}"
    return f"the account of {whose} on {account.lineage!r}"

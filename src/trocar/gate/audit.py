"""Compares the log with the tables that repeat it: what the entries add up to is what must be there.

Run after the chain was found whole (a broken log proves nothing about the tables). It re-derives keys,
lineages, accounts with their days, exposures and reservations from entries alone and names every difference.
It repairs nothing, and does not read payloads: their bytes are compared with the charged digest whenever they
are replayed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, RowMapping, Table, and_, select

from trocar.gate import chain, windows
from trocar.gate.accounts import owner_of
from trocar.gate.chain import Kind
from trocar.gate.limits import EVERYONE, Limits
from trocar.gate.reservations import OPEN
from trocar.gate.tables import (
    ACCOUNTS,
    DIRECTIONS,
    EXPORTED,
    HEAD,
    KEYS,
    LINEAGES,
    LOG,
    RESERVATIONS,
    REVOKED_TOKENS,
    TOKEN_ROOTS,
)
from trocar.gate.windows import DAY_MS, Account

_Rows: TypeAlias = dict[tuple[Any, ...], dict[str, Any]]
_STREAM: Final = {"yield_per": 1000}
_COLUMNS: Final = ("kind", "key_id", "lineage", "held_bits", "charged_bits", "digest")
_CLOSING: Final = (Kind.settled, Kind.cancelled, Kind.recovered)


def differences(connection: Connection) -> list[str]:
    """All differences between the log and the other tables, one sentence each; empty when they agree.

    Args:
        connection: a snapshot in which the chain was found whole.
    """
    books = _Books()
    entries = select(LOG).order_by(LOG.c.seq).execution_options(**_STREAM)
    with connection.execute(entries) as rows:
        for entry in rows.mappings():
            wrong = _enter(books, entry)
            if wrong:
                return [wrong]
    return [
        *_compare("key", books.keys, _keys(connection)),
        *_compare("token root", books.token_roots, _timeless(connection, TOKEN_ROOTS, "made_ms")),
        *_compare("revoked token", books.revoked_tokens, _timeless(connection, REVOKED_TOKENS, "revoked_ms")),
        *_compare("lineage", books.lineages, _rows(connection, LINEAGES, 1)),
        *_compare("account", _accounts(books), _rows(connection, ACCOUNTS, 2)),
        *_compare("direction", books.directions, _rows(connection, DIRECTIONS, 4)),
        *_compare("exported", books.exported, _rows(connection, EXPORTED, 3)),
        *_reservations(connection),
        *_head(connection, books),
    ]


@dataclass(slots=True)
class _Books:
    """The tables as the entries imply them, by primary key; and the payers of what still runs."""

    keys: _Rows = field(default_factory=dict)
    token_roots: _Rows = field(default_factory=dict)
    revoked_tokens: _Rows = field(default_factory=dict)
    lineages: _Rows = field(default_factory=dict)
    accounts: dict[tuple[str, str], Account] = field(default_factory=dict)
    directions: _Rows = field(default_factory=dict)
    exported: _Rows = field(default_factory=dict)
    payers: dict[str, list[str]] = field(default_factory=dict)
    anchored: int = 0


def _enter(books: _Books, entry: RowMapping) -> str | None:
    """Adds one entry to the books; says what is wrong when they cannot hold it."""
    try:
        _ENTER.get(entry["kind"], _nothing)(books, entry, json.loads(entry["detail"]))
    except (KeyError, TypeError, ValueError):
        return f"entry {entry['seq']} is a {entry['kind']} of something that no entry before it made"
    return None


def _key_created(books: _Books, entry: RowMapping, detail: Any) -> None:
    books.keys[entry["key_id"],] = {**detail, "secret_sha256": entry["digest"], "revoked": False}


def _key_revoked(books: _Books, entry: RowMapping, _detail: Any) -> None:
    books.keys[entry["key_id"],]["revoked"] = True


def _root_made(books: _Books, entry: RowMapping, _detail: Any) -> None:
    books.token_roots[entry["digest"],] = {}


def _block_revoked(books: _Books, _entry: RowMapping, detail: Any) -> None:
    books.revoked_tokens[detail["token_id"],] = {}


def _lineage_declared(books: _Books, entry: RowMapping, detail: Any) -> None:
    books.lineages[entry["lineage"],] = {**detail, "frozen": ""}


def _frozen(books: _Books, entry: RowMapping, detail: Any) -> None:
    books.lineages[entry["lineage"],]["frozen"] = detail["reason"]


def _limits(books: _Books, entry: RowMapping, detail: Any) -> None:
    owner, lineage, day = detail["owner"], entry["lineage"], _day(entry)
    limits = Limits(detail["life_bits"], detail["day_bits"])
    if entry["kind"] == Kind.account_opened:
        books.accounts[owner, lineage] = windows.opened(owner, lineage, limits, day)
        return
    move = windows.lowered if entry["kind"] == Kind.limit_lowered else windows.raised
    books.accounts[owner, lineage] = move(windows.rolled(books.accounts[owner, lineage], day), limits)


def _admitted(books: _Books, entry: RowMapping, detail: Any) -> None:
    books.payers[entry["reservation"]] = detail["owners"]
    for owner in (*detail["owners"], EVERYONE):
        account = windows.rolled(books.accounts[owner, entry["lineage"]], _day(entry))
        books.accounts[owner, entry["lineage"]] = windows.held(account, entry["held_bits"])
    exposed = detail.get("exposed", {})
    for site, digest, rank in exposed.get("directions", ()):
        for owner in (owner_of(entry["key_id"]), EVERYONE):
            books.directions.setdefault((owner, entry["lineage"], site, digest), {"rank": rank})
    for site, first in exposed.get("exported", ()):
        books.exported[entry["lineage"], site, first] = {}


def _closed(books: _Books, entry: RowMapping, _detail: Any) -> None:
    held, charged = -entry["held_bits"], entry["charged_bits"]
    for owner in (*books.payers.pop(entry["reservation"]), EVERYONE):
        account = windows.rolled(books.accounts[owner, entry["lineage"]], _day(entry))
        books.accounts[owner, entry["lineage"]] = windows.closed(account, held, charged)


def _anchored(books: _Books, _entry: RowMapping, _detail: Any) -> None:
    books.anchored = 1


def _nothing(_books: _Books, entry: RowMapping, _detail: Any) -> None:
    """An entry of a kind that moves no table, or of one that this version does not know."""
    if entry["held_bits"] or entry["charged_bits"]:
        raise ValueError(entry["kind"])


_ENTER: Final[dict[str, Callable[[_Books, RowMapping, Any], None]]] = {
    Kind.key_created: _key_created,
    Kind.key_revoked: _key_revoked,
    Kind.root_made: _root_made,
    Kind.block_revoked: _block_revoked,
    Kind.lineage_declared: _lineage_declared,
    Kind.account_opened: _limits,
    Kind.limit_lowered: _limits,
    Kind.limit_raised: _limits,
    Kind.admitted: _admitted,
    Kind.settled: _closed,
    Kind.cancelled: _closed,
    Kind.recovered: _closed,
    Kind.frozen: _frozen,
    Kind.thawed: _frozen,
    Kind.anchored: _anchored,
}


def _day(entry: RowMapping) -> int:
    return int(entry["time_ms"]) // DAY_MS


def _accounts(books: _Books) -> _Rows:
    rows = {name: asdict(account) for name, account in books.accounts.items()}
    for row in rows.values():
        del row["owner"], row["lineage"]
    return dict(rows)


def _head(connection: Connection, books: _Books) -> list[str]:
    anchored = connection.execute(select(HEAD.c.anchored)).scalar_one()
    if anchored == books.anchored:
        return []
    return [f"head: the log implies anchored {books.anchored}, the table has {anchored}"]


def _keys(connection: Connection) -> _Rows:
    rows = _rows(connection, KEYS, 1)
    for row in rows.values():
        del row["created_ms"]
        row["revoked"] = row.pop("revoked_ms") is not None
    return rows


def _timeless(connection: Connection, table: Table, time: str) -> _Rows:
    rows = _rows(connection, table, 1)
    for row in rows.values():
        del row[time]
    return rows


def _rows(connection: Connection, table: Table, key_columns: int) -> _Rows:
    rows = (dict(row) for row in connection.execute(select(table)).mappings())
    names = [column.name for column in table.columns][:key_columns]
    return {tuple(row.pop(name) for name in names): row for row in rows}


def _compare(what: str, implied: _Rows, found: _Rows) -> list[str]:
    return [
        f"{what} {'/'.join(map(str, name))}: the log implies {implied.get(name)}, "
        f"the table has {found.get(name)}"
        for name in sorted(implied.keys() | found.keys(), key=repr)
        if implied.get(name) != found.get(name)
    ]


def _reservations(connection: Connection) -> list[str]:
    """Rows that differ from their entries, and admissions whose row is gone."""
    admitted, closing = LOG.alias("admitted"), LOG.alias("closing")
    row = RESERVATIONS.c
    pairs = (
        select(RESERVATIONS, *_labelled(admitted, "in_"), *_labelled(closing, "out_"))
        .outerjoin(admitted, and_(admitted.c.reservation == row.id, admitted.c.kind == Kind.admitted))
        .outerjoin(closing, and_(closing.c.reservation == row.id, closing.c.kind.in_(_CLOSING)))
        .execution_options(**_STREAM)
    )
    differ = [p["id"] for p in connection.execute(pairs).mappings() if not _agrees(p)]
    gone = (
        select(LOG.c.reservation)
        .outerjoin(RESERVATIONS, row.id == LOG.c.reservation)
        .where(LOG.c.kind == Kind.admitted, row.id.is_(None))
    )
    return [f"reservation {i}: its row is not what its entries say" for i in differ] + [
        f"reservation {i}: the log has it, the table does not" for i in connection.execute(gone).scalars()
    ]


def _labelled(entry: Any, prefix: str) -> list[Any]:
    names = (*_COLUMNS, "request_id", "detail")
    return [entry.c[name].label(prefix + name) for name in names]


def _agrees(pair: RowMapping) -> bool:
    """Whether a reservation's row follows from the entry that admitted it and the one that closed it."""
    owner, reserved = (pair["key_id"], pair["lineage"]), pair["reserved_bits"]
    admitted = (pair["in_key_id"], pair["in_lineage"], pair["in_held_bits"], pair["in_digest"])
    if admitted != (*owner, reserved, pair["request_digest"]):
        return False
    detail = json.loads(pair["in_detail"])
    payers, tokens = (chain.canonical(detail.get(name, [])) for name in ("owners", "tokens"))
    if (payers, tokens, pair["in_request_id"]) != (pair["owners"], pair["tokens"], pair["request_id"]):
        return False
    end = tuple(pair[f"out_{n}"] for n in _COLUMNS)
    ending = (pair["state"], *owner, -reserved, pair["spent_bits"], pair["payload_digest"])
    if pair["state"] == OPEN:
        return end == (None,) * 6 and pair["spent_bits"] == 0
    return end == ending

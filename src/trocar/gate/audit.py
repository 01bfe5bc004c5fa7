"""Compares the log with the tables that repeat it: what the entries add up to is what must be there.

Run after the chain was found whole (a broken log proves nothing about the tables). It re-derives keys,
lineages, accounts and reservations from entries alone and names every difference. It repairs nothing, and
does not read payloads: their bytes are compared with the charged digest whenever they are replayed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, RowMapping, Table, and_, select

from trocar.gate.accounts import EVERYONE
from trocar.gate.chain import Kind
from trocar.gate.tables import (
    ACCOUNTS,
    KEYS,
    LINEAGES,
    LOG,
    RESERVATIONS,
    REVOKED_TOKENS,
    TOKEN_ROOTS,
)

_Rows: TypeAlias = dict[tuple[Any, ...], dict[str, Any]]
_STREAM: Final = {"yield_per": 1000}
_CLOSING: Final = (Kind.settled, Kind.cancelled, Kind.recovered)


def differences(connection: Connection) -> list[str]:
    """All differences between the log and the other tables, one sentence each; empty when they agree.

    Args:
        connection: a snapshot in which the chain was found whole.
    """
    books = _Books()
    entries = select(LOG).order_by(LOG.c.seq).execution_options(**_STREAM)
    for entry in connection.execute(entries).mappings():
        _enter(books, entry)
    return [
        *_compare("key", books.keys, _keys(connection)),
        *_compare("token root", books.token_roots, _timeless(connection, TOKEN_ROOTS, "made_ms")),
        *_compare("revoked token", books.revoked_tokens, _timeless(connection, REVOKED_TOKENS, "revoked_ms")),
        *_compare("lineage", books.lineages, _rows(connection, LINEAGES, 1)),
        *_compare("account", books.accounts, _rows(connection, ACCOUNTS, 2)),
        *_reservations(connection),
    ]


@dataclass(slots=True)
class _Books:
    """The tables as the entries imply them, by primary key."""

    keys: _Rows = field(default_factory=dict)
    token_roots: _Rows = field(default_factory=dict)
    revoked_tokens: _Rows = field(default_factory=dict)
    lineages: _Rows = field(default_factory=dict)
    accounts: _Rows = field(default_factory=dict)


def _enter(books: _Books, entry: RowMapping) -> None:
    key_id, lineage = entry["key_id"], entry["lineage"]
    detail = json.loads(entry["detail"])
    match Kind(entry["kind"]):
        case Kind.key_created:
            books.keys[key_id,] = {**detail, "secret_sha256": entry["digest"], "revoked": False}
        case Kind.key_revoked:
            books.keys[key_id,]["revoked"] = True
        case Kind.root_made:
            books.token_roots[entry["digest"],] = {}
        case Kind.minted:
            pass  # a token is in no table: whoever has one proves by its signature that it was made
        case Kind.block_revoked:
            books.revoked_tokens[detail["token_id"],] = {}
        case Kind.lineage_declared:
            books.lineages[lineage,] = detail
        case Kind.account_opened:
            books.accounts[key_id or EVERYONE, lineage] = {**detail, "charged_bits": 0, "held_bits": 0}
        case _:  # admitted, settled, cancelled, recovered, replayed
            for owner in (key_id, EVERYONE):
                account = books.accounts[owner, lineage]
                account["charged_bits"] += entry["charged_bits"]
                account["held_bits"] += entry["held_bits"]


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
    names = ("kind", "key_id", "lineage", "held_bits", "charged_bits", "digest")
    return [entry.c[name].label(prefix + name) for name in names]


def _agrees(pair: RowMapping) -> bool:
    """Whether a reservation's row follows from the entry that admitted it and the one that closed it."""
    owner, reserved = (pair["key_id"], pair["lineage"]), pair["reserved_bits"]
    admitted = (pair["in_key_id"], pair["in_lineage"], pair["in_held_bits"], pair["in_digest"])
    if admitted != (*owner, reserved, pair["request_digest"]):
        return False
    end = tuple(
        pair[f"out_{n}"] for n in ("kind", "key_id", "lineage", "held_bits", "charged_bits", "digest")
    )
    ending = (pair["state"], *owner, -reserved, pair["spent_bits"], pair["payload_digest"])
    if pair["state"] == "open":
        return end == (None,) * 6 and pair["spent_bits"] == 0
    return end == ending

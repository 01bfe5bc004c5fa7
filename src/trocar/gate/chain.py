"""The hash-chained log: append one entry, read entries, name the first entry that is not what was written.

Each entry holds the changes of one operation (`held_bits` and `charged_bits`, added to the lineage's account
and to those of the payers that the admission names) and the hash of the entry before it; its own hash is
SHA-256 over the canonical JSON of all its other columns. The row `head` repeats the last hash, so a cut-off
tail shows. Whoever can rewrite the whole file can rewrite the whole chain: only a `Head` kept elsewhere
(every `Charge` carries one, and `anchors.py` writes them down) catches that, and a restored backup.

This module knows columns, not what they mean: budgets are in `accounts.py`, the comparison in `audit.py`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, RowMapping, insert, select, update

from trocar.gate.tables import HEAD, LOG, SCHEMA


class Kind(StrEnum):
    """What an entry records."""

    key_created = "key_created"
    key_revoked = "key_revoked"
    root_made = "root_made"
    minted = "minted"
    block_revoked = "block_revoked"
    lineage_declared = "lineage_declared"
    account_opened = "account_opened"
    limit_lowered = "limit_lowered"
    limit_raised = "limit_raised"
    admitted = "admitted"
    settled = "settled"
    cancelled = "cancelled"
    recovered = "recovered"
    replayed = "replayed"
    refused = "refused"
    policy_changed = "policy_changed"
    policy_approved = "policy_approved"
    airlock = "airlock"
    frozen = "frozen"
    thawed = "thawed"
    anchored = "anchored"
    facts_pinned = "facts_pinned"
    worker_alert = "worker_alert"


NOTES: Final = (Kind.policy_changed, Kind.airlock, Kind.facts_pinned, Kind.worker_alert)
"""Kinds that others than the ledger write; they move no bits and no table."""


@dataclass(frozen=True, slots=True)
class Head:
    """The end of the log at one moment; keep one outside the database to catch a rollback."""

    seq: int
    hash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the log.

    Attributes:
        seq: 1, 2, 3, ... without gaps.
        time_ms: the ledger's clock, milliseconds since 1970; it says to which day an amount belongs, no more.
        kind: what happened.
        key_id: whose key, or empty.
        lineage: which secret, or empty.
        reservation: which reservation, or empty.
        request_id: which request, as its answer names it, or empty.
        held_bits: change of the bits held; negative when a reservation closes.
        charged_bits: change of the bits charged; never negative.
        digest: SHA-256 of the request (admitted), payload (settled, replayed) or secret (key_created).
        detail: canonical JSON of what has no column.
        previous: hash of the entry before.
        hash: of all of the above.
    """

    seq: int
    time_ms: int
    kind: str
    key_id: str
    lineage: str
    reservation: str
    request_id: str
    held_bits: int
    charged_bits: int
    digest: str
    detail: str
    previous: str
    hash: str


Json: TypeAlias = "str | int | Sequence[Json] | Mapping[str, Json] | None"
# built once: making a statement costs more than running it
_LOOK: Final = select(HEAD.c.seq, HEAD.c.hash)
_MOVE: Final = update(HEAD)
_ADD: Final = insert(LOG)
START: Final = Head(0, "0" * 64)


def start(connection: Connection) -> int:
    """Writes the head of an empty log if there is none; returns the schema number of the file."""
    found = connection.execute(select(HEAD.c.schema)).scalar_one_or_none()
    if found is None:
        ledger = secrets.token_hex(16)
        row = {
            "id": 1,
            "schema": SCHEMA,
            "seq": START.seq,
            "hash": START.hash,
            "ledger": ledger,
            "anchored": 0,
        }
        connection.execute(insert(HEAD), [row])
        return SCHEMA
    return int(found)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which ledger this is.

    Attributes:
        ledger: random, made with the ledger; a copy has the same.
        anchored: whether heads of it were ever written down in a second place.
    """

    ledger: str
    anchored: bool


def identity(connection: Connection) -> Identity:
    """Which ledger this is."""
    row = connection.execute(select(HEAD.c.ledger, HEAD.c.anchored)).one()
    return Identity(row.ledger, bool(row.anchored))


def head(connection: Connection) -> Head:
    """The end of the log."""
    row = connection.execute(_LOOK).one()
    return Head(row.seq, row.hash)


def append(
    connection: Connection,
    kind: Kind,
    *,
    key_id: str = "",
    lineage: str = "",
    reservation: str = "",
    request_id: str = "",
    held_bits: int = 0,
    charged_bits: int = 0,
    digest: str = "",
    detail: Mapping[str, Json] | None = None,
    time_ms: int | None = None,
) -> Head:
    """Adds one entry in the transaction of `connection`; the arguments are the columns of `Entry`.

    Args:
        time_ms: the clock of the operation; that of the machine when None.
    """
    last = head(connection)
    row: dict[str, Any] = {
        "seq": last.seq + 1,
        "time_ms": now_ms() if time_ms is None else time_ms,
        "kind": str(kind),
        "key_id": key_id,
        "lineage": lineage,
        "reservation": reservation,
        "request_id": request_id,
        "held_bits": held_bits,
        "charged_bits": charged_bits,
        "digest": digest,
        "detail": canonical(detail or {}),
        "previous": last.hash,
    }
    row["hash"] = _hash(row)
    connection.execute(_ADD, row)
    connection.execute(_MOVE, {"seq": row["seq"], "hash": row["hash"]})
    return Head(row["seq"], row["hash"])


def now_ms() -> int:
    """The machine's clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def canonical(value: Mapping[str, Any] | Sequence[Json]) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII."""
    # repr: a tampered column may hold a blob; it must get a hash (a wrong one), not a crash
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=repr)


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(
        canonical({k: v for k, v in row.items() if k != "hash"}).encode("ascii")
    ).hexdigest()


def entries(
    connection: Connection,
    *,
    after_seq: int,
    limit: int,
    key_id: str = "",
    lineage: str = "",
    request_id: str = "",
    kind: str = "",
) -> tuple[Entry, ...]:
    """Entries after `after_seq`, oldest first; an empty word means any."""
    query = select(LOG).where(LOG.c.seq > after_seq).order_by(LOG.c.seq).limit(limit)
    chosen = {LOG.c.key_id: key_id, LOG.c.lineage: lineage, LOG.c.request_id: request_id, LOG.c.kind: kind}
    for column, word in chosen.items():
        if word:
            query = query.where(column == word)
    return tuple(Entry(**row) for row in connection.execute(query).mappings())


def latest(connection: Connection, *, key_id: str, limit: int) -> tuple[Entry, ...]:
    """The last `limit` entries of one key, oldest first."""
    query = select(LOG).where(LOG.c.key_id == key_id).order_by(LOG.c.seq.desc()).limit(limit)
    return tuple(Entry(**row) for row in connection.execute(query).mappings())[::-1]


def verify(connection: Connection, anchor: Head | None = None) -> list[str]:
    """Walks the whole log and names the first thing wrong with it; empty when it is whole.

    Args:
        connection: a snapshot.
        anchor: a head that was kept elsewhere and must still be part of the log.
    """
    last = START
    query = select(LOG).order_by(LOG.c.seq).execution_options(yield_per=1000)
    with connection.execute(query) as rows:
        for row in rows.mappings():
            wrong = _fault(row, last)
            if wrong:
                return [wrong]
            last = Head(row["seq"], row["hash"])
            if anchor is not None and anchor.seq == last.seq and anchor != last:
                return [f"entry {last.seq} is not the one that was anchored: the log was rewritten"]
    return _end_faults(last, head(connection), anchor)


def _fault(row: RowMapping, last: Head) -> str | None:
    expected = last.seq + 1
    if row["seq"] != expected:
        return f"entry {expected} is missing: entry {row['seq']!r} follows entry {last.seq}"
    if _hash(dict(row)) != row["hash"]:
        return f"entry {expected} was edited or moved: its hash is not that of its content"
    if row["previous"] != last.hash:
        return f"entry {expected} does not follow entry {last.seq}: one of the two was replaced"
    return None


def _end_faults(last: Head, recorded: Head, anchor: Head | None) -> list[str]:
    if last != recorded:
        return [f"entry {last.seq + 1} is missing: the log ends at {last.seq}, its head says {recorded.seq}"]
    if anchor is not None and anchor.seq > last.seq:
        return [
            f"entry {last.seq + 1} is missing: entry {anchor.seq} was anchored; an older copy was restored"
        ]
    return []

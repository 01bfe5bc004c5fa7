"""The rows of operations: admitted, closed once, and repeated under an idempotency key.

A row says what the admission's entry in the log says, so that an operation can be closed by one look-up. What
may be admitted is decided in `ledger.py`; all functions run inside its transaction.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NewType

from sqlalchemy import Connection, RowMapping, and_, bindparam, delete, insert, select, update

from trocar import errors
from trocar.gate import accounts, chain
from trocar.gate.chain import Head, Json, Kind
from trocar.gate.database import unavailable
from trocar.gate.keys import KeyId
from trocar.gate.tables import LOG, PAYLOADS, RESERVATIONS
from trocar.gate.windows import DAY_MS

ReservationId = NewType("ReservationId", str)
OPEN: Final = "open"
REPLAY_DAYS: Final = 30
"""An answer is kept that long for replays; its name is taken for good."""
# built once: making a statement costs more than running it
_ADD: Final = insert(RESERVATIONS)
_CLOSE: Final = update(RESERVATIONS).where(RESERVATIONS.c.id == bindparam("at"))
_MINE: Final = select(RESERVATIONS).where(
    RESERVATIONS.c.id == bindparam("at"),
    RESERVATIONS.c.instance == bindparam("instance"),
    RESERVATIONS.c.state == OPEN,
)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bits held for one operation; end it with `settle` or `cancel`, once."""

    id: ReservationId
    key_id: KeyId
    lineage: str
    reserved_bits: int


@dataclass(frozen=True, slots=True)
class Replay:
    """The answer already given under an idempotency key: the same bytes again, for 0 bits."""

    payload: bytes = field(repr=False)
    payload_digest: str
    spent_bits: int
    head: Head


@dataclass(frozen=True, slots=True)
class Charge:
    """Proof that a charge is on disk; part of the client's receipt, who so becomes a witness of the log.

    Attributes:
        seq: number of the log's entry.
        head: its hash.
        spent_bits: charged for good.
        left_bits: what can still be reserved on the lineage by the same payers; None when nothing is capped.
    """

    seq: int
    head: str
    spent_bits: int
    left_bits: int | None


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller asks to have admitted.

    Attributes:
        token_ids: the blocks of the token that stands for the key.
        named_by: whose word the idempotency key is: the last of these blocks, or nobody's but the key's.
    """

    key_id: KeyId
    lineage: str
    bits: int
    request_digest: str
    idempotency_key: str | None
    request_id: str
    token_ids: tuple[str, ...] = ()
    named_by: str = ""


def admit(
    connection: Connection,
    ask: Ask,
    owners: Sequence[str],
    *,
    instance: str,
    exposed: Mapping[str, Json],
    now_ms: int,
) -> Reservation:
    """Enters an operation whose bits are held in the accounts of `owners` and in the lineage's own."""
    reservation = Reservation(ReservationId(secrets.token_hex(16)), ask.key_id, ask.lineage, ask.bits)
    row = {
        "id": reservation.id,
        "instance": instance,
        "key_id": ask.key_id,
        "lineage": ask.lineage,
        "state": OPEN,
        "reserved_bits": ask.bits,
        "spent_bits": 0,
        "idempotency_key": ask.idempotency_key,
        "named_by": ask.named_by,
        "request_digest": ask.request_digest,
        "payload_digest": "",
        "owners": chain.canonical(list(owners)),
        "tokens": chain.canonical(list(ask.token_ids)),
        "request_id": ask.request_id,
    }
    connection.execute(_ADD, row)
    detail: dict[str, Json] = {"owners": list(owners)}
    if ask.token_ids:
        detail["tokens"] = list(ask.token_ids)
    if exposed:
        detail["exposed"] = exposed
    chain.append(
        connection,
        Kind.admitted,
        key_id=ask.key_id,
        lineage=ask.lineage,
        reservation=reservation.id,
        request_id=ask.request_id,
        held_bits=ask.bits,
        digest=ask.request_digest,
        detail=detail,
        time_ms=now_ms,
    )
    return reservation


def running(connection: Connection, reservation: Reservation, instance: str) -> RowMapping:
    """The open row of a reservation of this process.

    Raises:
        ServerFault: `reservation_closed`.
    """
    mine = {"at": reservation.id, "instance": instance}
    row = connection.execute(_MINE, mine).mappings().one_or_none()
    if row is None:
        raise errors.refuse("reservation_closed", "", f"reservation {reservation.id} is not open here")
    return row


def token_ids(row: RowMapping) -> list[str]:
    """The blocks of the token that asked; none for a key itself."""
    found: list[str] = json.loads(row["tokens"])
    return found


def still_open(connection: Connection) -> Sequence[RowMapping]:
    """The rows of all operations that have not ended, of whatever process."""
    query = select(RESERVATIONS).where(RESERVATIONS.c.state == OPEN)
    return connection.execute(query).mappings().all()


def close(
    connection: Connection,
    row: RowMapping,
    kind: Kind,
    spent_bits: int,
    *,
    now_ms: int,
    payload_digest: str = "",
) -> Charge:
    """Ends an open reservation in its accounts, its row and the log."""
    reserved = row["reserved_bits"]
    values = {
        "at": row["id"],
        "state": str(kind),
        "spent_bits": spent_bits,
        "payload_digest": payload_digest,
        "idempotency_key": row["idempotency_key"] if kind is Kind.settled else None,
    }
    balance = accounts.close(
        connection,
        json.loads(row["owners"]),
        row["lineage"],
        held_bits=reserved,
        charged_bits=spent_bits,
        now_ms=now_ms,
    )
    connection.execute(_CLOSE, values)
    head = chain.append(
        connection,
        kind,
        key_id=row["key_id"],
        lineage=row["lineage"],
        reservation=row["id"],
        request_id=row["request_id"],
        held_bits=-reserved,
        charged_bits=spent_bits,
        digest=payload_digest,
        time_ms=now_ms,
    )
    return Charge(head.seq, head.hash, spent_bits, balance.left_bits)


def keep(connection: Connection, row: RowMapping, payload: bytes, now_ms: int) -> None:
    """Stores a payload for replays, when its request has an idempotency key, and drops those that are too old."""
    if row["idempotency_key"] is not None:
        connection.execute(delete(PAYLOADS).where(PAYLOADS.c.kept_ms < now_ms - REPLAY_DAYS * DAY_MS))
        connection.execute(insert(PAYLOADS).values(reservation=row["id"], kept_ms=now_ms, payload=payload))


def earlier(connection: Connection, ask: Ask) -> RowMapping | None:
    """The operation that a credential already has under an idempotency key."""
    if ask.idempotency_key is None:
        return None
    same = and_(
        RESERVATIONS.c.key_id == ask.key_id,
        RESERVATIONS.c.named_by == ask.named_by,
        RESERVATIONS.c.idempotency_key == ask.idempotency_key,
    )
    return connection.execute(select(RESERVATIONS).where(same)).mappings().one_or_none()


def replay(connection: Connection, row: RowMapping, ask: Ask, now_ms: int) -> Replay:
    """The answer of an earlier operation, if `ask` is the same request.

    Raises:
        Conflict: `idempotency_conflict`, `still_running`, `replay_expired`.
        ServerFault: `ledger_unavailable` when the stored payload is not the one that was charged, or should be there.
    """
    name = repr(row["idempotency_key"])
    if (row["lineage"], row["request_digest"]) != (ask.lineage, ask.request_digest):
        raise errors.refuse("idempotency_conflict", "idempotency_key", f"{name} was used for another request")
    if row["state"] == OPEN:
        raise errors.refuse("still_running", "idempotency_key", f"the request {name} has not finished")
    query = select(PAYLOADS.c.payload).where(PAYLOADS.c.reservation == row["id"])
    kept = connection.execute(query).scalar_one_or_none()
    if kept is None:
        raise _gone(connection, row, now_ms)
    payload = bytes(kept)
    # other bytes than those charged would leave for free
    if hashlib.sha256(payload).hexdigest() != row["payload_digest"]:
        raise unavailable("a stored payload is not the one that was charged")
    head = chain.append(
        connection,
        Kind.replayed,
        key_id=row["key_id"],
        lineage=row["lineage"],
        reservation=row["id"],
        request_id=ask.request_id,
        digest=row["payload_digest"],
        time_ms=now_ms,
    )
    return Replay(payload, row["payload_digest"], row["spent_bits"], head)


def _gone(connection: Connection, row: RowMapping, now_ms: int) -> errors.TrocarError:
    """The refusal for an answer that is not stored: it is old, or somebody was at the table."""
    settled = and_(LOG.c.reservation == row["id"], LOG.c.kind == Kind.settled)
    at_ms = connection.execute(select(LOG.c.time_ms).where(settled)).scalar_one_or_none()
    if at_ms is None or at_ms >= now_ms - REPLAY_DAYS * DAY_MS:
        return unavailable("a stored payload is gone")
    reason = f"the answer of {row['idempotency_key']!r} is older than {REPLAY_DAYS} days and was not kept"
    return errors.refuse("replay_expired", "idempotency_key", reason)

"""The ledger: no bit leaves that was not charged before, whatever crashes.

`reserve` holds the worst case before anything runs; `settle` charges what was spent, refunds the rest and
only then may the payload be sent; `cancel` is for a failed run. Each is one transaction over the key's
account, the lineage's account, the reservation and the log: all of it or nothing. So at every instant, also
after a crash, emitted <= charged + held <= limit, for each key and for each lineage over all keys.

A reservation belongs to the process that made it. When that process is dead (`presence.py` says how this is
known without clocks) `recover` charges its reservations in full: nobody can know what it had sent.

The ledger counts; it does not know what a payload means, or how a price was computed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, Final, NewType

from sqlalchemy import Connection, RowMapping, and_, insert, select, update

from trocar import errors
from trocar.gate import accounts, audit, chain, keys
from trocar.gate.accounts import EVERYONE, Account, Balance
from trocar.gate.chain import Entry, Head, Kind
from trocar.gate.database import Database, unavailable
from trocar.gate.keys import KeyId, Principal
from trocar.gate.policy import Lineage, Policy, whole_bits
from trocar.gate.tables import PAYLOADS, RESERVATIONS

ReservationId = NewType("ReservationId", str)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_IDEMPOTENCY_KEY: Final = re.compile(r"[!-~]{1,200}")
_OPEN: Final = "open"


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
        left_bits: what the key can still reserve on the lineage; None when neither account is capped.
    """

    seq: int
    head: str
    spent_bits: int
    left_bits: int | None


class Ledger:
    """The budgets of one database under one policy; safe to share between threads.

    Opening it recovers the reservations of dead processes.

    Raises:
        ServerFault: `ledger_unavailable`, from every method; nothing may be emitted then.
    """

    def __init__(self, database: Database, policy: Policy) -> None:
        self._database = database
        self._policy = policy
        self.recover()

    def declare(self, lineage: Lineage) -> None:
        """Enters a lineage at start-up, so that a changed size is found before the first request.

        Raises:
            PolicyRefusal: `limit_changed`.
        """
        with self._database.write() as connection:
            accounts.declare(connection, lineage, self._policy.lineage_limit_bits(lineage))

    def reserve(
        self,
        principal: Principal,
        lineage: Lineage,
        bits: int,
        *,
        request_digest: str,
        idempotency_key: str | None = None,
    ) -> Reservation | Replay:
        """Holds the most that an operation may release, or hands back the answer it already had.

        Args:
            principal: from `Keys.authenticate`; looked up again here, so a revoked one is refused.
            lineage: the secret that is read.
            bits: the worst case, overhead included.
            request_digest: SHA-256 of the request, 64 hex digits.
            idempotency_key: the client's name for the request, 1 to 200 visible ASCII characters; per key.
                It is free again after `cancel` or a crash, because no answer exists to repeat.

        Raises:
            PolicyRefusal: `budget_exhausted` (nothing was spent) or `limit_changed`.
            Conflict: `idempotency_conflict` for another request under the same idempotency key,
                `still_running` for the same request when it has not ended.
            AuthError: `bad_key`.
            ProgramError: `bad_value` for a malformed idempotency key.
            ServerFault: `bad_bits`.
        """
        whole_bits(bits, "bits", least=max(1, self._policy.overhead_bits))
        _check_words(request_digest, idempotency_key)
        with self._database.write() as connection:
            keys.require_current(connection, principal)
            if idempotency_key is not None:
                earlier = _earlier(connection, principal.key_id, idempotency_key)
                if earlier is not None:
                    return _replay(connection, earlier, lineage.name, request_digest)
            self._open_accounts(connection, principal, lineage)
            return self._admit(
                connection,
                principal.key_id,
                lineage.name,
                bits,
                request_digest=request_digest,
                idempotency_key=idempotency_key,
            )

    def settle(self, reservation: Reservation, spent_bits: int, payload: bytes) -> Charge:
        """Charges what the payload releases and refunds the rest. Emit the payload only after this returns.

        Args:
            reservation: from `reserve`, in this process.
            spent_bits: what the payload releases, overhead included; at most what was reserved.
            payload: the exact bytes that will be emitted; stored when an idempotency key was given.

        Raises:
            ServerFault: `bad_bits` (it stays open: cancel it) or `reservation_closed`.
            AuthError: `bad_key` when the key was revoked meanwhile (it stays open: cancel it).
        """
        digest = hashlib.sha256(payload).hexdigest()
        with self._database.write() as connection:
            row = self._running(connection, reservation, spent_bits)
            keys.require_not_revoked(connection, row["key_id"])
            if row["idempotency_key"] is not None:
                connection.execute(insert(PAYLOADS).values(reservation=row["id"], payload=payload))
            return _close(connection, row, Kind.settled, spent_bits, digest)

    def cancel(self, reservation: Reservation, keep_bits: int) -> Charge:
        """Ends an operation that emitted no payload: charges `keep_bits` (the overhead), refunds the rest.

        Raises:
            ServerFault: `bad_bits` or `reservation_closed`.
        """
        with self._database.write() as connection:
            row = self._running(connection, reservation, keep_bits)
            return _close(connection, row, Kind.cancelled, keep_bits)

    def recover(self) -> tuple[Charge, ...]:
        """Charges in full each reservation whose process is dead; those of the living are not touched."""
        with self._database.write() as connection:
            query = select(RESERVATIONS).where(RESERVATIONS.c.state == _OPEN)
            rows = connection.execute(query).mappings().all()
            dead = {i for i in {row["instance"] for row in rows} if self._database.presence.is_dead(i)}
            return tuple(
                _close(connection, row, Kind.recovered, row["reserved_bits"])
                for row in rows
                if row["instance"] in dead
            )

    def balance(self, principal: Principal, lineage: Lineage) -> Balance:
        """The two accounts of a key on a lineage; an account not opened yet is shown as it would open."""
        key_limit = self._policy.cap_bits(principal.tier, lineage.secret_bits)
        with self._database.read() as connection:
            key = accounts.find(connection, principal.key_id, lineage.name)
            everyone = accounts.find(connection, EVERYONE, lineage.name)
        return Balance(
            key or Account(principal.key_id, lineage.name, key_limit, 0, 0),
            everyone or Account(EVERYONE, lineage.name, self._policy.lineage_limit_bits(lineage), 0, 0),
        )

    def balances(self) -> tuple[Account, ...]:
        """All accounts, by lineage, the lineage's own first."""
        with self._database.read() as connection:
            return accounts.every(connection)

    def entries(
        self, *, after_seq: int = 0, limit: int = 100, key_id: str = "", lineage: str = ""
    ) -> tuple[Entry, ...]:
        """At most `limit` entries of the log after `after_seq`, oldest first; empty words mean any."""
        with self._database.read() as connection:
            return chain.entries(connection, after_seq=after_seq, limit=limit, key_id=key_id, lineage=lineage)

    def latest(self, key_id: str, limit: int) -> tuple[Entry, ...]:
        """The last `limit` entries of one key, oldest first."""
        with self._database.read() as connection:
            return chain.latest(connection, key_id=key_id, limit=limit)

    def head(self) -> Head:
        """The end of the log; keep one elsewhere as an anchor for `verify`."""
        with self._database.read() as connection:
            return chain.head(connection)

    def verify(self, anchor: Head | None = None) -> list[str]:
        """Names the first entry of the log that was edited, deleted or moved; empty when there is none.

        Args:
            anchor: a head kept elsewhere; catches a log that was rewritten, cut off or restored from a copy.
        """
        with self._database.read() as connection:
            return chain.verify(connection, anchor)

    def check(self) -> list[str]:
        """`verify`, then compares what the log adds up to with every other table; empty when all agree."""
        with self._database.read() as connection:
            return chain.verify(connection) or audit.differences(connection)

    def _open_accounts(self, connection: Connection, principal: Principal, lineage: Lineage) -> None:
        accounts.declare(connection, lineage, self._policy.lineage_limit_bits(lineage))
        limit_bits = self._policy.cap_bits(principal.tier, lineage.secret_bits)
        accounts.ensure(connection, principal.key_id, lineage.name, limit_bits)

    def _admit(
        self,
        connection: Connection,
        key_id: KeyId,
        lineage: str,
        bits: int,
        *,
        request_digest: str,
        idempotency_key: str | None,
    ) -> Reservation:
        for owner in (key_id, EVERYONE):
            accounts.hold(connection, owner, lineage, bits)
        reservation = Reservation(ReservationId(secrets.token_hex(16)), key_id, lineage, bits)
        connection.execute(
            insert(RESERVATIONS).values(
                id=reservation.id,
                instance=self._database.presence.instance,
                key_id=key_id,
                lineage=lineage,
                state=_OPEN,
                reserved_bits=bits,
                spent_bits=0,
                idempotency_key=idempotency_key,
                request_digest=request_digest,
                payload_digest="",
            )
        )
        chain.append(
            connection,
            Kind.admitted,
            key_id=key_id,
            lineage=lineage,
            reservation=reservation.id,
            held_bits=bits,
            digest=request_digest,
        )
        return reservation

    def _running(self, connection: Connection, reservation: Reservation, bits: int) -> RowMapping:
        """The open row of a reservation of this process, if it may be closed at `bits`."""
        mine = and_(
            RESERVATIONS.c.id == reservation.id,
            RESERVATIONS.c.instance == self._database.presence.instance,
            RESERVATIONS.c.state == _OPEN,
        )
        row = connection.execute(select(RESERVATIONS).where(mine)).mappings().one_or_none()
        if row is None:
            raise errors.refuse("reservation_closed", "", f"reservation {reservation.id} is not open here")
        whole_bits(bits, "spent_bits", least=self._policy.overhead_bits)
        if bits > row["reserved_bits"]:
            reason = f"{bits} bits were spent of {row['reserved_bits']} reserved"
            raise errors.refuse("bad_bits", "spent_bits", reason)
        return row


def _close(connection: Connection, row: RowMapping, kind: Kind, spent_bits: int, digest: str = "") -> Charge:
    """Ends an open reservation in both accounts, its row and the log."""
    key_id, lineage, reserved = row["key_id"], row["lineage"], row["reserved_bits"]
    values: dict[str, Any] = {"state": str(kind), "spent_bits": spent_bits, "payload_digest": digest}
    if kind is not Kind.settled:
        values["idempotency_key"] = None
    for owner in (key_id, EVERYONE):
        accounts.close(connection, owner, lineage, held_bits=reserved, charged_bits=spent_bits)
    connection.execute(update(RESERVATIONS).where(RESERVATIONS.c.id == row["id"]).values(**values))
    head = chain.append(
        connection,
        kind,
        key_id=key_id,
        lineage=lineage,
        reservation=row["id"],
        held_bits=-reserved,
        charged_bits=spent_bits,
        digest=digest,
    )
    both = (accounts.must_find(connection, owner, lineage) for owner in (key_id, EVERYONE))
    return Charge(head.seq, head.hash, spent_bits, Balance(*both).left_bits)


def _earlier(connection: Connection, key_id: KeyId, idempotency_key: str) -> RowMapping | None:
    same = and_(RESERVATIONS.c.key_id == key_id, RESERVATIONS.c.idempotency_key == idempotency_key)
    return connection.execute(select(RESERVATIONS).where(same)).mappings().one_or_none()


def _replay(connection: Connection, row: RowMapping, lineage: str, request_digest: str) -> Replay:
    if (row["lineage"], row["request_digest"]) != (lineage, request_digest):
        name = repr(row["idempotency_key"])
        raise errors.refuse("idempotency_conflict", "idempotency_key", f"{name} was used for another request")
    if row["state"] == _OPEN:
        name = repr(row["idempotency_key"])
        raise errors.refuse("still_running", "idempotency_key", f"the request {name} has not finished")
    query = select(PAYLOADS.c.payload).where(PAYLOADS.c.reservation == row["id"])
    payload = connection.execute(query).scalar_one()
    # other bytes than those charged would leave for free
    if hashlib.sha256(payload).hexdigest() != row["payload_digest"]:
        raise unavailable("a stored payload is not the one that was charged")
    head = chain.append(
        connection,
        Kind.replayed,
        key_id=row["key_id"],
        lineage=lineage,
        reservation=row["id"],
        digest=row["payload_digest"],
    )
    return Replay(payload, row["payload_digest"], row["spent_bits"], head)


def _check_words(request_digest: str, idempotency_key: str | None) -> None:
    if not _DIGEST.fullmatch(request_digest):
        raise errors.refuse("bad_value", "request_digest", "a request digest is 64 hex digits")
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise errors.refuse(
            "bad_value", "idempotency_key", "an idempotency key is 1 to 200 visible ASCII characters"
        )

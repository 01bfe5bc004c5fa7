"""The ledger: no bit leaves that was not charged before, whatever crashes.

`reserve` holds the worst case before anything runs; `settle` charges what was spent, refunds the rest and
only then may the payload be sent; `cancel` is for a failed run. Each is one transaction over the lineage's
account, the account of every payer, the reservation and the log: all of it or nothing. So at every instant,
also after a crash, emitted <= charged + held <= limit, for each payer and for each lineage over all of them.

A reservation belongs to the process that made it. When that process is dead (the database's presence says how
this is known without clocks) `recover` charges its reservations in full: nobody can know what it had sent.

The ledger counts; it does not know what a payload means, how a price was computed or why a limit is what it
is. Its clock says to which day an amount belongs, and nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import Connection

from trocar import errors
from trocar.gate import accounts, audit, chain, exposures, keys, reservations
from trocar.gate.accounts import Account, Balance
from trocar.gate.anchors import Anchors, require_none
from trocar.gate.chain import Entry, Head, Kind
from trocar.gate.database import Database, unavailable
from trocar.gate.exposures import Exposure
from trocar.gate.keys import Principal
from trocar.gate.limits import Limits, Payer, whole_bits, with_everyone
from trocar.gate.policy import Lineage
from trocar.gate.reservations import Ask, Charge, Replay, Reservation

__all__ = ["Charge", "Ledger", "Replay", "Reservation"]
LAST_MS: Final = 253_370_764_800_000  # the beginning of the year 9999
MOST_DETAIL: Final = 16_384
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_IDEMPOTENCY_KEY: Final = re.compile(r"[!-~]{1,200}")
_REQUEST: Final = re.compile(r"[!-~]{0,64}")


class Ledger:
    """The budgets of one database; safe to share between threads.

    Opening it recovers the reservations of dead processes.

    Args:
        overhead_bits: nothing is admitted or charged below this.
        clock: milliseconds since 1970; fixes the days of daily windows. A day once begun is never begun again,
            whatever the clock says later.
        anchors: folder where heads of the log are written down; a ledger that once had one needs it again.

    Raises:
        ServerFault: `ledger_unavailable`, from every method; nothing may be emitted then. `ledger_rolled_back`
            when it is not the one that was anchored.
    """

    def __init__(
        self,
        database: Database,
        *,
        overhead_bits: int = 256,
        clock: Callable[[], int] = chain.now_ms,
        anchors: Path | None = None,
    ) -> None:
        self._database = database
        self._overhead_bits = whole_bits(overhead_bits, "overhead_bits")
        self._clock = clock
        self._anchors = None if anchors is None else Anchors(database, anchors, self._now_ms)
        if anchors is None:
            with database.read() as connection:
                require_none(connection)
        self.recover()

    def close(self) -> None:
        """Writes the last head to the anchors; the database stays open. Idempotent."""
        if self._anchors is not None:
            self._anchors.close()

    def declare(self, lineage: Lineage, limits: Limits) -> None:
        """Enters a lineage at start-up, so that a changed size is found before the first request.

        Raises:
            PolicyRefusal: `limit_changed`.
        """
        with self._write() as (connection, now_ms):
            accounts.declare(connection, lineage, limits, now_ms)

    def reserve(
        self,
        principal: Principal,
        lineage: Lineage,
        bits: int,
        *,
        payers: Sequence[Payer],
        limits: Limits,
        request_digest: str,
        idempotency_key: str | None = None,
        named_by_key: bool = False,
        exposure: Exposure | None = None,
        request_id: str = "",
    ) -> Reservation | Replay:
        """Holds the most that an operation may release, or hands back the answer it already had.

        Args:
            principal: from `Keys.authenticate`; looked up again here, so a revoked one is refused.
            lineage: the secret that is read.
            bits: the worst case, overhead included.
            payers: accounts that pay beside the lineage's own, each with the limits it has now.
            limits: of the lineage's own account.
            request_digest: SHA-256 of the request, 64 hex digits.
            idempotency_key: the client's name for the request, 1 to 200 visible ASCII characters; of the key, or of
                the token that stands for it. Free again after `cancel` or a crash: no answer exists to repeat.
            named_by_key: whether that name is the key's, whichever token asks.
            exposure: what the structure rules count.
            request_id: how the answer names the request; found again with `entries`.

        Raises:
            PolicyRefusal: `budget_exhausted`, `rank_exhausted`, `policy`, `lineage_frozen` or `limit_changed`;
                nothing was spent.
            Conflict: `idempotency_conflict` for another request under the same idempotency key,
                `still_running` for the same request when it has not ended.
            AuthError: `bad_key`.
            ProgramError: `bad_value` for a malformed idempotency key, or a payer named twice.
            ServerFault: `bad_bits`.
        """
        whole_bits(bits, "bits", least=max(1, self._overhead_bits))
        _check_words(request_digest, idempotency_key, request_id)
        every = with_everyone(payers, limits)
        if self._anchors is not None:
            self._anchors.require_kept()
        key, tokens = principal.key_id, principal.token_ids
        named_by = tokens[-1] if tokens and not named_by_key else ""
        ask = Ask(key, lineage.name, bits, request_digest, idempotency_key, request_id, tokens, named_by)
        while True:
            with self._write() as (connection, now_ms):
                keys.require_current(connection, principal)
                accounts.require_not_frozen(connection, lineage.name)
                earlier = reservations.earlier(connection, ask)
                if earlier is not None:
                    return reservations.replay(connection, earlier, ask, now_ms)
                accounts.enter(connection, lineage, now_ms)
                found = self._admit(connection, ask, every, exposure or Exposure(), now_ms)
            if found is not None:
                return found

    def settle(
        self,
        reservation: Reservation,
        spent_bits: int,
        payload: bytes,
        also: Callable[[Connection], None] | None = None,
    ) -> Charge:
        """Charges what the payload releases and refunds the rest. Emit the payload only after this returns.

        Args:
            reservation: from `reserve`, in this process.
            spent_bits: what the payload releases, overhead included; at most what was reserved.
            payload: the exact bytes that will be emitted; stored when an idempotency key was given.
            also: what else becomes true with the charge, and not without it.

        Raises:
            ServerFault: `bad_bits` (it stays open: cancel it) or `reservation_closed`.
            AuthError: `bad_key` when the key, or a block of the token, was revoked meanwhile (it stays open: cancel
                it).
            PolicyRefusal: `lineage_frozen` when that happened meanwhile (it stays open: cancel it).
        """
        digest = hashlib.sha256(payload).hexdigest()
        with self._write() as (connection, now_ms):
            row = reservations.running(connection, reservation, self._database.presence.instance)
            self._check_spent(spent_bits, row["reserved_bits"])
            keys.require_not_revoked(connection, row["key_id"], reservations.token_ids(row))
            accounts.require_not_frozen(connection, row["lineage"])
            reservations.keep(connection, row, payload, now_ms)
            if also is not None:
                also(connection)
            return reservations.close(
                connection, row, Kind.settled, spent_bits, now_ms=now_ms, payload_digest=digest
            )

    def cancel(self, reservation: Reservation, keep_bits: int) -> Charge:
        """Ends an operation that emitted no payload: charges `keep_bits` (the overhead), refunds the rest.

        Raises:
            ServerFault: `bad_bits` or `reservation_closed`.
        """
        with self._write() as (connection, now_ms):
            row = reservations.running(connection, reservation, self._database.presence.instance)
            self._check_spent(keep_bits, row["reserved_bits"])
            return reservations.close(connection, row, Kind.cancelled, keep_bits, now_ms=now_ms)

    def recover(self) -> tuple[Charge, ...]:
        """Charges in full each reservation whose process is dead; those of the living are not touched."""
        with self._write() as (connection, now_ms):
            rows = reservations.still_open(connection)
            instances = {row["instance"] for row in rows}
            dead = {i for i in instances if self._database.presence.is_dead(i)}
            return tuple(
                reservations.close(connection, row, Kind.recovered, row["reserved_bits"], now_ms=now_ms)
                for row in rows
                if row["instance"] in dead
            )

    def refuse(
        self, key_id: str, request_id: str, codes: Sequence[str], detail: Mapping[str, str | int]
    ) -> Head:
        """Enters that a request was refused, and why: `entries(request_id=...)` finds it again.

        Raises:
            ProgramError: `bad_value` for a request id outside its grammar, or a detail that is too long.
        """
        _check_request(request_id)
        told = {**_bounded(detail), "codes": list(codes)}
        with self._write() as (connection, now_ms):
            return chain.append(
                connection, Kind.refused, key_id=key_id, request_id=request_id, detail=told, time_ms=now_ms
            )

    def note(
        self,
        kind: Kind,
        *,
        key_id: str = "",
        lineage: str = "",
        digest: str = "",
        detail: Mapping[str, str | int] | None = None,
    ) -> Head:
        """Enters what others decided: a policy that changed, a step of the airlock.

        Raises:
            ProgramError: `bad_value` for a kind that only the ledger writes, or a detail that is too long.
        """
        if kind not in chain.NOTES:
            raise errors.refuse(
                "bad_value", "kind", f"an entry {str(kind)[:40]!r} cannot be written from outside"
            )
        told = _bounded(detail or {})
        with self._write() as (connection, now_ms):
            return chain.append(
                connection, kind, key_id=key_id, lineage=lineage, digest=digest, detail=told, time_ms=now_ms
            )

    def freeze(self, lineage: str, reason: str, *, key_id: str = "") -> Head:
        """Stops a lineage: until it is thawed nothing is admitted, settled or replayed for it. Twice is once.

        Args:
            reason: told to whoever is refused; 1 to 200 printable characters.

        Raises:
            ProgramError: `bad_value`.
        """
        with self._write() as (connection, now_ms):
            return accounts.freeze(connection, lineage, reason, key_id=key_id, now_ms=now_ms)

    def thaw(self, lineage: str, *, key_id: str) -> Head:
        """Lets a frozen lineage go on.

        Raises:
            ProgramError: `bad_value`.
        """
        with self._write() as (connection, now_ms):
            return accounts.thaw(connection, lineage, key_id=key_id, now_ms=now_ms)

    def raise_limits(self, owner: str, lineage: str, limits: Limits, *, approval: str) -> Head:
        """Gives an open account larger limits. They hold until configuration asks for less than ever before.

        Args:
            limits: both windows; the one that stays as it is is named too.
            approval: id of the approval that allows it; without one nothing may call this.

        Raises:
            ProgramError: `bad_value` when no such account is open, or a limit would sink or be lifted.
        """
        if not approval:
            raise errors.refuse("bad_value", "approval", "a raise needs the id of its approval")
        with self._write() as (connection, now_ms):
            return accounts.raise_limits(connection, owner, lineage, limits, approval=approval, now_ms=now_ms)

    def balance(self, lineage: str, payers: Sequence[Payer], limits: Limits) -> Balance:
        """The accounts of an operation, as a reservation made now would find them; nothing is opened."""
        with self._database.read() as connection:
            return accounts.balance(connection, lineage, with_everyone(payers, limits), self._now_ms())

    def balances(self) -> tuple[Account, ...]:
        """All accounts, by lineage, the lineage's own first."""
        with self._database.read() as connection:
            return accounts.every(connection)

    def entries(
        self,
        *,
        after_seq: int = 0,
        limit: int = 100,
        key_id: str = "",
        lineage: str = "",
        request_id: str = "",
        kind: str = "",
    ) -> tuple[Entry, ...]:
        """At most `limit` entries of the log after `after_seq`, oldest first; empty words mean any."""
        with self._database.read() as connection:
            return chain.entries(
                connection,
                after_seq=after_seq,
                limit=limit,
                key_id=key_id,
                lineage=lineage,
                request_id=request_id,
                kind=kind,
            )

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

    def _admit(
        self, connection: Connection, ask: Ask, every: Sequence[Payer], exposure: Exposure, now_ms: int
    ) -> Reservation | None:
        """Holds the bits in every account; None when a limit was lowered, which is kept whatever comes next."""
        touched = accounts.touch(connection, ask.lineage, every, now_ms)
        if touched.lowered:
            return None
        accounts.hold(connection, touched.accounts, ask.bits, now_ms)
        exposed = exposures.record(connection, exposure, accounts.owner_of(ask.key_id), ask.lineage)
        return reservations.admit(
            connection,
            ask,
            [payer.owner for payer in every[:-1]],
            instance=self._database.presence.instance,
            exposed=exposed,
            now_ms=now_ms,
        )

    @contextmanager
    def _write(self) -> Iterator[tuple[Connection, int]]:
        """One transaction, and the time of all that happens in it."""
        with self._database.write() as connection:
            yield connection, self._now_ms()
            seq = 0 if self._anchors is None else chain.head(connection).seq
        if self._anchors is not None:
            self._anchors.wrote(seq)

    def _now_ms(self) -> int:
        now_ms = self._clock()
        if not 0 <= now_ms < LAST_MS:
            raise unavailable("its clock is not in a year from 1970 to 9998")
        return now_ms

    def _check_spent(self, bits: int, reserved_bits: int) -> None:
        whole_bits(bits, "spent_bits", least=self._overhead_bits)
        if bits > reserved_bits:
            reason = f"{bits} bits were spent of {reserved_bits} reserved"
            raise errors.refuse("bad_bits", "spent_bits", reason)


def _check_words(request_digest: str, idempotency_key: str | None, request_id: str) -> None:
    if not _DIGEST.fullmatch(request_digest):
        raise errors.refuse("bad_value", "request_digest", "a request digest is 64 hex digits")
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise errors.refuse(
            "bad_value", "idempotency_key", "an idempotency key is 1 to 200 visible ASCII characters"
        )
    _check_request(request_id)


def _check_request(request_id: str) -> None:
    if not _REQUEST.fullmatch(request_id):
        raise errors.refuse("bad_value", "request_id", "a request id is at most 64 visible ASCII characters")


def _bounded(detail: Mapping[str, str | int]) -> Mapping[str, str | int]:
    if len(chain.canonical(detail)) > MOST_DETAIL:
        raise errors.refuse("bad_value", "detail", f"a detail has at most {MOST_DETAIL} characters")
    return detail

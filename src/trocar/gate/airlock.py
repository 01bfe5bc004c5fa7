"""The airlock: the only door for rows and artifacts, and the only way to larger limits.

`submit` freezes what is to leave: the numbers are rounded to 4 or 8 bits, hashed with everything that will be
decided on, checked and priced. `release` lets the frozen bytes out, once enough persons agreed: as a signed
file, charged to the author's budgets like any other answer. An approval is a permission, never a budget: a
release that the accounts cannot pay is refused whatever was approved. The same release again gives the same
bytes for nothing; a crash in between was charged in full.

It knows neither models nor stores: `service` hands it arrays and says where they come from.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection

from trocar import errors
from trocar.gate import airlock_records, chain, checks, exposures, keys, manifest, plain_text, roles
from trocar.gate.accounts import owner_of
from trocar.gate.airlock_desk import OPEN, Desk, Rules, actor_of
from trocar.gate.airlock_records import Ticket
from trocar.gate.airlock_request import ExportAsk, ExportFacts, RaiseAsk, RaiseFacts, Request
from trocar.gate.airlock_states import Action, Actor, Parties, State, first_state
from trocar.gate.airlock_tables import REQUESTS
from trocar.gate.checks import Check, Checked, Description, Disposition, ExportTerms
from trocar.gate.database import Database
from trocar.gate.exposures import Exposure
from trocar.gate.keys import Principal
from trocar.gate.ledger import Ledger, Replay, Reservation
from trocar.gate.limits import Limits, Payer
from trocar.gate.manifest import Manifest, ManifestPart, SigningKey
from trocar.gate.policy import Lineage, Role, Tier
from trocar.gate.roles import Power
from trocar.sites import Site
from trocar.wire import packing

LEAST_REASON: Final = 10
_ANY_ACCOUNT: Final = (Role.owner, Role.operator)


@dataclass(frozen=True, slots=True)
class Paying:
    """Who pays for a release, as `Ledger.reserve` wants it."""

    payers: tuple[Payer, ...]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Export:
    """A file that may leave: its charge is on disk.

    Attributes:
        payload: safetensors with the signed manifest; the same bytes at every release of the request.
        bits: charged now; 0 when it had left before.
        seq, head: the log's entry of the charge, or of the replay.
        left_bits: what can still be reserved; None when nothing is capped, or when it had left before.
    """

    payload: bytes = field(repr=False)
    ticket: Ticket
    bits: int
    seq: int
    head: str
    left_bits: int | None
    replayed: bool


def _terms(_caller: Principal, _lineage: Lineage) -> ExportTerms:
    return ExportTerms()


def _exposing(_caller: Principal, _lineage: Lineage, _what: ExportFacts, _request: str) -> Exposure:
    return Exposure()


class Airlock(Desk):
    """The whole airlock of one server.

    Args:
        key: signs what leaves.
        paying: the payers and the lineage's limits for a caller, from the policy; may refuse.
        terms: what a caller may export of a lineage, from the policy; may refuse.
        exposing: what a request of this id exposes, and how much of it the policy allows.
        overhead_bits: part of every price, as the ledger wants it.
    """

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        key: SigningKey,
        paying: Callable[[Principal, Lineage], Paying],
        *,
        terms: Callable[[Principal, Lineage], ExportTerms] = _terms,
        exposing: Callable[[Principal, Lineage, ExportFacts, str], Exposure] = _exposing,
        rules: Rules | None = None,
        overhead_bits: int = 256,
        clock: Callable[[], int] = chain.now_ms,
    ) -> None:
        super().__init__(database, rules, clock=clock)
        self._ledger = ledger
        self._key = key
        self._paying = paying
        self._terms = terms
        self._exposing = exposing
        self._overhead_bits = overhead_bits

    @property
    def public_key(self) -> str:
        """What released files are verified with; public."""
        return self._key.public_key

    def submit(self, caller: Principal, ask: ExportAsk) -> Ticket:
        """Freezes, checks and prices what is to leave.

        Raises:
            PolicyRefusal: `export_refused` with each reason when the checks fail: nothing is kept but that it
                was asked. `rank_exhausted` for more rows of a site than may leave. `not_allowed` for a role that does
                not ask.
            ProgramError: `bad_value` for text that cannot be kept, or arrays that are no float32 rows.
            Overloaded: `queue_full` when too many requests of the project are undecided.
        """
        plain_text.require(ask.fingerprint, "fingerprint", most=plain_text.MOST_WORDS)
        for sent in ask.parts:
            plain_text.require(sent.name, "parts", most=plain_text.MOST_WORDS)
            for text in sent.texts:
                plain_text.require(text, "parts", most=plain_text.MOST_WORDS)
        parts, terms = tuple(sent.part() for sent in ask.parts), self._terms(caller, ask.lineage)
        what = ExportFacts(ask.kind, ask.fingerprint, terms.vector_bits, parts)
        ticket = self._enter(caller, ask, what, lambda: _frozen(ask, terms), terms)
        if ticket.state is State.failed:
            raise errors.PolicyRefusal(
                [
                    errors.refusal("export_refused", reason.path, f"{reason.code.value}: {reason.text}")
                    for reason in checks.told(ticket.request.checked.reasons)
                ]
            )
        return ticket

    def price_bits(self, caller: Principal, lineage: Lineage, shapes: Iterable[tuple[int, int]]) -> int:
        """What a release of arrays `[rows, width]` will be charged; asked before any number is read.

        Raises:
            PolicyRefusal: `export_refused` when they are more than one request may hold.
        """
        terms = self._terms(caller, lineage)
        amount = sum(packing.packed_bytes(rows, width, terms.vector_bits) for rows, width in shapes)
        if amount > terms.most_bytes:
            reason = f"{Check.too_many_bytes.value}: {amount} bytes; one request may hold {terms.most_bytes}"
            raise errors.refuse("export_refused", "parts", reason)
        return 8 * amount + self._overhead_bits

    def submit_raise(self, caller: Principal, ask: RaiseAsk) -> Ticket:
        """Asks for larger limits of an account.

        Raises:
            PolicyRefusal: `not_allowed` for an account that is neither the caller's nor their project's, unless
                an owner or operator asks.
            ProgramError, Overloaded: as `submit`.
        """
        self.require_own(caller, ask.owner)
        return self._enter(caller, ask, RaiseFacts(ask.owner, ask.limits), lambda: b"", ExportTerms())

    @staticmethod
    def require_own(caller: Principal, owner: str) -> None:
        """Refuses an account for which the caller may not ask.

        Raises:
            PolicyRefusal: `not_allowed`.
            ProgramError: `bad_value` for what is no account.
        """
        Payer(owner, Limits(None))  # refuses what is no owner
        actor = actor_of(caller)
        own = (f"key:{actor.key_id}", f"project:{actor.project}")
        if owner not in own and actor.role not in _ANY_ACCOUNT:
            raise errors.refuse("not_allowed", "owner", "a researcher asks for the own key or project")

    def release(self, caller: Principal, request_id: str) -> Export:
        """Charges an approved export and hands out its file; again, for nothing, when it had left before.

        Raises:
            NotFound: `airlock_not_found`.
            PolicyRefusal: `not_allowed` for everybody but the key that asked; `budget_exhausted`,
                `rank_exhausted`, `lineage_frozen` or `policy` from the ledger: nothing leaves.
            Conflict: `airlock_state` when it is not approved, or was rejected meanwhile.
            ServerFault: `store_damaged` when anything of it was touched since it was submitted.
        """
        self.expire_old()
        with self._database.read() as connection:
            _, ticket, _, frozen = self._ready(connection, caller, request_id, Action.release)
        what = ticket.request.what
        if not isinstance(what, ExportFacts):
            raise errors.refuse("airlock_state", "", "a raise has no file: it is applied with `apply`")
        held = self._reserve(caller, ticket, what)
        if isinstance(held, Replay):
            ticket = self._mark(caller, request_id)
            return Export(held.payload, ticket, 0, held.head.seq, held.head.hash, None, replayed=True)
        export = self._settled(held, ticket, what, frozen)
        return replace(export, ticket=self._mark(caller, request_id))

    def _enter(
        self,
        caller: Principal,
        ask: ExportAsk | RaiseAsk,
        what: ExportFacts | RaiseFacts,
        frozen: Callable[[], bytes],
        terms: ExportTerms,
    ) -> Ticket:
        actor = self.author(caller, ask.lineage, ask.reason, ask.controls)
        self.expire_old()
        with self._database.write() as connection:
            keys.require_current(connection, caller)
            if airlock_records.count(connection, OPEN, actor) >= self._rules.most_open:
                raise errors.refuse(
                    "queue_full", "", "too many requests of the project wait for a decision",
                    next_step="Withdraw those you no longer need.",
                )  # fmt: skip
            now_ms = self._now_ms(connection)
            request = self._request(connection, actor, ask, what, terms, now_ms)
            parties = Parties(request.kind, actor, frozenset(), (), request.needed)
            failed = request.checked.disposition is Disposition.fail
            if isinstance(what, ExportFacts) and not failed:  # nobody decides on what could not leave
                exposed = self._exposing(caller, ask.lineage, what, request.id)
                exposures.require_room(connection, exposed, owner_of(caller.key_id), ask.lineage.name)
            state = first_state(parties, failed=failed)
            return airlock_records.enter(connection, request, state, b"" if failed else frozen(), now_ms)

    @staticmethod
    def author(caller: Principal, lineage: Lineage, reason: str, controls: str) -> Actor:
        """Who asks, and whether they may ask with these words; asked before anything is spent.

        Raises:
            PolicyRefusal: `not_allowed`.
            ProgramError: `bad_value`.
        """
        plain_text.require(reason, "reason", least=LEAST_REASON)
        plain_text.require(controls, "controls", least=LEAST_REASON)
        actor = actor_of(caller)
        roles.require(caller.role, Power.run)
        if caller.tier is Tier.open and lineage.cap is not None:
            raise errors.refuse(
                "not_allowed", "", "the weights are not open, and the key's tier 'open' has no cap"
            )
        return actor

    def _request(
        self,
        connection: Connection,
        actor: Actor,
        ask: ExportAsk | RaiseAsk,
        what: ExportFacts | RaiseFacts,
        terms: ExportTerms,
        now_ms: int,
    ) -> Request:
        checked, needed, price_bits = Checked(Disposition.review, ()), self._rules.raise_approvers, 0
        if isinstance(what, ExportFacts):
            description = Description(what.kind, what.parts, _left_before(connection, ask.lineage))
            checked = checks.check(description, terms)
            easy = ask.lineage.cap is None and checked.disposition is Disposition.passed
            needed = self._rules.open_approvers if easy else self._rules.approvers
            price_bits = 8 * terms.packed_bytes(description) + self._overhead_bits
        return Request(
            secrets.token_hex(16), actor, ask.lineage, ask.reason, ask.controls, checked, needed, price_bits,
            now_ms, now_ms + self._rules.life_ms, what,
        )  # fmt: skip

    def _reserve(self, principal: Principal, ticket: Ticket, what: ExportFacts) -> Reservation | Replay:
        request = ticket.request
        paying = self._paying(principal, request.lineage)
        return self._ledger.reserve(
            principal,
            request.lineage,
            request.price_bits,
            payers=paying.payers,
            limits=paying.limits,
            request_digest=ticket.digest,
            idempotency_key=f"airlock:{ticket.id}",
            named_by_key=True,
            exposure=self._exposing(principal, request.lineage, what, ticket.id),
            request_id=ticket.id,
        )

    def _settled(self, held: Reservation, ticket: Ticket, what: ExportFacts, frozen: bytes) -> Export:
        try:
            payload = self._file(ticket, what, frozen)
            charge = self._ledger.settle(held, ticket.request.price_bits, payload)
        except errors.TrocarError:
            # if this fails too, the bits stay held, and are charged when this process is gone
            with suppress(errors.TrocarError):
                self._ledger.cancel(held, self._overhead_bits)
            raise
        return Export(
            payload, ticket, charge.spent_bits, charge.seq, charge.head, charge.left_bits, replayed=False
        )

    def _file(self, ticket: Ticket, what: ExportFacts, frozen: bytes) -> bytes:
        tensors, request, head = _tensors(what, frozen), ticket.request, self._ledger.head()
        told = Manifest(
            request=ticket.id,
            kind=what.kind.value,
            lineage=request.lineage.name,
            fingerprint=what.fingerprint,
            author=request.author.key_id,
            bits=what.bits,
            parts=tuple(
                ManifestPart(p.name, str(p.site or ""), p.origin.value, p.rows, p.width, p.texts)
                for p in what.parts
            ),
            approvers=ticket.approvers,
            digest=ticket.digest,
            sha256=manifest.tensor_sha256(tensors),
            charged_bits=request.price_bits,
            ledger_seq=head.seq,
            ledger_head=head.hash,
            submitted_ms=request.submitted_ms,
            released_ms=self._clock(),
            public_key=self._key.public_key,
        )
        return manifest.build(tensors, told, self._key)

    def _mark(self, caller: Principal, request_id: str) -> Ticket:
        """Enters that it left; refused when somebody stopped it meanwhile: charged then, and not handed out."""
        with self._database.write() as connection:
            actor, ticket, after, _ = self._ready(connection, caller, request_id, Action.release)
            if ticket.state is after.enough:
                return ticket
            now_ms = self._now_ms(connection)
            return airlock_records.take(
                connection, ticket, Action.release, after.enough, actor, now_ms=now_ms
            )


def _frozen(ask: ExportAsk, terms: ExportTerms) -> bytes:
    packed = (packing.pack(sent.rows, terms.vector_bits) for sent in ask.parts)
    return b"".join(map(packing.to_bytes, packed))


def _left_before(connection: Connection, lineage: Lineage) -> tuple[Site, ...]:
    """Sites whose rows left a lineage before, or may leave now, whoever asked: people can put them together."""
    left = {one.site for one in exposures.exported(connection, lineage.name)}
    here = REQUESTS.c.lineage == lineage.name
    found = airlock_records.in_states(connection, (State.approved,), here, limit=None)
    what = [t.request.what for t in found]
    may_leave = {site for facts in what if isinstance(facts, ExportFacts) for site in facts.sites}
    return tuple(sorted(left | may_leave, key=str))


def _tensors(what: ExportFacts, frozen: bytes) -> dict[str, npt.NDArray[np.generic]]:
    """The frozen bytes as named arrays: codes as they are, and of each row's scale what a step is worth."""
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    start = 0
    for part in what.parts:
        size = packing.packed_bytes(part.rows, part.width, what.bits)
        packed = packing.from_bytes(frozen[start : start + size], part.rows, part.width, what.bits)
        tensors[f"{part.name}:codes"] = packing.codes(packed, part.width, what.bits)
        tensors[f"{part.name}:scales"] = packing.step_of(packed.scales, what.bits)
        start += size
    return tensors

"""The airlock's use cases: ask that rows or an artifact leave, follow the request, decide on it, fetch the file.

Asking is an admitted request like a run: whatever an answer tells depends on numbers, so it is charged before it is
told, and the overhead stays when the checks refuse. What was charged once may be looked at again for nothing, and
reviewers see everything. The file is charged by the airlock. Nothing here decides anything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

from trocar import errors
from trocar.gate import chain, release, schema, windows
from trocar.gate.airlock_records import Ticket
from trocar.gate.airlock_request import ExportAsk, ExportFacts, RaiseAsk, Request, Sent
from trocar.gate.airlock_states import State
from trocar.gate.checks import ExportKind, Origin
from trocar.gate.gate import Gate
from trocar.gate.handles import ACTIVATIONS, Handle
from trocar.gate.handles import Origin as Way
from trocar.gate.keys import Principal
from trocar.gate.limits import Limits
from trocar.gate.policy import Lineage
from trocar.gate.release import Released
from trocar.gate.schema import Arrays, Field
from trocar.gate.use import Use
from trocar.grants.scope import EXPORT
from trocar.graph.cost import Cost
from trocar.graph.labels import Label
from trocar.service import faults, tickets, ticks
from trocar.service.prepare import digest
from trocar.service.worker import Model, NumbersOrder
from trocar.sites import parse
from trocar.wire import airlock as a
from trocar.wire import results as r

DIGEST_BITS: Final = 256
"""The digest of what was frozen, which its author is told."""
CHECK_BITS: Final = 64
"""Of each part: whatever the checks say of its numbers takes less."""
MOST_LISTED: Final = 1000
MOST_WAIT_S: Final = 2.0
_UNKNOWN: Final = Way(blocks=0, first=True)
"""Of rows whose way nobody wrote down: the worst is assumed."""


class Exports:
    """The airlock of one server.

    Args:
        models: served models by name.
    """

    def __init__(self, gate: Gate, models: Mapping[str, Model]) -> None:
        self._gate = gate
        self._models = models
        self._turn = threading.Lock()  # numbers of one request at a time: they may fill much memory

    # ---- asking ----

    def submit(
        self,
        principal: Principal,
        request: a.ExportRequest,
        idempotency_key: str | None = None,
        request_id: str = "",
    ) -> Released:
        """Freezes, checks and prices the numbers of a handle.

        Raises:
            PolicyRefusal: `export_refused` when the checks fail or it is too much at once; `out_of_scope`,
                `not_allowed`, `budget_exhausted`.
            NotFound: `handle_not_found`, `unknown_model`.
            ProgramError: `wrong_handle`, `bad_value`.
            Overloaded: `queue_full`.
        """
        of = self._gate.handles.find(principal.tenant, request.handle)
        model, order = self._model_of(of), _numbers_of(of)
        lineage = self._gate.lineage(model.facts)
        self._gate.airlock.author(principal, lineage, request.reason, request.controls)
        price_bits = self._gate.airlock.price_bits(principal, lineage, map(_shape, order.fields))
        use = Use({"$": EXPORT}, {f"handle[{i}]": site for i, site in enumerate(of.shapes)})
        principal.scope.require(
            model=model.facts.name, ops=use.ops, sites=use.sites, bits=price_bits, now_ms=chain.now_ms()
        )
        cost = self._cost(order)
        hold = self._gate.reserve(
            principal, model.facts, model.text, cost, digest(request, {}), idempotency_key, use, request_id
        )
        if isinstance(hold, Released):
            return hold
        started_s, tick_ms = time.monotonic(), self._gate.policy.terms(principal.tier).tick_ms
        kept_bits = None
        try:
            with self._alone():
                try:
                    with faults.reworded(model.facts, frozenset(of.shapes)):
                        arrays = model.worker.numbers(order)
                finally:  # nobody sees before it how long the worker took
                    time.sleep(ticks.rest_s(started_s, tick_ms))
                schema.require(arrays, order.fields)
                ticket = self._gate.airlock.submit(principal, _ask(request, of, lineage, order, arrays))
            kept_bits = cost.total_bits  # from here on whoever asked can look it up
            view = self._seen(principal, ticket.id)
            return self._gate.release(hold, lambda press: press.ticket(view, cost))
        except BaseException as e:
            self._gate.cancel(hold, e, kept_bits=kept_bits)
            raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One request's numbers at a time; whoever finds it taken comes again instead of keeping a connection."""
        if not self._turn.acquire(timeout=MOST_WAIT_S):
            raise errors.full("numbers of another request are being checked", MOST_WAIT_S)
        try:
            yield
        finally:
            self._turn.release()

    def submit_raise(self, principal: Principal, request: a.RaiseRequest) -> Released:
        """Asks for larger limits; nothing of it depends on numbers, so it is free.

        Raises:
            NotFound: `unknown_model`.
            PolicyRefusal: `out_of_scope`; `not_allowed` for an account of somebody else.
            ProgramError: `bad_value` for an account that was never used, or limits that are no larger.
            Overloaded: `queue_full`.
        """
        model = self._model(request.model)
        principal.scope.require(
            model=model.facts.name, ops={"$": EXPORT}, sites={}, bits=0, now_ms=chain.now_ms()
        )
        owner = f"key:{principal.key_id}" if request.owner is None else request.owner
        lineage = self._gate.lineage(model.facts)
        self._gate.airlock.author(principal, lineage, request.reason, request.controls)
        self._gate.airlock.require_own(principal, owner)
        limits = self._raised(request, owner, lineage)
        ask = RaiseAsk(lineage, owner, limits, request.reason, request.controls)
        ticket = self._gate.airlock.submit_raise(principal, ask)
        return release.public(self._seen(principal, ticket.id))

    def _raised(self, request: a.RaiseRequest, owner: str, lineage: Lineage) -> Limits:
        """The limits that are asked for, if they could be applied today."""
        found = (x for x in self._gate.ledger.balances() if (x.owner, x.lineage) == (owner, lineage.name))
        account = next(found, None)
        if account is None:
            raise errors.refuse(
                "bad_value", "owner", f"{owner[:80]!r} has used nothing of {lineage.name!r} yet"
            )
        life = account.limit_bits if request.life_bits is None else request.life_bits
        day = account.day_limit_bits if request.day_bits is None else request.day_bits
        windows.raised(account, Limits(life, day))
        return Limits(life, day)

    def _cost(self, order: NumbersOrder) -> Cost:
        checks = CHECK_BITS * len(order.fields)
        bits = {"overhead": self._gate.policy.overhead_bits, "checks": checks, "digest": DIGEST_BITS}
        numbers = sum(rows * width for rows, width in map(_shape, order.fields))
        rows_read = sum(field.shape[0] for field in order.fields) if order.rows else 0
        return Cost(
            tokens=0, rows_read=rows_read, flops=0, bytes_stored=0, bits_out=bits, total_bits=sum(bits.values()),
            download_bits=numbers * 16,
        )  # fmt: skip

    # ---- looking and deciding ----

    def list(self, principal: Principal, state: str | None = None, limit: int = 100) -> Released:
        """The newest requests that the caller sees.

        Raises:
            ProgramError: `bad_value` for a word that is no state, or a limit outside 1 to 1000.
        """
        if state is not None and state not in list(State):
            near = errors.closest(state, list(State))
            raise errors.refuse("bad_value", "state", f"{state[:40]!r} is not a state", closest=near)
        if not 1 <= limit <= MOST_LISTED:
            raise errors.refuse("bad_value", "limit", f"{limit} is not in 1 to {MOST_LISTED}")
        principal.scope.require_alive(chain.now_ms())
        found = self._gate.airlock.list(principal, state=None if state is None else State(state), limit=limit)
        mine = [ticket for ticket in found if self._in_scope(principal, ticket)]
        limits = {t.request.lineage.name: self._limit_bits(t.request.lineage) for t in mine}
        views = (tickets.view(principal, ticket, limits[ticket.request.lineage.name]) for ticket in mine)
        return release.public(a.TicketsView(tickets=tuple(views)))

    def show(self, principal: Principal, ticket: str) -> Released:
        """A request, and for reviewers all that a decision needs.

        Raises:
            NotFound: `airlock_not_found`.
        """
        return release.public(self._seen(principal, ticket))

    def step(self, principal: Principal, ticket: str, step: a.Step, request: a.StepRequest) -> Released:
        """Signs, approves, rejects, withdraws or applies.

        Raises:
            NotFound: `airlock_not_found`.
            PolicyRefusal: `not_allowed` for who may not.
            Conflict: `airlock_state` when it cannot be done now, or not on what has this digest.
            ProgramError: `missing_field` for an approval without a digest; `bad_value`.
        """
        airlock, seen = self._gate.airlock, self._seen(principal, ticket)
        if step == "approve" and request.digest is None:
            reason = "an approval names the digest of what was looked at"
            raise errors.refuse("missing_field", "digest", reason)
        if request.digest not in (None, seen.digest):
            raise errors.refuse("airlock_state", "digest", "the request is not the one with this digest")
        if step not in ("approve", "reject") and request.words:
            raise errors.refuse("bad_value", "words", f"{step!r} takes no words")
        match step:
            case "approve":
                airlock.approve(principal, ticket, seen.digest, request.words)
            case "reject":
                airlock.reject(principal, ticket, request.words)
            case "sign":
                airlock.sign(principal, ticket)
            case "withdraw":
                airlock.withdraw(principal, ticket)
            case "apply":
                airlock.apply(principal, ticket)
        return self.show(principal, ticket)

    def file(self, principal: Principal, ticket: str) -> Released:
        """The file of an approved export: charged once, and the same bytes again for nothing.

        Raises:
            NotFound: `airlock_not_found`.
            PolicyRefusal: `not_allowed` for everybody but who asked; `budget_exhausted`, `lineage_frozen`, `policy`.
            Conflict: `airlock_state` when it is not approved.
        """
        review = self._gate.airlock.show(principal, ticket)
        request = review.ticket.request
        self._require(principal, request, request.price_bits)
        export = self._gate.airlock.release(principal, ticket)
        if export.replayed:
            export = replace(export, left_bits=self._gate.left_bits(principal, request.lineage))
        charge = r.Charge(
            bits=export.bits,
            seq=export.seq,
            head=export.head,
            left_bits=export.left_bits,
            replayed=export.replayed,
        )
        return release.exported(export.payload, charge)

    def _seen(self, principal: Principal, ticket: str) -> a.TicketView:
        review = self._gate.airlock.show(principal, ticket)
        request = review.ticket.request
        self._require(principal, request)
        return tickets.view(principal, review.ticket, self._limit_bits(request.lineage), review)

    def _require(self, principal: Principal, request: Request, bits: int = 0) -> None:
        """Refuses a credential whose scope does not reach what a request is about."""
        what = request.what
        parts = what.parts if isinstance(what, ExportFacts) else ()
        sites = {f"parts[{i}].site": str(p.site) for i, p in enumerate(parts) if p.site is not None}
        scope = principal.scope
        name = self._name_of(request, scope.models)
        scope.require(model=name, ops={"$": EXPORT}, sites=sites, bits=bits, now_ms=chain.now_ms())

    def _in_scope(self, principal: Principal, ticket: Ticket) -> bool:
        with suppress(errors.PolicyRefusal):
            self._require(principal, ticket.request)
            return True
        return False

    def _limit_bits(self, lineage: Lineage) -> int | None:
        """For life, of all keys together, as it stands now."""
        limits = self._gate.policy.lineage_limits(lineage)
        return self._gate.ledger.balance(lineage.name, (), limits).everyone.limit_bits

    # ---- models ----

    def _name_of(self, request: Request, wanted: frozenset[str] | None) -> str:
        """The served model that a request is about, one of `wanted` if there are several; or else the lineage."""
        what, served = request.what, (model.facts for model in self._models.values())
        if isinstance(what, ExportFacts):
            names = [facts.name for facts in served if facts.fingerprint == what.fingerprint]
        else:
            names = [facts.name for facts in served if facts.lineage == request.lineage.name]
        return min(names, key=lambda name: name not in (wanted or ()), default=request.lineage.name)

    def _model(self, name: str) -> Model:
        if name not in self._models:
            near = errors.closest(name, self._models)
            raise errors.refuse(
                "unknown_model", "model", f"this server does not serve {name!r}", closest=near
            )
        return self._models[name]

    def _model_of(self, of: Handle) -> Model:
        model = self._model(of.model)
        if of.fingerprint != model.facts.fingerprint:
            reason = f"{of.id!r} was made on another model than the {model.facts.name!r} of today"
            raise errors.refuse("wrong_handle", "handle", reason)
        if of.kind == ACTIVATIONS and not of.rows:
            raise errors.refuse("wrong_handle", "handle", f"{of.id!r} holds no row")
        return model


def _shape(field: Field) -> tuple[int, int]:
    """Rows and width; what has one dimension is one row."""
    height, width = field.shape if len(field.shape) > 1 else (1, *field.shape)
    return height, width


def _ask(
    request: a.ExportRequest, of: Handle, lineage: Lineage, order: NumbersOrder, arrays: Arrays
) -> ExportAsk:
    kind = ExportKind.rows if order.rows else ExportKind.artifact
    parts = tuple(_parts(of, order, arrays))
    return ExportAsk(kind, lineage, of.fingerprint, parts, request.reason, request.controls)


def _parts(of: Handle, order: NumbersOrder, arrays: Arrays) -> Iterator[Sent]:
    origin, label = _made(of, order)
    for field in order.fields:
        site = field.name.partition("/")[0]
        way = of.origins.get(site, _UNKNOWN)
        values, leans_on = arrays[field.name], of.leans_on
        yield Sent(field.name, origin, label, values, parse(site), way.blocks, way.first, leans_on=leans_on)


def _made(of: Handle, order: NumbersOrder) -> tuple[Origin, Label]:
    """How the numbers came to be: a fit to activations is a piece of the weights between them."""
    if order.rows:
        return Origin.read, Label.ACT
    return (Origin.activation_fit, Label.WEIGHT) if of.own_targets else (Origin.fit, Label.ACT)


def _numbers_of(handle: Handle) -> NumbersOrder:
    """All numbers of a handle, in the shapes that the gate knows."""
    rows = handle.kind == ACTIVATIONS
    lead = (handle.rows,) if rows else ()
    fields = tuple(
        Field(f"{site}/{name}", "<f4", (*lead, *shape))
        for site, arrays in handle.shapes.items()
        for name, shape in arrays.items()
    )
    return NumbersOrder(handle.tenant, handle.id, rows, fields)

"""`Service`: every use case of a server, one method each, and `exports`, those of the airlock. The API calls nothing
else.

Each method takes the calling principal first and returns `Released`, so an answer that did not pass the gate
cannot be written. Order in every run: prepare (pure), reserve, run, store, release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

from trocar import __version__, errors
from trocar.gate import chain, release
from trocar.gate.gate import Gate, Hold
from trocar.gate.handles import ACTIVATIONS
from trocar.gate.keys import Principal
from trocar.gate.policy import Tier
from trocar.gate.release import Released
from trocar.gate.roles import Power
from trocar.gate.use import Use
from trocar.graph.cost import Cost
from trocar.graph.facts import ModelFacts
from trocar.graph.spec import SPEC
from trocar.service import fits, minting, uses
from trocar.service.exports import Exports
from trocar.service.jobs import Claim, Jobs, Kind, Work
from trocar.service.pace import Pace
from trocar.service.prepare import Prepared, Vectors, digest, prepare
from trocar.service.runs import Run
from trocar.service.sessions import Session, prepare_session, session_cost
from trocar.service.shelf import Shelf
from trocar.service.steps import Request
from trocar.service.views import handle_view, plan_view, tier_view
from trocar.service.worker import Model
from trocar.wire import about
from trocar.wire import requests as q
from trocar.wire import results as r
from trocar.wire.tokens import TokenRequest

MOST_LOGGED: Final = 500
MOST_CODES: Final = 20
SUMMED: Final = tuple(n for n in about.EngineView.model_fields if n != "most_requests_in_a_forward")


class Room(Protocol):
    """Something that is looked after and closed."""

    def check(self) -> list[str]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a use case asks to be admitted: a job of `total` parts at this price."""

    kind: Kind
    total: int
    cost: Cost
    digest: str
    idempotency_key: str | None
    use: Use
    request_id: str


class Service:
    """The use cases of one server.

    Args:
        models: served models.
        gate: keys, ledger, release.
        rooms: what is closed, in this order, when the service closes.
        isolation: whether models run in this process, or in one that has only its frames to speak with.

    Attributes:
        exports: the use cases of the airlock.
    """

    def __init__(
        self,
        models: Sequence[Model],
        gate: Gate,
        rooms: Sequence[Room] = (),
        *,
        isolation: Literal["process", "host"] = "process",
    ) -> None:
        self.gate = gate
        self._isolation = isolation
        self._models: Mapping[str, Model] = {m.facts.name: m for m in models}
        self.exports = Exports(gate, self._models)
        self._rooms = rooms
        self._jobs = Jobs()
        self._shelf = Shelf(gate, self._models)
        self._pace = Pace()
        for model in models:
            gate.declare(model.facts)

    # ---- who asks, and what was refused ----

    def authenticate(self, secret: str | None) -> Principal:
        """Names the caller.

        Raises:
            AuthError: `no_key`, `bad_key`.
        """
        return self.gate.keys.authenticate(secret)

    def refused(self, principal: Principal, request_id: str, error: errors.TrocarError) -> errors.TrocarError:
        """Enters a refusal in the log; gives what the caller is told, which is to wait when there were too many."""
        wait_s = self._pace.wait_s(principal.key_id, self.gate.policy.people.refusals_per_minute)
        if wait_s > 0:
            return errors.slow_down(wait_s)
        first = error.refusals[0]
        detail = {"path": first.path[:MOST_LOGGED], "reason": first.reason[:MOST_LOGGED]}
        codes = [refusal.code for refusal in error.refusals[:MOST_CODES]]
        try:
            self.gate.ledger.refuse(principal.key_id, request_id, codes, detail)
        except errors.ServerFault as e:
            return e
        return error

    # ---- public facts ----

    def health(self) -> Released:
        return release.public(about.HealthView(status="ok", version=__version__))

    def models(self) -> Released:
        return release.public(about.ModelsView(models=tuple(m.facts for m in self._models.values())))

    def capabilities(self) -> Released:
        ops = tuple(
            about.OpView(
                op=row.op,
                group=row.group,
                doc=row.doc,
                gives=row.gives,
                leaves_as=row.declassifier,
                fields=tuple(n for n in row.node.model_fields if n not in ("op", "id")),
            )
            for row in SPEC.values()
        )
        return release.public(
            about.CapabilitiesView(
                version=__version__,
                isolation=self._isolation,
                engines={name: m.engine for name, m in self._models.items()},
                ops=ops,
                fits=get_args(q.FitKind),
                tiers={tier.value: tier_view(self.gate.policy.prices(tier)) for tier in Tier},
                overhead_bits=self.gate.policy.overhead_bits,
                airlock=about.AirlockView(public_key=self.gate.airlock.public_key),
            )
        )

    def tokenize(self, _principal: Principal, request: q.TokenizeRequest) -> Released:
        text = self._model(request.model).text
        ids = tuple(tuple(text.encode_prompt(t, path=f"texts[{i}]")) for i, t in enumerate(request.texts))
        texts = tuple(tuple(text.token_texts(list(row))) for row in ids)
        return release.public(r.TokensView(ids=ids, texts=texts))

    # ---- programs ----

    def plan(self, principal: Principal, request: q.RunRequest, vectors: Vectors) -> Released:
        """What the program would do and cost; nothing runs, nothing is spent."""
        self.gate.require(principal, Power.run)
        model = self._model(request.model)
        prepared = self._prepare(principal, request, vectors, model)
        use = uses.of_run(prepared, model.facts)
        principal.scope.require(
            model=model.facts.name, ops=use.ops, sites=use.sites, bits=0, now_ms=chain.now_ms()
        )
        budget = self.gate.budget(principal, model.facts)
        return release.public(plan_view(prepared, budget))

    def run(
        self,
        principal: Principal,
        request: q.RunRequest,
        vectors: Vectors,
        idempotency_key: str | None,
        request_id: str = "",
    ) -> Released:
        """Admits a program and starts its job."""
        model = self._model(request.model)
        prepared = self._prepare(principal, request, vectors, model)
        ask = _Ask(
            "run",
            prepared.sequences,
            prepared.cost,
            prepared.digest,
            idempotency_key,
            uses.of_run(prepared, model.facts),
            request_id,
        )

        def work(hold: Hold) -> Work:
            ordered = Request.of(hold.reservation.id, principal.tenant, prepared, model)
            return Run(ordered, model, self.gate, self._jobs, hold).work

        return self._admit(principal, model, ask, work)

    def session(
        self,
        principal: Principal,
        request: q.SessionRequest,
        vectors: Vectors,
        idempotency_key: str | None,
        request_id: str = "",
    ) -> Released:
        """Admits programs that run one after another, and starts their job."""
        model = self._model(request.steps[0].model, "steps[0].model")
        prices = self.gate.prices(principal)
        steps = prepare_session(request, vectors, model, self.gate.handles, principal.tenant, prices)
        total = sum(step.sequences for step in steps)
        cost = session_cost([step.cost for step in steps])
        ask = _Ask(
            "session",
            total,
            cost,
            digest(request, vectors),
            idempotency_key,
            uses.of_session(steps, model.facts),
            request_id,
        )

        def work(hold: Hold) -> Work:
            name, tenant = hold.reservation.id, principal.tenant
            requests = tuple(Request.of(f"{name}.{i}", tenant, s, model) for i, s in enumerate(steps))
            return Session(requests, request.keep, model, self.gate, self._jobs, tenant, hold).work

        return self._admit(principal, model, ask, work)

    def fit(
        self,
        principal: Principal,
        request: q.FitRequest,
        idempotency_key: str | None,
        request_id: str = "",
    ) -> Released:
        """Admits a fit on stored rows and starts its job."""
        of = self.gate.handles.find(principal.tenant, request.handle)
        if of.kind != ACTIVATIONS:
            raise errors.refuse("wrong_handle", "handle", f"{request.handle!r} holds a fit, not rows")
        model = self._model(of.model)
        if of.fingerprint != model.facts.fingerprint:
            reason = f"{request.handle!r} was made on another model than the {model.facts.name!r} of today"
            raise errors.refuse("wrong_handle", "handle", reason)
        prices, target = self.gate.prices(principal), None
        if request.target is not None:
            target = self.gate.handles.find(principal.tenant, request.target)
        asked = fits.ask(request, of, target, prices.rules)
        ask = _Ask(
            "fit",
            len(of.shapes),
            asked.cost(prices),
            fits.fit_digest(request),
            idempotency_key,
            uses.of_fit(tuple(of.shapes), request.target_site),
            request_id,
        )

        def work(hold: Hold) -> Work:
            return fits.Fit(asked, model, self.gate, self._jobs, hold).work

        return self._admit(principal, model, ask, work)

    def _admit(self, principal: Principal, model: Model, ask: _Ask, work: Callable[[Hold], Work]) -> Released:
        """Reserves and starts a job, or finds the job or the answer of the same request."""
        # before a job is found too: a narrower token of the same key may not hear what the key asked
        self.gate.require_allowed(principal, model.facts, ask.cost, ask.use)
        key = ask.idempotency_key
        claim = None if key is None else Claim(principal.key_id, key, ask.digest)
        running = self._jobs.running(principal, claim)
        if running is not None:
            return release.public(running, 202)
        self._jobs.require_room(principal.tenant)
        hold = self.gate.reserve(
            principal, model.facts, model.text, ask.cost, ask.digest, key, ask.use, ask.request_id
        )
        if isinstance(hold, Released):
            return release.public(self._jobs.finished(principal, ask.kind, ask.total, hold))
        try:
            tick_ms = self.gate.policy.terms(principal.tier).tick_ms
            view = self._jobs.start(principal, ask.kind, ask.total, work(hold), claim, tick_ms)
        except errors.TrocarError as e:
            self.gate.cancel(hold, e)
            raise
        return release.public(view, 202)

    # ---- jobs and handles ----

    def job(self, principal: Principal, job_id: str) -> Released:
        self.gate.require(principal, Power.run)
        return release.public(self._jobs.view(principal, job_id))

    def job_result(self, principal: Principal, job_id: str, wait_s: float) -> Released:
        """The released bytes, or the job's state with status 202 while it runs.

        Raises:
            ProgramError: `bad_value` for a wait outside 0 to 30 s.
        """
        if not 0.0 <= wait_s <= q.MAX_WAIT_S:
            raise errors.refuse("bad_value", "wait_s", f"{wait_s} is not in 0 to {q.MAX_WAIT_S:g} seconds")
        self.gate.require(principal, Power.run)
        found = self._jobs.wait(principal, job_id, wait_s)
        return found if isinstance(found, Released) else release.public(found, 202)

    def cancel(self, principal: Principal, job_id: str) -> Released:
        self.gate.require(principal, Power.run)
        return release.public(self._jobs.cancel(principal, job_id))

    def handles(self, principal: Principal) -> Released:
        return release.public(self._shelf.list(principal))

    def handle(self, principal: Principal, handle: str) -> Released:
        return release.public(handle_view(self._shelf.find(principal, handle)))

    def erase(self, principal: Principal, handle: str) -> Released:
        return release.public(self._shelf.erase(principal, handle))

    def account(self, principal: Principal) -> Released:
        """The caller's own budgets and ledger entries."""
        return release.public(self.gate.account(principal, {n: m.facts for n, m in self._models.items()}))

    def token(self, principal: Principal, request: TokenRequest) -> Released:
        """A token of the calling key, shown this once."""
        return minting.mint(self.gate, self._pace, principal, request)

    # ---- operators ----

    def engine(self, principal: Principal) -> Released:
        """Batch counters over all models."""
        self.gate.require(principal, Power.operate)
        stats = [m.worker.stats() for m in self._models.values()]
        return release.public(
            about.EngineView(
                most_requests_in_a_forward=max((s.most_requests for s in stats), default=0),
                **{name: sum(getattr(s, name) for s in stats) for name in SUMMED},
            )
        )

    def check(self) -> list[str]:
        """Broken invariants of every room; empty when all is well."""
        workers = [problem for m in self._models.values() for problem in m.worker.check()]
        rooms = [problem for room in self._rooms for problem in room.check()]
        return workers + self._jobs.check() + rooms + self.gate.check()

    def halt(self) -> None:
        """Stops the engines, so that what waits for them fails now; everything else stays open."""
        for model in self._models.values():
            model.worker.halt()

    def close(self) -> None:
        """Stops engines and jobs, then closes stores and ledger."""
        self.halt()
        self._jobs.close()
        self._shelf.close()
        for model in self._models.values():
            model.worker.close()
        for room in self._rooms:
            room.close()
        self.gate.close()

    def _model(self, name: str, path: str = "model") -> Model:
        if name not in self._models:
            near = errors.closest(name, self._models)
            raise errors.refuse("unknown_model", path, f"this server does not serve {name!r}", closest=near)
        return self._models[name]

    def _prepare(
        self, principal: Principal, request: q.RunRequest, vectors: Vectors, model: Model
    ) -> Prepared:
        prices = self.gate.prices(principal)
        return prepare(request, vectors, model, self.gate.handles, principal.tenant, prices)

    @property
    def facts(self) -> Mapping[str, ModelFacts]:
        """Facts of the served models by name."""
        return {name: m.facts for name, m in self._models.items()}

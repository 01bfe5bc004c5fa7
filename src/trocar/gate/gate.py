"""The gate: who calls, what it may cost, and the only way out. One object per server.

A request is admitted by reserving its static price, and ends in exactly one of two ways: `release` rounds, counts,
charges and makes the bytes; `cancel` keeps the overhead and refunds the rest. What a policy says is turned into
prices, payers and limits here; what they mean, the other files of this room know.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from trocar import errors
from trocar.gate import chain, exposing, policy_log, release, roles
from trocar.gate.airlock import Airlock, Paying
from trocar.gate.airlock_desk import Rules as AirlockRules
from trocar.gate.airlock_request import ExportFacts
from trocar.gate.answers import Tongue
from trocar.gate.chain import Entry
from trocar.gate.checks import ExportTerms
from trocar.gate.database import Database
from trocar.gate.exposures import Exposure
from trocar.gate.handles import Handle, Handles
from trocar.gate.keys import Keys, NewToken, Principal
from trocar.gate.ledger import Ledger, Replay, Reservation
from trocar.gate.limits import Limits, Payer
from trocar.gate.manifest import SigningKey
from trocar.gate.policy import Lineage, Policy, Tier
from trocar.gate.release import Press, Priced, Released
from trocar.gate.roles import Power
from trocar.gate.scopes import Scope
from trocar.gate.use import Use
from trocar.graph.cost import Cost, Prices
from trocar.graph.facts import ModelFacts
from trocar.graph.linear_maps import LINEAR_MAPS
from trocar.wire import results as r

log = logging.getLogger(__name__)
ACCOUNT_ENTRIES: Final = 1000
SIGNING_FILE: Final = "tokens.key"
"""The file of the secret that signs tokens; see `tokens.py`."""

_DAY_MS: Final = 86_400_000


def _at_once() -> None:
    """The tick of whoever may know when work is done."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Reserved bits of one admitted request."""

    reservation: Reservation
    cost: Cost
    prices: Prices
    facts: ModelFacts
    tongue: Tongue
    maker: tuple[str, ...]


class Gate:
    """Keys, ledger, airlock and release under one policy.

    Args:
        url: database URL of the ledger.
        policy: prices, limits and rules.
        cap: tier that caps a lineage over all keys when its weights are not open; the policy's when None.
        anchors: a second place, where heads of the log are written down; None for none.
        secrets: folder of the secrets that sign exports and tokens; None for an export key that lives as long as this
            object, and no tokens.

    Raises:
        PolicyRefusal: `policy_loosened` for a policy that lets more leave than the last one, without approvals;
            `limit_changed` for another `lineage_tier`.
        ServerFault: `ledger_unavailable`, `ledger_rolled_back`.
    """

    def __init__(
        self,
        url: str,
        policy: Policy | None = None,
        *,
        cap: Tier | None = None,
        anchors: Path | None = None,
        secrets: Path | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self._cap = Tier(self.policy.data.lineage_tier) if cap is None else cap
        self._token_root = None if secrets is None else secrets / SIGNING_FILE
        self._changing = threading.Lock()
        self._n_layers: dict[str, int] = {}  # by fingerprint
        with ExitStack() as opened:
            self._database = Database(url)
            opened.callback(self._database.close)
            self.keys = Keys(self._database)
            self.handles = Handles(self._database)
            self.ledger = Ledger(self._database, overhead_bits=self.policy.overhead_bits, anchors=anchors)
            opened.callback(self.ledger.close)
            self._signer = SigningKey.made() if secrets is None else SigningKey.in_folder(secrets)
            policy_log.adopt(self._database, self.policy)
            self.airlock = self._airlock()
            self._opened = opened.pop_all()

    def _airlock(self) -> Airlock:
        said = self.policy.outputs.airlock
        return Airlock(
            self._database,
            self.ledger,
            self._signer,
            lambda principal, lineage: Paying(
                self._payers(principal, lineage), self.policy.lineage_limits(lineage)
            ),
            terms=self._export_terms,
            exposing=self._export_exposure,
            rules=AirlockRules(
                approvers=said.approvers, open_approvers=said.open_approvers, life_ms=said.days * _DAY_MS
            ),
            overhead_bits=self.policy.overhead_bits,
        )

    def change_policy(self, policy: Policy) -> None:
        """Goes on under another policy; what was admitted before ends at its own prices.

        Raises:
            PolicyRefusal: `policy_loosened`; `limit_changed` for another overhead, which needs a new start, or
                another `lineage_tier`, which needs a new ledger.
        """
        if policy.overhead_bits != self.policy.overhead_bits:
            reason = f"overhead_bits would be {policy.overhead_bits}, not {self.policy.overhead_bits}"
            raise errors.refuse(
                "limit_changed", "outputs.overhead_bits", reason, next_step="Start the server anew."
            )
        with self._changing:  # what holds is what the log says last
            policy_log.adopt(self._database, policy)
            self.policy = policy
            self.airlock = self._airlock()

    # ---- what the policy says of somebody ----

    def prices(self, principal: Principal) -> Prices:
        """What the caller pays, and the rules that hold for it."""
        return self.policy.prices(principal.tier)

    def lineage(self, facts: ModelFacts) -> Lineage:
        """The secret that a model belongs to."""
        return Lineage(facts.lineage, facts.weight_bits, None if facts.open_weights else self._cap)

    def declare(self, facts: ModelFacts) -> None:
        """Opens the lineage's account when a model is loaded."""
        lineage = self.lineage(facts)
        self._n_layers[facts.fingerprint] = facts.n_layers
        self.ledger.declare(lineage, self.policy.lineage_limits(lineage))

    def require(self, principal: Principal, power: Power) -> None:
        """Refuses a caller whose role does not allow something, or whose key has expired.

        Raises:
            PolicyRefusal: `not_allowed`.
            AuthError: `bad_key`.
        """
        principal.scope.require_alive(chain.now_ms())
        roles.require(principal.role, power)

    def mint(self, principal: Principal, scope: Scope, role: Literal["agent"] | None) -> NewToken:
        """Makes a token of the calling key.

        Raises:
            PolicyRefusal: `not_allowed` where there is no folder for its secret; and what `Keys.mint` raises.
        """
        if self._token_root is None:
            raise errors.refuse("not_allowed", "", "this server signs no tokens: its secret has no place")
        return self.keys.mint(principal, scope, role, root=self._token_root)

    def _payers(self, principal: Principal, lineage: Lineage) -> tuple[Payer, ...]:
        """The caller's key, its project, and every part of its credential that has a limit of its own."""
        own = Payer(f"key:{principal.key_id}", self.policy.limits(principal.tier, lineage))
        project = Payer(
            f"project:{principal.project}", self.policy.project_limits(principal.project, lineage)
        )
        parts = (Payer(sub.owner, Limits(sub.most_bits)) for sub in principal.subaccounts)
        return (own, project, *parts)

    def _export_terms(self, principal: Principal, lineage: Lineage) -> ExportTerms:
        said, tier = self.policy.outputs.airlock, self.policy.terms(principal.tier)
        if lineage.cap is None:
            return ExportTerms(
                first_raw_layer=0, least_blocks=0, own_targets=True, vector_bits=8,
                review_bytes=said.most_bytes, most_bytes=said.most_bytes, maps=(), rows_reviewed=False,
                one_hot_reviewed=False,
            )  # fmt: skip
        return ExportTerms(
            first_raw_layer=self.policy.data.first_raw_layer,
            least_blocks=self.policy.data.least_blocks,
            vector_bits=min(tier.vector_bits, 8),
            review_bytes=said.review_bytes,
            most_bytes=said.most_bytes,
            maps=() if self.policy.data.linear_maps else LINEAR_MAPS,
            rows=tier.raw != "never",
        )

    def left_bits(self, principal: Principal, lineage: Lineage) -> int | None:
        """What the caller can still reserve of a lineage; None when nothing is capped."""
        payers = self._payers(principal, lineage)
        return self.ledger.balance(lineage.name, payers, self.policy.lineage_limits(lineage)).left_bits

    def budget(self, principal: Principal, facts: ModelFacts) -> r.BudgetView:
        """The caller's budget on a model's lineage: its key's, and the tightest of all that it pays from."""
        lineage = self.lineage(facts)
        payers = self._payers(principal, lineage)
        balance = self.ledger.balance(lineage.name, payers, self.policy.lineage_limits(lineage))
        key = balance.payers[0]
        return r.BudgetView(
            tier=principal.tier.value,
            limit_bits=key.limit_bits,
            spent_bits=key.charged_bits,
            left_bits=balance.left_bits,
            day_limit_bits=key.day_limit_bits,
        )

    # ---- one request ----

    def require_allowed(self, principal: Principal, facts: ModelFacts, cost: Cost, use: Use) -> None:
        """Refuses what role, tier or scope do not allow, whatever is left of any budget.

        Raises:
            PolicyRefusal: `out_of_scope`, or `not_allowed` for a role that runs nothing and for an open-tier key on
                weights that are not open.
            AuthError: `bad_key`.
        """
        roles.require(principal.role, Power.run)
        if principal.tier is Tier.open and not facts.open_weights:
            reason = f"the weights of {facts.name!r} are not open, and the key's tier 'open' has no cap"
            raise errors.refuse("not_allowed", "", reason)
        principal.scope.require(
            model=facts.name, ops=use.ops, sites=use.sites, bits=cost.total_bits, now_ms=chain.now_ms()
        )

    def reserve(
        self,
        principal: Principal,
        facts: ModelFacts,
        tongue: Tongue,
        cost: Cost,
        request_digest: str,
        idempotency_key: str | None,
        use: Use,
        request_id: str = "",
    ) -> Hold | Released:
        """Admits a request, or hands back the bytes it already got under this idempotency key.

        Args:
            use: what it touches and exposes.

        Raises:
            PolicyRefusal: `budget_exhausted`, `rank_exhausted`, `policy`, `lineage_frozen`, and those of
                `require_allowed`; nothing is spent.
            Conflict: `idempotency_conflict`, `still_running`.
        """
        self.require_allowed(principal, facts, cost, use)
        lineage = self.lineage(facts)
        admitted = self.ledger.reserve(
            principal,
            lineage,
            cost.total_bits,
            payers=self._payers(principal, lineage),
            limits=self.policy.lineage_limits(lineage),
            request_digest=request_digest,
            idempotency_key=idempotency_key,
            exposure=self._exposure(principal, lineage, facts, use),
            request_id=request_id,
        )
        if isinstance(admitted, Replay):
            left = self.budget(principal, facts).left_bits
            charge = r.Charge(
                bits=0, seq=admitted.head.seq, head=admitted.head.hash, left_bits=left, replayed=True
            )
            return release.replay(admitted.payload, charge)
        return Hold(admitted, cost, self.prices(principal), facts, tongue, principal.credential)

    def _exposure(
        self, principal: Principal, lineage: Lineage, facts: ModelFacts, use: Use
    ) -> Exposure | None:
        """What the structure rules count; of open weights nothing."""
        if lineage.cap is None:
            return None
        return exposing.of_use(self.policy, principal.tier, facts, use)

    def _export_exposure(
        self, principal: Principal, lineage: Lineage, what: ExportFacts, request: str
    ) -> Exposure:
        if lineage.cap is None:
            return Exposure()
        n_layers = self._n_layers.get(what.fingerprint)
        return exposing.of_export(self.policy, principal.tier, what, request, n_layers)

    def release(
        self,
        hold: Hold,
        press: Callable[[Press], Priced],
        made: Sequence[Handle] = (),
        tick: Callable[[], None] = _at_once,
    ) -> Released:
        """Rounds, counts and charges a result; the bytes exist only after the charge is on disk.

        Args:
            press: makes the payload with the one given, which holds the caller's prices.
            made: handles that it tells of; they are there as soon as it is charged, and never before.
            tick: waits for the moment at which it may be known that the work is done.

        Raises:
            RunFailed: `result_not_finite`; the hold stays open: cancel it.
            ServerFault: `ledger_unavailable`, `bad_result`, `internal`.
        """
        priced = press(Press(hold.facts, hold.tongue, hold.prices))
        tick()
        return release.seal(priced, lambda bits, payload: self._settle(hold, bits, payload, made))

    def cancel(
        self,
        hold: Hold,
        fault: BaseException,
        tick: Callable[[], None] = _at_once,
        kept_bits: int | None = None,
    ) -> None:
        """Ends a request that gave nothing: the overhead stays charged, the rest is refunded.

        Args:
            fault: why. A worker whose result was not the declared one freezes what is secret: an honest one never
                does this.
            tick: as for `release`.
            kept_bits: what stays charged; the overhead when None.
        """
        tick()
        try:
            lineage = self.lineage(hold.facts)
            if lineage.cap is not None and _code(fault) == "bad_result":
                log.critical(
                    "ALERT: a result was not what was declared; the lineage %s is frozen", lineage.name
                )
                self.ledger.freeze(lineage.name, "a worker's result was not what was declared")
        finally:
            kept = hold.cost.bits_out["overhead"] if kept_bits is None else kept_bits
            self.ledger.cancel(hold.reservation, kept)

    def _settle(self, hold: Hold, bits: int, payload: bytes, made: Sequence[Handle]) -> r.Charge:
        charge = self.ledger.settle(
            hold.reservation,
            bits,
            payload,
            lambda connection: self.handles.enter(connection, made, hold.maker),
        )
        return r.Charge(bits=charge.spent_bits, seq=charge.seq, head=charge.head, left_bits=charge.left_bits)

    # ---- accounts ----

    def account(self, principal: Principal, models: Mapping[str, ModelFacts]) -> r.LedgerView:
        """The caller's own budgets and entries."""
        entries = self.ledger.latest(principal.key_id, ACCOUNT_ENTRIES)
        return r.LedgerView(
            key=principal.key_id,
            budgets={name: self.budget(principal, facts) for name, facts in models.items()},
            entries=tuple(_entry(e) for e in entries),
            head=self.ledger.head().hash,
        )

    def check(self) -> list[str]:
        """Broken invariants; empty when all is well."""
        return [*self.ledger.check(), *self.airlock.check()]

    def close(self) -> None:
        self._opened.close()


def _code(fault: BaseException) -> str:
    return fault.code if isinstance(fault, errors.TrocarError) else ""


def _entry(entry: Entry) -> r.LedgerEntryView:
    when = datetime.fromtimestamp(entry.time_ms / 1000, tz=UTC).isoformat(timespec="seconds")
    return r.LedgerEntryView(seq=entry.seq, kind=entry.kind, bits=entry.charged_bits, time=when)

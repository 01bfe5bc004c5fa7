"""The gate: who calls, what it may cost, and the only way out. One object per server.

A request is admitted by reserving its static price, and ends in exactly one of two ways: `release` quantises,
counts, charges and makes the bytes; `cancel` keeps the overhead and refunds the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from trocar import errors
from trocar.gate import release
from trocar.gate.answers import Tongue
from trocar.gate.chain import Entry
from trocar.gate.database import Database
from trocar.gate.handles import Handles
from trocar.gate.keys import Keys, Principal
from trocar.gate.ledger import Ledger, Replay, Reservation
from trocar.gate.policy import Lineage, Policy, Role, Tier
from trocar.gate.release import Press, Priced, Released
from trocar.graph.cost import Cost, Prices
from trocar.graph.facts import ModelFacts
from trocar.wire import results as r

ACCOUNT_ENTRIES: Final = 1000


@dataclass(frozen=True, slots=True)
class Hold:
    """Reserved bits of one admitted request."""

    reservation: Reservation
    cost: Cost
    prices: Prices
    facts: ModelFacts
    tongue: Tongue


class Gate:
    """Keys, ledger and release under one policy.

    Args:
        url: database URL of the ledger.
        policy: prices and fractions.
        cap: tier that caps a lineage over all keys when its weights are not open; the policy's when None.
    """

    def __init__(self, url: str, policy: Policy | None = None, *, cap: Tier | None = None) -> None:
        self.policy = policy or Policy()
        self._cap = Tier(self.policy.data.lineage_tier) if cap is None else cap
        self._database = Database(url)
        self.keys = Keys(self._database)
        self.handles = Handles(self._database)
        self.ledger = Ledger(self._database, self.policy)

    def prices(self, principal: Principal) -> Prices:
        """What the caller pays, and the rules that hold for it."""
        return self.policy.prices(principal.tier)

    def lineage(self, facts: ModelFacts) -> Lineage:
        """The secret that a model belongs to."""
        return Lineage(facts.lineage, facts.weight_bits, None if facts.open_weights else self._cap)

    def declare(self, facts: ModelFacts) -> None:
        """Opens the lineage's account when a model is loaded."""
        self.ledger.declare(self.lineage(facts))

    def require_operator(self, principal: Principal) -> None:
        """Refuses a caller who is not an operator."""
        if principal.role is not Role.operator:
            raise errors.refuse(
                "not_allowed", "", f"this needs the role 'operator'; the key has {principal.role.value!r}"
            )

    def budget(self, principal: Principal, facts: ModelFacts) -> r.BudgetView:
        """The caller's lifetime budget on a model's lineage; the tighter of key and lineage."""
        balance = self.ledger.balance(principal, self.lineage(facts))
        return r.BudgetView(
            tier=principal.tier.value,
            limit_bits=balance.key.limit_bits,
            spent_bits=balance.key.charged_bits,
            left_bits=balance.left_bits,
        )

    def reserve(
        self,
        principal: Principal,
        facts: ModelFacts,
        tongue: Tongue,
        cost: Cost,
        request_digest: str,
        idempotency_key: str | None,
    ) -> Hold | Released:
        """Admits a request, or hands back the bytes it already got under this idempotency key.

        Raises:
            PolicyRefusal: `budget_exhausted`, or `not_allowed` for an open-tier key on weights that are not
                open; nothing is spent.
            Conflict: `idempotency_conflict`, `still_running`.
        """
        if principal.tier is Tier.open and not facts.open_weights:
            reason = f"the weights of {facts.name!r} are not open, and the key's tier 'open' has no cap"
            raise errors.refuse("not_allowed", "", reason)
        admitted = self.ledger.reserve(
            principal,
            self.lineage(facts),
            cost.total_bits,
            request_digest=request_digest,
            idempotency_key=idempotency_key,
        )
        if isinstance(admitted, Replay):
            left = self.budget(principal, facts).left_bits
            charge = r.Charge(
                bits=0, seq=admitted.head.seq, head=admitted.head.hash, left_bits=left, replayed=True
            )
            return release.replay(admitted.payload, charge)
        return Hold(admitted, cost, self.prices(principal), facts, tongue)

    def release(self, hold: Hold, press: Callable[[Press], Priced]) -> Released:
        """Rounds, counts and charges a result; the bytes exist only after the charge is on disk.

        Args:
            press: makes the payload with the one given, which holds the caller's prices.

        Raises:
            RunFailed: `result_not_finite`; the hold stays open: cancel it.
            ServerFault: `ledger_unavailable`, `bad_result`, `internal`.
        """
        priced = press(Press(hold.facts, hold.tongue, hold.prices))
        return release.seal(priced, lambda bits, payload: self._settle(hold, bits, payload))

    def cancel(self, hold: Hold) -> None:
        """Ends a request that gave nothing: the overhead stays charged, the rest is refunded."""
        self.ledger.cancel(hold.reservation, hold.cost.bits_out["overhead"])

    def account(self, principal: Principal, models: Mapping[str, ModelFacts]) -> r.LedgerView:
        """The caller's own budgets and entries."""
        entries = self.ledger.latest(principal.key_id, ACCOUNT_ENTRIES)
        return r.LedgerView(
            key=principal.key_id,
            budgets={name: self.budget(principal, facts) for name, facts in models.items()},
            entries=tuple(_entry(e) for e in entries),
            head=self.ledger.head().hash,
        )

    def close(self) -> None:
        self._database.close()

    def _settle(self, hold: Hold, bits: int, payload: bytes) -> r.Charge:
        charge = self.ledger.settle(hold.reservation, bits, payload)
        return r.Charge(bits=charge.spent_bits, seq=charge.seq, head=charge.head, left_bits=charge.left_bits)


def _entry(entry: Entry) -> r.LedgerEntryView:
    when = datetime.fromtimestamp(entry.time_ms / 1000, tz=UTC).isoformat(timespec="seconds")
    return r.LedgerEntryView(seq=entry.seq, kind=entry.kind, bits=entry.charged_bits, time=when)

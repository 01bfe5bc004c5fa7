"""One open airlock per test: people with keys, a ledger that pays, and something to ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trocar.gate.airlock import Airlock, ExportAsk, Paying, RaiseAsk
from trocar.gate.airlock_desk import Rules
from trocar.gate.airlock_records import Ticket
from trocar.gate.airlock_request import ExportFacts, Sent
from trocar.gate.airlock_states import State
from trocar.gate.checks import ExportKind, ExportTerms, Origin
from trocar.gate.database import Database
from trocar.gate.exposing import of_export
from trocar.gate.exposures import Exposure
from trocar.gate.keys import Keys, Principal
from trocar.gate.ledger import Ledger
from trocar.gate.limits import Limits, Payer
from trocar.gate.manifest import SigningKey
from trocar.gate.policy import Lineage, Policy, Role, Tier
from trocar.graph.labels import Label
from trocar.sites import Site

SECRET = Lineage("base", 100_000_000, Tier.external)
OPEN = Lineage("open", 100_000_000, None)
REASON, CONTROLS = "Figure 3 of the paper.", "One laptop, deleted after."
OVERHEAD = 256
DAY_MS = 86_400_000
NOW_MS = 40_000 * DAY_MS


def ranked(key_ppm: int, lineage_ppm: int) -> Policy:
    """A policy with these shares of a site's width for one key, and for all keys."""
    terms = {"life_ppm": 1_000, "day_ppm": 250, "rank_ppm": key_ppm, "tick_ms": 100}
    tiers = dict.fromkeys(("trusted", "external", "agent"), terms)
    return Policy.model_validate({"people": {"tiers": tiers}, "data": {"lineage_rank_ppm": lineage_ppm}})


@dataclass
class Clock:
    now_ms: int = NOW_MS

    def __call__(self) -> int:
        return self.now_ms


@dataclass
class Room:
    """A database, its people and its airlock; the author may spend `budget_bits`."""

    url: str
    rules: Rules = field(default_factory=Rules)
    terms: ExportTerms = field(default_factory=ExportTerms)
    budget_bits: int = 1_000_000
    policy: Policy = field(default_factory=lambda: ranked(1_000_000, 1_000_000))
    clock: Clock = field(default_factory=Clock)
    signing: SigningKey = field(default_factory=lambda: SigningKey(bytes(range(32))))

    def __post_init__(self) -> None:
        self.open()
        self.author = self.person("ann")
        self.bea = self.person("bea", Role.checker, project="board", tenant="house")
        self.cid = self.person("cid", Role.checker, project="board", tenant="house")
        self.boss = self.person("boss", Role.owner, project="board", tenant="house")

    def open(self) -> None:
        self.database = Database(self.url)
        self.keys = Keys(self.database)
        self.ledger = Ledger(self.database, overhead_bits=OVERHEAD, clock=self.clock)
        self.airlock = Airlock(
            self.database, self.ledger, self.signing, self.paying, terms=lambda *_: self.terms,
            exposing=self.exposing, rules=self.rules, clock=self.clock,
        )  # fmt: skip

    def exposing(self, who: Principal, lineage: Lineage, what: ExportFacts, request: str) -> Exposure:
        if lineage.cap is None:
            return Exposure()
        return of_export(self.policy, who.tier, what, request, None)

    def paying(self, who: Any, lineage: Lineage) -> Paying:
        mine = Limits(None if lineage.cap is None else self.budget_bits)
        return Paying((Payer(f"key:{who.key_id}", mine),), Limits(lineage.cap and 10_000_000))

    def crash(self) -> None:
        self.database.close()
        self.open()

    def person(
        self, holder: str, role: Role = Role.researcher, *, project: str = "probe", tenant: str = "lab",
        tier: Tier = Tier.external,
    ) -> Principal:  # fmt: skip
        """A new key in somebody's hand."""
        return self.keys.create(tenant, tier, role, project=project, holder=holder).principal

    def sent(self, name: str = "rows", site: str = "resid_post", layer: int = 12, **more: Any) -> Sent:
        values = np.random.default_rng(len(name)).normal(size=(10, 64)).astype(np.float32)
        fields = {"label": Label.ACT, "values": values, "site": Site(site, layer), **more}
        return Sent(name, Origin.read, **fields)

    def rows(self, *parts: Sent, **changes: Any) -> ExportAsk:
        asked = ExportAsk(ExportKind.rows, SECRET, "sha256:1", parts or (self.sent(),), REASON, CONTROLS)
        return replace(asked, **changes)

    def probe(self, **changes: Any) -> ExportAsk:
        values = np.linspace(-1, 1, 64, dtype=np.float32)
        part = Sent(
            "resid_post.12/probe", Origin.fit, Label.ACT, values, Site("resid_post", 12), texts=("a", "b")
        )
        return replace(self.rows(part), kind=ExportKind.artifact, **changes)

    def raised(self, bits: int = 2_000_000, owner: str = "", **changes: Any) -> RaiseAsk:
        asked = RaiseAsk(SECRET, owner or f"key:{self.author.key_id}", Limits(bits), REASON, CONTROLS)
        return replace(asked, **changes)

    def submit(self, ask: ExportAsk | None = None, who: Principal | None = None) -> Ticket:
        return self.airlock.submit(who or self.author, ask or self.rows())

    def look(self, ticket: Ticket) -> State:
        return self.airlock.show(self.bea, ticket.id).ticket.state

    def agree(self, ticket: Ticket, *people: Principal) -> Ticket:
        for one in people or (self.bea, self.cid):
            ticket = self.airlock.approve(one, ticket.id, ticket.digest)
        return ticket

    def release(self, ticket: Ticket, who: Principal | None = None) -> Any:
        return self.airlock.release(who or self.author, ticket.id)

    def charged(self, who: Principal | None = None) -> int:
        """Bits charged to a key, all lineages together."""
        owner = f"key:{(who or self.author).key_id}"
        return sum(a.charged_bits for a in self.ledger.balances() if a.owner == owner)

    def steps(self, ticket: Ticket) -> list[str]:
        """What the log says of a request."""
        found = self.ledger.entries(request_id=ticket.id, limit=1000)
        return [json.loads(e.detail)["action"] for e in found if e.kind == "airlock"]

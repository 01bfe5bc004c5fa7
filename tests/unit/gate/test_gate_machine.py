"""Random histories of one ledger, against a model that is only dictionaries."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gate_room import Room
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trocar.errors import TrocarError
from trocar.gate.ledger import Replay, Reservation
from trocar.gate.policy import Lineage, Policy, Tier

KEY = st.integers(0, 2)
OVERHEAD = 10


@dataclass
class Running:
    handle: Reservation
    key: int
    bits: int
    idem: tuple[int, str] | None
    body: str


class LedgerMachine(RuleBasedStateMachine):
    """Keys 0 (external, 1000 bits), 1 (agent, 100) and 2 (open) share 1500 bits of one lineage."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="gate"))
        policy = Policy(overhead_bits=OVERHEAD, trusted_ppm=1500)
        self.gate = Room(self.directory / "l.db", policy, Lineage("base", 1_000_000, Tier.trusted))
        self.limits = (1000, 100, 1500)
        self.charged, self.emitted, self.revoked = [0, 0, 0], [0, 0, 0], [False] * 3
        self.running: list[Running] = []
        self.ended: list[Reservation] = []
        self.answers: dict[tuple[int, str], tuple[str, bytes]] = {}
        self.seen: dict[Any, int] = {}

    @initialize()
    def keys(self) -> None:
        self.who = [self.gate.key(tier) for tier in (Tier.external, Tier.agent, Tier.open)]

    def teardown(self) -> None:
        self.gate.database.close()
        shutil.rmtree(self.directory)

    def held(self, key: int) -> int:
        return sum(r.bits for r in self.running if r.key == key)

    def expected(self, key: int, bits: int, name: tuple[int, str] | None, body: str) -> str:
        running = next((r for r in self.running if name and r.idem == name), None)
        if self.revoked[key]:
            return "bad_key"
        if running:
            return "still_running" if running.body == body else "idempotency_conflict"
        if name in self.answers:
            return "replay" if self.answers[name][0] == body else "idempotency_conflict"
        mine = self.charged[key] + self.held(key) + bits > self.limits[key]
        everyone = sum(self.charged) + sum(map(self.held, range(3))) + bits > 1500
        return "budget_exhausted" if mine or everyone else "reservation"

    @rule(
        key=KEY,
        bits=st.integers(OVERHEAD, 400),
        idem=st.sampled_from([None, "a", "b"]),
        body=st.sampled_from("xy"),
    )
    def reserve(self, key: int, bits: int, idem: str | None, body: str) -> None:
        name = None if idem is None else (key, idem)
        expected = self.expected(key, bits, name, body)
        if expected not in ("reservation", "replay"):
            self.refused(expected, lambda: self.gate.ask(self.who[key], bits, body, idem))
            return
        got = self.gate.ask(self.who[key], bits, body, idem)
        if isinstance(got, Replay):
            assert expected == "replay"
            assert name is not None
            assert got.payload == self.answers[name][1]
        else:
            assert expected == "reservation"
            self.running.append(Running(got, key, bits, name, body))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), delivered=st.booleans())
    def settle(self, data: st.DataObject, delivered: bool) -> None:
        job = data.draw(st.sampled_from(self.running))
        spent = data.draw(st.integers(OVERHEAD, job.bits))
        payload = data.draw(st.binary(max_size=8))
        if self.revoked[job.key]:
            self.refused("bad_key", lambda: self.gate.ledger.settle(job.handle, spent, payload))
            return
        charge = self.gate.ledger.settle(job.handle, spent, payload)
        assert charge.spent_bits == spent
        self.end(job, spent)
        if job.idem:
            self.answers[job.idem] = (job.body, payload)
        if delivered:  # or the process died between the charge and the emission
            self.emitted[job.key] += spent

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.gate.ledger.cancel(job.handle, OVERHEAD)
        self.end(job, OVERHEAD)

    @rule()
    def crash_and_recover(self) -> None:
        self.gate.crash()
        for job in list(self.running):
            self.end(job, job.bits)

    @rule(key=KEY)
    def revoke(self, key: int) -> None:
        self.gate.keys.revoke(self.who[key].key_id)
        self.revoked[key] = True

    @precondition(lambda self: self.running)
    @rule(over=st.integers(1, 2**62))
    def overcharge(self, over: int) -> None:
        job = self.running[-1]
        self.refused("bad_bits", lambda: self.gate.ledger.settle(job.handle, job.bits + over, b""))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def end_twice(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.ended))
        self.refused("reservation_closed", lambda: self.gate.ledger.settle(handle, OVERHEAD, b""))
        self.refused("reservation_closed", lambda: self.gate.ledger.cancel(handle, OVERHEAD))

    def end(self, job: Running, charged: int) -> None:
        self.running.remove(job)
        self.ended.append(job.handle)
        self.charged[job.key] += charged

    def refused(self, code: str, act: Any) -> None:
        with pytest.raises(TrocarError) as e:
            act()
        assert e.value.code == code

    @invariant()
    def the_accounts_are_the_model(self) -> None:
        found = {a.owner: (a.charged_bits, a.held_bits) for a in self.gate.ledger.balances()}
        for key, who in enumerate(getattr(self, "who", ())):
            assert found.get(who.key_id, (0, 0)) == (self.charged[key], self.held(key))
            assert self.emitted[key] <= self.charged[key]
            assert self.charged[key] + self.held(key) <= self.limits[key]
        assert found.get("*", (0, 0)) == (sum(self.charged), sum(map(self.held, range(3))))
        assert sum(found.get("*", (0, 0))) <= 1500

    @invariant()
    def counters_only_grow(self) -> None:
        now: dict[Any, int] = {a.owner: a.charged_bits for a in self.gate.ledger.balances()}
        now["seq"] = self.gate.ledger.head().seq
        assert all(now[name] >= count for name, count in self.seen.items())
        self.seen = now

    @invariant()
    def the_books_are_in_order(self) -> None:
        assert self.gate.ledger.check() == []


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

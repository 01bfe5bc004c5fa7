"""Random histories of one ledger in each kind of database, against a model that is only small records."""

from __future__ import annotations

import copy
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gate_places import place
from gate_room import DAY_MS, MIDNIGHT_MS, Room, refused
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trocar.gate.ledger import Replay, Reservation
from trocar.gate.limits import Limits, Payer
from trocar.gate.policy import Lineage, Tier

KEY = st.integers(0, 2)
OVERHEAD = 10
LINEAGE = Lineage("base", 1_000_000, Tier.trusted)


@dataclass
class Purse:
    """What the model knows of an account; a limit of None is none."""

    life: int | None
    daily: int | None
    asked: tuple[int | None, int | None]
    day: int
    charged: int = 0
    held: int = 0
    today: int = 0

    def begin(self, day: int) -> None:
        if day > self.day:
            self.day, self.today = day, self.held

    def hear(self, limits: Limits) -> bool:
        """Whether configuration asks for less than ever; it is followed then."""
        life, daily = self.asked
        less_life = limits.life_bits is not None and (life is None or limits.life_bits < life)
        less_daily = limits.day_bits is not None and (daily is None or limits.day_bits < daily)
        if less_life:
            self.life, life = min(x for x in (self.life, limits.life_bits) if x is not None), limits.life_bits
        if less_daily:
            self.daily, daily = (
                min(x for x in (self.daily, limits.day_bits) if x is not None),
                limits.day_bits,
            )
        self.asked = (life, daily)
        return less_life or less_daily

    def fits(self, bits: int) -> bool:
        life = self.life is None or self.charged + self.held + bits <= self.life
        return life and (self.daily is None or self.today + bits <= self.daily)


@dataclass
class Running:
    handle: Reservation
    key: int
    bits: int
    idem: tuple[int, str] | None
    body: str


class LedgerMachine(RuleBasedStateMachine):
    """Three keys share a project and a lineage; all have two windows."""

    kind = "sqlite"
    server: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="gate"))
        self.gate = Room(
            place(self.kind, self.directory / "ledger", self.server),
            LINEAGE,
            overhead_bits=OVERHEAD,
            options={"anchors": self.directory / "anchors"},
        )
        self.revoked, self.frozen = [False] * 3, False
        self.emitted = [0, 0, 0]
        self.purses: dict[str, Purse] = {}
        self.running: list[Running] = []
        self.ended: list[Reservation] = []
        self.answers: dict[tuple[int, str], tuple[str, bytes]] = {}
        self.seen: dict[Any, int] = {}
        self.backup: tuple[int, Any] | None = None

    @initialize()
    def keys(self) -> None:
        self.who = [self.gate.key(tier) for tier in (Tier.external, Tier.agent, Tier.open)]
        names = [f"key:{who.key_id}" for who in self.who]
        limits = (Limits(1000, 600), Limits(300), Limits(None, 500), Limits(1300, 900), Limits(1500, None))
        self.config = dict(zip((*names, "project:p", "*"), limits, strict=True))

    def teardown(self) -> None:
        self.gate.ledger.close()
        self.gate.database.close()
        shutil.rmtree(self.directory)

    @property
    def day(self) -> int:
        return self.gate.clock.now_ms // DAY_MS

    def owners(self, key: int) -> tuple[str, ...]:
        return (f"key:{self.who[key].key_id}", "project:p", "*")

    def touch(self, key: int) -> dict[str, Purse]:
        """The purses of a request; what configuration lowered is kept, whatever becomes of the request."""
        config = {owner: self.config[owner] for owner in self.owners(key)}
        purses, lowered = {}, False
        for owner, limits in config.items():
            new = Purse(limits.life_bits, limits.day_bits, (limits.life_bits, limits.day_bits), self.day)
            purses[owner] = copy.copy(self.purses.get(owner, new))
            if purses[owner].hear(limits):
                lowered = True
                purses[owner].begin(self.day)
        if lowered:
            self.purses.update(copy.deepcopy(purses))
        for purse in purses.values():
            purse.begin(self.day)
        return purses

    def expected(self, key: int, name: tuple[int, str] | None, body: str) -> str:
        if self.revoked[key]:
            return "bad_key"
        if self.frozen:
            return "lineage_frozen"
        running = next((r for r in self.running if name and r.idem == name), None)
        if running:
            return "still_running" if running.body == body else "idempotency_conflict"
        if name in self.answers:
            return "replay" if self.answers[name][0] == body else "idempotency_conflict"
        return "budget"

    @rule(
        key=KEY,
        bits=st.integers(OVERHEAD, 400),
        idem=st.sampled_from([None, "a", "b"]),
        body=st.sampled_from("xy"),
    )
    def reserve(self, key: int, bits: int, idem: str | None, body: str) -> None:
        name = None if idem is None else (key, idem)
        *owners, last = self.owners(key)
        payers = tuple(Payer(owner, self.config[owner]) for owner in owners)

        def ask() -> Reservation | Replay:
            who = self.who[key]
            return self.gate.ask(who, bits, body, idem, payers=payers, limits=self.config[last])

        expected = self.expected(key, name, body)
        if expected == "replay":
            assert name is not None
            got = ask()
            assert isinstance(got, Replay)
            assert got.payload == self.answers[name][1]
        elif expected != "budget":
            refused(expected, ask)
        else:
            purses = self.touch(key)
            if not all(purse.fits(bits) for purse in purses.values()):
                refused("budget_exhausted", ask)
                return
            held = ask()
            assert isinstance(held, Reservation)
            for owner, purse in purses.items():
                purse.held += bits
                purse.today += bits
                self.purses[owner] = purse
            self.running.append(Running(held, key, bits, name, body))

    @rule(key=KEY, bits=st.integers(OVERHEAD, 120))
    def reserve_little(self, key: int, bits: int) -> None:
        """Most histories should have something running."""
        self.reserve(key, bits, None, "x")

    @precondition(lambda self: self.running)
    @rule(days=st.sampled_from([1 / 24, 1, 2]), bits=st.integers(OVERHEAD, 60))
    def let_it_run_over_midnight(self, days: float, bits: int) -> None:
        self.gate.clock.pass_days(days)
        self.reserve(self.running[-1].key, bits, None, "x")

    @precondition(lambda self: self.running)
    @rule(data=st.data(), delivered=st.booleans())
    def settle(self, data: st.DataObject, delivered: bool) -> None:
        job = data.draw(st.sampled_from(self.running))
        spent = data.draw(st.integers(OVERHEAD, job.bits))
        payload = data.draw(st.binary(max_size=8))
        if self.revoked[job.key] or self.frozen:
            code = "bad_key" if self.revoked[job.key] else "lineage_frozen"
            refused(code, lambda: self.gate.ledger.settle(job.handle, spent, payload))
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

    @rule(tidily=st.booleans())
    def crash_and_recover(self, tidily: bool) -> None:
        if tidily:
            self.gate.ledger.close()
        self.gate.crash()
        self.charge_all()

    @rule(days=st.sampled_from([1 / 24, 0.5, 1, 1, 2, 40, 3653, -0.5, -1, -40, -3653]))
    def set_the_clock(self, days: float) -> None:
        self.gate.clock.pass_days(days)
        self.gate.clock.now_ms = max(0, self.gate.clock.now_ms)

    @rule(data=st.data(), life=st.none() | st.integers(0, 2000), daily=st.none() | st.integers(0, 1000))
    def configure(self, data: st.DataObject, life: int | None, daily: int | None) -> None:
        self.config[data.draw(st.sampled_from(sorted(self.config)))] = Limits(life, daily)

    @precondition(lambda self: self.purses)
    @rule(data=st.data(), more=st.integers(-1, 300))
    def raise_limits(self, data: st.DataObject, more: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.purses)))
        purse = self.purses[owner]
        life, daily = (None if x is None else max(0, x + more) for x in (purse.life, purse.daily))
        limits = Limits(life, daily)
        sinks = any(new is not None and new < old for new, old in ((life, purse.life), (daily, purse.daily)))

        def act() -> None:
            self.gate.ledger.raise_limits(owner, "base", limits, approval="request-1")

        if sinks:
            refused("bad_value", act)
            return
        act()
        purse.begin(self.day)
        purse.life, purse.daily = life, daily

    @precondition(lambda self: self.purses)
    @rule()
    def freeze_or_thaw(self) -> None:
        if self.frozen:
            self.gate.ledger.thaw("base", key_id="op")
        else:
            self.gate.ledger.freeze("base", "why not")
        self.frozen = not self.frozen

    @rule(key=KEY)
    def refuse(self, key: int) -> None:
        self.gate.ledger.refuse(self.who[key].key_id, "req", ["policy"], {})

    @precondition(lambda self: not self.backup)
    @rule()
    def back_up(self) -> None:
        self.shut()
        self.backup = (self.head_seq, self.gate.place.backup())
        self.gate.open()
        self.charge_all()

    @precondition(lambda self: self.backup)
    @rule()
    def restore_the_backup(self) -> None:
        assert self.backup is not None
        seq, old = self.backup
        self.shut()
        newest = self.gate.place.backup()
        if self.head_seq > seq:
            self.gate.place.restore(old)
            refused("ledger_rolled_back", self.gate.open)
            self.gate.place.restore(newest)
        self.gate.open()
        self.charge_all()
        self.backup = None

    @rule(key=KEY)
    def revoke(self, key: int) -> None:
        self.gate.keys.revoke(self.who[key].key_id)
        self.revoked[key] = True

    @precondition(lambda self: self.running)
    @rule(over=st.integers(1, 2**62))
    def overcharge(self, over: int) -> None:
        job = self.running[-1]
        refused("bad_bits", lambda: self.gate.ledger.settle(job.handle, job.bits + over, b""))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def end_twice(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.ended))
        refused("reservation_closed", lambda: self.gate.ledger.settle(handle, OVERHEAD, b""))
        refused("reservation_closed", lambda: self.gate.ledger.cancel(handle, OVERHEAD))

    def shut(self) -> None:
        self.head_seq = self.gate.ledger.head().seq
        self.gate.ledger.close()
        self.gate.close()

    def charge_all(self) -> None:
        for job in list(self.running):
            self.end(job, job.bits)

    def end(self, job: Running, charged: int) -> None:
        self.running.remove(job)
        self.ended.append(job.handle)
        for owner in self.owners(job.key):
            purse = self.purses[owner]
            purse.begin(self.day)
            purse.held -= job.bits
            purse.charged += charged
            purse.today += charged - job.bits

    @invariant()
    def the_accounts_are_the_model(self) -> None:
        found = {a.owner: a for a in self.gate.ledger.balances()}
        assert found.keys() == self.purses.keys()
        for owner, purse in self.purses.items():
            a = found[owner]
            assert (a.charged_bits, a.held_bits) == (purse.charged, purse.held)
            assert (a.day, a.day_bits) == (purse.day, purse.today)
            assert (a.limit_bits, a.day_limit_bits) == (purse.life, purse.daily)
        for key in range(3 if self.purses else 0):
            mine = self.purses.get(self.owners(key)[0])
            assert self.emitted[key] <= (mine.charged if mine else 0)

    @invariant()
    def counters_only_grow(self) -> None:
        now: dict[Any, int] = {a.owner: a.charged_bits for a in self.gate.ledger.balances()}
        now.update({(a.owner, "day"): a.day for a in self.gate.ledger.balances()})
        now["seq"] = self.gate.ledger.head().seq
        assert all(now[name] >= count for name, count in self.seen.items())
        self.seen = now

    @invariant()
    def the_books_are_in_order(self) -> None:
        assert self.gate.ledger.check() == []


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> type[LedgerMachine]:
    """The machine on one kind of database."""
    kind = request.param
    server = request.getfixturevalue("postgres") if kind == "postgres" else None
    return type("Machine", (LedgerMachine,), {"kind": kind, "server": server})


@pytest.mark.parametrize(("machine", "examples"), [("sqlite", 10), ("postgres", 5)], indirect=["machine"])
def test_a_random_history_is_the_models(machine: type[LedgerMachine], examples: int) -> None:
    assert MIDNIGHT_MS % DAY_MS == 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )

"""Threads and real processes at one budget, and processes killed at random moments."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from gate_places import Place
from gate_processes import emitted_bits, go_file, nest, stop_file
from gate_room import Room

from trocar.errors import TrocarError, refuse
from trocar.gate.accounts import Account
from trocar.gate.keys import Principal
from trocar.gate.policy import Role, Tier

THREADS = 50
LIMIT = 1000
STEP = 7
KILLS = 100


@dataclass
class Outcome:
    granted_bits: int
    refusals: Counter[str]

    def overspent(self) -> bool:
        return self.granted_bits > LIMIT

    def fair(self) -> bool:
        """Every thread was stopped, all by the same refusal, and less than one step was left."""
        return self.refusals == {"budget_exhausted": THREADS} and 0 <= LIMIT - self.granted_bits < STEP


def _race(spend: Callable[[], int]) -> Outcome:
    """Fifty threads take what they can until each was refused."""
    granted: list[int] = []
    refusals: list[str] = []
    begin = threading.Barrier(THREADS)

    def one() -> None:
        begin.wait()
        try:
            while True:
                granted.append(spend())
        except TrocarError as e:
            refusals.append(e.code)

    threads = [threading.Thread(target=one) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return Outcome(sum(granted), Counter(refusals))


def test_fifty_threads_never_overspend_and_see_one_kind_of_refusal(gate: Room) -> None:
    who = gate.key()
    ledger = gate.ledger
    outcome = _race(lambda: ledger.settle(gate.reserve(who, STEP), STEP, b"").spent_bits)
    assert not outcome.overspent()
    assert outcome.fair()
    assert gate.used(who) == (outcome.granted_bits, 0)


def test_a_ledger_that_looks_first_and_acts_later_would_overspend(tmp_path: Path) -> None:
    path = tmp_path / "naive.db"
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("PRAGMA journal_mode=WAL")
        raw.execute("CREATE TABLE account (spent INT)")
        raw.execute("INSERT INTO account VALUES (0)")
    together = threading.Barrier(THREADS)
    naive_step = LIMIT // THREADS + 1

    def naive() -> int:
        with closing(sqlite3.connect(path, timeout=30)) as raw, raw:
            (spent,) = raw.execute("SELECT spent FROM account").fetchone()
            with suppress(threading.BrokenBarrierError):
                together.wait()  # a schedule that nothing in this ledger forbids: all look, then all act
            if spent + naive_step > LIMIT:
                together.abort()  # one thread has ended: the others need not wait for it
                raise refuse("budget_exhausted", "", "")
            raw.execute("UPDATE account SET spent = spent + ?", (naive_step,))
        return naive_step

    outcome = _race(naive)
    assert outcome.overspent()


def test_fifty_threads_under_one_idempotency_key_are_admitted_once(gate: Room) -> None:
    who = gate.key()
    answers: list[str] = []
    begin = threading.Barrier(THREADS)

    def one() -> None:
        begin.wait()
        try:
            answers.append(type(gate.ask(who, 10, idem="k")).__name__)
        except TrocarError as e:
            answers.append(e.code)

    threads = [threading.Thread(target=one) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Counter(answers) == {"Reservation": 1, "still_running": THREADS - 1}
    assert gate.used(who) == (0, 10)


def test_a_reservation_settled_by_many_threads_is_charged_once(gate: Room) -> None:
    who = gate.key()
    held = gate.reserve(who, 100)
    answers: list[str] = []

    def one() -> None:
        try:
            gate.ledger.settle(held, 9, b"")
            answers.append("charged")
        except TrocarError as e:
            answers.append(e.code)

    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Counter(answers) == {"charged": 1, "reservation_closed": 9}
    assert gate.used(who) == (9, 0)


def test_eight_processes_of_fifty_threads_never_overspend(gate: Room) -> None:
    made = gate.keys.create("lab", Tier.external, Role.researcher)
    with nest(gate.place, made.secret) as here:
        racers = [here.start("race") for _ in range(8)]
        for racer in racers:
            here.begun(racer)
        go_file(gate.place.folder).touch()
        assert [here.end(racer, kill=False) for racer in racers] == [(0, "")] * 8
        told = [json.loads(here.said(racer)[-1]) for racer in racers]
    assert Counter(code for t in told for code in t["codes"]) == {"budget_exhausted": 8 * THREADS}
    assert sum(t["total"] for t in told) == LIMIT
    assert sum(t["total"] > 0 for t in told) > 1  # it was a race
    for owner in (f"key:{made.principal.key_id}", "project:p", "*"):
        account = gate.account(owner)
        assert (account.charged_bits, account.held_bits) == (LIMIT, 0)


def test_processes_killed_at_random_never_emit_more_than_was_charged(gate: Room) -> None:
    """A hundred SIGKILLs for each kind of database, beside one process that must not be harmed by any of them."""
    made = gate.keys.create("lab", Tier.open, Role.researcher)
    rng = random.Random()
    with nest(gate.place, made.secret) as here:
        survivor = here.start("storm")
        here.begun(survivor)
        while emitted_bits(gate.place.folder) == 0:
            time.sleep(0.002)
        crowd = [here.start("storm") for _ in range(2)]
        for kill in range(KILLS):
            victim = crowd.pop(0)
            crowd.append(here.start("storm"))
            here.begun(victim)
            time.sleep(rng.uniform(0, 0.1))
            assert here.end(victim, kill=True) == (-signal.SIGKILL, "")
            _emitted_was_charged(gate, made.principal)
            assert kill % 10 or gate.ledger.check() == []
        for one in (survivor, *crowd):
            here.begun(one)
        stop_file(gate.place.folder).touch()
        assert [here.end(one, kill=False) for one in (survivor, *crowd)] == [(0, "")] * 3
    gate.options = {"anchors": gate.place.folder / "anchors"}
    gate.crash()  # starts beside the anchors that all of them wrote
    assert _count(gate.place, "recovered") > 0  # some kills hit between reserve and settle
    assert _emitted_was_charged(gate, made.principal).held_bits == 0
    assert gate.ledger.check() == []


def _emitted_was_charged(gate: Room, who: Principal) -> Account:
    """Also while others go on: what is emitted after the first look is not in it."""
    emitted = emitted_bits(gate.place.folder)
    account = gate.account(f"key:{who.key_id}", "open")
    assert emitted <= account.charged_bits
    return account


def _count(place: Place, kind: str) -> int:
    (row,) = place.sql(f"SELECT count(*) AS n FROM log WHERE kind = '{kind}'")
    return int(row["n"])

"""Random histories of one airlock against a model of a few plain rules, with deaths and passing days."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from airlock_room import DAY_MS, OVERHEAD, Room
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trocar.errors import TrocarError
from trocar.gate.airlock_records import Ticket
from trocar.gate.policy import Role

PRICE = 8 * 10 * (2 + 64) + OVERHEAD
PEOPLE = (
    ("ann", Role.researcher), ("ann", Role.checker), ("ann", Role.agent), ("bea", Role.checker), ("bea", Role.owner),
    ("cid", Role.checker), ("boss", Role.owner), ("dan", Role.researcher), ("dan", Role.checker), ("eve", Role.auditor),
)  # fmt: skip
WHO = st.integers(0, len(PEOPLE) - 1)
WHICH = st.integers(0, 3)
DEATHS = st.sampled_from(["", "", "", "before", "after"])
ASKING = st.sampled_from([0, 2])


class Died(Exception):
    """The process dies here."""


@dataclass
class Asked:
    """What the model knows of one request."""

    ticket: Ticket
    author: int
    due_ms: int
    state: str = "submitted"
    signer: str = ""
    agreed: set[str] = field(default_factory=set)
    payload: bytes = b""

    def persons(self) -> set[str]:
        """Who counts as the author."""
        return {PEOPLE[self.author][0], self.signer}


class AirlockMachine(RuleBasedStateMachine):
    """Ten keys of six persons and four requests at most; the budget is three and a half exports per key."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="airlock"))
        self.room = Room(f"sqlite:///{self.directory / 'l.db'}", budget_bits=3 * PRICE + PRICE // 2)
        self.asked: list[Asked] = []
        self.charged = {0: 0, 2: 0}
        self.emitted = 0

    @initialize()
    def people(self) -> None:
        self.keys = [self.room.person(holder, role) for holder, role in PEOPLE]
        self.submit(0)
        self.submit(2)

    def teardown(self) -> None:
        found = [*self.room.ledger.check(), *self.room.airlock.check()]
        self.room.database.close()
        shutil.rmtree(self.directory)
        assert found == []

    def at(self, which: int) -> Asked:
        return self.asked[which % len(self.asked)]

    def tried(self, act: Any) -> str:
        try:
            act()
        except TrocarError as e:
            return e.code
        return "done"

    def settle_time(self) -> None:
        """Requests that are due are over; the model's only knowledge of time."""
        for one in self.asked:
            if one.due_ms <= self.room.clock.now_ms and one.state in ("unsigned", "submitted", "approved"):
                one.state = "expired"

    @precondition(lambda self: len(self.asked) < 4)
    @rule(author=ASKING)
    def submit(self, author: int) -> None:
        ticket = self.room.submit(who=self.keys[author])
        one = Asked(ticket, author, self.room.clock.now_ms + 14 * DAY_MS)
        one.state = "unsigned" if author == 2 else "submitted"
        self.settle_time()
        self.asked.append(one)

    @precondition(lambda self: self.asked)
    @rule(which=WHICH, who=WHO)
    def sign(self, which: int, who: int) -> None:
        one = self.at(which)
        found = self.tried(lambda: self.room.airlock.sign(self.keys[who], one.ticket.id))
        self.settle_time()
        may = PEOPLE[who][1] is Role.researcher and who != one.author and one.signer != PEOPLE[who][0]
        if one.author == 0 and PEOPLE[who][0] == "ann":
            may = False
        if may and one.state == "unsigned":
            assert found == "done"
            one.state, one.signer = "submitted", PEOPLE[who][0]
        else:
            assert found in ("not_allowed", "airlock_state")

    @precondition(lambda self: self.asked)
    @rule(which=WHICH, who=WHO)
    def approve(self, which: int, who: int) -> None:
        one, (holder, role) = self.at(which), PEOPLE[who]
        found = self.tried(
            lambda: self.room.airlock.approve(self.keys[who], one.ticket.id, one.ticket.digest)
        )
        self.settle_time()
        may = role in (Role.checker, Role.owner) and holder not in one.persons() | one.agreed
        if may and one.state == "submitted":
            assert found == "done"
            one.agreed.add(holder)
            one.state = "approved" if len(one.agreed) == 2 else "submitted"
        else:
            assert found in ("not_allowed", "airlock_state")

    @precondition(lambda self: self.asked)
    @rule(which=WHICH, death=DEATHS)
    def all_agree(self, which: int, death: str) -> None:
        """The way through, which chance alone would hardly find."""
        self.sign(which, 7)
        self.approve(which, 5)
        self.approve(which, 6)
        self.release(which, None, death)

    @precondition(lambda self: self.asked)
    @rule(which=WHICH, who=WHO)
    def reject(self, which: int, who: int) -> None:
        one, (holder, role) = self.at(which), PEOPLE[who]
        found = self.tried(lambda: self.room.airlock.reject(self.keys[who], one.ticket.id, "no"))
        self.settle_time()
        may = role in (Role.checker, Role.owner) and holder not in one.persons()
        if may and one.state in ("unsigned", "submitted", "approved"):
            assert found == "done"
            one.state = "rejected"
        else:
            assert found in ("not_allowed", "airlock_state")

    @precondition(lambda self: self.asked)
    @rule(which=WHICH, who=WHO)
    def withdraw(self, which: int, who: int) -> None:
        one, (holder, role) = self.at(which), PEOPLE[who]
        found = self.tried(lambda: self.room.airlock.withdraw(self.keys[who], one.ticket.id))
        self.settle_time()
        may = who == one.author if role is Role.agent else holder in one.persons()
        if may and one.state in ("unsigned", "submitted", "approved"):
            assert found == "done"
            one.state = "withdrawn"
        else:
            assert found in ("not_allowed", "airlock_state")

    @precondition(lambda self: self.asked)
    @rule(which=WHICH, who=st.sampled_from([None, None, None, 1, 2, 7]), death=DEATHS)
    def release(self, which: int, who: int | None, death: str) -> None:
        one = self.at(which)
        who = one.author if who is None else who
        payload, found = self.let_out(one, who, death)
        self.settle_time()
        if who != one.author:
            assert found == "not_allowed"
            return
        if one.state not in ("approved", "released"):
            assert found == "airlock_state"
            return
        if one.payload:  # paid before: the same bytes, for nothing
            assert found == "done"
            assert payload == one.payload
        elif self.charged[who] + PRICE > self.room.budget_bits:
            assert found == "budget_exhausted"
            return
        else:
            self.charged[who] += PRICE
            if found == "died":
                self.died(one, death, payload)
                return
            assert found == "done"
            one.payload = payload
            self.emitted += PRICE
        one.state = "released"

    def died(self, one: Asked, death: str, payload: bytes) -> None:
        if death == "after":  # charged and kept: it is still to be had
            one.payload = payload
            self.emitted += PRICE

    def let_out(self, one: Asked, who: int, death: str) -> tuple[bytes, str]:
        """The file, or why there is none; a death is followed by the next process."""
        ledger, seen = self.room.ledger, [b""]
        settle = ledger.settle

        def dying(held: Any, bits: int, payload: bytes) -> Any:
            if death == "after":
                settle(held, bits, payload)
                seen[0] = payload
            raise Died

        try:
            with mock.patch.object(ledger, "settle", dying if death else settle):
                return self.room.release(one.ticket, self.keys[who]).payload, "done"
        except TrocarError as e:
            return b"", e.code
        except Died:
            self.room.crash()
            return seen[0], "died"

    @rule(days=st.sampled_from([1, 1, 1, 8]))
    def pass_days(self, days: int) -> None:
        self.room.clock.now_ms += days * DAY_MS

    @rule()
    def crash(self) -> None:
        self.room.crash()

    @invariant()
    def emitted_is_charged_and_within_the_budget(self) -> None:
        if not hasattr(self, "keys"):
            return
        charged = {who: self.room.charged(self.keys[who]) for who in self.charged}
        assert charged == self.charged
        assert self.emitted <= sum(charged.values())
        assert max(charged.values()) <= self.room.budget_bits

    @invariant()
    def what_was_released_was_agreed_to_by_two_others(self) -> None:
        for one in self.asked:
            shown = self.room.airlock.show(self.keys[9], one.ticket.id).ticket  # the auditor sees all
            state = "submitted" if shown.state.value == "seconded" else shown.state.value
            # when one is overdue, the model or the airlock may not have looked since
            assert state == one.state or one.due_ms <= self.room.clock.now_ms
            if state == "released":
                assert len(set(shown.approvers) - one.persons()) >= 2


TestAirlockMachine = pytest.mark.filterwarnings("error")(AirlockMachine.TestCase)
AirlockMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)

"""Several accounts pay for one operation, in two windows; limits move; all of it in a database."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gate_room import DAY_MS, MIDNIGHT_MS, Room, refused

from trocar.gate.limits import Limits, Payer
from trocar.gate.policy import Lineage, Tier

PROJECT = Payer("project:p", Limits(500))
TOKEN = Payer("token:ab12", Limits(300))
YEARS_10 = 3653


def test_every_payer_is_charged_and_refunded(gate: Room) -> None:
    gate.more = (PROJECT, TOKEN)
    who = gate.key()
    held = gate.reserve(who, 200)
    owners = (f"key:{who.key_id}", "project:p", "token:ab12", "*")
    assert [gate.account(o).held_bits for o in owners] == [200] * 4
    charge = gate.ledger.settle(held, 50, b"")
    assert [(gate.account(o).charged_bits, gate.account(o).held_bits) for o in owners] == [(50, 0)] * 4
    assert charge.left_bits == 250  # the tightest: the token's
    gate.ledger.cancel(gate.reserve(who, 100), 1)
    assert [gate.account(o).charged_bits for o in owners] == [51] * 4


@pytest.mark.parametrize("short", ["project:p", "token:ab12"])
def test_all_pay_or_none(gate: Room, short: str) -> None:
    gate.more = tuple(replace(p, limits=Limits(99)) if p.owner == short else p for p in (PROJECT, TOKEN))
    who = gate.key()
    gate.spend(who, 1)
    before = gate.ledger.head(), gate.ledger.balances()
    no = refused("budget_exhausted", lambda: gate.ask(who, 100))
    kind, _, name = short.partition(":")
    assert f"100 bits; the account of {kind} {name} on 'base' has 98 of 99 bits left for life" in no.reason
    assert (gate.ledger.head(), gate.ledger.balances()) == before


def test_an_operation_without_payers_touches_the_lineage_alone(gate: Room) -> None:
    held = gate.reserve(gate.key(), 10, payers=())
    assert [a.owner for a in gate.ledger.balances()] == ["*"]
    assert gate.ledger.settle(held, 10, b"").left_bits == 9990


def test_recovered_reservations_are_charged_to_every_payer(gate: Room) -> None:
    gate.more = (PROJECT,)
    gate.reserve(gate.key(), 100)
    gate.crash()
    assert gate.account("project:p").charged_bits == gate.account("*").charged_bits == 100


def test_a_day_has_its_own_window(gate: Room) -> None:
    gate.day_bits = 300
    who = gate.key()
    gate.spend(who, 200)
    no = refused("budget_exhausted", lambda: gate.ask(who, 101))
    assert f"key {who.key_id} on 'base' has 100 of 300 bits left today" in no.reason
    assert "opens again on 2024-10-05 at 00:00 UTC" in no.next_step
    assert "no day has more than 300" in refused("budget_exhausted", lambda: gate.ask(who, 301)).next_step
    gate.clock.now_ms += DAY_MS - 1
    refused("budget_exhausted", lambda: gate.ask(who, 101))
    gate.clock.now_ms += 1
    gate.spend(who, 300)
    assert gate.of(who).day_bits == 300
    assert gate.used(who) == (500, 0)


def test_days_do_not_refill_a_life(gate: Room) -> None:
    gate.day_bits = 600
    who = gate.key()
    gate.spend(who, 600)
    gate.clock.pass_days(1)
    assert "left for life" in refused("budget_exhausted", lambda: gate.ask(who, 401)).reason
    gate.spend(who, 400)
    gate.clock.pass_days(YEARS_10)
    refused("budget_exhausted", lambda: gate.ask(who, 1))


def test_what_runs_over_midnight_is_held_on_both_days_and_charged_on_the_second(gate: Room) -> None:
    gate.day_bits = 300
    who = gate.key()
    held = gate.reserve(who, 250)
    gate.clock.pass_days(1)
    refused("budget_exhausted", lambda: gate.ask(who, 51))
    gate.ledger.settle(held, 20, b"")
    assert gate.of(who).day_bits == 20
    gate.spend(who, 280)


@pytest.mark.parametrize("days", [-YEARS_10, -1, -1 / DAY_MS])
def test_a_clock_set_back_begins_no_day_again(gate: Room, days: float) -> None:
    gate.day_bits = 300
    who = gate.key()
    gate.spend(who, 300)
    gate.clock.pass_days(days)
    no = refused("budget_exhausted", lambda: gate.ask(who, 1))
    assert "2024-10-05" in no.next_step
    assert gate.used(who) == (300, 0)
    gate.crash()
    refused("budget_exhausted", lambda: gate.ask(who, 1))


def test_a_clock_set_forward_and_back_gives_one_day_not_two(gate: Room) -> None:
    gate.day_bits = 300
    who = gate.key()
    gate.spend(who, 300)
    gate.clock.pass_days(YEARS_10)
    gate.spend(who, 300)
    for back in (YEARS_10, YEARS_10):
        gate.clock.pass_days(-back)
        refused("budget_exhausted", lambda: gate.ask(who, 1))
    assert gate.used(who) == (600, 0)


@pytest.mark.parametrize("now_ms", [-1, 253_370_764_800_000, 2**62])
def test_a_clock_that_is_not_of_this_age_stops_the_ledger(gate: Room, now_ms: int) -> None:
    who = gate.key()
    gate.clock.now_ms = now_ms
    refused("ledger_unavailable", lambda: gate.ask(who, 1))
    gate.clock.now_ms = MIDNIGHT_MS


def test_a_lineage_has_days_too(gate: Room) -> None:
    limits = Limits(10_000, 100)
    who = gate.key()
    gate.spend(who, 100, limits=limits)
    assert "everyone" in refused("budget_exhausted", lambda: gate.ask(who, 1, limits=limits)).reason


def test_a_lower_limit_is_taken_over_and_told(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 100)
    seq = gate.ledger.head().seq
    gate.more = (replace(PROJECT, limits=Limits(400, 50)),)
    own = (Payer(f"key:{who.key_id}", Limits(300, 250)),)
    gate.reserve(who, 150, payers=own)
    assert gate.kinds(seq) == ["limit_lowered", "admitted"]
    (entry, _) = gate.ledger.entries(after_seq=seq)
    assert entry.key_id == who.key_id
    for higher in (Limits(1000), Limits(None, None), Limits(400, 300)):
        payers = (Payer(own[0].owner, higher),)
        no = refused("budget_exhausted", lambda payers=payers: gate.ask(who, 51, payers=payers))
        assert "has 50 of 300" in no.reason
    assert "limit_lowered" not in gate.kinds(seq + 1)


def test_a_limit_stays_lowered_when_the_request_that_brought_it_is_refused(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 800)
    low = (Payer(f"key:{who.key_id}", Limits(500)),)
    no = refused("budget_exhausted", lambda: gate.ask(who, 1, payers=low))
    assert "has 0 of 500" in no.reason
    refused("budget_exhausted", lambda: gate.ask(who, 1))  # what configuration said before does not count
    assert gate.of(who).limit_bits == 500


@pytest.mark.parametrize("low", [Limits(200, 500), Limits(1000, 200)])
def test_one_window_is_lowered_without_the_other(gate: Room, low: Limits) -> None:
    who = gate.key()
    first, less = ((Payer(f"key:{who.key_id}", limits),) for limits in (Limits(1000, 500), low))
    gate.spend(who, 100, payers=first)
    refused("budget_exhausted", lambda: gate.ask(who, 101, payers=less))
    refused("budget_exhausted", lambda: gate.ask(who, 101, payers=first))
    gate.spend(who, 100, payers=first)


def test_declaring_takes_a_lower_limit_over(gate: Room) -> None:
    gate.ledger.declare(gate.lineage, Limits(10_000, None))
    gate.ledger.declare(gate.lineage, Limits(10_000, None))
    gate.clock.pass_days(1)
    gate.ledger.declare(gate.lineage, Limits(7, 5))
    gate.ledger.declare(gate.lineage, Limits(None, None))
    account = gate.account("*")
    assert (account.limit_bits, account.day_limit_bits) == (7, 5)
    assert gate.kinds() == ["lineage_declared", "account_opened", "limit_lowered"]


def test_a_raise_needs_an_approval_and_outlives_the_configuration(gate: Room) -> None:
    who = gate.key()
    owner = f"key:{who.key_id}"
    gate.spend(who, 1000)
    refused("budget_exhausted", lambda: gate.ask(who, 1))
    refused("bad_value", lambda: gate.ledger.raise_limits(owner, "base", Limits(1500), approval=""))
    refused("bad_value", lambda: gate.ledger.raise_limits("key:x", "base", Limits(1500), approval="a"))
    refused("bad_value", lambda: gate.ledger.raise_limits(owner, "base", Limits(900), approval="a"))
    gate.clock.pass_days(1)
    head = gate.ledger.raise_limits(owner, "base", Limits(1500), approval="req-7")
    (entry,) = gate.ledger.entries(after_seq=head.seq - 1)
    assert (entry.kind, entry.key_id) == ("limit_raised", who.key_id)
    assert '"approval":"req-7"' in entry.detail
    gate.spend(who, 400)
    gate.crash()
    gate.spend(who, 100)
    refused("budget_exhausted", lambda: gate.ask(who, 1))
    assert gate.used(who) == (1500, 0)


def test_a_balance_tells_what_a_reservation_would_find(gate: Room) -> None:
    gate.day_bits = 300
    who = gate.key()
    gate.spend(who, 300)
    assert gate.of(who).left_bits == 0
    gate.clock.pass_days(1)
    assert gate.of(who).left_bits == 300
    low = (Payer(f"key:{who.key_id}", Limits(310, 300)),)
    assert gate.ledger.balance("base", low, gate.limits).left_bits == 10
    assert gate.of(who).left_bits == 300  # nothing was stored


def test_payers_of_one_lineage_know_nothing_of_another(gate: Room) -> None:
    gate.more = (PROJECT,)
    who = gate.key()
    gate.spend(who, 500)
    gate.lineage = Lineage("other", 1_000_000, Tier.trusted)
    gate.spend(who, 500)
    assert gate.account("project:p", "other").charged_bits == 500

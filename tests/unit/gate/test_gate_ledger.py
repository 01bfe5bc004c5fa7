from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gate_room import Room, code_of, digest, refused

from trocar.errors import TrocarError
from trocar.gate.ledger import Ledger, Replay, Reservation
from trocar.gate.limits import MAX_BITS
from trocar.gate.policy import Lineage, Role, Tier


def test_settle_charges_what_was_spent_and_refunds_the_rest(gate: Room) -> None:
    who = gate.key()
    held = gate.reserve(who, 600)
    assert gate.used(who) == (0, 600)
    charge = gate.ledger.settle(held, 150, b"payload")
    assert (charge.spent_bits, charge.left_bits) == (150, 850)
    assert gate.used(who) == (150, 0)
    assert (charge.seq, charge.head) == (gate.ledger.head().seq, gate.ledger.head().hash)


def test_over_budget_is_refused_and_nothing_is_spent(gate: Room) -> None:
    who = gate.key()
    gate.reserve(who, 600)
    before = gate.ledger.head(), gate.ledger.balances()
    with pytest.raises(TrocarError, match=r"401 bits; .* has 400 of 1000 bits left for life") as e:
        gate.ask(who, 401)
    assert code_of(e) == "budget_exhausted"
    assert (gate.ledger.head(), gate.ledger.balances()) == before
    gate.reserve(who, 400)


def test_a_lineage_is_one_budget_for_all_keys(gate: Room) -> None:
    gate.lineage = Lineage("base", 1_000_000, Tier.external)
    first, second = gate.key(Tier.trusted), gate.key(Tier.open)
    gate.ledger.settle(gate.reserve(first, 700), 700, b"")
    with pytest.raises(TrocarError, match=r"everyone .* has 300 of 1000"):
        gate.ask(second, 301)
    held = gate.reserve(second, 300)
    assert gate.ledger.settle(held, 299, b"").left_bits == 1
    assert gate.ledger.balance("base", gate.payers(first), gate.limits).left_bits == 1


def test_each_key_has_its_own_budget_and_each_lineage_too(gate: Room) -> None:
    first, second = gate.key(Tier.agent), gate.key(Tier.agent)
    gate.reserve(first, 100)
    gate.reserve(second, 100)
    gate.lineage = Lineage("other", 2_000_000, Tier.trusted)
    gate.reserve(first, 200)
    assert [(a.lineage, a.limit_bits, a.held_bits) for a in gate.ledger.balances()] == [
        ("base", 10_000, 200),
        *[("base", 100, 100)] * 2,
        ("other", 20_000, 200),
        ("other", 200, 200),
    ]


def test_open_weights_are_counted_without_a_cap(gate: Room) -> None:
    gate.lineage = Lineage("open", 10, None)
    who = gate.key(Tier.open)
    charge = gate.ledger.settle(gate.reserve(who, 10**9), 10**9, b"")
    assert charge.left_bits is None
    assert gate.account("*", "open").charged_bits == 10**9


def test_an_uncapped_counter_stops_before_it_leaves_64_bits(gate: Room) -> None:
    gate.lineage = Lineage("open", MAX_BITS, None)
    who = gate.key(Tier.open)
    gate.ledger.settle(gate.reserve(who, MAX_BITS - 5), MAX_BITS - 5, b"")
    for bits in (6, MAX_BITS):
        with pytest.raises(TrocarError) as e:
            gate.ask(who, bits)
        assert code_of(e) == "budget_exhausted"
    gate.reserve(who, 5)
    assert gate.used(who) == (MAX_BITS - 5, 5)


@pytest.mark.parametrize("bits", [0, -1, True, 1.0, "1", MAX_BITS + 1, 2**70])
def test_reserve_takes_only_amounts_of_bits(gate: Room, bits: Any) -> None:
    with pytest.raises(TrocarError) as e:
        gate.ask(gate.key(), bits)
    assert code_of(e) == "bad_bits"


@pytest.mark.parametrize("bits", [0, -1, True, 1.0, 101, MAX_BITS + 1, 2**70])
def test_closing_takes_only_amounts_up_to_what_is_held(gate: Room, bits: Any) -> None:
    who = gate.key()
    held = gate.reserve(who, 100)
    for close in (lambda: gate.ledger.settle(held, bits, b""), lambda: gate.ledger.cancel(held, bits)):
        with pytest.raises(TrocarError) as e:
            close()
        assert code_of(e) == "bad_bits"
    assert gate.used(who) == (0, 100)
    gate.ledger.settle(held, 100, b"")


def test_nothing_is_cheaper_than_the_overhead(gate: Room) -> None:
    gate.ledger = ledger = Ledger(gate.database, overhead_bits=256)
    who = gate.key()
    with pytest.raises(TrocarError, match="256"):
        gate.ask(who, 255)
    held = gate.reserve(who, 300)
    for close in (lambda: ledger.settle(held, 255, b""), lambda: ledger.cancel(held, 255)):
        with pytest.raises(TrocarError, match="256"):
            close()
    assert ledger.cancel(held, 256).left_bits == 744


def test_a_reservation_ends_once(gate: Room) -> None:
    who = gate.key()
    for end in (lambda r: gate.ledger.settle(r, 10, b""), lambda r: gate.ledger.cancel(r, 10)):
        held = gate.reserve(who, 100)
        end(held)
        for again in (lambda r: gate.ledger.settle(r, 10, b""), lambda r: gate.ledger.cancel(r, 10)):
            with pytest.raises(TrocarError) as e:
                again(held)
            assert code_of(e) == "reservation_closed"
    assert gate.used(who) == (20, 0)


def test_a_forged_reservation_is_charged_by_its_row_not_by_its_words(gate: Room) -> None:
    who, other = gate.key(), gate.key()
    held = gate.reserve(who, 100)
    forged = replace(held, reserved_bits=900, key_id=other.key_id)
    with pytest.raises(TrocarError) as e:
        gate.ledger.settle(forged, 101, b"")
    assert code_of(e) == "bad_bits"
    gate.ledger.settle(forged, 100, b"")
    assert gate.used(who) == (100, 0)
    assert gate.used(other) == (0, 0)


def test_a_principal_that_is_not_the_key_is_refused(gate: Room) -> None:
    who = gate.key(Tier.agent)
    for forged in (
        replace(who, tier=Tier.open),
        replace(who, tenant="rival"),
        replace(who, role=Role.operator),
    ):
        with pytest.raises(TrocarError) as e:
            gate.ask(forged, 10)
        assert code_of(e) == "bad_key"


def test_a_revoked_key_gets_nothing_more_and_keeps_its_charges(gate: Room) -> None:
    who = gate.key()
    gate.ledger.settle(gate.reserve(who, 50, idem="done"), 50, b"answer")
    held = gate.reserve(who, 100)
    gate.keys.revoke(who.key_id)
    for act in (
        lambda: gate.ask(who, 10),
        lambda: gate.ask(who, 50, idem="done"),
        lambda: gate.ledger.settle(held, 10, b""),
    ):
        with pytest.raises(TrocarError) as e:
            act()
        assert code_of(e) == "bad_key"
    gate.ledger.cancel(held, 1)
    assert gate.used(who) == (51, 0)


def test_a_replay_gives_the_same_bytes_for_nothing(gate: Room) -> None:
    who = gate.key()
    charge = gate.ledger.settle(gate.reserve(who, 900, idem="k"), 800, b"\x00answer")
    for _ in range(2):
        again = gate.ask(who, 900, idem="k")
        assert isinstance(again, Replay)
        assert (again.payload, again.spent_bits) == (b"\x00answer", 800)
        assert "answer" not in repr(again)
    assert gate.used(who) == (800, 0)
    assert [e.kind for e in gate.ledger.entries(after_seq=charge.seq)] == ["replayed"] * 2


def test_an_answer_is_kept_for_a_month_and_its_name_for_good(gate: Room) -> None:
    who = gate.key()
    gate.ledger.settle(gate.reserve(who, 100, idem="old"), 10, b"x" * 100)
    gate.clock.pass_days(29)
    gate.ledger.settle(gate.reserve(who, 100, idem="new"), 10, b"y")
    assert isinstance(gate.ask(who, 100, idem="old"), Replay)
    gate.clock.pass_days(2)
    gate.ledger.settle(gate.reserve(who, 100, idem="newer"), 10, b"z")
    with pytest.raises(TrocarError) as gone:
        gate.ask(who, 100, idem="old")
    assert code_of(gone) == "replay_expired"
    assert isinstance(gate.ask(who, 100, idem="new"), Replay)
    assert gate.used(who) == (30, 0)
    assert gate.ledger.check() == []


def test_an_idempotency_key_means_one_request(gate: Room) -> None:
    who = gate.key()
    held = gate.reserve(who, 100, "one", "k")
    with pytest.raises(TrocarError) as running:
        gate.ask(who, 100, "one", "k")
    assert code_of(running) == "still_running"
    assert running.value.retryable
    gate.ledger.settle(held, 10, b"")
    base = gate.lineage
    for body, lineage in (("two", base), ("one", Lineage("other", 10**6, None))):
        gate.lineage = lineage
        with pytest.raises(TrocarError) as conflict:
            gate.ask(who, 100, body, "k")
        assert code_of(conflict) == "idempotency_conflict"
    gate.lineage = base
    assert gate.used(who) == (10, 0)


def test_an_idempotency_key_belongs_to_one_api_key(gate: Room) -> None:
    gate.ledger.settle(gate.reserve(gate.key(), 100, idem="k"), 10, b"private")
    assert isinstance(gate.ask(gate.key(), 100, idem="k"), Reservation)


def test_after_cancel_or_crash_an_idempotency_key_is_free(gate: Room) -> None:
    who = gate.key()
    gate.ledger.cancel(gate.reserve(who, 100, idem="k"), 1)
    gate.reserve(who, 100, idem="k")
    gate.crash()
    gate.ledger.settle(gate.reserve(who, 100, idem="k"), 7, b"")
    assert gate.used(who) == (1 + 100 + 7, 0)


@pytest.mark.parametrize("idem", ["", " ", "a b", "a\n", "é", "x" * 201])
def test_idempotency_keys_keep_to_their_grammar(gate: Room, idem: str) -> None:
    with pytest.raises(TrocarError) as e:
        gate.ask(gate.key(), 10, idem=idem)
    assert code_of(e) == "bad_value"


def test_a_request_digest_is_a_digest(gate: Room) -> None:
    with pytest.raises(TrocarError) as e:
        gate.ask(gate.key(), 10, request_digest="abc")
    assert code_of(e) == "bad_value"


def test_what_a_dead_process_held_is_charged_in_full(gate: Room) -> None:
    who = gate.key()
    held = gate.reserve(who, 300)
    gate.crash()
    assert gate.used(who) == (300, 0)
    with pytest.raises(TrocarError) as e:
        gate.ledger.settle(held, 10, b"")
    assert code_of(e) == "reservation_closed"
    assert gate.ledger.recover() == ()


def test_opening_a_second_time_does_not_touch_the_reservations_of_the_living(gate: Room) -> None:
    who = gate.key()
    held = gate.reserve(who, 300)
    second = Room(gate.place)
    try:
        assert second.ledger.recover() == ()
        with pytest.raises(TrocarError) as e:
            second.ledger.settle(held, 10, b"")
        assert code_of(e) == "reservation_closed"
    finally:
        second.database.close()
    gate.ledger.settle(held, 10, b"")
    assert gate.used(who) == (10, 0)


def test_a_living_server_recovers_what_a_dead_neighbour_held(gate: Room) -> None:
    who = gate.key()
    neighbour = Room(gate.place)
    neighbour.reserve(who, 300)
    assert gate.ledger.recover() == ()
    neighbour.database.close()
    assert [c.spent_bits for c in gate.ledger.recover()] == [300]


def test_a_secret_that_changed_its_size_or_cap_is_refused(gate: Room) -> None:
    who = gate.key()
    gate.declare()
    gate.spend(who, 100)
    for lineage in (Lineage("base", 2_000_000, Tier.trusted), Lineage("base", 1_000_000, None)):
        gate.lineage = lineage
        for act in (gate.declare, lambda: gate.ask(who, 10)):
            refused("limit_changed", act)
    gate.lineage = Lineage("base", 1_000_000, Tier.trusted)
    assert gate.used(who) == (100, 0)


def test_a_balance_can_be_read_before_anything_was_spent(gate: Room) -> None:
    who = gate.key(Tier.agent)
    balance = gate.ledger.balance("base", gate.payers(who), gate.limits)
    assert (balance.payers[0].limit_bits, balance.everyone.limit_bits, balance.left_bits) == (
        100,
        10_000,
        100,
    )
    assert gate.ledger.balances() == ()


def test_the_log_tells_every_operation_and_can_be_read_in_parts(gate: Room) -> None:
    who, other = gate.key(), gate.key()
    gate.ledger.settle(gate.reserve(who, 100), 40, b"x")
    gate.ledger.cancel(gate.reserve(other, 100), 5)
    entries = gate.ledger.entries()
    assert [e.seq for e in entries] == list(range(1, len(entries) + 1))
    assert [(e.kind, e.held_bits, e.charged_bits) for e in entries if e.held_bits or e.charged_bits] == [
        ("admitted", 100, 0),
        ("settled", -100, 40),
        ("admitted", 100, 0),
        ("cancelled", -100, 5),
    ]
    kinds = [e.kind for e in gate.ledger.entries(key_id=other.key_id, lineage="base")]
    assert kinds == ["account_opened", "admitted", "cancelled"]
    assert [e.seq for e in gate.ledger.entries(after_seq=2, limit=3)] == [3, 4, 5]
    assert next(e.digest for e in entries if e.kind == "settled") == digest("x")

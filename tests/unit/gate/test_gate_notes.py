"""What else the log tells: refusals, notes of others, and lineages that were stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gate_room import Room, refused

from trocar.gate.chain import NOTES, Kind
from trocar.gate.ledger import Replay


def test_why_a_request_was_refused_is_found_by_its_id(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, request_id="req_1")
    told = gate.ledger.refuse(who.key_id, "req_2", ["rank_exhausted", "policy"], {"site": "z.3", "nodes": 2})
    (entry,) = gate.ledger.entries(request_id="req_2")
    assert (entry.seq, entry.hash, entry.kind, entry.key_id) == (told.seq, told.hash, "refused", who.key_id)
    assert json.loads(entry.detail) == {"codes": ["rank_exhausted", "policy"], "site": "z.3", "nodes": 2}
    assert (entry.held_bits, entry.charged_bits) == (0, 0)
    assert [e.kind for e in gate.ledger.entries(request_id="req_1")] == ["admitted", "settled"]
    assert gate.ledger.entries(request_id="req_3") == ()


def test_a_replay_is_found_by_its_own_request(gate: Room) -> None:
    who = gate.key()
    gate.ledger.settle(gate.reserve(who, 10, idem="k", request_id="first"), 10, b"x")
    assert isinstance(gate.ask(who, 10, idem="k", request_id="second"), Replay)
    assert [e.kind for e in gate.ledger.entries(request_id="second")] == ["replayed"]


def test_looking_for_a_request_uses_an_index(broken_gate: Room) -> None:
    query = "SELECT * FROM log WHERE request_id = 'x' AND seq > 0 ORDER BY seq"
    if broken_gate.place.kind == "sqlite":
        plan = broken_gate.place.sql("EXPLAIN QUERY PLAN " + query)
    else:
        plan = broken_gate.place.sql("SET LOCAL enable_seqscan = off", "EXPLAIN " + query)
    assert "by_request" in str(plan)


@pytest.mark.parametrize("request_id", ["a b", "x" * 65, "é", "a\n"])
def test_a_request_id_keeps_to_its_grammar(gate: Room, request_id: str) -> None:
    refused("bad_value", lambda: gate.ledger.refuse("", request_id, ["policy"], {}))
    refused("bad_value", lambda: gate.ask(gate.key(), 10, request_id=request_id))


def test_others_write_their_steps_into_the_log(gate: Room) -> None:
    for kind in (Kind.policy_changed, Kind.airlock):
        gate.ledger.note(kind, key_id="k", lineage="base", digest="d", detail={"step": "approved", "n": 1})
        gate.ledger.note(kind)
    first, second, *_ = gate.ledger.entries()
    assert (first.kind, first.key_id, first.lineage, first.digest) == ("policy_changed", "k", "base", "d")
    assert (first.detail, second.detail) == ('{"n":1,"step":"approved"}', "{}")


@pytest.mark.parametrize("kind", [k for k in Kind if k not in NOTES])
def test_what_the_ledger_writes_itself_no_one_else_writes(file_gate: Room, kind: Kind) -> None:
    refused("bad_value", lambda: file_gate.ledger.note(kind))


def test_a_detail_is_bounded(gate: Room) -> None:
    long: dict[str, Any] = {"x": "y" * 17_000}
    refused("bad_value", lambda: gate.ledger.note(Kind.airlock, detail=long))
    refused("bad_value", lambda: gate.ledger.refuse("", "", [], long))


def test_nothing_leaves_a_frozen_lineage(gate: Room) -> None:
    who = gate.key()
    gate.ledger.settle(gate.reserve(who, 10, idem="k"), 10, b"x")
    held = gate.reserve(who, 100)
    gate.ledger.freeze("base", "a frame nobody asked for", key_id="op")
    for act in (
        lambda: gate.ask(who, 10),
        lambda: gate.ask(who, 10, idem="k"),
        lambda: gate.ledger.settle(held, 10, b""),
    ):
        no = refused("lineage_frozen", act)
        assert "a frame nobody asked for" in no.reason
    gate.ledger.cancel(held, 1)
    gate.crash()
    refused("lineage_frozen", lambda: gate.ask(who, 10))
    gate.ledger.thaw("base", key_id="op")
    gate.spend(who, 10)
    assert gate.used(who) == (21, 0)
    entries = [e for e in gate.ledger.entries() if e.kind in ("frozen", "thawed")]
    assert [(e.kind, e.key_id, e.lineage) for e in entries] == [
        ("frozen", "op", "base"),
        ("thawed", "op", "base"),
    ]


def test_freezing_twice_is_once_and_thawing_what_is_not_frozen_is_nothing(gate: Room) -> None:
    gate.declare()
    before = gate.ledger.head()
    assert gate.ledger.thaw("base", key_id="op") == before
    frozen = gate.ledger.freeze("base", "first")
    assert gate.ledger.freeze("base", "second") == frozen
    assert "first" in refused("lineage_frozen", lambda: gate.ask(gate.key(), 10)).reason


def test_only_what_exists_is_frozen_and_only_with_a_reason(gate: Room) -> None:
    refused("bad_value", lambda: gate.ledger.freeze("base", "why"))
    refused("bad_value", lambda: gate.ledger.thaw("base", key_id="op"))
    gate.declare()
    for reason in ("", "x" * 201, "a\nb"):
        refused("bad_value", lambda reason=reason: gate.ledger.freeze("base", reason))


def test_an_entry_that_its_books_cannot_hold_is_named(broken_gate: Room) -> None:
    """An attacker who can append to the chain, hash included, still cannot make the tables follow from it."""
    from trocar.gate import chain

    who = broken_gate.key()
    broken_gate.spend(who, 10)
    with broken_gate.database.write() as connection:
        chain.append(connection, Kind.settled, key_id=who.key_id, lineage="base", reservation="x")
    (found,) = broken_gate.ledger.check()
    assert found.startswith(f"entry {broken_gate.ledger.head().seq} is a settled of something")


def test_an_entry_that_moves_bits_under_a_kind_that_moves_none_is_named(broken_gate: Room) -> None:
    from trocar.gate import chain

    with broken_gate.database.write() as connection:
        chain.append(connection, Kind.airlock, charged_bits=5)
    (found,) = broken_gate.ledger.check()
    assert found.startswith("entry 1 is a airlock of")

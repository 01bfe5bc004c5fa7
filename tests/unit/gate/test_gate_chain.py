"""Tampering is done with plain connections, behind the ledger's back."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from typing import Any

import psycopg
import pytest
from gate_room import Room

from trocar.gate.chain import Head
from trocar.gate.exposures import Direction, Exposure, Leaving
from trocar.gate.policy import Tier
from trocar.sites import parse

_WORDS = "time_ms, kind, key_id, lineage, reservation, request_id, held_bits, charged_bits, digest, detail"
_APPEND = f"INSERT INTO log SELECT seq + 1, {_WORDS}, hash, hash FROM log WHERE seq = 13"
_KEY_WORDS = "tenant, tier, role, project, holder, scope, made_by, note, secret_sha256"
_GHOST = "SELECT 'ghost', instance, key_id, lineage, 'open', 5, 0, NULL, '', '', '', '[]', '[]', ''"
EXPOSURE = Exposure((Direction("resid_post.3", "ab" * 32, 2),), (Leaving(parse("z.3"), True),))


def _swap(first: int, second: int) -> list[str]:
    steps = ((first, -1), (second, first), (-1, second))
    return [f"UPDATE log SET seq = {new} WHERE seq = {old}" for old, new in steps]


def _work(gate: Room) -> None:
    """Twelve entries, of eight kinds."""
    gate.keys.revoke(gate.key(Tier.agent).key_id)
    who = gate.key()
    gate.ledger.settle(gate.reserve(who, 100, idem="k", exposure=EXPOSURE, request_id="q"), 40, b"x")
    gate.ask(who, 100, idem="k")
    gate.ledger.cancel(gate.reserve(who, 100), 5)
    gate.reserve(who, 100)
    gate.crash()


@pytest.fixture
def worked(broken_gate: Room) -> Room:
    _work(broken_gate)
    assert len(broken_gate.ledger.entries()) == 13
    assert broken_gate.ledger.check() == []
    return broken_gate


def test_the_chain_can_be_computed_from_its_description_alone(worked: Room) -> None:
    previous = "0" * 64
    for row in worked.place.sql("SELECT * FROM log ORDER BY seq"):
        written = row.pop("hash")
        assert row["previous"] == previous
        text = json.dumps(row, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        assert previous == written
    assert previous == worked.ledger.head().hash


@pytest.mark.parametrize(
    ("statements", "entry"),
    [
        (["UPDATE log SET charged_bits = 1 WHERE seq = 7"], 7),
        (["UPDATE log SET time_ms = time_ms + 1 WHERE seq = 1"], 1),
        (["UPDATE log SET detail = '{}' WHERE seq = 4"], 4),
        (["UPDATE log SET request_id = 'other' WHERE seq = 6"], 6),
        (["UPDATE log SET hash = previous WHERE seq = 5"], 5),
        (["UPDATE log SET previous = hash WHERE seq = 5"], 5),
        (["DELETE FROM log WHERE seq = 1"], 1),
        (["DELETE FROM log WHERE seq = 8"], 8),
        (["DELETE FROM log WHERE seq BETWEEN 5 AND 9"], 5),
        (["DELETE FROM log WHERE seq > 10"], 11),
        (["DELETE FROM log"], 1),
        ([*_swap(6, 9)], 6),
        (["UPDATE log SET seq = 99 WHERE seq = 9"], 9),
        (["UPDATE log SET seq = 0 WHERE seq = 3"], 1),
        ([_APPEND], 14),
        (["UPDATE head SET seq = 12"], 14),
    ],
)  # fmt: skip
def test_the_first_bad_entry_is_named(worked: Room, statements: list[str], entry: int) -> None:
    worked.place.sql(*statements)
    (found,) = worked.ledger.verify()
    assert found.startswith(f"entry {entry} ")
    assert worked.ledger.check() == [found]


@pytest.mark.parametrize("value", ["key_id = x'ff00'", "held_bits = 'many'"])
def test_a_value_of_another_type_is_named_too(broken_file_gate: Room, value: str) -> None:
    _work(broken_file_gate)
    broken_file_gate.place.sql(f"UPDATE log SET {value} WHERE seq = 6")
    (found,) = broken_file_gate.ledger.verify()
    assert found.startswith("entry 6 ")


def _rehash(gate: Room, last: int = 99) -> None:
    """An attacker who knows the format recomputes every hash after an edit, or those up to `last`."""
    previous, statements = "0" * 64, []
    for row in gate.place.sql("SELECT * FROM log ORDER BY seq"):
        if row["seq"] > last:
            break
        row.update(previous=previous)
        del row["hash"]
        text = json.dumps(row, sort_keys=True, separators=(",", ":"))
        previous, before = hashlib.sha256(text.encode()).hexdigest(), previous
        where = f"WHERE seq = {row['seq']}"
        statements.append(f"UPDATE log SET previous = '{before}', hash = '{previous}' {where}")
    if last == 99:
        statements.append(f"UPDATE head SET hash = '{previous}'")
    gate.place.sql(*statements)


def test_an_entry_replaced_together_with_its_hash_is_named_with_its_neighbour(worked: Room) -> None:
    worked.place.sql("UPDATE log SET charged_bits = 1 WHERE seq = 7")
    _rehash(worked, last=7)
    (found,) = worked.ledger.verify()
    assert found.startswith("entry 8 does not follow entry 7")


def test_a_rewritten_chain_is_caught_by_a_head_kept_elsewhere(worked: Room) -> None:
    anchor = worked.ledger.head()
    assert worked.ledger.verify(anchor) == []
    worked.place.sql("UPDATE log SET charged_bits = 1 WHERE seq = 7")
    _rehash(worked)
    assert worked.ledger.verify() == []
    (found,) = worked.ledger.verify(anchor)
    assert found.startswith("entry 13 is not the one that was anchored")


def test_a_restored_copy_is_caught_by_a_later_head(worked: Room) -> None:
    head = worked.ledger.head()
    (found,) = worked.ledger.verify(Head(head.seq + 2, "f" * 64))
    assert found.startswith(f"entry {head.seq + 1} is missing")
    assert worked.ledger.verify(Head(3, worked.ledger.entries()[2].hash)) == []


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE accounts SET charged_bits = charged_bits - 1 WHERE owner <> '*'", "account"),
        ("UPDATE accounts SET held_bits = 7 WHERE owner = '*'", "account */base"),
        ("UPDATE accounts SET limit_bits = 999999 WHERE owner <> '*'", "account"),
        ("UPDATE accounts SET asked_bits = 999999 WHERE owner <> '*'", "account"),
        ("UPDATE accounts SET grace_bits = 999999 WHERE owner <> '*'", "account"),
        ("UPDATE accounts SET day = day + 1 WHERE owner = '*'", "account */base"),
        ("UPDATE accounts SET day_bits = day_bits + 1 WHERE owner = '*'", "account */base"),
        ("UPDATE accounts SET day_limit_bits = 999999 WHERE owner = '*'", "account */base"),
        ("DELETE FROM accounts WHERE owner = '*'", "account */base"),
        ("INSERT INTO accounts VALUES ('ghost', 'base', 0, 0, NULL, NULL, 0, 0, 0, NULL, NULL, 0)",
         "account ghost/base"),
        ("DELETE FROM directions WHERE owner = '*'", "direction */base/resid_post.3"),
        ("UPDATE directions SET rank = 1 WHERE owner = '*'", "direction */base/resid_post.3"),
        ("INSERT INTO exported VALUES ('base', 'z.4', 0)", "exported base/z.4/0"),
        ("DELETE FROM exported", "exported base/z.3/1"),
        ("UPDATE lineages SET frozen = 'x'", "lineage base"),
        ("UPDATE head SET anchored = 1", "head"),
        ("UPDATE reservations SET owners = '[]' WHERE state = 'settled'", "reservation"),
        ("UPDATE reservations SET tokens = '[\"x\"]' WHERE state = 'settled'", "reservation"),
        ("UPDATE reservations SET request_id = 'x' WHERE state = 'settled'", "reservation"),
        ("UPDATE lineages SET secret_bits = secret_bits * 2", "lineage base"),
        ("UPDATE keys SET tier = 'open' WHERE revoked_ms IS NULL", "key"),
        ("UPDATE keys SET secret_sha256 = 'mine' WHERE revoked_ms IS NULL", "key"),
        ("UPDATE keys SET revoked_ms = NULL", "key"),
        (f"INSERT INTO keys SELECT 'ghost', {_KEY_WORDS}, 0, NULL FROM keys LIMIT 1", "key ghost"),
        ("UPDATE reservations SET spent_bits = 1 WHERE state = 'settled'", "reservation"),
        ("UPDATE reservations SET state = 'open' WHERE state = 'cancelled'", "reservation"),
        ("UPDATE reservations SET payload_digest = 'other' WHERE state = 'settled'", "reservation"),
        ("UPDATE reservations SET request_digest = 'other' WHERE state = 'settled'", "reservation"),
        ("DELETE FROM reservations WHERE state = 'recovered'", "reservation"),
        (f"INSERT INTO reservations {_GHOST} FROM reservations LIMIT 1", "reservation ghost"),
    ],
)  # fmt: skip
def test_a_table_that_disagrees_with_the_log_is_named(worked: Room, statement: str, named: str) -> None:
    worked.place.sql(statement)
    assert worked.ledger.verify() == []
    found = worked.ledger.check()
    assert len(found) == 1
    assert found[0].startswith(named)


def test_an_open_reservation_that_vanished_is_named(broken_gate: Room) -> None:
    broken_gate.reserve(broken_gate.key(), 100)
    assert broken_gate.ledger.check() == []
    broken_gate.place.sql("UPDATE reservations SET state = 'settled'")
    assert [f.split()[0] for f in broken_gate.ledger.check()] == ["reservation"]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE accounts SET charged_bits = -1",
        "UPDATE accounts SET held_bits = limit_bits + 1",
        "UPDATE accounts SET held_bits = 1, day_bits = 0",
        "UPDATE accounts SET day_limit_bits = day_bits - 1",
        "UPDATE directions SET rank = 0",
        "UPDATE reservations SET spent_bits = reserved_bits + 1",
        "INSERT INTO head SELECT 2, schema, seq, hash, ledger, anchored FROM head",
    ],
)
def test_the_database_itself_refuses_what_must_not_be(worked: Room, statement: str) -> None:
    with pytest.raises((sqlite3.IntegrityError, psycopg.errors.CheckViolation)):
        worked.place.sql(statement)


def test_every_charge_is_the_head_of_its_moment(gate: Room) -> None:
    who = gate.key()
    charges: list[Any] = [gate.ledger.settle(gate.reserve(who, 10), 3, b"") for _ in range(3)]
    hashes = {e.seq: e.hash for e in gate.ledger.entries()}
    assert [hashes[c.seq] for c in charges] == [c.head for c in charges]
    assert all(gate.ledger.verify(Head(c.seq, c.head)) == [] for c in charges)

"""Whoever writes into the tables changes nothing that leaves: the log remembers what was submitted and by whom."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from airlock_room import Room
from gate_places import Place

from trocar.errors import TrocarError
from trocar.gate.airlock_records import Ticket


@pytest.fixture
def room(anywhere: Place) -> Iterator[Room]:
    opened = Room(anywhere.url)
    yield opened
    opened.database.close()


@pytest.fixture
def path(anywhere: Place) -> Path:
    return anywhere.path


def sql(path: Path, statement: str, *values: Any) -> list[Any]:
    """A program that writes behind the gate's back."""
    with closing(sqlite3.connect(path)) as raw, raw:
        return raw.execute(statement, values).fetchall()


def content(path: Path, ticket: Ticket) -> bytes:
    return bytes(sql(path, "SELECT content FROM airlock_contents WHERE request = ?", ticket.id)[0][0])


def document(path: Path) -> str:
    return str(sql(path, "SELECT document FROM airlock_requests")[0][0])


def one_bit(path: Path, ticket: Ticket) -> None:
    raw = bytearray(content(path, ticket))
    raw[100] ^= 1
    sql(path, "UPDATE airlock_contents SET content = ?", bytes(raw))


def other_bytes_and_their_digest(path: Path, ticket: Ticket) -> None:
    raw = bytes(len(content(path, ticket)))
    digest = hashlib.sha256(document(path).encode() + b"\n" + raw).hexdigest()
    sql(path, "UPDATE airlock_contents SET content = ?", raw)
    sql(path, "UPDATE airlock_requests SET digest = ?", digest)


def no_content(path: Path, _: Ticket) -> None:
    sql(path, "DELETE FROM airlock_contents")


def more_content(path: Path, ticket: Ticket) -> None:
    sql(path, "UPDATE airlock_contents SET content = ?", content(path, ticket) + b"W")


def retold(path: Path, **fields: Any) -> None:
    told = json.loads(document(path)) | fields
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    sql(path, "UPDATE airlock_requests SET document = ?", text)


def another_reason(path: Path, _: Ticket) -> None:
    retold(path, reason="A harmless reason.")


def a_lower_price(path: Path, _: Ticket) -> None:
    retold(path, price_bits=256)


def nobody_needed(path: Path, _: Ticket) -> None:
    retold(path, needed=0)


def more_time(path: Path, ticket: Ticket) -> None:
    retold(path, expires_ms=ticket.request.expires_ms * 2)
    sql(path, "UPDATE airlock_requests SET expires_ms = ?", ticket.request.expires_ms * 2)


def another_author(path: Path, _: Ticket) -> None:
    author = json.loads(document(path))["author"] | {"holder": "mallory"}
    retold(path, author=author)
    sql(path, "UPDATE airlock_requests SET holder = 'mallory'")


def the_approved_state(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_requests SET state = 'approved'")


def a_forged_approval(path: Path, ticket: Ticket) -> None:
    sql(
        path,
        "INSERT INTO airlock_steps VALUES (?, 1, 'approve', 'approved', 'k', 'cid', 'checker', '', 1)",
        ticket.id,
    )
    sql(path, "UPDATE airlock_requests SET state = 'approved'")


def an_approval_by_somebody_else(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_steps SET holder = 'zed' WHERE action = 'approve'")


def other_words(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_steps SET words = 'all checked' WHERE action = 'approve'")


def no_steps(path: Path, _: Ticket) -> None:
    sql(path, "DELETE FROM airlock_steps")


def one_step_less(path: Path, _: Ticket) -> None:
    sql(path, "DELETE FROM airlock_steps WHERE action = 'approve'")
    sql(path, "UPDATE airlock_requests SET state = 'submitted'")


def another_entry_in_the_log(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE log SET detail = replace(detail, 'bea', 'zed') WHERE kind = 'airlock'")


def a_state_that_does_not_exist(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_requests SET state = 'blessed'")


def a_step_to_nowhere(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_steps SET state = 'blessed'")


def a_role_that_does_not_exist(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_steps SET role = 'god'")


def no_document(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_requests SET document = '{'")


def a_document_without_parts(path: Path, _: Ticket) -> None:
    retold(path, what={"kind": "rows", "fingerprint": "", "bits": 8, "parts": [{}]})


def a_column_that_differs(path: Path, _: Ticket) -> None:
    sql(path, "UPDATE airlock_requests SET tenant = 'house', project = 'board'")


TAMPERINGS = [
    one_bit, other_bytes_and_their_digest, no_content, more_content, another_reason, a_lower_price, nobody_needed,
    more_time, another_author, the_approved_state, a_forged_approval, an_approval_by_somebody_else, other_words,
    no_steps, one_step_less, another_entry_in_the_log, a_state_that_does_not_exist, a_step_to_nowhere,
    a_role_that_does_not_exist, no_document, a_document_without_parts, a_column_that_differs,
]  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda t: t.__name__)
def test_a_request_that_was_touched_is_neither_shown_nor_decided_nor_released(
    room: Room, path: Path, tamper: Any
) -> None:
    ticket = room.agree(room.submit(), room.bea)
    tamper(path, ticket)
    acts = (
        lambda: room.airlock.show(room.boss, ticket.id),
        lambda: room.airlock.approve(room.cid, ticket.id, ticket.digest),
        lambda: room.airlock.reject(room.boss, ticket.id, "no"),
        lambda: room.release(ticket),
    )
    codes = []
    for act in acts:
        with pytest.raises(TrocarError) as e:
            act()
        codes.append(e.value.code)
    assert codes == ["store_damaged"] * len(acts)
    assert room.charged() == 0
    assert len(room.airlock.check()) == 1
    assert ticket.id in room.airlock.check()[0]


@pytest.mark.parametrize(
    "tamper", [one_bit, other_bytes_and_their_digest, a_lower_price, more_content, no_content]
)
def test_what_was_approved_and_then_touched_does_not_leave(room: Room, path: Path, tamper: Any) -> None:
    ticket = room.agree(room.submit())
    tamper(path, ticket)
    with pytest.raises(TrocarError) as e:
        room.release(ticket)
    assert e.value.code == "store_damaged"
    assert room.charged() == 0
    assert all(account.held_bits == 0 for account in room.ledger.balances())


def test_a_request_that_is_gone_is_named(room: Room, path: Path) -> None:
    ticket = room.submit()
    for table, column in (("contents", "request"), ("steps", "request"), ("requests", "id")):
        sql(path, f"DELETE FROM airlock_{table} WHERE {column} = ?", ticket.id)
    assert room.airlock.check() == [f"airlock request {ticket.id}: the log has it, the table does not"]


def test_a_request_that_nobody_submitted_is_named(room: Room, path: Path) -> None:
    ticket = room.submit()
    sql(
        path,
        "INSERT INTO airlock_requests SELECT ?, state, key_id, holder, tenant, project, lineage, submitted_ms,"
        " expires_ms, replace(document, ?, ?), digest FROM airlock_requests",
        "0" * 32, ticket.id, "0" * 32,
    )  # fmt: skip
    [found] = room.airlock.check()
    assert found.startswith(f"airlock request {'0' * 32}: ")


def test_a_request_that_moved_while_it_was_looked_at_is_not_moved_again(room: Room) -> None:
    """The second line: the row is only changed over the state that was read."""
    from trocar.gate import airlock_records
    from trocar.gate.airlock_states import State

    ticket = room.submit()
    room.agree(ticket, room.bea)
    with pytest.raises(TrocarError) as e, room.database.write() as connection:
        airlock_records.take(connection, ticket, "approve", State.approved, None, now_ms=1)
    assert e.value.code == "ledger_unavailable"


def test_the_database_itself_holds_one_approval_per_person(room: Room) -> None:
    from trocar.gate import airlock_records
    from trocar.gate.airlock_desk import actor_of
    from trocar.gate.airlock_states import State

    ticket = room.agree(room.submit(), room.bea)
    with pytest.raises(TrocarError) as e, room.database.write() as connection:
        airlock_records.take(connection, ticket, "approve", State.approved, actor_of(room.bea), now_ms=1)
    assert e.value.code == "ledger_unavailable"
    assert room.look(ticket) is State.seconded

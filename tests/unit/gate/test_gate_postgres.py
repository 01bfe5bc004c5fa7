"""What only a server can do to a ledger: be lax about the disk, go away, lose a connection."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from gate_places import Place, place
from gate_room import Room, refused

from trocar.errors import TrocarError
from trocar.gate.database import Database


@pytest.mark.parametrize("level", ["off", "local", "remote_write"])
def test_a_session_whose_commits_may_be_lost_is_refused(on_server: Place, level: str) -> None:
    lax = f"{on_server.url}%20-csynchronous_commit%3D{level}"
    assert f"synchronous_commit = {level}" in refused("ledger_unavailable", lambda: Database(lax)).reason
    Database(f"{on_server.url}%20-csynchronous_commit%3Dremote_apply").close()


def test_a_server_that_is_not_there_is_unavailable(on_server: Place) -> None:
    url = on_server.url.replace("host=", "host=/nowhere")
    assert "nowhere" not in refused("ledger_unavailable", lambda: Database(url)).reason


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    no = refused("missing_extra", lambda: Database("postgresql+psycopg://u@h/d"))
    assert "postgres" in no.next_step


def test_the_end_of_a_session_frees_what_it_held(server_gate: Room) -> None:
    """The server hangs up on a process that lives: it counts as dead, and learns it before it can settle."""
    gate = server_gate
    who = gate.key()
    held = gate.reserve(who, 300)
    neighbour = Room(gate.place)
    assert neighbour.ledger.recover() == ()
    lost = gate.database.presence.instance
    gate.place.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_locks"
        " WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND pid <> pg_backend_pid()"
    )
    assert [c.spent_bits for c in neighbour.ledger.recover()] == [300]
    neighbour.close()
    refused("reservation_closed", lambda: gate.ledger.settle(held, 10, b""))
    assert gate.database.presence.instance != lost
    again = gate.reserve(who, 300)
    other = Room(gate.place)
    assert other.ledger.recover() == ()
    other.close()
    assert gate.ledger.settle(again, 10, b"").spent_bits == 10
    assert gate.used(who) == (310, 0)


def test_talk_of_the_server_is_not_taken_for_the_end_of_the_session(server_gate: Room) -> None:
    presence: Any = server_gate.database.presence
    name = presence.instance
    raw = presence._connection.connection.dbapi_connection
    raw.execute("LISTEN news")
    server_gate.place.sql("NOTIFY news")
    for _ in range(2):
        server_gate.spend(server_gate.key(), 1)
    assert presence.instance == name


def test_a_server_that_stopped_charges_nothing_and_loses_nothing(tmp_path: Any) -> None:
    from postgres_server import running

    with running() as server:
        gate = Room(place("postgres", tmp_path, server))
        who = gate.key()
        gate.spend(who, 100)
        held = gate.reserve(who, 200)
        before = gate.ledger.head()
        server.restart()
        codes = set()
        for act in (lambda: gate.ledger.settle(held, 10, b""), gate.ledger.recover, gate.ledger.recover):
            try:
                act()
            except TrocarError as e:
                codes.add(e.code)
        assert codes <= {"ledger_unavailable", "reservation_closed"}
        assert gate.ledger.entries()[before.seq - 1].hash == before.hash
        assert gate.used(who) == (300, 0)  # the lock was lost with the server: charged in full
        assert gate.ledger.check() == []
        gate.close()


def test_a_forked_child_that_closes_says_nothing_about_its_parent(server_gate: Room) -> None:
    gate = server_gate
    held = gate.reserve(gate.key(), 100)
    child = os.fork()
    if child == 0:  # no test machinery may run here: leave only by _exit
        try:
            gate.database.close()
            os._exit(0)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gate.ledger.settle(held, 10, b"").spent_bits == 10
    assert gate.ledger.check() == []


def test_a_child_that_closes_leaves_its_parents_session_alone(server_gate: Room) -> None:
    presence: Any = server_gate.database.presence
    presence._pid += 1
    presence.close()
    presence._pid -= 1
    neighbour = Room(server_gate.place)
    assert not neighbour.database.presence.is_dead(presence.instance)
    assert neighbour.database.presence.is_dead("not a name of ours")
    neighbour.close()


def test_a_process_never_takes_itself_for_dead(server_gate: Room) -> None:
    presence = server_gate.database.presence
    assert not presence.is_dead(presence.instance)
    assert presence.is_dead("no instance")

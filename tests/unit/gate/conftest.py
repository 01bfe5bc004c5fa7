"""One open gate per test, in each kind of database; `gate_room.py` says what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gate_places import KINDS, Place, place
from gate_room import Room


@pytest.fixture(params=KINDS)
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place for a ledger."""
    server = request.getfixturevalue("postgres") if request.param == "postgres" else None
    return place(request.param, tmp_path, server)


@pytest.fixture
def anywhere(tmp_path: Path) -> Place:
    """A place in a file, for what is not the database's affair or SQLite's alone."""
    return place("sqlite", tmp_path)


@pytest.fixture
def on_server(postgres: Any, tmp_path: Path) -> Place:
    """A place on a server, for what is PostgreSQL's alone."""
    return place("postgres", tmp_path, postgres)


@pytest.fixture
def in_order() -> Iterator[Callable[[Room], Room]]:
    """Closes a gate at the end, and only after its books were found in order."""
    opened: list[Room] = []

    def keep(room: Room) -> Room:
        opened.append(room)
        return room

    yield keep
    for room in opened:
        found = room.ledger.check()
        room.database.close()
        assert found == []


@pytest.fixture
def gate(somewhere: Place, in_order: Callable[[Room], Room]) -> Room:
    """In each kind of database; the books are in order at the end."""
    return in_order(Room(somewhere))


@pytest.fixture
def file_gate(anywhere: Place, in_order: Callable[[Room], Room]) -> Room:
    """In a file; the books are in order at the end."""
    return in_order(Room(anywhere))


@pytest.fixture
def server_gate(on_server: Place, in_order: Callable[[Room], Room]) -> Room:
    """On a server; the books are in order at the end."""
    return in_order(Room(on_server))


@pytest.fixture
def broken_gate(somewhere: Place) -> Iterator[Room]:
    """For tests that leave the books in disorder."""
    opened = Room(somewhere)
    yield opened
    opened.database.close()


@pytest.fixture
def broken_file_gate(anywhere: Place) -> Iterator[Room]:
    """The same in a file."""
    opened = Room(anywhere)
    yield opened
    opened.database.close()

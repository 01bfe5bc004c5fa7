"""One open gate per test; `gate_room.py` says what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gate_room import Room


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Room]:
    """Closed at the end, and only after the books were found in order."""
    opened = Room(tmp_path / "ledger.db")
    yield opened
    found = opened.ledger.check()
    opened.database.close()
    assert found == []


@pytest.fixture
def broken_gate(tmp_path: Path) -> Iterator[Room]:
    """For tests that leave the books in disorder."""
    opened = Room(tmp_path / "ledger.db")
    yield opened
    opened.database.close()

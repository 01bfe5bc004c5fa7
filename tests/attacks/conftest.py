"""What the cases share: a server of two strangers in this process, and the rooms of other test folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
for room in ("arch", "conformance", "e2e", "unit/api", "unit/gate", "unit/graph"):
    sys.path.insert(0, str(TESTS / room))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def world(server: Any) -> Any:
    """An attacker and a neighbour on the server of this module."""
    from case_room import World

    return World.of(server)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real server process on loopback, with a tiny model that is not open."""
    from case_process import start

    running = start(tmp_path_factory.mktemp("live"))
    yield running
    running.end()

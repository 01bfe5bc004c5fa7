"""Many at once, and killed processes: one charge, one voice per person, nothing out that was not paid."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import airlock_processes
import pytest
from airlock_room import OVERHEAD, Room
from gate_places import Place

from trocar.errors import TrocarError
from trocar.gate import chain
from trocar.gate.airlock_states import State
from trocar.gate.policy import Role, Tier

PRICE = 8 * 10 * (2 + 64) + OVERHEAD


@pytest.fixture
def room(somewhere: Place) -> Iterator[Room]:
    opened = Room(somewhere.url)
    yield opened
    found = [*opened.ledger.check(), *opened.airlock.check()]
    opened.database.close()
    assert found == []


def at_once(acts: list[Callable[[], Any]]) -> list[Any]:
    """What each act gave: its result, or the code of its refusal."""
    gate, given = threading.Barrier(len(acts)), []

    def run(act: Callable[[], Any]) -> None:
        gate.wait()
        try:
            given.append(act())
        except TrocarError as e:
            given.append(e.code)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


def test_eight_releases_at_once_are_one_charge_and_one_file(room: Room) -> None:
    ticket = room.agree(room.submit())
    given = at_once([lambda: room.release(ticket)] * 8)
    files = {export.payload for export in given if not isinstance(export, str)}
    assert len(files) == 1
    assert {g for g in given if isinstance(g, str)} <= {"still_running"}
    assert room.charged() == PRICE
    assert room.steps(ticket).count("release") == 1


def test_one_person_with_many_keys_at_once_is_one_voice(room: Room) -> None:
    ticket = room.submit()
    keys = [room.person("bea", role, project="board") for role in (Role.checker, Role.owner) * 3]
    given = at_once([lambda k=key: room.agree(ticket, k).state for key in keys])
    assert Counter(map(str, given)) == {"seconded": 1, "not_allowed": 5}
    assert room.look(ticket) is State.seconded


def test_an_approval_and_a_rejection_at_once_leave_one_outcome(room: Room) -> None:
    for _ in range(4):
        ticket = room.agree(room.submit(), room.bea)
        given = at_once(
            [
                lambda t=ticket: room.agree(t, room.cid).state,
                lambda t=ticket: room.airlock.reject(room.boss, t.id, "no").state,
            ]
        )
        assert room.look(ticket) is State.rejected  # an approved request can still be stopped
        assert set(given) <= {State.approved, State.rejected, "airlock_state"}


def test_killed_processes_have_emitted_no_more_than_was_charged(anywhere: Place, tmp_path: Path) -> None:
    room = Room(anywhere.url, clock=chain.now_ms)  # type: ignore[arg-type]
    made = room.keys.create("lab", Tier.external, Role.researcher, project="probe", holder="ann")
    tickets = [room.agree(room.submit(who=made.principal)) for _ in range(8)]
    side, rng = tmp_path / "emitted", random.Random(7)
    for _ in range(6):
        with airlock_processes.start(anywhere.url, side, made.secret, [t.id for t in tickets]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(rng.uniform(0.0, 0.25))
    room.crash()
    out = [line.split() for line in side.read_text().splitlines() if len(line) == 97]
    emitted = {request for request, _ in out}
    assert emitted
    assert len(emitted) * PRICE <= room.charged(made.principal)
    files: dict[str, set[str]] = {}
    for request, digest in out:
        files.setdefault(request, set()).add(digest)
    assert all(len(digests) == 1 for digests in files.values())
    assert [*room.ledger.check(), *room.airlock.check()] == []
    room.database.close()

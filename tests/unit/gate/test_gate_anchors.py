"""An older or other copy of a ledger does not start beside its anchors."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from gate_room import Room, refused

from trocar.gate import anchors as heads
from trocar.gate import chain
from trocar.gate.anchors import MOST_ENTRIES, MOST_S
from trocar.gate.chain import Head
from trocar.gate.database import Database
from trocar.gate.keys import Keys
from trocar.gate.ledger import Ledger
from trocar.gate.policy import Role, Tier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "second place"


@pytest.fixture
def anchored(gate: Room, folder: Path) -> Room:
    """A ledger with anchors, in each kind of database."""
    gate.options = {"anchors": folder}
    gate.crash()
    return gate


def lines(folder: Path) -> list[list[str]]:
    (file,) = folder.glob("*.anchors")
    return [line.split(" ") for line in file.read_text().splitlines()]


def last(folder: Path) -> Head:
    seq, digest, *_ = lines(folder)[-1]
    return Head(int(seq), digest)


def until(what: Any, seconds: float) -> float:
    """How long it took until `what()` was true."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < seconds
        time.sleep(0.005)
    return time.monotonic() - begun


def test_the_last_head_is_written_down_when_a_ledger_closes(anchored: Room, folder: Path) -> None:
    who = anchored.key()
    anchored.spend(who, 10)
    head = anchored.ledger.head()
    anchored.ledger.close()
    anchored.ledger.close()
    assert last(folder) == head
    assert folder.stat().st_mode & 0o077 == 0
    with anchored.database.read() as connection:
        seen = heads.report(connection, folder)
    assert (seen.unreadable, seen.problems) == (0, [])
    assert seen.lines == len(lines(folder))


def test_a_head_is_written_down_within_a_second(anchored: Room, folder: Path) -> None:
    who = anchored.key()
    for _ in range(2):
        anchored.spend(who, 10)
        head = anchored.ledger.head()
        until(
            lambda head=head: last(folder) == head, MOST_S + 5
        )  # the disk of a busy machine may take its time


def test_a_hundred_entries_are_not_waited_for(
    anchored: Room, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = anchored.key()
    monkeypatch.setattr(heads, "MOST_S", 1000.0)
    anchored.ledger._anchors._wake.set()
    time.sleep(0.6)  # the thread waits by the new rule from here on
    for _ in range(MOST_ENTRIES + 10):
        anchored.spend(who, 1)
        assert anchored.ledger.head().seq - last(folder).seq < MOST_ENTRIES
    assert len(lines(folder)) > 1


@pytest.mark.parametrize("go_on", [False, True])
def test_a_restored_backup_does_not_start(anchored: Room, folder: Path, go_on: bool) -> None:
    who = anchored.key()
    anchored.spend(who, 100)
    anchored.ledger.close()
    anchored.close()
    copy = anchored.place.backup()
    anchored.open()
    anchored.spend(who, 900)
    newest = anchored.ledger.head()
    anchored.ledger.close()
    anchored.close()
    now = anchored.place.backup()
    anchored.place.restore(copy)
    if go_on:  # something that does not know about anchors writes to the old copy until it is as long
        database = Database(anchored.place.url)
        while head_of(database).seq <= newest.seq:
            Keys(database).create("lab", Tier.agent, Role.researcher)
        database.close()
    no = refused("ledger_rolled_back", anchored.open)
    assert "older copy" in no.reason
    database = Database(anchored.place.url)
    with database.read() as connection:
        (problem,) = heads.report(connection, folder).problems
    assert problem.startswith(f"entry {newest.seq} is {'not the one' if go_on else 'missing'}")
    database.close()
    anchored.place.restore(now)
    anchored.open()
    refused("budget_exhausted", lambda: anchored.ask(who, 1))


def head_of(database: Database) -> Head:
    with database.read() as connection:
        return chain.head(connection)


def test_a_backup_from_before_the_first_anchor_does_not_start(gate: Room, folder: Path) -> None:
    who = gate.key()
    gate.close()
    copy = gate.place.backup()
    gate.options = {"anchors": folder}
    gate.open()
    gate.spend(who, 1000)
    gate.ledger.close()
    gate.close()
    now = gate.place.backup()
    gate.place.restore(copy)
    refused("ledger_rolled_back", gate.open)
    gate.place.restore(now)
    gate.open()


def test_deleted_anchors_are_missed(anchored: Room, folder: Path) -> None:
    anchored.ledger.close()
    anchored.close()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(b""), lambda: file.write_bytes(b"\xff 7 x\n" * 9)):
        damage()
        no = refused("ledger_rolled_back", anchored.open)
        assert "gone" in no.reason
        assert "--accept" in no.next_step
        database = Database(anchored.place.url)
        with database.read() as connection:
            assert "gone" in heads.report(connection, folder).problems[0]
        database.close()
    file.write_bytes(content)
    anchored.open()


def test_an_anchored_ledger_needs_its_folder(anchored: Room, folder: Path) -> None:
    anchored.ledger.close()
    anchored.close()
    anchored.options = {}
    assert "no folder" in refused("ledger_rolled_back", anchored.open).reason
    anchored.options = {"anchors": folder}
    anchored.open()


def test_two_ledgers_share_a_folder(anchored: Room, folder: Path, tmp_path: Path) -> None:
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    ledger = Ledger(other, anchors=folder)
    ledger.close()
    other.close()
    assert len(list(folder.iterdir())) == 2
    anchored.spend(anchored.key(), 10)


def test_an_operator_may_start_again_from_what_is_left(anchored: Room, folder: Path) -> None:
    who = anchored.key()
    anchored.ledger.close()
    anchored.close()
    copy = anchored.place.backup()
    anchored.open()
    anchored.spend(who, 900)
    anchored.ledger.close()
    anchored.close()
    anchored.place.restore(copy)
    database = Database(anchored.place.url)
    refused("ledger_rolled_back", lambda: heads.anchor(database, folder, 5))
    head = heads.accept(database, folder, "the newer disk burned", 7)
    assert heads.anchor(database, folder, 8) == head
    database.close()
    anchored.open()
    assert "the newer disk burned" in anchored.ledger.entries(after_seq=head.seq - 1)[0].detail
    assert len(list(folder.glob("*.before-7"))) == 1


def test_a_line_that_a_crash_cut_off_harms_nothing(anchored: Room, folder: Path) -> None:
    anchored.ledger.close()
    (file,) = folder.iterdir()
    with file.open("a") as opened:
        opened.write("99 " + "f" * 64)
    anchored.crash()
    anchored.spend(anchored.key(), 1)
    anchored.ledger.close()
    assert last(folder) == anchored.ledger.head()
    with anchored.database.read() as connection:
        assert heads.report(connection, folder).unreadable == 1


def test_a_line_of_another_ledger_or_number_is_not_believed(anchored: Room, folder: Path) -> None:
    anchored.ledger.close()
    (file,) = folder.iterdir()
    seq, digest, when, check = file.read_text().splitlines()[-1].split(" ")
    with file.open("a") as opened:
        opened.write(f"{int(seq) + 50} {digest} {when} {check}\n")
    anchored.crash()
    anchored.spend(anchored.key(), 1)


def test_nothing_is_admitted_while_heads_cannot_be_written_down(anchored: Room, folder: Path) -> None:
    who = anchored.key()
    held = anchored.reserve(who, 100)
    until(lambda: last(folder) == anchored.ledger.head(), 10)
    moved = folder.rename(folder.with_name("moved"))
    folder.write_bytes(b"a file where the folder was")
    assert anchored.ledger.settle(held, 10, b"").spent_bits == 10  # what was admitted goes on
    until(lambda: anchored.ledger._anchors._failure, 10)
    no = refused("ledger_unavailable", lambda: anchored.ask(who, 10))
    assert "anchors" in no.reason
    folder.unlink()
    moved.rename(folder)
    anchored.spend(who, 10)
    until(lambda: last(folder) == anchored.ledger.head(), 10)


def test_a_ledger_that_is_turned_back_while_it_runs_admits_nothing_more(
    server_gate: Room, folder: Path
) -> None:
    """A server of PostgreSQL can be restored under the connections of whoever uses it."""
    gate = server_gate
    gate.options = {"anchors": folder}
    gate.crash()
    who = gate.key()
    gate.spend(who, 10)
    copy = gate.place.backup()
    gate.spend(who, 900)
    until(lambda: last(folder) == gate.ledger.head(), 10)
    now = gate.place.backup()
    gate.place.restore(copy)
    gate.spend(who, 10)  # at most a second, or a hundred entries
    until(lambda: gate.ledger._anchors._failure, 10)
    for _ in range(2):
        refused("ledger_rolled_back", lambda: gate.ask(who, 10))
    gate.place.restore(now)
    gate.spend(who, 10)


def test_a_folder_that_cannot_be_written_does_not_start(gate: Room, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    gate.close()
    for place in ("file", "file/below"):
        gate.options = {"anchors": tmp_path / place}
        refused("ledger_unavailable", gate.open)
    database = Database(gate.place.url)
    for act in (heads.anchor, lambda d, f, t: heads.accept(d, f, "why", t)):
        refused("ledger_unavailable", lambda act=act: act(database, tmp_path / "file", 1))
    database.close()
    gate.options = {"anchors": tmp_path / "anchors"}
    refused("ledger_rolled_back", gate.open)  # the last accept marked it, and wrote no line
    database = Database(gate.place.url)
    heads.accept(database, tmp_path / "anchors", "again", 2)
    database.close()
    gate.open()


def test_a_disk_that_takes_half_a_line_is_noticed(
    anchored: Room, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchored.ledger.close()
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:10]))
        refused("ledger_unavailable", lambda: heads.anchor(anchored.database, folder, 1))
    heads.anchor(anchored.database, folder, 1)


def test_only_the_end_of_a_long_file_is_read_at_the_start(
    anchored: Room, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = anchored.key()
    for _ in range(3):
        anchored.spend(who, 1)
        heads.anchor(anchored.database, folder, 1)
    monkeypatch.setattr(heads, "_TAIL_BYTES", 150)
    monkeypatch.setattr(heads, "_BATCH", 2)
    anchored.ledger.close()
    anchored.crash()
    anchored.spend(who, 1)
    with anchored.database.read() as connection:
        assert heads.report(connection, folder).problems == []


def test_a_rewritten_entry_below_the_last_anchor_is_named(anchored: Room, folder: Path) -> None:
    who = anchored.key()
    anchored.spend(who, 1)
    head = heads.anchor(anchored.database, folder, 1)
    anchored.spend(who, 1)
    anchored.place.sql(f"UPDATE log SET hash = previous WHERE seq = {head.seq}")
    with anchored.database.read() as connection:
        assert heads.report(connection, folder).problems == [
            f"entry {head.seq} is not the one that was anchored"
        ]
    anchored.place.sql(f"UPDATE log SET hash = '{head.hash}' WHERE seq = {head.seq}")


def test_a_ledger_without_anchors_has_none_to_report(gate: Room, folder: Path) -> None:
    with gate.database.read() as connection:
        assert heads.report(connection, folder) == heads.Report(0, 0, [])

"""Whatever the disk does, the answer is `ledger_unavailable` and nothing is charged or lost."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from gate_processes import start
from gate_room import Room, code_of
from sqlalchemy import event

from trocar.errors import TrocarError
from trocar.gate import accounts
from trocar.gate.database import Database
from trocar.gate.policy import Role, Tier
from trocar.gate.presence import Presence
from trocar.gate.sqlite import _on_connect


def _unavailable(act: Callable[[], object]) -> str:
    with pytest.raises(TrocarError) as e:
        act()
    assert code_of(e) == "ledger_unavailable"
    assert e.value.retryable
    said = e.value.reason.replace("sqlite:///FILE", "").replace("postgresql+psycopg://USER@HOST/DATABASE", "")
    assert "/" not in said
    return e.value.reason


def test_a_read_only_database_admits_and_charges_nothing(file_gate: Room) -> None:
    gate = file_gate
    who = gate.key()
    held = gate.reserve(who, 100)
    before = gate.ledger.head()

    def read_only(raw: sqlite3.Connection, _record: object, _proxy: object) -> None:
        raw.execute("PRAGMA query_only=ON")

    event.listen(gate.database._backend.engine, "checkout", read_only)
    for act in (
        lambda: gate.ask(who, 10),
        lambda: gate.ledger.settle(held, 10, b""),
        lambda: gate.ledger.cancel(held, 10),
        lambda: gate.keys.create("lab", Tier.agent, Role.researcher),
        lambda: gate.keys.revoke(who.key_id),
    ):
        _unavailable(act)
    event.remove(gate.database._backend.engine, "checkout", read_only)
    gate.crash()
    assert gate.ledger.entries()[before.seq - 1].hash == before.hash
    assert gate.used(who) == (100, 0)


def test_a_commit_that_fails_charges_nothing(gate: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    who = gate.key()
    held = gate.reserve(who, 100)
    before = gate.ledger.head()

    dialect = gate.database._backend.engine.dialect

    def no_fsync(_raw: object) -> None:
        raise dialect.dbapi.OperationalError("disk I/O error on /secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(dialect, "do_commit", no_fsync)
        for act in (lambda: gate.ledger.settle(held, 10, b""), lambda: gate.ask(who, 10)):
            _unavailable(act)
    assert gate.ledger.head() == before
    assert gate.ledger.settle(held, 10, b"").spent_bits == 10


def test_a_disk_that_fills_up_fails_closed_and_recovers(file_gate: Room) -> None:
    gate = file_gate
    made = gate.keys.create("lab", Tier.trusted, Role.researcher)
    with start("full", gate.place, made.secret) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    told = json.loads(out)
    assert told["codes"] == ["ledger_unavailable"] * 2  # settle, then reserve
    assert told["check"] == []
    assert told["head_moved"] is False
    assert told["settled_when_there_is_room"] == 7
    assert gate.used(made.principal) == (7, 0)


def test_a_writer_that_never_ends_is_not_waited_for_forever(gate: Room) -> None:
    who = gate.key()
    gate.close()
    gate.open(busy_s=0.05)
    other = Database(gate.place.url)
    with other.write():
        _unavailable(lambda: gate.ask(who, 10))
        assert gate.ledger.verify() == []  # readers do not wait
    other.close()
    gate.reserve(who, 10)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\x00" + b"\xff" * 4080])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.db").write_bytes(content)
    _unavailable(lambda: Database(f"sqlite:///{tmp_path}/ledger.db"))
    assert (tmp_path / "ledger.db").read_bytes() == content


def test_a_database_of_another_schema_is_refused(broken_gate: Room) -> None:
    broken_gate.place.sql("UPDATE head SET schema = 99")
    assert "schema 99" in _unavailable(lambda: Database(broken_gate.place.url))


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in ("file/ledger.db", "absent/ledger.db"):
        _unavailable(lambda place=place: Database(f"sqlite:///{tmp_path}/{place}"))


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "sqlite:////tmp/x.db?timeout=1",
        "postgresql://host/db",
        "mysql://host/db",
        "ledger.db",
        "",
    ],
)
def test_only_the_two_kinds_of_url_are_a_ledger(url: str) -> None:
    _unavailable(lambda: Database(url))


def test_a_lost_account_stops_the_charge(broken_gate: Room) -> None:
    gate, who = broken_gate, broken_gate.key()
    held = gate.reserve(who, 100)
    for damage in ("UPDATE accounts SET held_bits = 0 WHERE owner = '*'", "DELETE FROM accounts"):
        gate.place.sql(damage)
        _unavailable(lambda: gate.ledger.settle(held, 10, b""))


def test_an_account_is_written_only_over_the_row_it_was_computed_from(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 100)
    stale = gate.account("*")
    gate.spend(who, 100)
    with gate.database.read() as connection:
        assert accounts.find(connection, "base", ["*"])["*"] != stale

    def overwrite() -> None:
        with gate.database.write() as connection:
            accounts.hold(connection, [stale], 10, gate.clock())

    assert "not the one that was read" in _unavailable(overwrite)


def test_a_payload_changed_on_disk_is_never_replayed(broken_gate: Room) -> None:
    gate, who = broken_gate, broken_gate.key()
    gate.ledger.settle(gate.reserve(who, 100, idem="k"), 10, b"charged")
    zero = "x'00'" if gate.place.kind == "sqlite" else "'\\\\x00'"
    for damage in (f"UPDATE payloads SET payload = {zero}", "DELETE FROM payloads"):
        gate.place.sql(damage)
        _unavailable(lambda: gate.ask(who, 100, idem="k"))


def test_an_instance_name_from_a_damaged_row_is_no_path(broken_gate: Room) -> None:
    gate, who = broken_gate, broken_gate.key()
    gate.reserve(who, 100)
    gate.place.sql("UPDATE reservations SET instance = '../../etc/passwd'")
    assert [c.spent_bits for c in gate.ledger.recover()] == [100]


def test_a_forked_child_is_refused_and_does_not_end_its_parent(gate: Room) -> None:
    who = gate.key()
    held = gate.reserve(who, 100)
    child = os.fork()
    if child == 0:  # no test machinery may run here: leave only by _exit
        try:
            gate.ledger.settle(held, 10, b"")
            os._exit(1)
        except TrocarError as e:
            gate.database.presence.close()
            os._exit(0 if e.code == "ledger_unavailable" else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    second = Room(gate.place)
    second.database.close()
    assert gate.ledger.settle(held, 10, b"").spent_bits == 10


def test_what_was_opened_before_a_fork_is_refused_after_it(
    gate: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gate.database, "_pid", os.getpid() + 1)
        assert "fork" in _unavailable(gate.ledger.head)


def test_a_child_that_closes_does_not_remove_its_parents_file(tmp_path: Path) -> None:
    presence = Presence(tmp_path)
    presence._pid += 1
    presence.close()
    presence.close()
    assert [p.name for p in tmp_path.iterdir()] == [f"{presence.instance}.live"]


def test_a_file_system_without_wal_is_refused() -> None:
    with closing(sqlite3.connect(":memory:")) as raw:
        assert "memory" in _unavailable(lambda: _on_connect(raw, None))


def test_files_of_dead_processes_are_swept(file_gate: Room) -> None:
    gate = file_gate
    made = gate.keys.create("lab", Tier.open, Role.researcher)
    with start("storm", gate.place, made.secret) as process:
        process.stdout.readline()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    locks = gate.place.folder / "ledger.db.locks"
    assert len(list(locks.glob("*.live"))) == 2
    gate.options = {"anchors": gate.place.folder / "anchors"}  # a storm keeps some
    gate.crash()
    assert len(list(locks.glob("*.live"))) == 1

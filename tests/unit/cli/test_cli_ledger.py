"""Keys and the ledger from the command line, compared with the gate's own answers and a plain sqlite3."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from trocar import errors
from trocar.gate.database import Database
from trocar.gate.keys import Keys
from trocar.gate.ledger import Ledger, Reservation
from trocar.gate.limits import Limits, Payer
from trocar.gate.policy import Lineage, Role, Tier

LINEAGE = Lineage("base", 2_000_000_000, Tier.external)
DIGEST = "0" * 64
LIMITS = Limits(2_000_000)


def spend(home: Path, secret: str, *, leave_open: bool = False, **options: Any) -> None:
    """1,000 bits charged of 50,000 reserved; or all of them left held by a process that is gone."""
    database = Database(f"sqlite:///{home / 'data' / 'ledger.db'}")
    ledger = Ledger(database, **options)
    who = Keys(database).authenticate(secret)
    payers = (Payer(f"key:{who.key_id}", LIMITS),)
    held = ledger.reserve(
        who, LINEAGE, 50_000, payers=payers, limits=LIMITS, request_digest=DIGEST, request_id="req_1"
    )
    assert isinstance(held, Reservation)
    if not leave_open:
        ledger.settle(held, 1_000, b"x")
    ledger.close()
    database.close()


def sql(home: Path, statement: str) -> list[Any]:
    connection = sqlite3.connect(home / "data" / "ledger.db")
    rows = connection.execute(statement).fetchall()
    connection.commit()
    connection.close()
    return rows


@pytest.fixture
def secret(trocar: Any) -> str:
    made = trocar("key", "create", "--tenant", "alice", "--note", "[red]n[/red]", "--json")
    assert made.code == 0
    return str(made.json["secret"])


def test_a_created_key_authenticates_and_its_secret_is_never_shown_again(trocar: Any, home: Path) -> None:
    ran = trocar("key", "create", "--tenant", "bob", "--tier", "agent", "--role", "operator")
    secret = ran.out.split()[-1]
    database = Database(f"sqlite:///{home / 'data' / 'ledger.db'}")
    who = Keys(database).authenticate(secret)
    database.close()
    assert (who.tenant, who.tier, who.role) == ("bob", Tier.agent, Role.operator)
    later = [trocar("key", "list"), trocar("key", "list", "--json"), trocar("ledger", "log", "--json")]
    assert all(who.key_id in r.out and secret not in r.out + r.err for r in later)
    assert (home / "data" / "ledger.db").stat().st_mode & 0o077 == 0


def test_list_and_revoke(trocar: Any, secret: str) -> None:
    listed = trocar("key", "list", "--json").json[0]
    assert (listed["tenant"], listed["tier"], listed["role"]) == ("alice", "external", "researcher")
    assert listed["revoked_ms"] is None
    assert "[red]n[/red]" in trocar("key", "list").out  # a note is text, not markup
    assert trocar("key", "revoke", listed["key_id"]).code == 0
    assert trocar("key", "list", "--json").json[0]["revoked_ms"] > 0
    missing = trocar("key", "revoke", "f" * 16)
    assert missing.code == 2
    assert "[key_not_found]" in missing.err


def test_a_bad_tenant_is_refused_and_makes_no_key(trocar: Any, secret: str) -> None:
    assert trocar("key", "create", "--tenant", "Bob!").code == 2
    assert len(trocar("key", "list", "--json").json) == 1


@pytest.mark.parametrize("words", [("key", "list"), ("key", "revoke", "x"), ("ledger", "verify")])
def test_looking_makes_no_ledger(trocar: Any, home: Path, words: tuple[str, ...]) -> None:
    ran = trocar(*words)
    assert ran.code == 2
    assert "[no_ledger]" in ran.err
    assert not (home / "data").exists()


def test_show_has_limits_and_what_is_left(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    everyone, key = trocar("ledger", "show", "--json").json
    assert (everyone["owner"], everyone["limit_bits"]) == ("everyone", 2_000_000)
    assert (key["tenant"], key["charged_bits"], key["held_bits"]) == ("alice", 1_000, 0)
    assert key["left_bits"] == 1_999_000
    out = trocar("ledger", "show").out
    assert "2 Mbit" in out
    assert "1000 bit" in out


def test_looking_charges_nothing_to_a_dead_process(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret, leave_open=True)
    before = sql(home, "select * from log")
    for words in (("ledger", "show"), ("ledger", "verify"), ("ledger", "log"), ("key", "list"), ("doctor",)):
        assert trocar(*words).code == 0, words
    assert sql(home, "select * from log") == before
    assert trocar("ledger", "show", "--json").json[1]["held_bits"] == 50_000


def test_verify_tells_a_whole_log_from_a_broken_one(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    good = trocar("ledger", "verify")
    assert good.code == 0
    head = good.out.split()[-1]
    assert trocar("ledger", "verify", "--anchor", head).code == 0
    sql(home, "update log set charged_bits = 999 where kind = 'settled'")
    bad = trocar("ledger", "verify")
    assert bad.code == 1
    [[seq]] = sql(home, "select seq from log where kind = 'settled'")
    assert bad.out.startswith(f"entry {seq} was edited")
    failed = [f for f in trocar("doctor", "--json").json if f["level"] == "fail"]
    assert [f["check"] for f in failed] == ["ledger"]


def test_verify_finds_an_account_that_the_log_does_not_imply(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    sql(home, "update accounts set charged_bits = 0 where owner = '*'")
    bad = trocar("ledger", "verify")
    assert bad.code == 1
    assert "account */base" in bad.out


def test_an_anchor_catches_an_older_copy(trocar: Any, secret: str) -> None:
    assert trocar("ledger", "verify", "--anchor", f"99:{'a' * 64}").code == 1
    refused = trocar("ledger", "verify", "--anchor", "99")
    assert refused.code == 2
    assert "[bad_argument]" in refused.err


def test_log_pages(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    whole = trocar("ledger", "log", "--json").json
    assert [e["seq"] for e in whole] == list(range(1, len(whole) + 1))
    assert [e["seq"] for e in trocar("ledger", "log", "--limit", "2", "--json").json] == [
        e["seq"] for e in whole[-2:]
    ]
    page = trocar("ledger", "log", "--after", "1", "--limit", "2", "--json").json
    assert [e["seq"] for e in page] == [2, 3]
    assert "settled" in trocar("ledger", "log").out


def test_a_file_that_is_no_ledger_is_a_fault(trocar: Any, home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "ledger.db").write_bytes(b"not a database" * 1000)
    ran = trocar("ledger", "verify")
    assert ran.code == 3
    assert "[ledger_unavailable]" in ran.err


@pytest.fixture
def operator(trocar: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    made = trocar("key", "create", "--tenant", "ops", "--role", "operator", "--json").json
    monkeypatch.setenv("TROCAR_API_KEY", made["secret"])
    return str(made["key_id"])


def test_a_lineage_is_stopped_and_goes_on_by_hand(
    trocar: Any, home: Path, secret: str, operator: str
) -> None:
    spend(home, secret)
    assert trocar("ledger", "freeze", "base", "--reason", "a strange answer").code == 0
    with pytest.raises(errors.PolicyRefusal, match="a strange answer") as caught:
        spend(home, secret)
    assert caught.value.code == "lineage_frozen"
    assert trocar("ledger", "thaw", "base").code == 0
    spend(home, secret)
    kinds = [e["kind"] for e in trocar("ledger", "log", "--json").json]
    assert [k for k in kinds if k in ("frozen", "thawed")] == ["frozen", "thawed"]
    by = {e["key_id"] for e in trocar("ledger", "log", "--json").json if e["kind"] in ("frozen", "thawed")}
    assert by == {operator}
    assert trocar("ledger", "verify").code == 0


def test_only_who_operates_stops_a_lineage(
    trocar: Any, home: Path, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spend(home, secret)
    for key, code in (("", "no_key"), ("trk_x", "bad_key"), (secret, "not_allowed")):
        monkeypatch.setenv("TROCAR_API_KEY", key)
        for words in (("freeze", "base", "--reason", "x"), ("thaw", "base")):
            ran = trocar("ledger", *words)
            assert (ran.code, f"[{code}]" in ran.err) == (2, True), ran.err
    spend(home, secret)


@pytest.mark.usefixtures("operator")
def test_a_lineage_that_was_never_declared_is_not_stopped(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    ran = trocar("ledger", "freeze", "bose", "--reason", "x")
    assert ran.code == 2
    assert "[bad_value]" in ran.err
    assert "closest: 'base'" in ran.err
    assert trocar("ledger", "freeze", "base", "--reason", "").code == 2

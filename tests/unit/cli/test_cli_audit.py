"""`trocar audit`: log, tables and anchors of ledgers that are whole, broken, old or on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cli_ledger import spend, sql


@pytest.fixture
def secret(trocar: Any) -> str:
    made = trocar("key", "create", "--tenant", "alice", "--json")
    assert made.code == 0
    return str(made.json["secret"])


def test_verify_names_the_first_bad_entry(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    good = trocar("audit", "verify")
    assert good.code == 0
    assert "anchors" not in good.out
    head = good.out.split()[-1]
    assert trocar("audit", "verify", "--anchor", head).code == 0
    assert trocar("audit", "verify", "--anchor", f"2:{'0' * 64}").code == 1
    sql(home, "update log set key_id = 'x' where seq = 3")
    bad = trocar("audit", "verify")
    assert bad.code == 1
    assert bad.out.startswith("entry 3 was edited")


def test_verify_names_a_table_that_differs(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    sql(home, "update accounts set day_bits = day_bits + 1 where owner = '*'")
    bad = trocar("audit", "verify")
    assert bad.code == 1
    assert "account */base" in bad.out


def test_log_finds_a_request_and_a_key(trocar: Any, home: Path, secret: str) -> None:
    spend(home, secret)
    found = trocar("audit", "log", "--request", "req_1", "--json").json
    assert [e["kind"] for e in found] == ["admitted", "settled"]
    key = found[0]["key_id"]
    kinds = [e["kind"] for e in trocar("audit", "log", "--key", key, "--json").json]
    assert kinds == ["key_created", "account_opened", "admitted", "settled"]
    assert len(trocar("audit", "log", "--limit", "2", "--json").json) == 2
    assert [e["seq"] for e in trocar("audit", "log", "--after", "1", "--limit", "1", "--json").json] == [2]
    assert "req_1" in trocar("audit", "log").out


def test_anchors_are_kept_checked_and_missed(trocar: Any, home: Path, secret: str) -> None:
    place = ("--anchors", str(home / "anchors"))
    spend(home, secret, anchors=home / "anchors")
    good = trocar("audit", "verify", *place)
    assert good.code == 0
    assert "anchors: 2 heads, all of them in the log" in good.out
    assert "not checked" in trocar("audit", "verify").out
    printed = trocar("audit", "anchor", *place)
    assert printed.out.strip() == good.out.strip().splitlines()[-1]
    (file,) = (home / "anchors").iterdir()
    with file.open("a") as lines:
        lines.write("7 torn")
    assert "1 more cannot be read" in trocar("audit", "verify", *place).out
    file.unlink()
    gone = trocar("audit", "verify", *place)
    assert gone.code == 1
    assert "gone" in gone.out
    refused = trocar("audit", "anchor", *place)
    assert refused.code == 3
    assert "[ledger_rolled_back]" in refused.err
    assert trocar("audit", "anchor", *place, "--accept", "the disk is lost").code == 0
    assert trocar("audit", "verify", *place).code == 0
    assert "the disk is lost" in trocar("audit", "log").out


def test_an_older_copy_is_named(trocar: Any, home: Path, secret: str) -> None:
    place = ("--anchors", str(home / "anchors"))
    spend(home, secret, anchors=home / "anchors")
    copy = (home / "data" / "ledger.db").read_bytes()
    spend(home, secret, anchors=home / "anchors")
    newest = trocar("audit", "verify", *place).out.split()[-1]
    (home / "data" / "ledger.db").write_bytes(copy)
    assert trocar("audit", "verify").code == 0  # an older copy is whole
    bad = trocar("audit", "verify", *place)
    assert bad.code == 1
    assert bad.out == f"entry {newest.partition(':')[0]} is missing, but was anchored\n"
    assert trocar("audit", "verify", "--anchor", newest).code == 1


def test_anchor_needs_a_folder_and_a_ledger(trocar: Any, home: Path) -> None:
    assert "[no_ledger]" in trocar("audit", "anchor", "--anchors", "x").err
    assert trocar("key", "create", "--tenant", "alice").code == 0
    assert "[bad_argument]" in trocar("audit", "anchor").err


def test_a_ledger_on_a_server_is_named_by_its_url(
    trocar: Any, home: Path, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROCAR_LEDGER", postgres.url(postgres.new_schema()))
    assert trocar("key", "create", "--tenant", "alice").code == 0
    assert not (home / "data" / "ledger.db").exists()
    assert "ok: 1 entries" in trocar("audit", "verify").out
    assert "alice" in trocar("key", "list").out
    assert [f["level"] for f in trocar("doctor", "--json").json if f["check"] == "ledger"] == ["ok"]

"""`trocar policy`: a file to begin with, its faults, what is looser, who agreed, and why a request was refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trocar.errors import TrocarError
from trocar.gate import policy_file, policy_log
from trocar.gate.database import Database
from trocar.gate.gate import Gate
from trocar.gate.keys import Keys
from trocar.gate.ledger import Ledger, Reservation
from trocar.gate.limits import Limits, Payer
from trocar.gate.policy import Lineage, Policy, Role, Tier

LOOSER = "[data]\nlineage_day_ppm = 400\nleast_blocks = 2\n"
URL_AT = "data/ledger.db"


def url(home: Path) -> str:
    return f"sqlite:///{home / URL_AT}"


def started(home: Path, policy: Policy | None = None) -> None:
    """A server ran there under a policy."""
    (home / "data").mkdir(exist_ok=True)
    Gate(url(home), policy, anchors=home / "data.anchors").close()


def written(home: Path, text: str) -> str:
    (home / "new.toml").write_text(text)
    return str(home / "new.toml")


def made(home: Path, holder: str, role: Role) -> str:
    database = Database(url(home))
    secret = Keys(database).create("lab", Tier.open, role, holder=holder).secret
    database.close()
    return secret


# ---- the file -------------------------------------------------------------------------------------


def test_the_file_to_begin_with_is_the_default(trocar: Any) -> None:
    ran = trocar("policy", "init")
    assert (ran.code, ran.err) == (0, "")
    assert policy_file.read(ran.out) == Policy()


def test_a_good_file_is_named_by_its_digest(trocar: Any, home: Path) -> None:
    ran = trocar("policy", "check", written(home, LOOSER))
    assert (ran.code, ran.out) == (0, f"ok: policy {policy_file.read(LOOSER).digest()[:12]}\n")
    assert not (home / "data").exists()


def test_every_fault_of_a_file_is_told(trocar: Any, home: Path) -> None:
    ran = trocar("policy", "check", written(home, "[data]\nlineage_tear = 'agent'\nleast_blocks = -1\n"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("[bad_policy]") == 2
    assert "at data.lineage_tear" in ran.err
    assert "closest: 'lineage_tier'" in ran.err


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_opened(trocar: Any, home: Path, content: bytes | None) -> None:
    path = home / "p.toml"
    if content is not None:
        path.write_bytes(content)
    for verb in ("check", "diff", "approve"):
        ran = trocar("policy", verb, str(path))
        assert (ran.code, "[bad_argument] at policy" in ran.err) == (2, True)


# ---- differences ----------------------------------------------------------------------------------


def test_what_would_be_different(trocar: Any, home: Path) -> None:
    started(home)
    file = written(home, LOOSER)
    assert trocar("policy", "diff", file, "--json").json == [
        {"path": "data.lineage_day_ppm", "was": 250, "now": 400, "looser": True},
        {"path": "data.least_blocks", "was": 1, "now": 2, "looser": False},
    ]
    said = trocar("policy", "diff", file).out.splitlines()
    assert [line.split() for line in said] == [
        ["setting", "was", "would", "be"],
        ["data.lineage_day_ppm", "250", "400", "looser"],
        ["data.least_blocks", "1", "2", "tighter"],
    ]
    assert trocar("policy", "diff", written(home, ""), "--json").json == []


def test_the_difference_is_to_the_last_policy(trocar: Any, home: Path) -> None:
    started(home)
    started(home, policy_file.read("[data]\nlineage_day_ppm = 100\n"))
    [change] = trocar("policy", "diff", written(home, ""), "--json").json
    assert (change["was"], change["now"], change["looser"]) == (100, 250, True)


def test_without_a_ledger_there_is_nothing_to_compare_with(trocar: Any, home: Path) -> None:
    for words in (("diff", written(home, "")), ("approve", written(home, "")), ("explain", "req_1")):
        ran = trocar("policy", *words)
        assert (ran.code, "[no_ledger]" in ran.err) == (2, True), words
    assert not (home / "data").exists()


# ---- agreeing -------------------------------------------------------------------------------------


def test_two_people_make_a_looser_policy_usable(
    trocar: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(home)
    file, policy = written(home, LOOSER), policy_file.read(LOOSER)
    with pytest.raises(TrocarError, match="policy_loosened"):
        started(home, policy)
    said = []
    for holder, role in (("ann", Role.owner), ("ann", Role.owner), ("cy", Role.checker)):
        monkeypatch.setenv("TROCAR_API_KEY", made(home, holder, role))
        ran = trocar("policy", "approve", file)
        assert ran.code == 0, ran.err
        said.append(ran.out)
    short = policy.digest()[:12]
    assert said == [f"policy {short}: {n} approved; 2 are needed\n" for n in (1, 1, 2)]
    started(home, policy)
    with pytest.raises(TrocarError, match="policy_loosened"):
        started(home, policy_file.read("[data]\nlineage_day_ppm = 401\nleast_blocks = 2\n"))


def test_who_may_not_agree(trocar: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(home)
    file = written(home, LOOSER)
    assert "[no_key]" in trocar("policy", "approve", file).err
    for secret, code in (
        ("  ", "no_key"),
        ("trk_x", "bad_key"),
        (made(home, "op", Role.operator), "not_allowed"),
    ):
        monkeypatch.setenv("TROCAR_API_KEY", secret)
        ran = trocar("policy", "approve", file)
        assert (ran.code, f"[{code}]" in ran.err, ran.out) == (2, True, "")
        assert secret.strip() == "" or secret not in ran.err
    database = Database(url(home))
    with database.read() as connection:
        assert policy_log._approvals(connection, policy_file.read(LOOSER)) == {}
    database.close()


# ---- explaining -----------------------------------------------------------------------------------


def test_every_setting_is_explained_also_without_a_ledger(trocar: Any, home: Path) -> None:
    rows = {row["path"]: row for row in trocar("policy", "explain", "--json").json}
    assert list(rows) == [path for path, _ in policy_file.settings(Policy())]
    assert all(row["meaning"] for row in rows.values())
    assert rows["outputs.overhead_bits"]["value"] == "256"
    assert rows["people.tiers.open.life_ppm"]["value"] == "not limited"
    assert "price of being admitted at all" in trocar("policy", "explain").out
    assert not (home / "data").exists()


def test_the_settings_are_those_that_hold(trocar: Any, home: Path) -> None:
    started(home, policy_file.read("[data]\nleast_blocks = 7\n[projects.a]\nday_ppm = 3\n"))
    rows = {row["path"]: row["value"] for row in trocar("policy", "explain", "--json").json}
    assert (rows["data.least_blocks"], rows["projects.a.day_ppm"]) == ("7", "3")


@pytest.fixture
def asked(home: Path) -> str:
    """One request refused for two reasons, and one that was charged; the id of the key."""
    started(home)
    database = Database(url(home))
    who = Keys(database).create("lab", Tier.external, Role.researcher).principal
    ledger = Ledger(database, anchors=home / "data.anchors")
    detail = {"path": "program.nodes[1]", "reason": "rows\n[red]of[/red] '\x1b[1m'"}
    ledger.refuse(who.key_id, "req_no", ["needs_airlock", "policy", "code_of_another_version"], detail)
    limits = Limits(5000)
    held = ledger.reserve(
        who, Lineage("base", 10**9, Tier.external), 900, payers=(Payer(f"key:{who.key_id}", limits),), limits=limits,
        request_digest="0" * 64, request_id="req_yes",
    )  # fmt: skip
    assert isinstance(held, Reservation)
    ledger.settle(held, 300, b"x")
    ledger.close()
    database.close()
    return str(who.key_id)


def test_why_a_request_was_refused(trocar: Any, asked: str) -> None:
    [entry] = trocar("policy", "explain", "req_no", "--json").json
    assert (entry["kind"], entry["key_id"], entry["path"]) == ("refused", asked, "program.nodes[1]")
    assert [code["code"] for code in entry["codes"]] == ["needs_airlock", "policy"]
    assert all(code["summary"] and code["next_step"] for code in entry["codes"])
    assert entry["codes"][0]["docs"] == "docs/errors/needs_airlock.md"
    said = trocar("policy", "explain", "req_no").out
    assert f"refused, key {asked}\n" in said
    assert "  needs_airlock: " in said
    assert "next: " in said
    assert "docs/errors/policy.md" in said
    assert r"at program.nodes[1]: " in said
    assert "\x1b" not in said  # what a client said steers no terminal
    assert "_bits" not in said


def test_what_a_request_was_charged(trocar: Any, asked: str) -> None:
    entries = trocar("policy", "explain", "req_yes", "--json").json
    assert [(e["kind"], e["held_bits"], e["charged_bits"], e["lineage"]) for e in entries] == [
        ("admitted", 900, 0, "base"),
        ("settled", -900, 300, "base"),
    ]
    lines = [line.strip() for line in trocar("policy", "explain", "req_yes").out.splitlines()]
    assert [line for line in lines if "_bits" in line] == [
        "held_bits: +900",
        "held_bits: -900",
        "charged_bits: +300",
    ]
    assert {e["key_id"] for e in entries} == {asked}


def test_a_request_that_nobody_made(trocar: Any, asked: str) -> None:
    assert asked
    ran = trocar("policy", "explain", "req_" + "x" * 500)
    assert (ran.code, ran.out) == (2, "")
    assert "[bad_argument] at request" in ran.err
    assert "x" * 100 not in ran.err

from __future__ import annotations

import hashlib
import re
import sqlite3
from dataclasses import replace
from typing import Any

import pytest
from gate_room import Room

from trocar.errors import AuthError, PolicyRefusal, TrocarError
from trocar.gate.policy import Role, Tier
from trocar.gate.scopes import EVERYTHING, Scope


def _answer(gate: Room, secret: str | None) -> dict[str, Any]:
    with pytest.raises(TrocarError) as e:
        gate.keys.authenticate(secret)
    return e.value.as_json()


def test_a_new_key_authenticates_as_what_it_was_made(gate: Room) -> None:
    made = gate.keys.create("lab-1", Tier.agent, Role.operator, "nightly")
    who = gate.keys.authenticate(made.secret)
    assert who == made.principal
    assert (who.tenant, who.tier, who.role) == ("lab-1", Tier.agent, Role.operator)
    assert re.fullmatch(rf"trk_{who.key_id}_[A-Za-z0-9_-]{{43}}", made.secret)


def test_the_secret_is_shown_once_and_stored_nowhere(file_gate: Room) -> None:
    gate = file_gate
    made = gate.keys.create("lab", Tier.trusted, Role.researcher)
    random_part = made.secret.split("_", 2)[2]
    assert random_part not in repr(made) + str(made) + repr(gate.keys.list()) + repr(gate.ledger.entries())
    gate.database.close()
    on_disk = b"".join(p.read_bytes() for p in gate.path.parent.iterdir() if p.is_file())
    assert random_part.encode() not in on_disk
    assert hashlib.sha256(made.secret.encode()).hexdigest().encode() in on_disk
    gate.open()


def test_no_key_is_its_own_answer(gate: Room) -> None:
    assert _answer(gate, None)["error"]["refusals"][0]["code"] == "no_key"


def test_unknown_malformed_and_revoked_keys_get_the_same_answer(gate: Room) -> None:
    made = gate.keys.create("lab", Tier.trusted, Role.researcher)
    gate.keys.revoke(made.principal.key_id)
    other = gate.keys.create("lab", Tier.trusted, Role.researcher)
    tail = "A" * 43
    wrong = [
        "",
        "trk_",
        made.secret,
        other.secret[:-1] + ("B" if other.secret[-1] == "A" else "A"),
        other.secret + "\n",
        other.secret.upper(),
        f"trk_{other.principal.key_id}_{tail}",
        f"trk_{'0' * 16}_{tail}",
        f"trk_' OR 1=1 --_{tail}",
        "\x00\ud800" * 40,
        "x" * 10**6,
    ]
    answers = [_answer(gate, secret) for secret in wrong]
    assert answers[0]["error"]["refusals"][0]["code"] == "bad_key"
    assert all(answer == answers[0] for answer in answers)
    assert gate.keys.authenticate(other.secret) == other.principal


def test_revoking_twice_is_one_entry_and_an_unknown_key_is_named(gate: Room) -> None:
    who = gate.key()
    gate.keys.revoke(who.key_id)
    gate.keys.revoke(who.key_id)
    assert [e.kind for e in gate.ledger.entries()] == ["key_created", "key_revoked"]
    assert [r.revoked_ms is not None for r in gate.keys.list()] == [True]
    with pytest.raises(TrocarError) as e:
        gate.keys.revoke("nobody")
    assert e.value.code == "key_not_found"


@pytest.mark.parametrize(
    ("tenant", "note"),
    [
        ("", ""),
        ("Lab", ""),
        ("a/b", ""),
        ("a" * 65, ""),
        ("lab", "x" * 201),
        ("lab", "\x1b[2J"),
        ("lab", "a\nb"),
    ],
)
def test_tenants_and_notes_keep_to_their_grammar(gate: Room, tenant: str, note: str) -> None:
    with pytest.raises(TrocarError) as e:
        gate.keys.create(tenant, Tier.trusted, Role.researcher, note)
    assert e.value.code == "bad_value"
    assert gate.keys.list() == ()


def test_the_files_are_closed_to_other_users(file_gate: Room) -> None:
    gate = file_gate
    gate.key()
    found = {p.name: p.stat().st_mode & 0o077 for p in gate.path.parent.rglob("*")}
    assert len(found) >= 4
    assert set(found.values()) == {0}


def test_keys_of_one_operator_are_listed_oldest_first(gate: Room) -> None:
    made = {gate.keys.create("lab", tier, Role.researcher, tier).principal for tier in Tier}
    listed = gate.keys.list()
    assert {r.principal for r in listed} == made
    assert [r.created_ms for r in listed] == sorted(r.created_ms for r in listed)


def test_the_database_holds_one_row_per_key(file_gate: Room) -> None:
    gate = file_gate
    gate.key()
    with sqlite3.connect(gate.path) as raw:
        assert raw.execute("SELECT count(*) FROM keys").fetchone() == (1,)
    raw.close()


def test_project_and_holder_are_the_tenant_unless_said(gate: Room) -> None:
    plain = gate.keys.create("lab", Tier.trusted, Role.researcher, "note").principal
    assert (plain.project, plain.holder, plain.scope, plain.subaccounts) == ("lab", "lab", EVERYTHING, ())
    said = gate.keys.create("lab", Tier.trusted, Role.checker, project="p.1", holder="ada.l@lab-1.example")
    assert (said.principal.project, said.principal.holder) == ("p.1", "ada.l@lab-1.example")
    assert gate.keys.authenticate(said.secret) == said.principal
    assert [r.made_by for r in gate.keys.list()] == ["", ""]


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("project", ""),
        ("project", "P"),
        ("project", "a@b"),
        ("project", "a" * 65),
        ("holder", ""),
        ("holder", "Ada"),
        ("holder", "ada lovelace"),
        ("holder", "ada+two@lab.example"),
        ("holder", "ada@"),
        ("holder", "@lab"),
        ("holder", "ada@lab@lab"),
        ("holder", "ada\n"),
        ("holder", "аda"),
        ("holder", "a" * 65),
        ("holder", "a@" + "b" * 190),
    ],
)
def test_projects_and_holders_keep_to_their_grammar(gate: Room, field: str, word: str) -> None:
    words: dict[str, Any] = {field: word}
    with pytest.raises(TrocarError) as e:
        gate.keys.create("lab", Tier.trusted, Role.researcher, **words)
    assert (e.value.code, e.value.path) == ("bad_value", field)
    assert gate.keys.list() == ()


def test_an_empty_scope_is_no_key(gate: Room) -> None:
    with pytest.raises(TrocarError) as e:
        gate.keys.create("lab", Tier.trusted, Role.researcher, scope=Scope(ops=frozenset()))
    assert e.value.path == "ops"
    assert gate.keys.list() == ()


@pytest.mark.parametrize("by", Role)
@pytest.mark.parametrize("made", Role)
def test_a_key_is_made_by_whoever_may(gate: Room, by: Role, made: Role) -> None:
    minter = gate.keys.create("ops", Tier.open, by).principal
    allowed = by is Role.owner or (by is Role.operator and made not in (Role.owner, Role.checker))
    if allowed:
        gate.keys.create("lab", Tier.external, made, by=minter)
        assert gate.keys.list()[-1].made_by == minter.key_id
    else:
        with pytest.raises(PolicyRefusal) as e:
            gate.keys.create("lab", Tier.external, made, by=minter)
        assert e.value.code == "not_allowed"
        assert len(gate.keys.list()) == 1


def test_nobody_makes_a_key_with_more_scope_than_his_own(gate: Room) -> None:
    minter = gate.keys.create("ops", Tier.open, Role.operator, scope=Scope(sites=frozenset({"z"}))).principal
    inside = Scope(sites=frozenset({"z.3"}), most_bits=9)
    assert (
        gate.keys.create("lab", Tier.open, Role.researcher, scope=inside, by=minter).principal.scope == inside
    )
    for wider in (EVERYTHING, Scope(sites=frozenset({"z.3", "q"})), Scope(models=frozenset({"toy"}))):
        with pytest.raises(PolicyRefusal) as e:
            gate.keys.create("lab", Tier.open, Role.researcher, scope=wider, by=minter)
        assert (e.value.code, e.value.path) == ("out_of_scope", "scope")


def test_a_revoked_or_invented_minter_makes_nothing(gate: Room) -> None:
    minter = gate.keys.create("ops", Tier.open, Role.operator).principal
    invented = replace(gate.key(), role=Role.owner)
    gate.keys.revoke(minter.key_id)
    for by in (minter, invented):
        with pytest.raises(AuthError):
            gate.keys.create("lab", Tier.open, Role.researcher, by=by)


@pytest.mark.parametrize(
    "change",
    [
        {"role": Role.owner},
        {"project": "other"},
        {"holder": "other"},
        {"scope": Scope(most_bits=1)},
        {"tier": Tier.open},
    ],
)
def test_a_principal_that_is_not_exactly_its_key_is_not_admitted(gate: Room, change: dict[str, Any]) -> None:
    who = gate.key()
    gate.reserve(who, 10)
    with pytest.raises(AuthError):
        gate.ask(replace(who, **change), 10)

"""Scopes in the gate: stored with the key, read back or refused, and turned into accounts."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from gate_room import Room

from trocar.errors import ServerFault
from trocar.gate import scopes
from trocar.gate.policy import Role, Tier
from trocar.gate.scopes import EVERYTHING, Scope, SubAccount
from trocar.grants import scope
from trocar.grants.tokens import Link

NARROW = Scope(frozenset({"toy"}), frozenset({"lens"}), frozenset({"z", "q.3"}), 77, 2**61)


def test_it_is_the_class_that_clients_have() -> None:
    assert scopes.Scope is scope.Scope


@pytest.mark.parametrize("held", [EVERYTHING, NARROW])
def test_a_scope_is_stored_with_its_key(file_gate: Room, held: Scope) -> None:
    made = file_gate.keys.create("lab", Tier.trusted, Role.researcher, scope=held)
    assert made.principal.scope == held
    assert file_gate.keys.authenticate(made.secret) == made.principal
    with closing(sqlite3.connect(file_gate.path)) as raw:
        assert raw.execute("SELECT scope FROM keys").fetchall() == [(held.as_json(),)]
    assert held.as_json() in file_gate.ledger.entries()[0].detail.replace("\\", "")


@pytest.mark.parametrize("text", ["", "{}}", "null", '{"models":["b","a"]}', '{"most_bits":"9"}'])
def test_a_scope_that_was_tampered_with_is_never_no_restriction(broken_file_gate: Room, text: str) -> None:
    made = broken_file_gate.keys.create("lab", Tier.trusted, Role.researcher, scope=NARROW)
    with closing(sqlite3.connect(broken_file_gate.path)) as raw, raw:
        raw.execute("UPDATE keys SET scope = ?", (text,))
    with pytest.raises(ServerFault) as e:
        broken_file_gate.keys.authenticate(made.secret)
    assert e.value.code == "ledger_unavailable"


def test_a_wider_scope_in_the_table_is_found_by_the_audit(broken_file_gate: Room) -> None:
    made = broken_file_gate.keys.create("lab", Tier.trusted, Role.researcher, scope=NARROW)
    with closing(sqlite3.connect(broken_file_gate.path)) as raw, raw:
        raw.execute("UPDATE keys SET scope = '{}'")
    [found] = broken_file_gate.ledger.check()
    assert found.startswith(f"key {made.principal.key_id}")


def test_bits_become_accounts() -> None:
    links = [
        Link("a" * 32, Scope(most_bits=5), False),
        Link("b" * 32, EVERYTHING, True),
        Link("c" * 32, NARROW, False),
    ]
    assert scopes.subaccounts("k", EVERYTHING) == ()
    assert scopes.subaccounts("k", NARROW) == (SubAccount("token:k", 77),)
    assert scopes.subaccounts("k", NARROW, links) == (
        SubAccount("token:k", 77),
        SubAccount(f"token:{'a' * 32}", 5),
        SubAccount(f"token:{'c' * 32}", 77),
    )

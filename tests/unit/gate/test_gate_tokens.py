"""Tokens at the gate: what they stand for, when they end, and one answer to everything that is not good."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gate_room import Room, code_of

from trocar.errors import AuthError, PolicyRefusal, ProgramError, ServerFault
from trocar.gate import keys
from trocar.gate.keys import NewKey, Principal
from trocar.gate.policy import Role, Tier
from trocar.gate.scopes import EVERYTHING, Scope, SubAccount
from trocar.grants.biscuits import Root
from trocar.grants.tokens import attenuate, ids, sign

LENS = Scope(ops=frozenset({"lens", "read"}), most_bits=500)


def root_of(gate: Room) -> Path:
    return gate.path.with_name("tokens.key")


def mint(gate: Room, made: NewKey, scope: Scope = EVERYTHING, role: Any = None) -> str:
    return gate.keys.mint(gate.keys.authenticate(made.secret), scope, role, root=root_of(gate)).text


def bad(gate: Room, secret: str) -> dict[str, Any]:
    with pytest.raises(AuthError) as e:
        gate.keys.authenticate(secret)
    assert code_of(e) == "bad_key"
    return e.value.as_json()


@pytest.fixture
def key(gate: Room) -> NewKey:
    return gate.keys.create("lab", Tier.trusted, Role.operator, project="p", holder="ada@lab.example")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Milliseconds that the keys of this process see."""
    now = {"ms": time.time_ns() // 1_000_000}
    monkeypatch.setattr(keys, "_now_ms", lambda: now["ms"])
    return now


def test_a_token_stands_for_its_key_with_less(gate: Room, key: NewKey) -> None:
    token = mint(gate, key, LENS)
    [first] = ids(token)
    who = gate.keys.authenticate(token)
    assert who == replace(
        key.principal, role=Role.researcher, scope=LENS, subaccounts=(SubAccount(f"token:{first}", 500),),
        token_ids=(first,),
    )  # fmt: skip
    weaker = attenuate(token, Scope(most_bits=90, ops=frozenset({"lens", "capture"})), "agent")
    _, second = ids(weaker)
    who = gate.keys.authenticate(weaker)
    assert (who.role, who.tier, who.holder) == (Role.agent, Tier.trusted, "ada@lab.example")
    assert who.scope == Scope(ops=frozenset({"lens"}), most_bits=90)
    assert who.subaccounts == (SubAccount(f"token:{first}", 500), SubAccount(f"token:{second}", 90))


def test_the_scope_of_the_key_holds_for_its_tokens(gate: Room) -> None:
    made = gate.keys.create(
        "lab", Tier.trusted, Role.researcher, scope=Scope(models=frozenset({"toy"}), most_bits=7)
    )
    who = gate.keys.authenticate(mint(gate, made, Scope(models=frozenset({"toy", "other"}), most_bits=9)))
    assert who.scope == Scope(models=frozenset({"toy"}), most_bits=7)
    assert [s.most_bits for s in who.subaccounts] == [7, 9]
    assert who.subaccounts[0].owner == f"token:{made.principal.key_id}"


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ({"model": "other"}, "model"),
        ({"ops": ["capture"]}, "ops[0]"),
        ({"sites": ["resid_post.13"]}, "sites[0]"),
        ({"bits": 501}, "bits"),
    ],
)
def test_a_token_asks_for_no_more_than_it_says(
    gate: Room, key: NewKey, asked: dict[str, Any], path: str
) -> None:
    scope = Scope(frozenset({"toy"}), LENS.ops, frozenset({"resid_post.12"}), 500)
    wide = Scope(frozenset({"toy", "other"}), None, frozenset({"resid_post"}), 2**40)
    who = gate.keys.authenticate(attenuate(mint(gate, key, scope), wide))
    inside = {"model": "toy", "ops": ["lens"], "sites": ["resid_post.12"], "bits": 500, "now_ms": 0}
    who.scope.require(**inside)
    with pytest.raises(PolicyRefusal) as e:
        who.scope.require(**{**inside, **asked})
    assert (code_of(e), e.value.path) == ("out_of_scope", path)


def test_an_agent_stays_one(gate: Room, key: NewKey) -> None:
    made = gate.keys.create("lab", Tier.agent, Role.agent)
    for token in (mint(gate, made), attenuate(mint(gate, made), LENS), mint(gate, key, role="agent")):
        assert gate.keys.authenticate(token).role is Role.agent
        assert gate.keys.authenticate(attenuate(token, EVERYTHING)).role is Role.agent


def test_a_token_mints_nothing(gate: Room) -> None:
    owner = gate.keys.create("lab", Tier.trusted, Role.owner)
    who = gate.keys.authenticate(mint(gate, owner))
    assert who.role is Role.researcher
    for role in Role:
        with pytest.raises(PolicyRefusal):
            gate.keys.create("lab", Tier.open, role, by=who)
    with pytest.raises(PolicyRefusal, match="attenuate it"):
        gate.keys.mint(who, root=root_of(gate))
    # without its blocks a token is not a key: the role tells
    with pytest.raises(AuthError):
        gate.keys.mint(replace(who, token_ids=()), root=root_of(gate))


@pytest.mark.parametrize("role", [Role.checker, Role.auditor])
def test_a_key_that_runs_nothing_has_no_tokens(gate: Room, key: NewKey, role: Role) -> None:
    made = gate.keys.create("lab", Tier.trusted, role)
    with pytest.raises(PolicyRefusal) as e:
        mint(gate, made)
    assert code_of(e) == "not_allowed"
    mint(gate, key)  # the root is there now
    bad(gate, sign(Root.of(root_of(gate).read_bytes()), made.principal.key_id))


def test_another_role_is_not_handed_out(gate: Room, key: NewKey) -> None:
    with pytest.raises(ProgramError) as e:
        mint(gate, key, role="owner")
    assert (code_of(e), e.value.path) == ("bad_value", "role")
    assert not root_of(gate).exists()


def test_everything_that_is_not_good_gets_the_answer_of_an_unknown_key(gate: Room, key: NewKey) -> None:
    unknown = bad(gate, f"trk_{'0' * 16}_{'A' * 43}")
    before_any = bad(gate, sign(Root.make(), key.principal.key_id))
    token = attenuate(mint(gate, key, LENS), Scope(most_bits=5))
    root = Root.of(root_of(gate).read_bytes())
    middle = len(token) // 2
    wrong = [
        "trt_",
        "trt_" + "A" * 10**6,
        token[:-1],
        token[:middle],
        token[:middle] + ("B" if token[middle] != "B" else "C") + token[middle + 1 :],
        token + "\n",
        token.upper(),
        "trt_\ud800",
        sign(Root.make(), key.principal.key_id),
        sign(root, "0" * 16),
    ]
    assert before_any == unknown
    assert [bad(gate, secret) for secret in wrong] == [unknown] * len(wrong)
    assert gate.keys.authenticate(token).key_id == key.principal.key_id


def test_a_token_ends_with_its_key(gate: Room, key: NewKey) -> None:
    token = mint(gate, key)
    who = gate.keys.authenticate(token)
    held = gate.reserve(who, 10)
    gate.keys.revoke(key.principal.key_id)
    assert bad(gate, token) == bad(gate, "trt_")
    for act in (lambda: gate.ask(who, 10), lambda: gate.ledger.settle(held, 10, b"")):
        with pytest.raises(AuthError):
            act()
    gate.ledger.cancel(held, 1)


def test_a_block_that_is_revoked_ends_what_was_made_from_it(gate: Room, key: NewKey) -> None:
    parent = mint(gate, key)
    child = attenuate(parent, Scope(most_bits=5))
    grandchild, sibling = attenuate(child, LENS), attenuate(parent, Scope(most_bits=5))
    before = gate.keys.authenticate(grandchild)
    gate.keys.revoke_token(ids(child)[-1])
    gate.keys.revoke_token(ids(child)[-1])
    for token in (child, grandchild):
        assert bad(gate, token) == bad(gate, "trt_")
    for token in (parent, sibling, key.secret):
        gate.keys.authenticate(token)
    with pytest.raises(AuthError):  # authenticated before, admitted after
        gate.ask(before, 5)
    kinds = [e.kind for e in gate.ledger.entries()]
    assert kinds == ["key_created", "root_made", "minted", "block_revoked"]


@pytest.mark.parametrize("token_id", ["", "x", "A" * 32, "0" * 31, "0" * 33, "0" * 16])
def test_what_is_no_id_is_not_revoked(gate: Room, token_id: str) -> None:
    with pytest.raises(ProgramError) as e:
        gate.keys.revoke_token(token_id)
    assert (code_of(e), e.value.path) == ("bad_value", "token_id")


def test_revocation_reaches_what_runs(gate: Room, key: NewKey) -> None:
    who = gate.keys.authenticate(mint(gate, key))
    with gate.database.read() as connection:
        keys.require_not_revoked(connection, who.key_id, who.token_ids)
    gate.keys.revoke_token(who.token_ids[0])
    with gate.database.read() as connection:
        keys.require_not_revoked(connection, who.key_id)
        with pytest.raises(AuthError):
            keys.require_not_revoked(connection, who.key_id, who.token_ids)


@pytest.mark.parametrize("block", [0, 1])
def test_what_a_revoked_token_asked_is_not_settled(gate: Room, key: NewKey, block: int) -> None:
    token = attenuate(mint(gate, key), LENS)
    other = mint(gate, key)
    mine, theirs, by_key = (
        gate.reserve(gate.keys.authenticate(secret), 100, body=secret)
        for secret in (token, other, key.secret)
    )
    gate.keys.revoke_token(ids(token)[block])
    with pytest.raises(AuthError) as e:
        gate.ledger.settle(mine, 50, b"x")
    assert code_of(e) == "bad_key"
    gate.ledger.cancel(mine, 1)
    for held in (theirs, by_key):
        assert gate.ledger.settle(held, 50, b"x").spent_bits == 50
    assert gate.ledger.check() == []


def test_the_log_knows_which_token_asked(gate: Room, key: NewKey) -> None:
    token = attenuate(mint(gate, key), LENS)
    gate.spend(gate.keys.authenticate(token), 10)
    gate.spend(key.principal, 10)
    asked = [json.loads(e.detail) for e in gate.ledger.entries(limit=1000) if e.kind == "admitted"]
    assert [detail.get("tokens", []) for detail in asked] == [list(ids(token)), []]
    gate.place.sql("UPDATE reservations SET tokens = '[]'")
    (found,) = gate.ledger.check()
    assert found.startswith("reservation ")
    tokens = json.dumps(list(ids(token)), separators=(",", ":"))
    gate.place.sql(f"UPDATE reservations SET tokens = '{tokens}' WHERE id = '{found.split()[1][:-1]}'")


def test_keys_and_tokens_expire(gate: Room, clock: dict[str, int]) -> None:
    soon = clock["ms"] + 1000
    made = gate.keys.create("lab", Tier.trusted, Role.researcher, scope=Scope(expires_ms=soon + 1000))
    token = mint(gate, made)
    short = attenuate(token, Scope(expires_ms=soon))
    who, by_key = gate.keys.authenticate(short), gate.keys.authenticate(made.secret)
    clock["ms"] = soon - 1
    gate.ask(who, 10)
    clock["ms"] = soon
    assert bad(gate, short) == bad(gate, "trt_")
    with pytest.raises(AuthError):
        gate.ask(who, 10)
    # a later expiry in a later block gives nothing back
    bad(gate, attenuate(short, Scope(expires_ms=soon + 500)))
    gate.keys.authenticate(token)
    gate.ask(by_key, 10)
    clock["ms"] = soon + 1000
    for secret in (token, made.secret):
        assert bad(gate, secret) == bad(gate, "trt_")
    with pytest.raises(AuthError):
        gate.ask(by_key, 10)
    with pytest.raises(AuthError):
        gate.keys.mint(by_key, root=root_of(gate))


@pytest.mark.parametrize(
    "change",
    [
        {"tier": Tier.open},
        {"tenant": "other"},
        {"project": "other"},
        {"holder": "other"},
        {"role": Role.operator},
        {"role": Role.owner},
        {"scope": EVERYTHING},
        {"subaccounts": ()},
        {"key_id": "0" * 16},
        {"token_ids": ()},
    ],
)
def test_a_principal_that_no_token_makes_is_not_admitted(gate: Room, change: dict[str, Any]) -> None:
    made = gate.keys.create("lab", Tier.external, Role.researcher, scope=LENS)
    who = gate.keys.authenticate(attenuate(mint(gate, made), Scope(expires_ms=2**61)))
    gate.reserve(who, 10)
    with pytest.raises(AuthError):
        gate.ask(replace(who, **change), 10)


def test_an_agents_token_is_admitted_and_a_researchers_is_not_made_of_it(gate: Room) -> None:
    made = gate.keys.create("lab", Tier.external, Role.agent)
    who = gate.keys.authenticate(mint(gate, made))
    gate.reserve(who, 10)
    with pytest.raises(AuthError):
        gate.ask(replace(who, role=Role.researcher), 10)


def test_the_log_says_what_was_minted_and_not_how_to_use_it(gate: Room, key: NewKey) -> None:
    token = gate.keys.mint(key.principal, LENS, "agent", root=root_of(gate))
    assert token.text not in repr(token)
    entry = gate.ledger.entries()[-1]
    assert (entry.kind, entry.key_id) == ("minted", key.principal.key_id)
    for word in (token.token_id, "agent", "lens"):
        assert word in entry.detail
    gate.database.close()
    on_disk = b"".join(p.read_bytes() for p in gate.path.parent.glob("ledger.db*") if p.is_file())
    assert token.text.encode() not in on_disk
    assert root_of(gate).read_bytes() not in on_disk
    assert root_of(gate).read_bytes().hex().encode() not in on_disk
    gate.open()


def test_the_root_is_made_once_and_read_by_its_owner_only(gate: Room, key: NewKey) -> None:
    mint(gate, key)
    secret = root_of(gate).read_bytes()
    assert root_of(gate).stat().st_mode & 0o777 == 0o600
    gate.crash()
    mint(gate, key)
    assert root_of(gate).read_bytes() == secret
    assert [e.kind for e in gate.ledger.entries()].count("root_made") == 1
    assert {p.name for p in gate.path.parent.iterdir() if "partial" in p.name} == set()


def test_a_root_whose_row_was_never_written_is_taken_up(gate: Room, key: NewKey) -> None:
    """A crash between the file and the commit."""
    left = Root.make()
    root_of(gate).write_bytes(left.secret)
    root_of(gate).chmod(0o600)
    gate.keys.authenticate(mint(gate, key))
    assert root_of(gate).read_bytes() == left.secret


def _lost(path: Path) -> None:
    path.unlink()


def _other(path: Path) -> None:
    path.write_bytes(Root.make().secret)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:31])


def _shown(path: Path) -> None:
    path.chmod(0o640)


@pytest.mark.parametrize("harm", [_lost, _other, _cut, _shown])
def test_a_harmed_root_mints_nothing_and_its_tokens_stay_good(gate: Room, key: NewKey, harm: Any) -> None:
    token = mint(gate, key)
    harm(root_of(gate))
    head = gate.ledger.head()
    with pytest.raises(ServerFault) as e:
        mint(gate, key)
    assert code_of(e) == "ledger_unavailable"
    assert str(gate.path.parent) not in str(e.value)
    assert gate.ledger.head() == head
    assert gate.keys.authenticate(token).key_id == key.principal.key_id


def test_a_root_that_cannot_be_written_is_refused(gate: Room, key: NewKey) -> None:
    with pytest.raises(ServerFault):
        gate.keys.mint(key.principal, root=gate.path.parent / "nowhere" / "tokens.key")
    assert [e.kind for e in gate.ledger.entries()] == ["key_created"]


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DELETE FROM revoked_tokens", "revoked token"),
        ("INSERT INTO revoked_tokens VALUES ('{ghost}', 0)", "revoked token"),
        ("UPDATE token_roots SET public_key = '{root}'", "token root"),
    ],
)
def test_tables_of_tokens_that_the_log_does_not_imply_are_named(
    broken_gate: Room, statement: str, named: str
) -> None:
    made = broken_gate.keys.create("lab", Tier.trusted, Role.researcher)
    broken_gate.keys.revoke_token(ids(mint(broken_gate, made))[0])
    assert broken_gate.ledger.check() == []
    broken_gate.place.sql(statement.format(ghost="0" * 32, root=Root.make().public.hex()))
    found = broken_gate.ledger.check()
    assert found
    assert all(line.startswith(named) for line in found)


def test_minting_and_checking_work_from_many_threads(gate: Room, key: NewKey) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda _: mint(gate, key, LENS), range(24)))
        found = list(pool.map(gate.keys.authenticate, tokens))
    assert len({who.token_ids for who in found}) == 24
    assert [e.kind for e in gate.ledger.entries()].count("root_made") == 1


def test_a_principal_of_a_key_has_no_blocks(key: NewKey) -> None:
    assert isinstance(key.principal, Principal)
    assert key.principal.token_ids == ()

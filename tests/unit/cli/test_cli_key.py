"""Keys with scopes, and tokens made of them, from the command line; what is printed is tried at the gate."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest

from trocar.errors import AuthError
from trocar.gate.database import Database
from trocar.gate.keys import Keys, Principal
from trocar.gate.policy import Role
from trocar.gate.scopes import Scope
from trocar.grants.tokens import ids

DAY_MS = 86_400_000
NARROW = ("--models", "toy, other", "--ops", "lens,edit", "--sites", "resid_post,z.3", "--bits", "9000")
SCOPE = Scope(
    frozenset({"toy", "other"}), frozenset({"lens", "edit"}), frozenset({"resid_post", "z.3"}), 9000
)


def who(home: Path, secret: str) -> Principal:
    database = Database(f"sqlite:///{home / 'data' / 'ledger.db'}")
    try:
        return Keys(database).authenticate(secret)
    finally:
        database.close()


@pytest.fixture
def key(trocar: Any) -> dict[str, Any]:
    made = trocar("key", "create", "--tenant", "alice", "--json")
    assert made.code == 0
    return dict(made.json)


@pytest.fixture
def attenuate(trocar: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`trocar key attenuate` with something in TROCAR_API_KEY."""

    def run(secret: str, *words: str) -> Any:
        monkeypatch.setenv("TROCAR_API_KEY", secret)
        return trocar("key", "attenuate", *words)

    return run


def test_a_key_is_made_as_the_options_say(trocar: Any, home: Path) -> None:
    before_ms = time.time_ns() // 1_000_000
    made = trocar(
        "key", "create", "--tenant", "lab", "--role", "checker", "--project", "p-1", "--holder", "ada@lab.example",
        *NARROW, "--expires", "30d", "--json",
    ).json  # fmt: skip
    found = who(home, made["secret"])
    assert (found.tenant, found.role, found.project, found.holder) == (
        "lab", Role.checker, "p-1", "ada@lab.example",
    )  # fmt: skip
    assert found.scope.within(SCOPE)
    assert (found.scope.models, found.scope.ops, found.scope.sites) == (SCOPE.models, SCOPE.ops, SCOPE.sites)
    assert found.scope.most_bits == 9000
    assert 0 <= made["expires_ms"] - before_ms - 30 * DAY_MS < 60_000
    assert (made["project"], made["holder"], made["sites"]) == (
        "p-1",
        "ada@lab.example",
        ["resid_post", "z.3"],
    )


def test_a_plain_key_is_restricted_in_nothing(key: dict[str, Any], home: Path) -> None:
    assert who(home, key["secret"]).scope == Scope()
    assert [key[name] for name in ("models", "ops", "sites", "most_bits", "expires_ms")] == [None] * 5
    assert (key["project"], key["holder"]) == ("alice", "alice")


def test_the_list_has_the_new_columns(trocar: Any, key: dict[str, Any]) -> None:
    trocar(
        "key",
        "create",
        "--tenant",
        "bob",
        "--holder",
        "bo.b@lab",
        "--project",
        "p9",
        *NARROW,
        "--expires",
        "12h",
    )
    out = trocar("key", "list").out
    assert out.split("\n")[0].split() == [
        "key", "tenant", "project", "holder", "tier", "role", "scope", "created", "expires", "revoked", "note",
    ]  # fmt: skip
    assert "other toy; edit lens; resid_post z.3; 9000 bit" in out
    assert "bo.b@lab" in out
    first, second = trocar("key", "list", "--json").json
    assert (first["models"], first["expires_ms"], first["made_by"]) == (None, None, "")
    assert (second["models"], second["most_bits"], second["project"]) == (["other", "toy"], 9000, "p9")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--ops", "lenz"), "bad_value"),
        (("--ops", ""), "bad_value"),
        (("--models", " , "), "bad_value"),
        (("--sites", "resid_pst"), "unknown_site"),
        (("--bits", "0"), "bad_argument"),
        (("--bits", "99999999999999999999"), "bad_value"),
        (("--expires", "30"), "bad_argument"),
        (("--expires", "0d"), "bad_argument"),
        (("--expires", "-3d"), "bad_argument"),
        (("--expires", "2030-01-01"), "bad_argument"),
        (("--expires", "99999d"), "bad_argument"),
        (("--role", "boss"), "bad_argument"),
        (("--holder", "Ada"), "bad_value"),
        (("--project", "a b"), "bad_value"),
    ],
)
def test_a_wrong_option_makes_no_key(
    trocar: Any, key: dict[str, Any], words: tuple[str, ...], code: str
) -> None:
    ran = trocar("key", "create", "--tenant", "bob", *words)
    assert (ran.code, ran.out) == (2, "")
    assert f"[{code}]" in ran.err
    assert len(trocar("key", "list", "--json").json) == 1


def test_the_first_token_of_a_key(attenuate: Any, key: dict[str, Any], home: Path) -> None:
    ran = attenuate(key["secret"], *NARROW, "--agent", "--expires", "90m")
    token = ran.out.strip()
    assert ran.out == f"{token}\n"  # stdout is for the next program
    found = who(home, token)
    assert (found.key_id, found.role) == (key["key_id"], Role.agent)
    assert found.scope.within(SCOPE)
    assert found.token_ids[0] in ran.err
    assert token not in ran.err
    assert (home / "data" / "tokens.key").stat().st_mode & 0o777 == 0o600


def test_a_token_is_made_weaker_without_the_data(
    attenuate: Any, key: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    token = attenuate(key["secret"], "--ops", "lens,read").out.strip()
    (home / "data").rename(tmp_path / "away")
    weaker = attenuate(token, "--bits", "500", "--json").json
    assert not (home / "data").exists()
    (tmp_path / "away").rename(home / "data")
    found = who(home, weaker["token"])
    assert found.scope == Scope(ops=frozenset({"lens", "read"}), most_bits=500)
    assert found.token_ids == ids(weaker["token"])
    assert found.token_ids[-1] == weaker["token_id"]


def test_stdin_serves_when_the_environment_is_empty(
    trocar: Any, key: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"  {key['secret']}\n"))
    token = trocar("key", "attenuate", "--bits", "5").out.strip()
    assert who(home, token).scope == Scope(most_bits=5)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    ran = trocar("key", "attenuate")
    assert (ran.code, ran.out) == (2, "")
    assert "[no_key] at TROCAR_API_KEY" in ran.err


def test_a_terminal_is_not_waited_for(trocar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def read(self, _size: int | None = -1) -> str:
            raise EOFError

    monkeypatch.setattr("sys.stdin", Terminal())
    assert "[no_key]" in trocar("key", "attenuate").err


@pytest.mark.parametrize(
    ("secret", "code"),
    [("trk_wrong", "bad_key"), ("trt_wrong", "bad_argument"), (f"trk_{'0' * 16}_{'A' * 43}", "bad_key")],
)
def test_what_is_neither_is_refused(attenuate: Any, key: dict[str, Any], secret: str, code: str) -> None:
    ran = attenuate(secret)
    assert (ran.code, ran.out) == (2, "")
    assert f"[{code}]" in ran.err


def test_minting_makes_no_ledger(attenuate: Any, home: Path) -> None:
    assert "[no_ledger]" in attenuate(f"trk_{'0' * 16}_{'A' * 43}").err
    assert not (home / "data").exists()


def test_a_token_is_revoked_by_its_id(trocar: Any, attenuate: Any, key: dict[str, Any], home: Path) -> None:
    token = attenuate(key["secret"]).out.strip()
    weaker = attenuate(token, "--bits", "5", "--json").json
    ran = trocar("key", "revoke", weaker["token_id"])
    assert (ran.code, ran.out) == (0, f"token {weaker['token_id']} is revoked\n")
    who(home, token)
    with pytest.raises(AuthError):
        who(home, weaker["token"])
    assert trocar("key", "revoke", key["key_id"]).out == f"key {key['key_id']} is revoked\n"
    with pytest.raises(AuthError):
        who(home, token)
    assert trocar("ledger", "verify").code == 0
    assert trocar("key", "revoke", "A" * 32).code == 2

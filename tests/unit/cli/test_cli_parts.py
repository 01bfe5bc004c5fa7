"""The three parts of a server by themselves: whose processes they speak with, and where their sockets lie."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from trocar.cli import processes, serve
from trocar.cli.address import bind
from trocar.cli.folder import Folder
from trocar.cli.plan import Plan, Sizes
from trocar.cli.serve_options import LogLevel, Network
from trocar.cli.users import uid_of
from trocar.errors import TrocarError
from trocar.gate.gate import Gate
from trocar.gate.policy import Policy, Tier
from trocar.host.worker import cell


def test_users_have_names_and_numbers() -> None:
    me = pwd.getpwuid(os.geteuid())
    assert uid_of(me.pw_name, "--gate-user") == me.pw_uid
    assert uid_of("0", "--gate-user") == 0
    assert uid_of(str((1 << 32) - 2), "--gate-user") == (1 << 32) - 2
    assert uid_of(None, "--gate-user") is None


@pytest.mark.parametrize("word", ["", "-1", "no such user", "4294967295", "9" * 30, "\u0661", "a\0b", "1.0"])
def test_who_is_no_user_is_refused(word: str) -> None:
    with pytest.raises(TrocarError) as caught:
        uid_of(word, "--front-user")
    assert (caught.value.code, caught.value.path) == ("bad_argument", "--front-user")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("worker", "--model", "m", "--socket", "s/w", "--gate-user", "no such user"), "--gate-user"),
        (("front", "--gate", "s/g", "--gate-user", "no such user"), "--gate-user"),
        (
            ("gate", "--model", "m", "--worker", "a/w", "--socket", "b/g", "--worker-user", "no such user"),
            "--worker-user",
        ),
        (
            ("gate", "--model", "m", "--worker", "a/w", "--socket", "b/g", "--front-user", "no such user"),
            "--front-user",
        ),
    ],
)
def test_an_unknown_user_ends_the_start(trocar: Any, words: tuple[str, ...], option: str) -> None:
    ran = trocar(*words)
    assert ran.code == 2
    assert f"[bad_argument] at {option}" in ran.err


def test_the_gate_refuses_one_folder_for_both_sockets(trocar: Any, tmp_path: Path) -> None:
    (tmp_path / "also").symlink_to(tmp_path)
    words = ("gate", "--model", "m", "--worker", str(tmp_path / "w"))
    ran = trocar(*words, "--socket", str(tmp_path / "also" / "g"))
    assert ran.code == 2
    assert "[bad_argument] at --socket" in ran.err
    assert "take the gate's place" in ran.err


def test_a_server_in_three_parts_has_two_folders_and_says_who_is_who(tmp_path: Path) -> None:
    address = bind("127.0.0.1", 0)
    with address.socket:
        home = processes._household(plan(tmp_path, None), address, tmp_path, Network.closed)
    options = {
        p.name: {w: p.words[i + 1] for i, w in enumerate(p.words) if w.startswith("--")} for p in home.all
    }
    assert options["worker"]["--socket"] == options["gate"]["--worker"]
    assert options["gate"]["--socket"] == options["front"]["--gate"]
    folders = [Path(options[name]["--socket"]).parent for name in ("worker", "gate")]
    assert folders[0] != folders[1]
    assert [f.stat().st_mode & 0o777 for f in folders] == [0o700, 0o700]
    mine = str(os.geteuid())
    assert options["worker"]["--gate-user"] == options["front"]["--gate-user"] == mine
    assert options["worker"]["--network"] == options["gate"]["--network"] == "closed"
    assert options["gate"]["--worker-user"] == options["gate"]["--front-user"] == mine


# ---- one process, and a policy that asks for three ----


@pytest.mark.parametrize("secret", [True, False])
def test_a_policy_that_asks_for_three_processes_needs_a_new_start(
    secret: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_secret", lambda names: list(names) if secret else [])
    asked = plan(tmp_path, None)
    asked.folder.make()
    gate = Gate(f"sqlite:///{tmp_path}/ledger.db")
    asked.folder.policy.write_text(
        "[settings]\nisolation = 'host'\n[people.tiers.external]\nscalar_bits = 6\n"
    )
    entries = gate.ledger.head()
    if secret:
        with pytest.raises(TrocarError) as caught:
            serve._reload(asked, gate)
        assert (caught.value.code, caught.value.path) == ("limit_changed", "settings.isolation")
        assert "--isolation host" in caught.value.refusals[0].next_step
        assert gate.policy == Policy()
        assert gate.ledger.head() == entries  # nothing was adopted, in the log neither
        asked.folder.policy.write_text("[people.tiers.external]\nscalar_bits = 6\n")
    serve._reload(asked, gate)  # what else is stricter is taken
    assert gate.policy.settings.isolation == ("process" if secret else "host")
    assert gate.policy.terms(Tier.external).scalar_bits == 6
    gate.close()


# ---- the worker's network -------------------------------------------------------------------------


def plan(tmp_path: Path, network: Network | None) -> Plan:
    sizes = Sizes(None, None, None, 1.0)
    folder = Folder.at(tmp_path / "data")
    return Plan(("m",), folder, None, None, sizes, LogLevel.warning, False, network)


@pytest.mark.parametrize(
    ("can", "secret", "said", "found"),
    [
        (True, True, None, "closed"),
        (True, False, "allowed", "closed"),
        (False, False, None, "allowed"),
        (False, False, "allowed", "allowed"),
        (False, True, "allowed", "allowed"),
        (False, True, None, None),
        (False, True, "closed", None),
        (False, False, "closed", None),
    ],
)
def test_secret_weights_are_not_served_from_a_network_unless_somebody_says_so(
    can: bool,
    secret: bool,
    said: str | None,
    found: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cell, "can_close_network", lambda: can)
    monkeypatch.setattr(serve, "_secret", lambda names: list(names) if secret else [])
    asked = plan(tmp_path, None if said is None else Network(said))
    if found is not None:
        assert serve._network(asked).value == found
        return
    with pytest.raises(TrocarError) as caught:
        serve._network(asked)
    assert (caught.value.code, caught.value.path) == ("network_open", "--network")


def test_a_network_is_a_matter_of_three_processes(trocar: Any) -> None:
    ran = trocar("serve", "--network", "allowed")
    assert ran.code == 2
    assert "[bad_argument] at --network" in ran.err
    assert "--isolation host" in ran.err


def test_a_worker_that_stays_in_the_network_does_not_start(
    trocar: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def close_network(*, knows_others: bool) -> bool:
        asked.append(knows_others)
        return False

    monkeypatch.setattr(cell, "close_network", close_network)
    other = str(os.geteuid() + 1)
    for words in ((), ("--gate-user", str(os.geteuid())), ("--gate-user", other), ("--network", "closed")):
        ran = trocar("worker", "--model", "m", "--socket", str(home / "w"), *words)
        assert ran.code == 2
        assert "[network_open] at --network" in ran.err
        assert "next: Start it where there is no network" in ran.err
    assert asked == [False, False, True, False]

"""The three parts of a server by themselves: whose processes they speak with, and where their sockets lie."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from trocar.cli import processes
from trocar.cli.address import bind
from trocar.cli.folder import Folder
from trocar.cli.plan import Plan, Sizes
from trocar.cli.serve_options import LogLevel
from trocar.cli.users import uid_of
from trocar.errors import TrocarError


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
    sizes = Sizes(None, None, None, 1.0)
    plan = Plan(("m",), Folder.at(tmp_path / "data"), None, None, sizes, LogLevel.warning, False)
    address = bind("127.0.0.1", 0)
    with address.socket:
        home = processes._household(plan, address, tmp_path)
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
    assert options["gate"]["--worker-user"] == options["gate"]["--front-user"] == mine

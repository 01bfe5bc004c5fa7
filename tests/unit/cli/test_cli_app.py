"""The entry point: help, exit codes, did-you-mean, and what is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import trocar as package
from trocar import errors
from trocar.cli import app, doctor, tree
from trocar.cli.checks import Finding
from trocar.codes import CODES
from trocar.graph.spec import SPEC

VERBS = ("serve", "demo", "model", "key", "ledger", "airlock", "attack", "ops", "doctor")


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(package.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'uvicorn', 'sqlalchemy', 'pydantic', 'numpy', 'httpx'}"
    started_s = time.perf_counter()
    done = python(
        f"import sys; from trocar.cli.app import main; code = main(['--help']); print({heavy} & set(sys.modules), code)"
    )
    took_s = time.perf_counter() - started_s
    assert done.stdout.endswith("set() 0\n")
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    assert took_s < 2.0  # the goal is 0.6 s on an idle machine; 0.12 s was measured


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("srve",), "serve"),
        (("ledgr", "show"), "ledger"),
        (("key", "creat"), "create"),
        (("model", "lst"), "list"),
        (("ledger", "verfy"), "verify"),
        (("docter",), "doctor"),
    ],
)
def test_a_misspelt_command_names_the_closest(trocar: Any, words: tuple[str, ...], near: str) -> None:
    ran = trocar(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "[unknown_command]" in ran.err
    assert f"closest: {near!r}" in ran.err


def test_a_misspelt_option_names_the_closest(trocar: Any) -> None:
    ran = trocar("serve", "--prot", "1")
    assert ran.code == 2
    assert "[bad_argument] at trocar serve" in ran.err
    assert "closest: '--port'" in ran.err


@pytest.mark.parametrize(
    "words",
    [("key", "create"), ("key", "create", "--tenant", "a", "--tier", "boss"), ("serve", "--port", "x")],
)
def test_a_wrong_or_absent_value_is_refused(trocar: Any, words: tuple[str, ...]) -> None:
    ran = trocar(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "[bad_argument]" in ran.err
    assert "--help` shows what is accepted" in ran.err


def test_a_noun_alone_prints_its_verbs(trocar: Any) -> None:
    ran = trocar("ledger")
    assert ran.code == 2
    assert "verify" in ran.err


def test_version(trocar: Any) -> None:
    assert trocar("--version").out == f"trocar {package.__version__}\n"


def ends_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken() -> Any:
        raise error

    monkeypatch.setattr(tree, "command", broken)


def test_a_fault_of_ours_is_3(trocar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with(monkeypatch, ZeroDivisionError("oops"))
    ran = trocar("ops")
    assert ran.code == app.FAULT
    assert "ZeroDivisionError: oops" in ran.err
    assert "[internal]" in ran.err


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ledger_unavailable", 3),
        ("disk_full", 3),
        ("key_not_found", 2),
        ("limit_changed", 2),
        ("bad_value", 2),
    ],
)
def test_the_kind_of_a_refusal_decides_the_exit_code(
    trocar: Any, monkeypatch: pytest.MonkeyPatch, code: str, expected: int
) -> None:
    ends_with(monkeypatch, errors.refuse(code, "", "why"))
    assert trocar("ops").code == expected


def test_a_missing_package_is_named(trocar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with(monkeypatch, ModuleNotFoundError("no", name="torch"))
    ran = trocar("ops")
    assert ran.code == 2
    assert "[missing_extra]" in ran.err
    assert "'torch'" in ran.err


def test_a_reader_that_stops_is_no_error() -> None:
    code = "import sys; from trocar.cli.app import main; sys.exit(main(['ops']))"
    path = str(Path(package.__file__).parents[1])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ops_is_the_table(trocar: Any) -> None:
    rows = trocar("ops", "--json").json
    assert [row["op"] for row in rows] == list(SPEC)
    read = next(row for row in rows if row["op"] == "read")
    assert read["fields"] == ["site", "at", "heads", "neurons", "keys"]
    assert all(op in trocar("ops").out for op in SPEC)


def test_the_hint_of_unknown_op_names_a_command_that_exists(trocar: Any) -> None:
    assert "`trocar ops`" in CODES["unknown_op"].next_step
    assert trocar("ops").code == 0


def test_no_colour_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    doctor._print(Finding("data", "warn", "said"))
    assert "\x1b[33m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    doctor._print(Finding("data", "warn", "said"))
    assert "\x1b[33m" not in capsys.readouterr().out

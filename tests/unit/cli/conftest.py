"""A command line with nothing of the real user's: own data folder, config, cache and no proxies of settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trocar.cli.app import main


@dataclass(frozen=True)
class Ran:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Trocar = Callable[..., Ran]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TROCAR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TROCAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("TROCAR_URL", "http://127.0.0.1:9")
    for name in ("TROCAR_API_KEY", "TROCAR_POLICY", "TROCAR_ANCHORS", "TROCAR_LEDGER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def trocar(home: Path, capsys: pytest.CaptureFixture[str]) -> Trocar:
    """Runs the real entry point in this process."""

    def run(*words: str) -> Ran:
        code = main(words)
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run

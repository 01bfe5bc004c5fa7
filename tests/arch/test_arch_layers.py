"""The import contracts hold, and each of them can fail: a planted import breaks it."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, SRC

CONFIG = ROOT / ".importlinter"
# contract -> (module, line): an import that this contract exists to stop
PLANTED = {
    "layers": ("graph/ops.py", "from trocar.wire import requests"),
    "server-without-client": ("service/service.py", "from trocar.client import edit"),
    "light-rooms": ("gate/ledger.py", "import torch"),
    "sdk-dependencies": ("client/results.py", "import sqlalchemy"),
    "gate-alone": ("gate/policy.py", "from trocar.models import catalog"),
    "biscuit-door": ("gate/tokens.py", "import biscuit_auth"),
    "engine-door": ("api/app.py", "from trocar.engine import protocol"),
    "store-door": ("api/app.py", "from trocar.store import Store"),
    "analysis-door": ("engine/executor.py", "from trocar import analysis"),
    "dictionaries-door": ("api/app.py", "from trocar import dictionaries"),
    "dictionaries-alone": ("dictionaries/files.py", "from trocar.store import Store"),
    "models-door": ("api/app.py", "from trocar.models import catalog"),
    "host-door": ("service/service.py", "from trocar.host import streams"),
    "three-processes": ("host/gate/line.py", "from trocar.host.worker import cell"),
    "front-process": ("host/front/front.py", "from trocar.gate import ledger"),
    "gate-process": ("host/gate/house.py", "from trocar.models import load"),
    "worker-process": ("host/worker/bench.py", "from trocar.gate import ledger"),
    "api-door": ("service/service.py", "from trocar.api import app"),
}


def lint(src: Path, contract: str | None = None) -> subprocess.CompletedProcess[str]:
    chosen = [] if contract is None else ["--contract", contract]
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--config", str(CONFIG), "--no-cache", *chosen],
        cwd=src.parent,
        env={**os.environ, "PYTHONPATH": str(src), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_contracts_hold() -> None:
    result = lint(SRC.parent)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_contract_has_a_planted_import() -> None:
    config = configparser.ConfigParser()
    config.read(CONFIG)
    names = {s.rpartition(":")[2] for s in config.sections() if ":contract:" in s}
    assert names == set(PLANTED)


@pytest.mark.parametrize("contract", PLANTED)
def test_a_planted_import_breaks_the_contract(contract: str, tmp_path: Path) -> None:
    module, line = PLANTED[contract]
    copy = tmp_path / "src"
    shutil.copytree(SRC, copy / "trocar", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "trocar" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(copy, contract)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout


def test_a_package_without_a_layer_breaks_the_contract(tmp_path: Path) -> None:
    copy = tmp_path / "src"
    shutil.copytree(SRC, copy / "trocar", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "trocar" / "newroom").mkdir()
    (copy / "trocar" / "newroom" / "__init__.py").write_text('"""New."""\n')
    assert lint(copy, "layers").returncode == 1

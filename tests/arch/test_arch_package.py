"""The package from outside: light to import, honest about its names and version, as strict under `-O`."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from source_tree import ROOT, SRC

import trocar

HEAVY = {
    "accelerate", "duckdb", "fastapi", "httpx", "obstore", "pyarrow", "pydantic", "rich", "sae_lens", "scipy",
    "sklearn", "sparsify", "sqlalchemy", "starlette", "torch", "transformers", "typer", "uvicorn", "vllm",
}  # fmt: skip
SERVER = HEAVY - {
    "httpx",
    "pydantic",
    "rich",
}  # httpx imports rich for its own command line, where it finds it
IMPORT = """
import json, sys, time
start = time.perf_counter()
{code}
took_s = time.perf_counter() - start
print(json.dumps({{"took_s": took_s, "modules": sorted({{m.split(".")[0] for m in sys.modules}})}}))
"""


def python(*args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(SRC.parent)}
    env.pop("COVERAGE_PROCESS_START", None)
    done = subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_quick() -> None:
    runs = [json.loads(python("-c", IMPORT.format(code="import trocar"))) for _ in range(3)]
    assert set(runs[0]["modules"]) & HEAVY == set()
    assert min(run["took_s"] for run in runs) < 1.0


def test_the_client_loads_no_server_code() -> None:
    seen = json.loads(python("-c", IMPORT.format(code="import trocar; trocar.Client; trocar.edit.add")))
    assert set(seen["modules"]) & SERVER == set()


def test_all_is_sorted_and_importable() -> None:
    assert trocar.__all__ == sorted(trocar.__all__)
    assert [name for name in trocar.__all__ if getattr(trocar, name, None) is None] == []
    assert set(dir(trocar)) == set(trocar.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="Cleint"):
        trocar.Cleint  # noqa: B018


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    log = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["version"] == trocar.__version__
    assert next(v for v in log if v.lower() != "unreleased") == trocar.__version__


def test_types_are_shipped() -> None:
    assert (SRC / "py.typed").exists()


def test_refusals_hold_without_assertions() -> None:
    """The gate and the checker refuse the same things when `python -O` removes every assert."""
    script = str(Path(__file__).with_name("refusals.py"))
    plain, optimised = json.loads(python(script)), json.loads(python("-O", script))
    assert (plain.pop("debug"), optimised.pop("debug")) == (True, False)
    assert optimised == plain
    assert optimised == {
        "seal": "TypeError",
        "no key": "no_key",
        "bad key": "bad_key",
        "over budget": "budget_exhausted",
        "settled above the hold": "bad_bits",
        "settled twice": "reservation_closed",
        "not public": "TypeError",
        "not finite": "result_not_finite",
        "out of range": "layer_out_of_range",
        "no output": "nothing_returned",
    }


def test_the_lazy_names_are_the_right_ones() -> None:
    for name, module in trocar._LAZY.items():
        assert getattr(trocar, name) is getattr(importlib.import_module(module), name)

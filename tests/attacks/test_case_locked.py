"""Case S, continued: what is installed is locked by version and hash, and what is tested is what is locked.

The lock is compared with the metadata of what is installed here, never with the script that wrote it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from source_tree import ROOT

LOCK = (ROOT / "server.lock").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SERVER, EVERYTHING = ("server", "s3", "postgres", "tokens"), tuple(PROJECT["optional-dependencies"])
# A server on Linux and one on a system that has no CUDA.
LINUX = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}
MACOS = LINUX | {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
RELOCK = "Run `make lock` and commit what it writes."


def entries(text: str) -> list[tuple[Requirement, list[str]]]:
    """Every requirement of a file with its hashes; lines that continue the one before are joined to it."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    parts = [re.split(r"\s+--hash=", line) for line in lines]
    return [(Requirement(head), hashes) for head, *hashes in parts]


def pins(text: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Name -> the version that holds in an environment (this one, unless another is given)."""
    held = [r for r, _ in entries(text) if r.marker is None or r.marker.evaluate(environment)]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in held}


def asked(extras: Iterable[str]) -> list[Requirement]:
    """What `trocar[extras]` names itself, from pyproject.toml: metadata of an old installation may be stale."""
    lines = [*PROJECT["dependencies"], *(d for e in extras for d in PROJECT["optional-dependencies"][e])]
    return [Requirement(line) for line in lines]


def reachable(extras: Iterable[str]) -> Iterator[str]:
    """Names of everything that `trocar[extras]` needs here, by the metadata of what is installed."""
    todo = [(r, "") for r in asked(extras)]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen and name != "trocar":
                seen.add((name, wanted))
                todo += [(Requirement(line), wanted) for line in distribution(name).requires or ()]
    yield from sorted({name for name, _ in seen})


def loose(text: str, *, hashed: bool) -> list[str]:
    """Requirements that are not one version of the public index, or that lack a hash."""
    version_only = re.compile(r"==[0-9][0-9a-z.]*")
    found = [str(r) for r, _ in entries(text) if not version_only.fullmatch(str(r.specifier)) or r.url]
    sha256 = re.compile(r"sha256:[0-9a-f]{64}")
    return found + [
        str(r)
        for r, hashes in entries(text)
        if hashed and not (hashes and all(map(sha256.fullmatch, hashes)))
    ]


def disagreeing(lock: str, constraints: str) -> list[str]:
    """Names of the lock that the constraints lack, or have in another version."""
    environments = (None, LINUX, MACOS)
    both = [(pins(lock, e), pins(constraints, e)) for e in environments]
    return sorted({name for locked, held in both for name in locked if held.get(name) != locked[name]})


def strangers(constraints: str) -> list[str]:
    """What is installed here in another version than the constraints name; a suffix such as `+cpu` is no other."""
    found = []
    for name, wanted in pins(constraints).items():
        try:
            have = version(name)
        except PackageNotFoundError:
            continue
        if Version(have).public != str(Version(wanted)):
            found.append(f"{name} {have} (locked: {wanted})")
    return found


def inadmissible(constraints: str) -> list[str]:
    """What pyproject.toml asks for in a range that the locked version is outside of."""
    build = [Requirement(line) for line in PYPROJECT["build-system"]["requires"]]
    wanted = [r for r in [*asked(EVERYTHING), *build] if r.name != "trocar"]
    held = pins(constraints)
    return [str(r) for r in wanted if not r.specifier.contains(held.get(canonicalize_name(r.name), "0"))]


def test_case_s_dependencies_are_bounded() -> None:
    """Every dependency has a lower bound, and every pin is one version and nothing else."""
    unbounded = [str(r) for r in asked(EVERYTHING) if r.name != "trocar" and ">=" not in str(r.specifier)]
    assert unbounded == []
    assert loose(CONSTRAINTS, hashed=False) == []
    assert "--hash" not in CONSTRAINTS, "pip installs no editable package when hashes are given"


def test_case_s_everything_installed_is_locked() -> None:
    """What a server is installed from is locked by version and hash, down to the last package."""
    names = list(reachable(SERVER))
    assert {"fastapi", "starlette", "pydantic-core", "psycopg-binary", "biscuit-python", "torch"} <= {*names}
    assert set(names) - set(pins(LOCK)) == set(), RELOCK
    assert loose(LOCK, hashed=True) == [], RELOCK


def test_case_s_everything_tested_is_constrained() -> None:
    """CI installs nothing of which the version is not written down, what builds the package included."""
    build = {canonicalize_name(Requirement(line).name) for line in PYPROJECT["build-system"]["requires"]}
    assert ({*reachable(EVERYTHING)} | build | {"editables"}) - set(pins(CONSTRAINTS)) == set(), RELOCK


def test_case_s_lock_and_constraints_agree() -> None:
    """A server gets the versions that were tested, and pyproject.toml admits them."""
    assert disagreeing(LOCK, CONSTRAINTS) == [], RELOCK
    assert inadmissible(CONSTRAINTS) == [], RELOCK


def test_case_s_one_version_for_all() -> None:
    """No package of a server has several versions for several systems or Pythons: what was tested is what runs."""
    names = [canonicalize_name(r.name) for r, _ in entries(LOCK)]
    assert sorted(names) == sorted(set(names))


def test_case_s_lock_is_not_of_this_machine() -> None:
    """The lock is that of the public torch: with CUDA on Linux, without elsewhere. A local build has neither."""

    def cuda(environment: dict[str, str]) -> set[str]:
        return {n for n in pins(LOCK, environment) if n.startswith(("nvidia-", "triton"))}

    assert len(cuda(LINUX)) > 5
    assert cuda(MACOS) == set()


def test_case_s_tests_run_on_what_is_locked() -> None:
    """What is installed where the tests run is what a server gets."""
    found = strangers(CONSTRAINTS)
    assert found == [], (
        f"{', '.join(found)}: the tests run on other versions than constraints.txt names. `make test` installs the "
        "locked ones; `make lock` moves the lock; with other versions on purpose, deselect this test."
    )


def changed(text: str, pattern: str, new: str) -> str:
    """`text` with its first match replaced: there must be one."""
    done, count = re.subn(pattern, new, text, count=1, flags=re.MULTILINE)
    assert count == 1
    return done


def test_case_s_a_breach_of_the_lock_would_be_noticed() -> None:
    """Each rule above finds the fault that it is for."""
    missing = changed(LOCK, r"^h11==.*\n(    --hash.*\n)+", "")
    assert set(reachable(SERVER)) - set(pins(missing)) == {"h11"}
    for pattern, new in (
        (r"^(h11==\S+) \\\n(    --hash.*\n)+", r"\1\n"),
        (r"^h11==\S+ \\\n    --hash=sha256:", r"h11==0.16.0 \\\n    --hash=md5:"),
        (r"^h11==", "h11>="),
        (r"^(torch==[\d.]+)", r"\1+cpu"),
        (r"^h11==\S+", "h11 @ https://example.com/h11.whl"),
    ):
        assert len(loose(changed(LOCK, pattern, new), hashed=True)) == 1, pattern
    other = changed(CONSTRAINTS, r"^h11==.*", "h11==0.0.1")
    assert disagreeing(LOCK, other) == ["h11"]
    assert [s.split()[0] for s in strangers(other)] == ["h11"]
    assert inadmissible(changed(CONSTRAINTS, r"^fastapi==.*", "fastapi==0.1")) == ["fastapi>=0.115"]
    assert (
        inadmissible(changed(CONSTRAINTS, r"^hatchling==.*\n", "")) == PYPROJECT["build-system"]["requires"]
    )


@pytest.mark.parametrize(
    "line", ["--index-url https://example.com/simple", "--find-links /wheels", "-e .", "./x.whl"]
)
def test_case_s_the_lock_says_nothing_else(line: str) -> None:
    """No option and no file stands in a lock: neither parses as a requirement."""
    with pytest.raises(ValueError, match="Expected"):
        entries(f"{LOCK}{line}\n")


def test_case_s_without_its_tool_the_lock_stays() -> None:
    """The script that writes the lock says what is missing, and writes nothing."""
    command = [sys.executable, "-S", "-I", str(ROOT / "scripts" / "lock.py")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "`make lock` installs it" in ran.stderr
    assert (ROOT / "server.lock").read_text() == LOCK


TOOL = r"""
import json, os, sys
arguments, stdin = sys.argv[1:], sys.stdin.read()
if "--fail" in arguments:
    sys.exit(3)
after = {a: b for a, b in zip(arguments, arguments[1:])}
bounds = open(after["--constraints"]).read()
output = after["--output-file"]
seed = open(output).read()
with open(os.environ["TOOL_LOG"], "a") as log:
    print(json.dumps([arguments, stdin, bounds, seed]), file=log)
hashed = " \\\n    --hash=sha256:00" if "--generate-hashes" in arguments else ""
open(output, "w").write(f"torch==2.13.0{hashed}\nnumpy==9 ; os_name != 'x'{hashed}\n")
"""


@pytest.fixture
def relock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs a copy of the script with a tool that writes down what it was asked; gives that."""
    for name in ("pyproject.toml", "server.lock", "constraints.txt", "scripts/lock.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tool" / "uv").mkdir(parents=True)
    (tmp_path / "tool" / "uv" / "__init__.py").touch()  # or one that is installed would come first
    (tmp_path / "tool" / "uv" / "__main__.py").write_text(TOOL)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "tool"), "TOOL_LOG": str(tmp_path / "log")}

    def run(*options: str, ends: int = 0) -> list[Any]:
        command = [sys.executable, str(tmp_path / "scripts" / "lock.py"), *options]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == ends, ran.stderr
        log = tmp_path / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return run


def test_case_s_the_lock_is_of_the_public_index(relock: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Neither settings nor index of whoever writes the lock get into it, and what is locked stays."""
    (server, _, bounds, seed), (dev, build, pinned, _) = relock()
    assert {"--no-config", "--no-emit-index-url", "--no-header", "--universal"} <= {*server} & {*dev}
    assert "--generate-hashes" in server
    assert bounds == ""
    assert LOCK in seed
    assert PYPROJECT["build-system"]["requires"][0] in build.splitlines()
    assert pinned.splitlines() == ["torch==2.13.0", "numpy==9 ; os_name != 'x'"]
    assert (
        (tmp_path / "server.lock")
        .read_text()
        .endswith("\nnumpy==9 ; os_name != 'x' \\\n    --hash=sha256:00\n")
    )
    heads = [[x for x in text.splitlines() if x.startswith("#")] for text in (LOCK, CONSTRAINTS)]
    written = [(tmp_path / name).read_text() for name in ("server.lock", "constraints.txt")]
    assert heads == [[x for x in text.splitlines() if x.startswith("#")] for text in written]


def test_case_s_torch_moves_by_name_only(relock: Callable[..., list[Any]]) -> None:
    """Everything moves but torch, of which CI has one build; torch moves when it is named."""
    assert relock("--upgrade")[0][2] == f"torch=={pins(LOCK)['torch']}"
    assert relock("--upgrade-package", "torch")[-2][2] == ""


def test_case_s_a_lock_that_fails_changes_nothing(relock: Callable[..., list[Any]], tmp_path: Path) -> None:
    """When the tool fails, both files are what they were."""
    assert relock("--fail", ends=1) == []
    assert (tmp_path / "server.lock").read_text() == LOCK
    assert (tmp_path / "constraints.txt").read_text() == CONSTRAINTS

"""docs/isolation.md: its commands run, its start lines are the real ones, and three users reach what its table says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import isolation_page as page
import pytest
from host_room import COME_UP_S, Door, code, make_model, until
from isolation_page import PAGE, SERVED, USERS, Machine

pytestmark = pytest.mark.e2e
RUN = {
    "model": "tiny",
    "prompts": ["abc"],
    "program": {"nodes": [{"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}]},
}
STARTS = ("worker", "gate", "front")


def _tree() -> Any:
    """The conftest of the whole tree: every folder's own is called the same."""
    spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def machine(**options: Any) -> Iterator[Machine]:
    """An empty machine with a model, under a short path that every user may walk."""
    root = Path(tempfile.mkdtemp(prefix="pg-"))
    root.chmod(0o755)
    tree = _tree()
    made = Machine(
        root,
        make_model(root / "srv", tree.random_llama(), tree.byte_tokenizer()),
        page.free_port(),
        **options,
    )
    for folder in (root / "srv", *(root / "srv").rglob("*")):
        folder.chmod(0o755 if folder.is_dir() else 0o644)
    try:
        yield made
    finally:
        made.close()


def verb(words: list[str]) -> str:
    """What a line of the page does: `worker`, `ledger freeze`, `install`."""
    at = words.index("trocar") if "trocar" in words else -1
    if at < 0:
        return words[0]
    return " ".join(w for w in words[at + 1 : at + 3] if not w.startswith("-"))


def prepare(made: Machine) -> None:
    """All of the page up to the three commands, in its order; then those, the last first."""
    lines = page.commands()
    first = next(i for i, words in enumerate(lines) if verb(words) in STARTS)
    for words in lines[:first]:
        ran = made.do(words)
        assert ran is None or ran.returncode == 0, ran.stdout + ran.stderr
    for name in reversed(STARTS):
        start(made, name)


def start(made: Machine, name: str) -> None:
    [words] = [w for w in page.commands() if verb(w) == name]
    made.do(words)


def door(made: Machine) -> Door:
    """The server, once it answers."""
    until(lambda: "gate ready" in made.said("gate") or made.running["gate"].poll() is not None, COME_UP_S)
    assert made.running["gate"].poll() is None, made.said("gate")
    secret = re.search(r"TROCAR_API_KEY=(\S+)", made.said("gate"))
    assert secret is not None
    found = Door(f"http://127.0.0.1:{made.port}", secret[1])
    until(lambda: answers(found), COME_UP_S)
    return found


def answers(found: Door) -> bool:
    try:
        return found.send("GET", "/healthz").status_code == 200
    except httpx.TransportError:
        return False


def ask(found: Door) -> str:
    """How a request ends: `ok` or a code."""
    heard = found.send("POST", "/v1/runs", RUN)
    if heard.status_code == 202:
        heard = found.result(heard.json()["job"])
    return "ok" if heard.status_code == 200 else code(heard)


def typed(made: Machine, name: str) -> str:
    """What a command of the page prints."""
    [words] = [w for w in page.commands() if verb(w) == name]
    ran = made.do(words)
    assert ran is not None
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_command_is_one_that_a_test_types() -> None:
    known = {"useradd", "install", "export", "chgrp", "chmod", "model pull", *STARTS, "audit log", "audit verify",
             "ledger show", "ledger freeze", "ledger thaw"}  # fmt: skip
    assert {verb(words) for words in page.commands()} == known


def test_the_page_from_its_first_line_to_its_last() -> None:
    """As one user; that the front may come first, and the gate may go and come back, is part of the page."""
    with machine() as made:
        prepare(made)
        found = door(made)
        assert ask(found) == "ok"
        assert found.send("GET", "/v1/capabilities").json()["isolation"] == "host"
        assert "The worker is a process of this user" in made.said("gate")
        lines(made)
        assert typed(made, "ledger show").count("tiny") == 3
        assert "is frozen" in typed(made, "ledger freeze")
        assert ask(found) == "lineage_frozen"
        assert "goes on" in typed(made, "ledger thaw")
        assert ask(found) == "ok"
        assert "thawed" in typed(made, "audit log")
        assert "all of them in the log" in typed(made, "audit verify")
        assert made.stop("gate") == 0
        assert ask(found) == "ledger_unavailable"
        start(made, "gate")
        until(lambda: ask(found) == "ok", COME_UP_S)
        assert made.stop("front") == 0
        assert made.stop("gate") == 0
        assert made.stop("worker") == 0


def lines(made: Machine) -> None:
    """The lines of the start that the page names are printed by who it says."""
    text = PAGE.read_text().split("## What the start says")[1].split("\n## ")[0]
    shown = re.findall(r"^\| `([^`]+)`(?:, or `([^`]+)`)? \| ([^|]+) \|", text, re.MULTILINE)
    assert len(shown) == 9
    log = made.at("/var/lib/trocar-worker/worker.log").read_text()
    said = {"gate": made.said("gate"), "front": made.said("front"), "`worker.log`": log}
    for line, other, who in shown:
        wanted = [re.split(r"NAME|PATH|URL|\.\.\.", each)[0].strip() for each in (line, other) if each]
        places = [text for name, text in said.items() if name in who]
        assert not places or any(each in place for each in wanted for place in places), line
        assert places or "`serve`" in who, line


def test_three_users_reach_what_the_table_says() -> None:
    python = page.interpreter_of_others()
    if python is None:
        pytest.skip("needs root, and a Python that other users may run")
    with machine(users=USERS, trocar=python) as made:
        prepare(made)
        found = door(made)
        assert ask(found) == "ok"
        assert "The worker is a process of another user (29001; this is 29002)" in made.said("gate")
        places = {
            "weights": made.model / "model.safetensors",
            "rows": made.at("/var/lib/trocar-worker/store"),
            "its log": made.at("/var/lib/trocar-worker/worker.log"),
            "ledger": made.at("/var/lib/trocar-gate/ledger.db"),
            "anchors": made.at("/var/lib/trocar-anchors"),
            "worker": made.at("/run/trocar-worker/socket"),
            "gate": made.at("/run/trocar-gate/socket"),
        }
        reach = {user: {n for n, at in places.items() if reaches(uid, at)} for user, uid in USERS.items()}
    assert reach == {
        "trocar-worker": {"weights", "rows", "its log", "worker"},
        "trocar-gate": {"ledger", "anchors", "worker", "gate"},
        "trocar-front": {"gate"},
    }


LOOK = """
import os, socket, stat, sys
path = sys.argv[1]
if stat.S_ISSOCK(os.stat(path).st_mode):
    socket.socket(socket.AF_UNIX).connect(path)
else:
    os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
"""


def reaches(uid: int, path: Path) -> bool:
    """Whether a process of this user can read the file or folder, or call the socket."""
    assert path.exists(), path
    ran = subprocess.run(
        ["/usr/bin/python3", "-c", LOOK, str(path)], user=uid, group=uid, extra_groups=[], cwd="/",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 or "PermissionError" in ran.stderr, ran.stderr
    return ran.returncode == 0


def test_the_page_is_about_a_model_of_the_catalog() -> None:
    """The path of the weights that it names is where a pull leaves them."""
    from trocar.models.cache import catalog_home

    assert f"/srv/trocar/models/{catalog_home(SERVED).name}/model.safetensors" in PAGE.read_text()

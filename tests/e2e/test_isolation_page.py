"""docs/isolation.md: its commands run, and its start lines are the real ones."""

from __future__ import annotations

import re

import pytest
from host_room import COME_UP_S, until
from isolation_page import PAGE, SERVED, STAYING, Machine, ask, commands, door, machine, prepare, start, verb

pytestmark = pytest.mark.e2e


def typed(made: Machine, name: str) -> str:
    """What a command of the page prints."""
    [words] = [w for w in commands() if verb(w) == name]
    ran = made.do(words)
    assert ran is not None
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_command_is_one_that_a_test_types() -> None:
    known = {"useradd", "install", "export", "chgrp", "chmod", "model pull", *STAYING, "audit log", "audit verify",
             "ledger show", "ledger freeze", "ledger thaw"}  # fmt: skip
    assert {verb(words) for words in commands()} == known


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
        made.settings["TROCAR_API_KEY"] = found.secret
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


def test_the_page_is_about_a_model_of_the_catalog() -> None:
    """The path of the weights that it names is where a pull leaves them."""
    from trocar.models.cache import catalog_home

    assert f"/srv/trocar/models/{catalog_home(SERVED).name}/model.safetensors" in PAGE.read_text()

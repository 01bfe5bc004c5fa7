"""The page on keys and tokens says what the tables say, and its example makes the token that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docs_reference as reference
import pytest
from docs_blocks import blocks

import trocar
from trocar.errors import PolicyRefusal
from trocar.gate.policy import Role
from trocar.gate.roles import POWERS
from trocar.grants.biscuits import Root
from trocar.grants.scope import Scope
from trocar.grants.tokens import sign, verify

PAGE = reference.DOCS / "keys.md"
REFUSED = reference.DOCS / "errors" / "out_of_scope.md"


def rows(page: Path, first: str) -> dict[str, list[str]]:
    """A table of the page by its first column."""
    lines = page.read_text().split(f"| {first} |", 1)[1].split("\n\n")[0].split("\n")[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells}


def test_the_table_of_roles_is_the_table() -> None:
    shown = rows(PAGE, "role | runs programs")
    order = ["run", "mint", "change_policy", "review", "read_log", "operate"]
    assert shown == {role.value: ["yes" if power in POWERS[role] else "" for power in order] for role in Role}


def examples() -> list[str]:
    return [b.text for b in blocks(PAGE.read_text()) if b.language == "python"]


def test_the_example_of_asking_runs(server: Any) -> None:
    asking, _ = examples()
    with trocar.Client("http://server", server.keys["bob"], transport=server.transport()) as client:
        names: dict[str, Any] = {"client": client}
        exec(compile(asking, "docs/keys.md", "exec"), names)
    who = server.service.gate.keys.authenticate(names["token"])
    assert (who.role, who.scope.ops, who.scope.most_bits) == ("agent", frozenset({"read", "lens"}), 1_000_000)
    assert who.scope.expires_ms is not None


def test_the_example_of_attenuating_runs() -> None:
    _, attenuating = examples()
    root = Root.make()
    names: dict[str, Any] = {"token": sign(root, "0" * 16, Scope(most_bits=1_000_000))}
    exec(compile(attenuating, "docs/keys.md", "exec"), names)
    grant = verify(names["agents"], root.public)
    assert (grant.scope, grant.agent) == (names["narrow"], True)
    assert [link.scope.most_bits for link in grant.links] == [1_000_000, 500_000]


def test_the_refusal_on_its_page_is_the_real_one() -> None:
    [block] = [b for b in blocks(REFUSED.read_text()) if b.language == "text"]
    scope = Scope(sites=frozenset({"resid_post.12"}))
    with pytest.raises(PolicyRefusal) as e:
        scope.require(model="m", ops=[], sites={"nodes[0].site": "resid_post.13"}, bits=0, now_ms=0)
    assert str(e.value) == block.text.strip()

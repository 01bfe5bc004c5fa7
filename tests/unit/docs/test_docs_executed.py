"""Every Python block of the docs runs, against a real server with the real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docs_reference as reference
import docs_run
import pytest
from docs_blocks import Block, blocks
from docs_desk import MODEL, Desk
from docs_run import PAGES

import trocar
from trocar.codes import CODES
from trocar.errors import kind_of

pytestmark = [pytest.mark.model, pytest.mark.e2e]
ROOT = reference.ROOT
DOCS = reference.DOCS
# programs.md only records; its blocks run in test_docs_reference, that of keys.md in test_docs_keys, those of the
# others in test_docs_pages
ELSEWHERE = {DOCS / name for name in ("programs.md", "keys.md", *PAGES)}


@pytest.fixture(scope="module", autouse=True)
def clients() -> Iterator[None]:
    opened = docs_run.Clients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trocar, "Client", opened)
        yield
    opened.close()


@pytest.fixture(scope="module")
def names(docs_desk: Desk, clients: None) -> dict[str, Any]:
    return docs_run.names(docs_desk)


@pytest.fixture
def user(docs_desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROCAR_URL", docs_desk.url)
    monkeypatch.setenv("TROCAR_API_KEY", docs_desk.researcher)


def python_blocks(path: Path) -> list[Block]:
    return [b for b in blocks(path.read_text()) if b.language == "python"]


def test_no_python_block_is_left_out() -> None:
    pages = {p for p in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")] if python_blocks(p)}
    covered = {DOCS / "errors" / f"{c}.md" for c in CODES} | {
        DOCS / "tutorials" / "first.md",
        ROOT / "README.md",
    }
    assert pages - covered - ELSEWHERE == set()


@pytest.mark.parametrize("page", [DOCS / "tutorials" / "first.md"], ids=lambda p: p.name)
@pytest.mark.usefixtures("user")
def test_a_tutorial_runs_from_top_to_bottom(page: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in python_blocks(page):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
    assert namespace["steered"] != namespace["plain"]


@pytest.mark.usefixtures("user")
def test_the_readme_runs() -> None:
    namespace: dict[str, Any] = {"statements": docs_run.STATEMENTS, "labels": docs_run.LABELS}
    (block,) = python_blocks(ROOT / "README.md")
    exec(compile(block.text, "README.md", "exec"), namespace)
    assert namespace["job"].state == "COMPLETED"
    assert len(namespace["probe"].sites) == 30
    assert namespace["text"].receipt.edits[0].rows > 0


RUN = [c for c in CODES if python_blocks(DOCS / "errors" / f"{c}.md")]


@pytest.mark.parametrize("code", RUN)
def test_an_error_page_shows_the_actual_message(code: str, names: dict[str, Any]) -> None:
    python, text = blocks((DOCS / "errors" / f"{code}.md").read_text())
    shown = docs_run.run(python.text, f"docs/errors/{code}.md", dict(names))
    assert shown == text.text
    assert f"[{code}]" in shown or str(kind_of(code).status) in shown


def test_the_example_programs_are_for_the_model_that_is_served(docs_desk: Desk) -> None:
    with trocar.Client(docs_desk.url, docs_desk.researcher) as client:
        real = client.model(MODEL).facts
    made_up = {"fingerprint", "unavailable", "norms"}
    assert real.model_dump(exclude=made_up) == reference.FACTS.model_dump(exclude=made_up)

"""The generated parts of the docs are current, and the tables in them are complete."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import docs_reference as reference
import pytest
from docs_blocks import blocks, fill, parts

from trocar.codes import CODES
from trocar.graph import check
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts
from trocar.graph.program import Program
from trocar.graph.scope import Scope
from trocar.graph.spec import SPEC
from trocar.sites import SITES
from trocar.wire.requests import RunRequest

DOCS = reference.DOCS
LAYERS = {f"resid_post.{i}": 576 for i in range(30)}
ACTS, ART = "act_" + "0" * 32, "art_" + "0" * 32
MADE_ON = reference.FACTS.fingerprint
HANDLES = {
    ACTS: HandleFacts(
        handle=ACTS, kind="activations", fingerprint=MADE_ON, widths=LAYERS, rows_per_prompt=(1,)
    ),
    ART: HandleFacts(handle=ART, kind="artifact", fingerprint=MADE_ON, widths=LAYERS, has_probe=True),
}


@pytest.mark.parametrize("path", sorted(reference.current()), ids=lambda p: p.relative_to(DOCS).as_posix())
def test_generated_parts_are_current(path: Path) -> None:
    assert path.read_text() == reference.current()[path], "run `make reference`"


def test_measured_parts_are_current() -> None:
    """The tables of `docs/speed.md` are those of the committed results."""
    done = subprocess.run([sys.executable, "-m", "bench.report", "--check"], cwd=DOCS.parent, check=False)
    assert done.returncode == 0, "run `python -m bench.report`"


def test_a_stale_part_would_be_noticed() -> None:
    page = "<!-- generated: x -->\nold\n<!-- /generated -->"
    assert parts(page) == {"x": "old\n"}
    assert fill(page, {"x": "new\n"}) != page


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    pages = {p.stem for p in (DOCS / "errors").glob("*.md")} - {"index"}
    assert pages == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_an_error_page_names_its_code_and_shows_an_example_and_a_next_step(code: str) -> None:
    page = (DOCS / "errors" / f"{code}.md").read_text()
    assert page.startswith(f"# `{code}`\n")
    example, steps = page.split("## Example\n")[1].split("## What to do\n")
    shown = blocks(example)
    assert shown
    assert shown[-1].language == "text"
    if len(shown) == 1:  # not run here: it must at least be the message of this code
        assert f"[{code}]" in shown[0].text
        assert f"docs/errors/{code}.md" in shown[0].text
    assert re.search(r"^- .{20,}", steps, re.MULTILINE)
    assert len(page.split("<!-- /generated -->")[1].split("## Example")[0].split()) >= 8


def test_every_op_has_a_heading() -> None:
    headings = re.findall(r"^### `([^`]+)`", (DOCS / "programs.md").read_text(), re.MULTILINE)
    assert headings == list(SPEC)


def test_every_site_has_a_row() -> None:
    rows = re.findall(r"^\| `([a-z_]+)(?:\.L)?` \|", (DOCS / "sites.md").read_text(), re.MULTILINE)
    assert rows == list(SITES)


def test_the_five_programs_are_what_the_python_makes() -> None:
    page = (DOCS / "programs.md").read_text()
    printed = [RunRequest.model_validate_json(b.text) for b in blocks(page) if b.language == "json"]
    assert len(printed) == 5
    assert printed == reference.example_requests()


@pytest.mark.parametrize("number", range(5))
def test_the_checker_accepts_each_program(number: int) -> None:
    request = reference.example_requests()[number]
    scope = Scope(
        model=reference.FACTS,
        lengths=(10,) * len(request.prompts),
        generation=request.generation,
        tensors={"v0": (576,)},
        handles=HANDLES,
        encode=lambda _: [5],
    )
    checked = check.check(request.program, scope, Prices(24, 256))
    assert checked.cost.total_bits > 256


def test_the_schema_describes_programs() -> None:
    schema = json.loads(reference.SCHEMA.read_text())
    assert schema["properties"]["nodes"]["items"]["discriminator"]["mapping"].keys() == SPEC.keys()
    assert Program.model_validate_json('{"nodes": [{"id": "x", "op": "text"}]}').nodes[0].op == "text"

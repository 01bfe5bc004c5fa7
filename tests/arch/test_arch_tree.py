"""The folder list is the architecture, and nothing in it grows too long or goes nameless."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from source_tree import ROOT, SRC, functions, modules, name_of, tree

MOST_LINES_PER_FILE = 400
MOST_LINES_PER_FUNCTION = 60
# Tables with one row per entry, which are read by looking a row up. A new name here needs a reason.
TABLES: set[str] = set()
NAMELESS = {"utils", "util", "helpers", "helper", "common", "base", "misc", "core", "shared", "impl"}
VAGUE = re.compile(r"(Manager|Helper|Handler|Impl|Util|Utils)$")


def described() -> dict[str, str]:
    """Package -> sentence, from the list in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = text.split("<!-- packages -->")[1].split("<!-- /packages -->")[0]
    return dict(re.findall(r"^- `([a-z_/.]+)`: (.+)$", block, re.MULTILINE))


def existing() -> set[str]:
    rooms = {name_of(p.parent) + "/" for p in modules() if p.parent != SRC}
    return rooms | {p.name for p in SRC.glob("*.py") if p.name != "__init__.py"}


def test_every_package_has_one_sentence_in_the_docs() -> None:
    sentences = described()
    assert set(sentences) == existing()
    several = [n for n, s in sentences.items() if not s.endswith(".") or re.search(r"\. [A-Z]", s)]
    assert several == []


def test_every_package_is_a_package() -> None:
    assert [d for d in existing() if d.endswith("/") and not (SRC / d / "__init__.py").exists()] == []


def test_no_module_without_a_noun() -> None:
    assert [name_of(p) for p in modules() if p.stem in NAMELESS or p.parent.name in NAMELESS] == []


def test_no_class_without_a_noun() -> None:
    found = [(name_of(p), n) for p in modules() for n in tree(p).body]
    classes = [(where, n.name) for where, n in found if isinstance(n, ast.ClassDef)]
    assert [c for c in classes if VAGUE.search(c[1])] == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_lengths(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES_PER_FILE or name_of(path) in TABLES
    spans = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(tree(path))}
    assert {n: s for n, s in spans.items() if s > MOST_LINES_PER_FUNCTION} == {}


def test_no_table_is_excused_in_vain() -> None:
    long = {name_of(p) for p in modules() if len(p.read_text().splitlines()) > MOST_LINES_PER_FILE}
    assert long >= TABLES


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    if path.name != "__init__.py":
        assert ([*path.read_text().split('"""'), ""])[1].strip()

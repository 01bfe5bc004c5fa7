"""Words that do not belong into the repository, and skipped tests that nobody wrote down."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from source_tree import ROOT, called, dotted, tracked

# Written in pieces, so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": "/" + r"(work/|tmp/dev|opt/(wheels|pypi)|root/|home/[a-z])",
    "a folder beside the repository": r"\.\./" + "shared",
    "the host of a package registry": r"(pypi|test\.pypi)\." + r"org|python" + r"hosted\.|npm" + r"js\.(org|com)"
    + r"|proxy\.golang" + r"\.|(deb|archive)\.(debian|ubuntu)" + r"\.",
}  # fmt: skip
BINARY = {".png", ".jpg", ".ico", ".woff2", ".safetensors", ".db"}
SKIPS = ("pytest.skip", "pytest.importorskip", "pytest.xfail", "unittest.skip")
MARKS = ("mark.skip", "mark.skipif", "mark.xfail")


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_forbidden_words(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    texts = {p: p.read_text(errors="replace") for p in tracked() if p.suffix not in BINARY}
    found = [
        f"{p.relative_to(ROOT)}:{i}: {line.strip()[:80]}"
        for p, text in texts.items()
        for i, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of one machine", "see /" + "work/main/x"),
        ("a folder beside the repository", "../" + "shared/design"),
        ("the host of a package registry", "https://" + "py" + "pi.org/simple"),
        ("the host of a package registry", "https://files.python" + "hosted.org/x"),
    ],
)
def test_forbidden_words_are_noticed(what: str, line: str) -> None:
    assert re.search(FORBIDDEN[what], line)


def skipped(module: ast.Module, name: str) -> set[str]:
    """`path::test` of every test that can be skipped or is expected to fail."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            marks = [dotted(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
            inside = [called(c) for c in ast.walk(node) if isinstance(c, ast.Call)]
            if any(m.endswith(MARKS) for m in marks) or any(c in SKIPS for c in inside):
                found.add(f"{name}::{node.name}")
    if any(_skips_module(statement) for statement in module.body):
        found.add(f"{name}::*")
    return found


def _skips_module(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign) and "pytestmark" in map(dotted, statement.targets):
        parts = [n for n in ast.walk(statement.value) if isinstance(n, ast.expr)]
        return any(dotted(n).endswith(MARKS) for n in parts)
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and called(call) in SKIPS


def quarantined() -> set[str]:
    rows = (ROOT / "tests" / "QUARANTINE.md").read_text()
    return set(re.findall(r"^\| `([^`]+)` \| [^|]{10,} \| [^|]{3,} \|$", rows, re.MULTILINE))


def test_every_skip_has_a_row() -> None:
    here = Path(__file__)
    files = [p for p in sorted((ROOT / "tests").rglob("*.py")) if p != here]
    found = set().union(*(skipped(ast.parse(p.read_text()), p.relative_to(ROOT).as_posix()) for p in files))
    assert found == quarantined()


@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.skip\ndef test_x(): ...",
        "@pytest.mark.skipif(True, reason='x')\ndef test_x(): ...",
        "@pytest.mark.xfail\nasync def test_x(): ...",
        "def test_x():\n    pytest.skip('x')",
    ],
)
def test_a_skip_is_noticed(source: str) -> None:
    assert skipped(ast.parse(source), "t.py") == {"t.py::test_x"}


def test_a_skipped_module_is_noticed() -> None:
    assert skipped(ast.parse("pytestmark = [pytest.mark.skip]"), "t.py") == {"t.py::*"}
    assert skipped(ast.parse("pytest.importorskip('torch')"), "t.py") == {"t.py::*"}

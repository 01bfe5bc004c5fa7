"""The page of behaviours and the suite name the same tests, and no behaviour is without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "conformance.md"
BEHAVIOURS = range(1, 44)


def _tests() -> set[str]:
    """Names of the numbered tests, without `test_`."""
    trees = [ast.parse(p.read_text()) for p in sorted(HERE.glob("test_conformance_*.py"))]
    names = [n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)]
    return {n.removeprefix("test_") for n in names if re.match(r"test_c[0-9]{2}_", n)}


def _rows() -> dict[int, set[str]]:
    """Tests that each row of the page names."""
    rows = re.findall(r"^\| (\d+) \| (.+)$", PAGE.read_text(), re.MULTILINE)
    return {int(number): set(re.findall(r"`(c\d\d_\w+)`", rest)) for number, rest in rows}


def test_every_behaviour_has_a_row_and_a_test_that_exists() -> None:
    rows = _rows()
    assert list(rows) == list(BEHAVIOURS)
    assert {n for names in rows.values() for n in names} == _tests()
    for number, names in rows.items():
        assert names, number
        assert all(name.startswith(f"c{number:02d}_") for name in names)

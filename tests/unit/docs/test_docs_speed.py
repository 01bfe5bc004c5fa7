"""The tables of docs/speed.md are made of the committed results: other results, other tables."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import docs_reference as reference
import pytest

RESULTS = reference.RESULTS
PAGE = reference.DOCS / "speed.md"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(reference.ROOT))
    found = importlib.import_module("bench.report.__main__")
    yield found
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        del sys.modules[name]


def rows(part: str) -> list[list[str]]:
    """Cells of every line of every table."""
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def changed(report: Any, monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    """The results of a benchmark, with some of their groups replaced."""
    bench = {**json.loads((RESULTS / f"{name}.json").read_text()), **values}
    monkeypatch.setattr(report, "result", lambda _name: bench)


def test_every_part_of_the_page_has_a_table_and_every_table_a_part(report: Any) -> None:
    assert set(re.findall(r"<!-- measured: ([a-z]+) -->", PAGE.read_text())) == set(report.PARTS)


def test_every_ratio_of_the_gate_is_on_the_page(report: Any) -> None:
    bench = json.loads((RESULTS / "gate.json").read_text())
    shown = rows(report.ledger()) + rows(report.gate())
    for name in bench["ratios"]:
        low, high = (f"{x:.2f}" for x in bench["spread"][name])
        part = [f"{1 - bench['ratios'][name]:.1%}"]
        row = part if name.startswith("request_") else [f"{bench['ratios'][name]:.2f}", f"{low} to {high}"]
        assert any(set(row) <= set(cells) for cells in shown), name


def test_the_gates_part_is_what_the_run_leaves(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {"request_sqlite": 0.9, "request_postgres": 0.75}
    spread = {"request_sqlite": [0.875, 0.925], "request_postgres": [0.5, 1.0]}
    goals = {"request_sqlite": 0.95, "request_postgres": 0.95}
    changed(report, monkeypatch, "gate", ratios=ratios, spread=spread, goals=goals)
    assert rows(report.gate())[1:] == [
        ["SQLite", "10.0%", "7.5% to 12.5%", "<= 5%"],
        ["PostgreSQL", "25.0%", "0.0% to 50.0%", "<= 5%"],
    ]


def test_one_process_stands_beside_three(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    median_ms = {"tokens_8_process": 10.4, "tokens_8_host": 20.0}
    values = {"ratios": {"tokens_8": 0.52}, "spread": {"tokens_8": [0.5, 0.6]}, "goals": {"tokens_8": 0.9}}
    changed(report, monkeypatch, "isolation", median_ms=median_ms, **values)
    assert rows(report.isolation())[1:] == [["8", "10", "20", "0.52", "0.50 to 0.60", ">= 0.9"]]


def test_other_results_make_another_page(
    report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = PAGE.read_text()
    assert report.filled(page) == page
    changed(
        report, monkeypatch, "gate", pairs_per_s={f"{d}_{n}": 7.0 for d in report.DATABASES for n in (1, 50)}
    )
    monkeypatch.setattr(report, "PARTS", {**dict.fromkeys(report.PARTS, lambda: ""), "ledger": report.ledger})
    assert report.filled(page).count("| 7.0 |") == 4

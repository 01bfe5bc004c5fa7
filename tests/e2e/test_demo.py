"""The tour as `make demo` runs it: a real server process, three keys, five experiments, one report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.model, pytest.mark.e2e]
LIMIT_S = 900


class Addresses(HTMLParser):
    """Everything a page would load or link to, and how many figures it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))
        ]


def test_the_tour_passes_every_check_and_leaves_a_self_contained_report(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "-m", "trocar.cli.app", "demo", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert len(re.findall(r"^  ok ", done.stdout, re.MULTILINE)) == 12
    page = Addresses()
    page.feed(out.read_text(encoding="utf-8"))
    assert page.addresses == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 5

"""Pages whose Python blocks run one after another, and print what the page shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docs_reference as reference
import docs_run
import numpy as np
import pytest
from docs_blocks import Block, blocks
from docs_desk import MODEL, Desk

import trocar

pytestmark = [pytest.mark.model, pytest.mark.e2e]


@pytest.fixture
def names(docs_desk: Desk) -> Iterator[dict[str, Any]]:
    with trocar.Client(docs_desk.url, docs_desk.researcher, quiet=True) as client:
        yield {"trocar": trocar, "np": np, "client": client, "model": client.model(MODEL)}


def pairs(path: Path) -> list[tuple[Block, str]]:
    """Each Python block with the text block that follows it, or with nothing."""
    found = blocks(path.read_text())
    following = [*found[1:], Block("", "", "", 0)]
    return [
        (b, after.text if after.language == "text" else "")
        for b, after in zip(found, following, strict=True)
        if b.language == "python"
    ]


@pytest.mark.parametrize("page", docs_run.PAGES)
def test_a_page_shows_what_its_blocks_print(page: str, names: dict[str, Any]) -> None:
    for block, shown in pairs(reference.DOCS / page):
        printed = docs_run.run(block.text, f"docs/{page}:{block.line}", names)
        assert printed.strip() == shown.strip(), f"docs/{page}:{block.line}"

"""The docs' scripts on the path, and one real server for all pages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))

from docs_desk import Desk, desk  # noqa: E402


@pytest.fixture(scope="session")
def docs_desk(tmp_path_factory: pytest.TempPathFactory, smollm2: Any) -> Iterator[Desk]:
    with desk(tmp_path_factory.mktemp("desk"), smollm2) as found:
        yield found

"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A real S3 server, the same for all tests; each asks it for a prefix of its own."""
    from s3_server import running

    with running() as server:
        yield server

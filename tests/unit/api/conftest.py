"""Three callers of one server: alice (operator), bob, and eve, whose budget is small."""

from __future__ import annotations

from typing import Any

import pytest
from http_room import Caller


@pytest.fixture(scope="module")
def alice(server: Any) -> Caller:
    return Caller(server.app, server.keys["alice"])


@pytest.fixture(scope="module")
def bob(server: Any) -> Caller:
    return Caller(server.app, server.keys["bob"])


@pytest.fixture(scope="module")
def eve(server: Any) -> Caller:
    return Caller(server.app, server.keys["eve"])


@pytest.fixture(scope="module")
def nobody(server: Any) -> Caller:
    return Caller(server.app, None)

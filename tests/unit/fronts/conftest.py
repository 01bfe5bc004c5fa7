"""The tiny served model in the three spellings, and the same weights under plain torch hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trocar
from trocar.client import aio
from trocar.hooks import HookedModel
from trocar.nnsight import LanguageModel

IDS = ("op", "id", "a", "b", "of", "by", "value", "gate")


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[trocar.Client]:
    with trocar.Client("http://server", server.keys["alice"], transport=server.transport(), quiet=True) as c:
        yield c


@pytest.fixture(scope="module")
def model(client: trocar.Client) -> trocar.Model:
    return client.model("tiny")


@pytest.fixture
def lm(model: trocar.Model) -> LanguageModel:
    return LanguageModel(model)


@pytest.fixture
def hooked(model: trocar.Model) -> HookedModel:
    return HookedModel(model)


@pytest.fixture
def gpt2(client: trocar.Client, model: trocar.Model) -> trocar.Model:
    """The same model, said to be of another family: enough to record and to check."""
    facts = model.facts.model_copy(update={"family": "gpt2"})
    return trocar.Model(client, aio.AsyncModel(client._core, facts))


@pytest.fixture(scope="session")
def v() -> Any:
    return np.linspace(-1.0, 1.0, 32, dtype=np.float32)


def program(recorded: Any) -> list[dict[str, Any]]:
    """The nodes with ids and array names in order of appearance, so that two recordings can be compared."""
    seen: dict[str, str] = {}
    found = []
    for index, node in enumerate(recorded.request.program.nodes):
        seen[node.id] = f"#{index}"
        found.append({k: _named(x, seen) for k, x in node.model_dump(exclude_none=True).items()})
    for node in found:
        if node["op"] == "tensor":
            node["name"] = recorded.vectors[node["name"]].tolist()
    return found


def _named(value: Any, seen: dict[str, str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_named(x, seen) for x in value)
    return seen.get(value, value) if isinstance(value, str) else value


@pytest.fixture(scope="session")
def same() -> Any:
    """Fails unless two recordings are the same request."""

    def compare(ours: Any, native: Any) -> None:
        assert program(ours) == program(native)
        assert ours.request.prompts == native.request.prompts
        assert ours.request.generation == native.request.generation

    return compare

"""The models under test: a tiny random one always, SmolLM2 under the marker `model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bench_room import GAPS, Bench

from trocar.engine.hf.engine import HFEngine

TEXTS = (
    "The Eiffel Tower is in the city of",
    "In 1969 the first person walked on the",
    "two words",
    "A list of colours: red, green, blue and also",
)


def _prompts(loaded: Any, name: str) -> tuple[tuple[int, ...], ...]:
    if name == "smollm2":
        return tuple(tuple(loaded.tokenize(t)) for t in TEXTS)
    draw = torch.Generator().manual_seed(3)
    return tuple(tuple(torch.randint(0, 256, (n,), generator=draw).tolist()) for n in (9, 6, 2, 13))


@pytest.fixture(scope="session", params=["tiny", pytest.param("smollm2", marks=pytest.mark.model)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    loaded = request.getfixturevalue(request.param)
    engine = HFEngine(loaded)
    yield Bench(loaded, engine, _prompts(loaded, request.param))
    assert engine.check() == []
    assert engine.stats().live_requests == 0
    engine.close()


@pytest.fixture(scope="session")
def small(tiny: Any) -> Iterator[Bench]:
    """The tiny model alone, for what does not depend on the model."""
    engine = HFEngine(tiny)
    yield Bench(tiny, engine, _prompts(tiny, "tiny"))
    engine.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, gap in sorted(GAPS.items()):
        terminalreporter.write_line(f"largest difference, {name}: {gap:.2e}")

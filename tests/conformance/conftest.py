"""The models under test: random ones of every family always, real ones under the marker `model`; one engine each.

`bench` is every model, `family` every random one, `small` one of them for what does not depend on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from bench_room import Bench
from compare_room import GAPS
from models_room import ENGINES, RANDOM, REAL, random_bench, real_bench


def _made(request: pytest.FixtureRequest, model: str, engine: str) -> Bench:
    return (
        random_bench(model, engine)
        if model in RANDOM
        else real_bench(model, request.getfixturevalue(REAL[model]), engine)
    )


def _served(bench: Bench) -> Iterator[Bench]:
    yield bench
    assert bench.engine.check() == []
    assert bench.engine.stats().live_requests == 0
    bench.engine.close()


MODELS = [*RANDOM, *(pytest.param(m, marks=pytest.mark.model) for m in REAL)]


@pytest.fixture(scope="session", params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=MODELS)
def bench(request: pytest.FixtureRequest, engine_name: str) -> Iterator[Bench]:
    yield from _served(_made(request, request.param, engine_name))


@pytest.fixture(scope="session", params=RANDOM)
def family(request: pytest.FixtureRequest, engine_name: str) -> Iterator[Bench]:
    yield from _served(random_bench(request.param, engine_name))


@pytest.fixture(scope="session")
def small(engine_name: str) -> Iterator[Bench]:
    yield from _served(random_bench("llama", engine_name))


@pytest.fixture
def limited(engine_name: str) -> Iterator[Any]:
    """Makes small benches with an engine of given limits; each on a model of its own."""
    made: list[Bench] = []

    def make(family: str = "llama", **limits: Any) -> Bench:
        made.append(random_bench(family, engine_name, **limits))
        return made[-1]

    yield make
    for bench in made:
        assert bench.engine.check() == []
        bench.engine.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The comparisons that came nearest to their tolerance."""
    for name, gap in sorted(GAPS.items(), key=lambda item: -item[1])[:12]:
        terminalreporter.write_line(f"largest difference, {name}: {gap:.2e}")

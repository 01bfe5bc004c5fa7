"""The sync facade and the async core have the same public verbs, with the same parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from trocar.client import aio, airlock, sync

PAIRS = [
    (aio.AsyncClient, sync.Client),
    (aio.AsyncModel, sync.Model),
    (aio.AsyncJob, sync.Job),
    (aio.AsyncActivations, sync.Activations),
    (airlock.AsyncTicket, airlock.Ticket),
]
INSTANCE_ONLY = {
    "AsyncClient": {"settings", "transport", "quiet"},
    "AsyncModel": {"facts"},
    "AsyncJob": set(),
    "AsyncActivations": set(),
    "AsyncTicket": set(),
}


def _public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}


def _parameters(verb: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(verb).parameters.values()]


@pytest.mark.parametrize(("core", "facade"), PAIRS, ids=lambda k: k.__name__)
def test_the_same_names(core: type, facade: type) -> None:
    wanted = set(_public(core)) | ({"facts"} if core is aio.AsyncModel else set())
    assert set(_public(facade)) == wanted


@pytest.mark.parametrize(("core", "facade"), PAIRS, ids=lambda k: k.__name__)
def test_the_same_parameters_and_no_coroutines(core: type, facade: type) -> None:
    compared = 0
    for name, verb in _public(core).items():
        if not inspect.isfunction(verb):
            continue
        same = getattr(facade, name)
        assert _parameters(same) == _parameters(verb), name
        assert not inspect.iscoroutinefunction(same), name
        assert (
            verb.__doc__ is None or same.__doc__ or name in ("refresh", "close", "delete", "plan", "run")
        ), name
        compared += 1
    assert compared >= 2
    assert _parameters(facade.__init__) == _parameters(core.__init__) or core is not aio.AsyncClient


@pytest.mark.parametrize(("core", "facade"), PAIRS[:1], ids=lambda k: k.__name__)
def test_both_are_context_managers(core: type, facade: type) -> None:
    assert hasattr(core, "__aenter__")
    assert hasattr(core, "__aexit__")
    assert hasattr(facade, "__enter__")
    assert hasattr(facade, "__exit__")
    assert hasattr(aio.AsyncJob, "__await__")

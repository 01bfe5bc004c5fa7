"""Tokens from the SDK: asked for by a key, used like one, made weaker without the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

import trocar
from trocar import errors
from trocar.client import tokens
from trocar.client.aio import AsyncClient
from trocar.gate.scopes import Scope
from trocar.grants.tokens import attenuate

URL = "http://server"


@pytest.fixture
def client(server: Any) -> Iterator[trocar.Client]:
    with trocar.Client(URL, server.keys["bob"], transport=server.transport(), quiet=True) as made:
        yield made


def authenticated(server: Any, token: str) -> Any:
    return server.service.gate.keys.authenticate(token)


def test_a_token_is_for_an_agent_unless_it_is_said_otherwise(server: Any, client: trocar.Client) -> None:
    token = client.token(models="tiny", ops=["logprobs", "read"], sites={"resid_post"}, bits=4000)
    who = authenticated(server, token)
    assert who.role == "agent"
    assert who.scope == Scope(
        frozenset({"tiny"}), frozenset({"logprobs", "read"}), frozenset({"resid_post"}), most_bits=4000
    )
    assert authenticated(server, client.token(role=None)).role == "researcher"


def test_a_token_is_used_like_a_key(server: Any, client: trocar.Client) -> None:
    token = client.token(ops="text", bits=10_000)
    weaker = attenuate(token, Scope(most_bits=2000))
    with trocar.Client(URL, weaker, transport=server.transport(), quiet=True) as agent:
        model = agent.model("tiny")
        assert str(model.generate("abc", max_new_tokens=2, stop_at_eos=False))
        assert agent.ledger().key == server.principals["bob"].key_id
        left = agent.ledger().budgets["tiny"].left_bits
        assert left is not None
        assert left < 2000
        with pytest.raises(trocar.PolicyRefusal) as caught:
            model.capture(["a"], "resid_post.1")
        assert caught.value.code == "out_of_scope"
        with pytest.raises(trocar.PolicyRefusal) as caught:
            agent.token()
        assert caught.value.code == "not_allowed"


def test_the_async_client_asks_in_the_same_way(server: Any) -> None:
    async def go() -> str:
        async with AsyncClient(URL, server.keys["bob"], transport=server.transport(), quiet=True) as client:
            return await client.token(bits=7, expires=timedelta(hours=1))

    assert authenticated(server, asyncio.run(go())).scope.most_bits == 7


def test_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = datetime(2030, 1, 2, 3, 4, 5, 600_000, tzinfo=UTC)
    there = moment.astimezone(timezone(timedelta(hours=5)))
    for expires in (moment, there):
        assert tokens.asked(None, None, None, None, expires, None).scope.expires_ms == 1893553445600
    monkeypatch.setattr(tokens.time, "time_ns", lambda: 5_000_000_000)
    assert tokens.asked(None, None, None, None, timedelta(minutes=2), None).scope.expires_ms == 125_000
    with pytest.raises(errors.ClientError, match="no time zone"):
        tokens.asked(None, None, None, None, datetime(2030, 1, 1), None)  # noqa: DTZ001 - that is the fault


@pytest.mark.parametrize("wrong", [{"bits": -1}, {"models": []}, {"ops": [""]}, {"role": "owner"}])
def test_what_cannot_be_asked_is_refused_here(client: trocar.Client, wrong: dict[str, Any]) -> None:
    with pytest.raises(trocar.ProgramError) as caught:
        client.token(**wrong)
    assert caught.value.request_id is None  # nothing was sent

"""A client that hangs up while it waits for a result, over real sockets: its place is there for others at once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from anyio import CapacityLimiter
from host_parts import Peer, Three, three, until

from trocar import errors
from trocar.api import waiting
from trocar.api.app import create_app
from trocar.cli.connections import Connection
from trocar.errors import TrocarError
from trocar.wire.frames import Kind
from trocar.wire.requests import RunRequest

BODY = {
    "model": "tiny",
    "prompts": ["abc"],
    "program": {"nodes": [{"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}]},
}
GONE_S = 5.0


@pytest.fixture
def host(tiny: Any) -> Iterator[Three]:
    with three(tiny, fake=True) as made:
        yield made


@contextmanager
def served(app: Any) -> Iterator[tuple[str, int]]:
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, http=Connection, lifespan="off", log_config=None)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("through", ["front", "service"])
def test_who_hangs_up_waits_no_longer(host: Three, through: str) -> None:
    peer = Peer(host.root / "w")
    peer.accept()
    host.line.wait(20)
    app = host.app if through == "front" else create_app(host.service)
    caller = host.service.authenticate(host.keys["bob"])
    run = host.service.run(caller, RunRequest.model_validate_json(json.dumps(BODY)), {}, None)
    job = json.loads(run.payload)["job"]
    number = peer.next(Kind.run).head.number
    ask = f"GET /v1/jobs/{job}/result?wait_s=30 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {host.keys['bob']}\r\n\r\n"
    waits = lambda: host.service._jobs._waiting["bob"]  # noqa: E731
    with served(app) as address:
        clients = [socket.create_connection(address) for _ in range(3)]
        for client in clients:
            client.sendall(ask.encode())
        until(lambda: waits() == len(clients))
        time.sleep(2 * waiting.SLICE_S)
        until(lambda: waits() == len(clients))  # who stays goes on waiting
        left_s = time.monotonic()
        for client in clients[:2]:
            client.close()
        until(lambda: app.state.waiters.borrowed_tokens == waits() == 1)
        assert time.monotonic() - left_s < GONE_S
        peer.cut()
        assert b"503" in clients[2].recv(1 << 16).splitlines()[0]
        clients[2].close()
    assert number >= 0
    peer.close()


class Listener:
    """A request whose client stays, or has left."""

    def __init__(self, stays: bool = True) -> None:
        self._stays = stays

    async def is_disconnected(self) -> bool:
        return not self._stays


def outcome(verb: Callable[[float], Any], wait_s: float, stays: bool = True) -> Any:
    async def go() -> Any:
        found: Any = await waiting.outcome(Listener(stays), verb, wait_s, CapacityLimiter(1))  # type: ignore[arg-type]
        return found

    return asyncio.run(go())


class State:
    status = 202


def test_a_wait_is_as_long_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SLICE_S", 0.1)
    slices: list[float] = []

    def verb(wait_s: float) -> State:
        slices.append(wait_s)
        time.sleep(wait_s)
        return State()

    assert outcome(verb, 0.35).status == 202
    assert 0.3 < sum(slices) < 0.36
    assert max(slices) == 0.1
    slices.clear()
    outcome(verb, 0.35, stays=False)
    assert slices == [0.1]


@pytest.mark.parametrize("wait_s", [float("nan"), -1.0, 30.5, float("inf"), 0.0])
def test_a_wait_that_is_not_sliced_is_judged_as_it_was_sent(wait_s: float) -> None:
    heard: list[float] = []

    def verb(asked_s: float) -> State:
        heard.append(asked_s)
        return State()

    outcome(verb, wait_s)
    assert str(heard) == str([wait_s])


@pytest.mark.parametrize(("code", "raised"), [("queue_full", False), ("worker_lost", True)])
def test_who_loses_his_place_between_two_slices_hears_the_state(
    monkeypatch: pytest.MonkeyPatch, code: str, raised: bool
) -> None:
    monkeypatch.setattr(waiting, "SLICE_S", 0.01)
    calls: list[float] = []

    def verb(wait_s: float) -> State:
        calls.append(wait_s)
        if len(calls) == 2:
            raise errors.refuse(code, "", "no")
        return State()

    if raised:
        with pytest.raises(TrocarError):
            outcome(verb, 10.0)
    else:
        assert outcome(verb, 10.0).status == 202
    assert len(calls) == 2

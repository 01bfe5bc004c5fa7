"""One connection at a time, around an application of a few lines: what ends it, and who gives a place back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from trocar.cli import connections
from trocar.cli.connections import Connection

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
App = Callable[..., Awaitable[None]]
Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def app(*, reads: bool = False, size: int = 2, held: asyncio.Event | None = None) -> App:
    """Answers with `size` bytes, after the body if it `reads`, and not before `held`."""

    async def run(_scope: Any, receive: Any, send: Any) -> None:
        while reads and (await receive()).get("more_body"):
            pass
        if held is not None:
            await held.wait()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]}
        )
        await send({"type": "http.response.body", "body": b"x" * size})

    return run


@asynccontextmanager
async def serving(made: App, **more: Any) -> AsyncIterator[Dial]:
    options = {
        "http": Connection,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        **more,
    }
    server = uvicorn.Server(
        uvicorn.Config(made, host="127.0.0.1", port=0, timeout_graceful_shutdown=1, **options)
    )
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield lambda: asyncio.open_connection("127.0.0.1", port)
    finally:
        server.should_exit = True
        await task


async def _said(reader: asyncio.StreamReader, within_s: float) -> bytes:
    """Everything until the other side ends the connection, which it must do in time."""
    said = b""
    try:
        while part := await asyncio.wait_for(reader.read(65536), within_s):
            said += part
    except ConnectionError:
        pass
    return said


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HEAD_S", 0.3), ("BODY_S", 0.3), ("SEND_S", 0.3), ("LINGER_S", 0.2)):
        monkeypatch.setattr(connections, name, value)


@pytest.mark.parametrize("begun", [b"", b"GET / HTT", GET[:-2], POST, POST + b"123"])
def test_what_does_not_arrive_ends_the_connection(begun: bytes) -> None:
    async def go() -> bytes:
        async with serving(app(reads=True)) as dial:
            reader, writer = await dial()
            writer.write(begun)
            said = await _said(reader, 5)
            writer.close()
            return said

    assert asyncio.run(go()) == b""


def test_an_answer_may_take_its_time() -> None:
    """Deadlines are for the client: a request that has arrived waits as long as the application does."""

    async def go() -> bytes:
        held = asyncio.Event()
        async with serving(app(held=held)) as dial:
            reader, writer = await dial()
            writer.write(GET)
            await asyncio.sleep(0.8)
            held.set()
            said = await asyncio.wait_for(reader.readuntil(b"xx"), 5)
            writer.close()
            return said

    assert asyncio.run(go()).startswith(b"HTTP/1.1 200")


def test_a_body_that_nobody_wants_is_not_read_to_its_end() -> None:
    """The answer is heard, then the connection ends, although the client would go on."""

    async def go() -> bytes:
        async with serving(app()) as dial:
            reader, writer = await dial()
            writer.write(POST + b"123")
            said = await _said(reader, 5)
            writer.close()
            return said

    assert asyncio.run(go()).startswith(b"HTTP/1.1 200")


def test_a_client_who_does_not_read_is_left() -> None:
    async def go() -> None:
        async with serving(app(size=64 << 20)) as dial:
            reader, writer = await dial()
            writer.write(GET)
            await asyncio.sleep(2)
            assert len(await _said(reader, 5)) < 64 << 20
            writer.close()

    asyncio.run(go())


def test_the_longest_idle_gives_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many sockets the oldest that does nothing ends; one with a request in progress stays."""
    monkeypatch.setattr(connections, "SOCKETS", 2)
    monkeypatch.setattr(connections, "HEAD_S", 30.0)

    async def go() -> tuple[bytes, bytes]:
        held = asyncio.Event()
        async with serving(app(held=held)) as dial:
            busy, busy_out = await dial()
            busy_out.write(GET)
            await asyncio.sleep(0.1)
            oldest, oldest_out = await dial()
            await asyncio.sleep(0.05)
            _, newest_out = await dial()
            gone = await _said(oldest, 5)
            held.set()
            said = await asyncio.wait_for(busy.readuntil(b"xx"), 5)
            for out in (busy_out, oldest_out, newest_out):
                out.close()
            return gone, said

    gone, said = asyncio.run(go())
    assert gone == b""
    assert said.startswith(b"HTTP/1.1 200")


def test_the_limit_counts_requests_and_not_sockets() -> None:
    async def go() -> list[bytes]:
        held = asyncio.Event()
        async with serving(app(held=held), limit_concurrency=2) as dial:
            idle = [await dial() for _ in range(5)]
            asking = [await dial() for _ in range(3)]
            for _, out in asking:
                out.write(GET)
                await asyncio.sleep(0.05)
            held.set()
            said = [await asyncio.wait_for(reader.readline(), 5) for reader, _ in asking]
            for _, out in (*idle, *asking):
                out.close()
            return said

    said = asyncio.run(go())
    assert [s.split()[1] for s in said] == [b"200", b"200", b"503"]


@pytest.mark.parametrize(
    ("sent", "status", "body"),
    [(b"no http\r\n\r\n", b"400", b"Invalid HTTP request received."), (GET, b"503", b"Service Unavailable")],
)
def test_what_is_answered_below_the_application_is_plain_text(
    sent: bytes, status: bytes, body: bytes
) -> None:
    """As docs/api.md says: no JSON, nothing of the request, and the connection ends."""

    async def go() -> bytes:
        async with serving(app(), limit_concurrency=0) as dial:
            reader, writer = await dial()
            writer.write(sent)
            said = await _said(reader, 5)
            writer.close()
            return said

    head, _, rest = asyncio.run(go()).partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert b"content-type: text/plain" in head.lower()
    assert b"connection: close" in head.lower()
    assert body in rest

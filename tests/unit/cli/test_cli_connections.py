"""One connection at a time, around an application of a few lines: what ends it, and who gives a place back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from trocar.api.app import told
from trocar.api.middleware import Places, RequestId
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


def refusal(said: bytes) -> tuple[int, dict[str, Any]]:
    """Status and the one refusal of a whole answer, which has the form of all of them."""
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines)}
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert error["request_id"].encode() == headers[b"x-request-id"]
    [found] = error["refusals"]
    assert set(found) == {"code", "path", "reason", "next_step", "closest", "docs"}
    return int(first.split()[1]), found


def test_the_limit_counts_requests_and_not_sockets() -> None:
    async def go() -> list[bytes]:
        held = asyncio.Event()
        async with serving(RequestId(Places(app(held=held), 2, told))) as dial:
            idle = [await dial() for _ in range(5)]
            asking = [await dial() for _ in range(3)]
            for _, out in asking:
                out.write(GET)
                await asyncio.sleep(0.05)
            refused = await asyncio.wait_for(asking[2][0].readuntil(b"}]}}"), 5)
            held.set()
            said = [await asyncio.wait_for(reader.readuntil(b"xx"), 5) for reader, _ in asking[:2]]
            asking[2][1].write(GET)  # the same connection, when there is room
            said.append(await asyncio.wait_for(asking[2][0].readuntil(b"xx"), 5))
            for _, out in (*idle, *asking):
                out.close()
            return [refused, *said]

    refused, *said = asyncio.run(go())
    assert [s.split()[1] for s in said] == [b"200"] * 3
    status, found = refusal(refused)
    assert (status, found["code"]) == (503, "queue_full")
    assert b"\r\nretry-after: 1\r\n" in refused


@pytest.mark.parametrize(
    "sent",
    [
        b"no http\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"GET /secret HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"secret" * 20_000,
        POST.replace(b"9", b"nine"),
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nsecret\r\n",
    ],
)
def test_what_is_no_http_is_refused_like_everything_else(sent: bytes) -> None:
    """Nothing of it is repeated, and the connection ends."""

    async def go() -> bytes:
        async with serving(app(reads=True), h11_max_incomplete_event_size=connections.HEADER_BYTES) as dial:
            reader, writer = await dial()
            writer.write(sent)
            said = await _said(reader, 5)
            writer.close()
            return said

    said = asyncio.run(go())
    status, found = refusal(said)
    assert (status, found["code"], found["path"]) == (400, "bad_http", "")
    assert b"\r\nconnection: close\r\n" in said
    assert b"secret" not in said


def test_what_is_no_http_behind_the_beginning_of_an_answer_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    """There is no place left for a refusal."""

    async def begins(_scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def go() -> bytes:
        async with serving(begins) as dial:
            reader, writer = await dial()
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            begun = await asyncio.wait_for(reader.readuntil(b"x"), 5)
            writer.write(b"secret\r\n")
            said = await _said(reader, 5)
            writer.close()
            return begun + said

    said = asyncio.run(go())
    assert said.count(b"HTTP/1.1") == 1
    assert said.endswith(b"\r\n\r\nx")
    assert "Traceback" not in caplog.text


def test_a_request_that_is_cut_off_by_a_stop_is_told() -> None:
    async def go() -> bytes:
        async with serving(RequestId(Places(app(held=asyncio.Event()), 2, told))) as dial:
            reader, writer = await dial()
            writer.write(GET)
            await asyncio.sleep(0.1)
        said = await _said(reader, 5)
        writer.close()
        return said

    status, found = refusal(asyncio.run(go()))
    assert (status, found["code"], found["reason"]) == (500, "internal", "the server is stopping")

"""The SDK when the other side is absent, busy, broken or not Trocar; and when the user's script dies."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import trocar
from trocar import errors
from trocar.client.settings import Settings
from trocar.client.transport import Transport
from trocar.wire.requests import TokenizeRequest


def test_an_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with trocar.Client("http://127.0.0.1:9") as c, pytest.raises(trocar.ClientError) as caught:
        c.models()
    assert caught.value.code == "unreachable"
    assert "127.0.0.1:9" in str(caught.value)
    assert "trocar serve" in caught.value.next_step
    assert capsys.readouterr().err == ""


def _answering(status: int, body: bytes, **headers: str) -> httpx.MockTransport:
    return httpx.MockTransport(lambda _request: httpx.Response(status, content=body, headers=headers))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>hello</html>"),
        (200, b"{}"),
        (404, b"not found"),
        (502, b"[]"),
        (500, b'{"error": "x"}'),
        (307, b""),
        (400, b'{"error": {"kind": "ProgramError", "refusals": []}}'),
    ],
)
def test_an_answer_that_is_not_trocars(status: int, body: bytes) -> None:
    with (
        trocar.Client("http://other", transport=_answering(status, body)) as c,
        pytest.raises(trocar.ClientError) as caught,
    ):
        c.models()
    assert caught.value.code == "unreachable"


def test_a_lost_connection_is_tried_again_and_a_run_keeps_its_key() -> None:
    seen: list[httpx.Request] = []

    def flaky(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) < 3:
            raise httpx.ReadError("lost")
        return httpx.Response(200, content=b"{}")

    async def go() -> None:
        transport = Transport(Settings("http://x", None), httpx.MockTransport(flaky))
        await transport.post("/v1/runs", TokenizeRequest(model="m", texts=("a",)), once=True)
        await transport.close()

    asyncio.run(go())
    assert len({r.headers["idempotency-key"] for r in seen}) == 1
    assert len(seen) == 3


def test_a_busy_server_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def no_wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("trocar.client.transport.asyncio.sleep", no_wait)
    body = json.dumps(errors.refuse("queue_full", "", "full").as_json()).encode()
    with (
        trocar.Client("http://x", transport=_answering(503, body, **{"retry-after": "2"})) as c,
        pytest.raises(trocar.Overloaded) as caught,
    ):
        c.models()
    assert caught.value.retryable
    assert waits == [2.0, 2.0, 2.0]


SCRIPT = """
import trocar
client = trocar.Client("http://127.0.0.1:9", "trk_x")
try:
    client.models()
except trocar.ClientError:
    pass
raise RuntimeError("user's own bug")
"""


def test_a_script_that_dies_without_closing_exits_promptly() -> None:
    source = Path(trocar.__file__).parents[1]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1
    assert b"user's own bug" in done.stderr
    assert b"trk_x" not in done.stderr
    assert done.stderr.count(b"Traceback") == 1
    assert time.monotonic() - started < 15

"""Requests that no HTTP library would send: raw targets and credentials straight into the application."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import httpx
from http_room import Heard


@dataclass(frozen=True)
class Wire:
    """Speaks ASGI to an application as a server would that has read these bytes from a socket."""

    app: Any
    secret: str

    def send(self, method: str, target: str, body: bytes = b"") -> Heard:
        raw, _, query = target.encode("utf-8").partition(b"?")
        headers = [(b"host", b"x"), (b"content-type", b"application/json"),
                   (b"authorization", f"Bearer {self.secret}".encode("latin-1", "replace"))]  # fmt: skip
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
                 "path": unquote(raw.decode("utf-8")), "raw_path": raw, "query_string": query, "root_path": "",
                 "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}  # fmt: skip
        return asyncio.run(self._answer(scope, body))

    async def _answer(self, scope: dict[str, Any], body: bytes) -> Heard:
        said: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        await self.app(scope, receive, send)
        start = said[0]
        whole = b"".join(m.get("body", b"") for m in said[1:])
        return Heard(start["status"], httpx.Headers(start["headers"]), whole)

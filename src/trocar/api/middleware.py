"""What stands around the routes: an id for every request, and a place for as many as are answered at once."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trocar import errors

MOST_REQUESTS: Final = 256
Told = Callable[[errors.TrocarError, str], Response]


def new_request_id() -> str:
    """An id that no request had before."""
    return f"req_{secrets.token_hex(12)}"


class RequestId:
    """Gives every request an id of our own; what a client sends in `x-request-id` is ignored."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["request_id"] = new_request_id()
        await self._app(scope, receive, send)


class Places:
    """Refuses a request when so many are in progress, and tells one that the server cuts off when it stops.

    Servers of HTTP count and cut off too, but answer in words of their own.

    Args:
        told: the answer that refuses, from an error and the id of its request.
    """

    def __init__(self, app: ASGIApp, most: int, told: Told) -> None:
        self._app = app
        self._most = most
        self._told = told
        self._busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id: str = scope["state"]["request_id"]
        if self._busy >= self._most:
            error = errors.full(f"{self._busy} requests are being answered", 1.0)
            await self._told(error, request_id)(scope, receive, send)
            return
        self._busy += 1
        try:
            await self._until_cut_off(request_id, scope, receive, send)
        finally:
            self._busy -= 1

    async def _until_cut_off(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            if not begun:
                error = errors.refuse("internal", "", "the server is stopping")
                await self._told(error, request_id)(scope, receive, send)
            raise

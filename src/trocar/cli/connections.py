"""One HTTP connection with deadlines and a place that must be earned: nobody keeps others out by doing nothing.

A request's head must arrive within `HEAD_S`, its body within `BODY_S` more, and the client must take what is sent
to it within `SEND_S`; otherwise the connection ends. When there are too many sockets, those that have been without
a request for longest end. This module knows nothing of routes, keys or tenants: how many requests are answered at
once, and what a caller with a key may do, is decided above.
"""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from trocar import errors
from trocar.api.app import told
from trocar.api.middleware import new_request_id

HEAD_S: Final = 10.0
BODY_S: Final = 60.0
SEND_S: Final = 60.0
LINGER_S: Final = 1.0
HEADER_BYTES: Final = 32 << 10
NO_HTTP: Final = f"these bytes are no HTTP/1.1 request, or its head is longer than {HEADER_BYTES} bytes"
SOCKETS: Final = min(2048, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Connection(H11Protocol):
    """uvicorn's connection, with an end."""

    _deadline: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None
    _idle_since_s: float = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_since_s = time.monotonic()
        self._make_room()
        self._arm(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.resume_writing()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        was = self.cycle
        super().handle_events()
        if self.cycle is not was:
            self._arm(BODY_S)
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self._disarm()

    def on_response_complete(self) -> None:
        self._idle_since_s = time.monotonic()
        self._arm(HEAD_S + self.timeout_keep_alive)
        unread = self.cycle.more_body
        super().on_response_complete()
        if (
            unread
        ):  # answered before the body had arrived: the rest is not read, and the client has time to hear why
            self.transport.pause_reading()
            self._arm(LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self._sending or self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuses what h11 cannot read, in our words and not in uvicorn's."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:  # else an answer is on its way
            refused = told(errors.refuse("bad_http", "", NO_HTTP), new_request_id())
            headers = [*refused.raw_headers, (b"connection", b"close")]
            begin = h11.Response(status_code=refused.status_code, headers=headers, reason=b"Bad Request")
            for event in (begin, h11.Data(data=bytes(refused.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered or has begun to be."""
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
        """Ends the connections that have been idle longest, as many as are too many."""
        excess = len(self.connections) - SOCKETS
        if excess <= 0:
            return
        idle = [c for c in self.connections if isinstance(c, Connection) and c.is_idle and c is not self]
        for connection in sorted(idle, key=lambda c: c._idle_since_s)[:excess]:
            self.connections.discard(
                connection
            )  # now, not when its end is noticed: the places are counted at once
            connection.transport.abort()

    def _arm(self, after_s: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(after_s, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

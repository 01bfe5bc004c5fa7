"""One HTTP server around an application: limits, the moment it is ready, and a stop within `GRACE_S`.

At SIGTERM or SIGINT the engines stop first, which ends every request that waits for them; then uvicorn
drains, then store and ledger close. When a batch or a fit takes longer than the grace, the process ends
without it: the ledger charges what it held at the next start, and the store drops its rows.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Final

import uvicorn
from anyio import to_thread
from starlette.types import ASGIApp

from trocar.api.middleware import MOST_REQUESTS
from trocar.cli.address import Address
from trocar.cli.connections import HEADER_BYTES, Connection
from trocar.cli.reload import reread

GRACE_S: Final = 4.5
DRAIN_S: Final = 2
KEEP_ALIVE_S: Final = 15
LATE: Final = "stopped before the running batch or fit ended: the next start charges what it held"


@dataclass(frozen=True, slots=True)
class Served:
    """What is behind the addresses.

    Attributes:
        halt: makes what waits for it fail now.
        close: ends it.
        reload: takes the policy as it is now.
        settle: what the process does once before it serves.
    """

    app: ASGIApp
    halt: Callable[[], None]
    close: Callable[[], None]
    reload: Callable[[], None]
    settle: Callable[[], None] = gc.freeze


class HttpServer(uvicorn.Server):
    """uvicorn, with our beginning and our end."""

    def __init__(self, served: Served, log_level: str, on_ready: Callable[[], None]) -> None:
        super().__init__(_config(served, log_level))
        self._served = served
        self._on_ready = on_ready
        self._stopping = threading.Event()
        self._closed = threading.Event()

    def serve_until_stopped(self, address: Address) -> None:
        """Serves until SIGTERM or SIGINT, then closes everything. Call it on the main thread."""
        signal.signal(signal.SIGHUP, lambda *_: reread(self._served.reload))
        try:
            self.run(sockets=[address.socket])
        except KeyboardInterrupt:
            pass  # uvicorn repeats the signal that stopped it
        finally:
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(each, signal.SIG_IGN)
            self._served.close()
            self._closed.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._served.settle()
        # a request that waits for its job keeps a thread; with the default of 40, 40 of them stop everybody
        to_thread.current_default_thread_limiter().total_tokens = MOST_REQUESTS
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        threading.Thread(target=self._served.halt, name="trocar-halt", daemon=True).start()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            threading.Thread(target=self._watch, name="trocar-grace", daemon=True).start()
        super().handle_exit(sig, frame)

    def _watch(self) -> None:
        """Ends the process when the grace is over; threads that nobody can interrupt would keep it."""
        on_time = self._closed.wait(GRACE_S)
        if not on_time:
            print(LATE, file=sys.stderr, flush=True)
            os._exit(1)


def _config(served: Served, log_level: str) -> uvicorn.Config:
    return uvicorn.Config(
        served.app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=log_level,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )

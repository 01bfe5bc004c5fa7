"""`trocar front`: the process of three that speaks HTTP. `trocar serve --isolation host` starts it."""

from __future__ import annotations

import signal
import socket as sockets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from trocar.cli.child import ReadyOption, say_ready, watch_parent
from trocar.cli.logs import log_to_stderr
from trocar.cli.serve_options import Host, Level, LogLevel, Port
from trocar.cli.users import GateUser, uid_of


def front(
    gate: Annotated[Path, typer.Option(help="Path of the unix socket of the gate.")],
    gate_user: GateUser = None,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    listen_fd: Annotated[int, typer.Option(hidden=True, help="A socket that listens already.")] = -1,
    log_level: Level = LogLevel.warning,
    ready_fd: ReadyOption = -1,
) -> None:
    """Answer HTTP for a gate; part of `trocar serve --isolation host`."""
    from trocar.api.app import create_app
    from trocar.cli.address import NO_TLS, Address, bind, is_loopback
    from trocar.cli.serving import HttpServer, Served
    from trocar.host.front.front import Front

    gate_uid = uid_of(gate_user, "--gate-user")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    watch_parent(ready_fd)
    log_to_stderr(log_level)
    if listen_fd < 0 and not is_loopback(host):
        print(NO_TLS.format(host=host), file=sys.stderr)
    found = bind(host, port) if listen_fd < 0 else Address(sockets.socket(fileno=listen_fd), "")
    caller = Front(gate, gate_uid)
    nothing: Callable[[], None] = lambda: None  # noqa: E731 - a front has no engine and no policy
    served = Served(create_app(caller), nothing, caller.close, nothing)

    def on_ready() -> None:
        say_ready(ready_fd)
        if found.url:  # otherwise who gave us the socket says it
            print(f"trocar ready {found.url}", flush=True)

    HttpServer(served, log_level, on_ready).serve_until_stopped(found)

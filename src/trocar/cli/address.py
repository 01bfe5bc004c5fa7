"""Where a server listens: the bound socket, the URL that reaches it, and the file that tells scripts.

The socket is bound before a model is loaded, so a taken port is refused at once.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trocar import errors

NO_TLS: Final = (
    "warning: there is no TLS on {host}: keys and results can be read on the way. Put a TLS proxy in front."
)
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound


@dataclass(frozen=True, slots=True)
class Address:
    """A bound socket that does not listen yet, and a URL for clients on this machine."""

    socket: socket.socket
    url: str


def bind(host: str, port: int) -> Address:
    """Binds `host` and `port`; port 0 takes a free one.

    Raises:
        ClientError: `cannot_listen`.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as e:
        raise _refused(host, port, e) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        # listening is what makes a second server on the port fail at once; nothing is accepted yet
        bound.listen(1)
    except OSError as e:
        bound.close()
        raise _refused(host, port, e) from None
    name = _EVERYWHERE.get(host, host)
    shown = f"[{name}]" if ":" in name else name
    return Address(bound, f"http://{shown}:{bound.getsockname()[1]}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def write_ready(path: Path, url: str) -> None:
    """Writes `{"url", "pid"}` to `path` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"url": url, "pid": os.getpid()}) + "\n", encoding="utf-8")
    partial.replace(path)


def _refused(host: str, port: int, e: OSError) -> errors.TrocarError:
    return errors.refuse("cannot_listen", "port", f"{host}:{port} cannot be listened on: {e.strerror}")

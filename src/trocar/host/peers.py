"""Which user is at the other end of a unix socket. The kernel says so, and nobody else is believed.

It noted the user when the connection was made: of who listens, whoever called `listen`; of who came, whoever called
`connect`. A number that the kernel gives to every user that it cannot name here is nobody's.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)
KNOWN_HERE: Final = sys.platform == "linux"
_MAP: Final = Path("/proc/self/uid_map")
_UNNAMED: Final = Path("/proc/sys/kernel/overflowuid")
_CREDENTIALS: Final = struct.Struct("iII")
_SAID_EVERY_S: Final = 60


class Stranger(PermissionError):
    """Somebody else is at the other end."""


def require(connection: socket.socket, uid: int, path: Path) -> None:
    """Lets nobody but the user `uid` be at the other end of a connection at `path`.

    Raises:
        Stranger: for anybody else, and for somebody whom the kernel does not name.
    """
    found = _user(connection)
    if found != uid or _is_unnamed(found):
        _say(str(path), found, uid, int(time.monotonic()) // _SAID_EVERY_S)
        raise Stranger(f"user {found} is at the other end, not {uid}")


def _user(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def _is_unnamed(uid: int) -> bool:
    """Whether many users look like `uid`: in a user namespace, all that it does not map do."""
    try:
        whole = _MAP.read_text().split() == ["0", "0", str((1 << 32) - 1)]
        return not whole and uid == int(_UNNAMED.read_text())
    except OSError:
        return True


def own() -> int:
    return os.geteuid()


@functools.lru_cache(maxsize=64)
def _say(path: str, found: int, uid: int, _minute: int) -> None:
    """Tells the operator's log, once a minute: whoever is refused comes again at once."""
    log.error(
        "user %d is at the other end of %s, where only user %d may be; nothing is said to it",
        found,
        path,
        uid,
    )

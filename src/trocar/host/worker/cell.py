"""What the worker's process gives up before it touches a model: the network, core dumps, new privileges, its voice.

The network goes by a namespace of its own, in which there is no interface; that needs a right which not every
installation gives, so the process says whether it worked. Whoever starts it may have put it into such a namespace
already. Sockets with a path in the file system still reach it.
The rest (another user, a read-only file system, limits of memory) is for whoever starts the process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Final, NoReturn

_NEW_USER: Final = 0x10000000
_NEW_NET: Final = 0x40000000
_SET_DUMPABLE: Final = 4
_SET_NO_NEW_PRIVS: Final = 38
_TABLES: Final = ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet")
_ME: Final = Path("/proc/self")
_MOST_LOG_BYTES: Final = 16 << 20
_UNFIT: Final = 70


def close_network(*, knows_others: bool = False) -> bool:
    """Leaves the machine's network for an empty one, or is in one; False otherwise. Call it before any thread.

    Args:
        knows_others: whether it must tell other users apart afterwards, which a namespace of users does not allow.
    """
    if sys.platform != "linux":
        return False
    uid, gid = os.geteuid(), os.getegid()
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(_NEW_NET) == 0 or _is_empty():
        return True
    if knows_others or unshare(_NEW_USER | _NEW_NET) != 0:
        return False
    _keep_name(uid, gid)
    return True


def can_close_network() -> bool:
    """Whether a worker that we start could; tried in a process that ends. Call it before any thread."""
    tried = os.fork()
    if tried == 0:
        found = False
        try:
            found = close_network()
        finally:
            os._exit(0 if found else 1)
    _, status = os.waitpid(tried, 0)
    return status == 0


def _is_empty() -> bool:
    """Whether the network has no interface but the loopback, and nobody who listens or speaks there."""
    try:
        others = {name for _, name in socket.if_nameindex()} - {"lo"}
        tables = [path for path in (_ME / "net" / name for name in _TABLES) if path.exists()]
        spoken = [line for table in tables for line in table.read_text().splitlines()[1:]]
        named = [line for line in (_ME / "net" / "unix").read_text().splitlines() if " @" in line]
    except OSError:
        return False
    return not (others or spoken or named)


def _keep_name(uid: int, gid: int) -> None:
    """In a new user namespace nobody has a number until it is said; only the own one may be."""
    for name, text in (("uid_map", f"{uid} {uid} 1"), ("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1")):
        (_ME / name).write_text(text)


def keep_inside() -> None:
    """No core dumps, no memory for other processes of the user to read, no privileges from programs."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(_SET_DUMPABLE, 0, 0, 0, 0)
        prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def speak_into(log: Path) -> None:
    """Sends whatever this process prints, in any language, to a file that only its user reads."""
    if log.is_file() and log.stat().st_size > _MOST_LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.old"))
    sys.stdout.flush()
    sys.stderr.flush()
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for stream in (1, 2):
        os.dup2(opened, stream)
    os.close(opened)


def end() -> NoReturn:
    """Ends this process as a kill would: what it ran is lost, and whoever looks after it starts another."""
    os._exit(_UNFIT)

"""Which processes that use a ledger in a file are alive: one locked file per process, nothing else.

A process creates `<instance>.live` and holds an exclusive `flock` on it until it ends; the kernel lets go of
the lock whatever the end was, SIGKILL and power loss included. So "is it dead?" is "can its file be locked?".

Why not a lease with a heartbeat: it needs a clock, and a process that was only paused or slow would be taken
for dead. Why not process ids: they are reused, and mean nothing across containers that share a disk. Why not
one writer for the whole file: `trocar key create` must work beside a running server. SQLite's WAL already
binds all processes to one host, so a lock of that host's kernel reaches as far as the database does.

A wrong answer is safe in both directions: taken for alive (a forked child still has the file), the bits stay
held; taken for dead, its reservations are charged in full and its own attempt to settle them is refused.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NewType

InstanceId = NewType("InstanceId", str)
_INSTANCE: Final = re.compile(r"[0-9a-f]{32}")


class Presence:
    """The locked file of this process; hold it as long as reservations may be open.

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.instance = InstanceId(secrets.token_hex(16))
        self._pid = os.getpid()
        self._directory = directory
        self._path = directory / f"{self.instance}.live"
        # not inherited by programs we start: a child must not keep us alive
        self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def close(self) -> None:
        """Declares this process dead; idempotent. In a forked child it says nothing about the parent."""
        if self._file >= 0:
            if os.getpid() == self._pid:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def renew(self) -> None:
        """Nothing to do: the kernel takes no lock from a process that lives."""

    def is_dead(self, instance: str) -> bool:
        """Whether nobody holds the file of `instance`, or it is gone."""
        if not _INSTANCE.fullmatch(instance):
            return True  # never ours: not a name that may become part of a path
        return instance != self.instance and _unlocked(self._directory / f"{instance}.live")

    def sweep(self) -> None:
        """Removes the files of dead processes. Call it under `turn`, so that no file is half made."""
        for path in self._directory.glob("*.live"):
            if path != self._path and _unlocked(path):
                path.unlink(missing_ok=True)


def _unlocked(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        # shared, so that two processes asking at once do not take each other for the owner
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`: one process at a time inside, released by the kernel at death."""
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)

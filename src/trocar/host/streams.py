"""Whole frames over one unix socket, with one user at the other end. It does not know what frames are for.

Reading waits for ever between two frames and `FRAME_S` inside one; a peer that sends byte by byte, or does not
take what is sent to it, is one that is not there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from trocar import errors
from trocar.host import peers
from trocar.wire import frames
from trocar.wire.frames import Frame, Head

FRAME_S: Final = 60.0
_TICK_S: Final = 2.0
_CHUNK_BYTES: Final = 1 << 20
_TURN_S: Final = 5.0
_MOST_PATH: Final = 96  # a kernel takes 107 bytes, and a name is longer until somebody answers


class Lost(Exception):
    """The other side ended, or did not go on in time."""


class Stream:
    """One connection; one thread may read it, any may write.

    Args:
        allow: as for `frames.Collector`.
    """

    def __init__(self, connection: socket.socket, allow: Callable[[Head], None]) -> None:
        # set once: two threads that set it in turn would change it for each other
        connection.settimeout(_TICK_S)
        self._socket = connection
        self._collector = frames.Collector(allow)
        self._turn = threading.Lock()

    def put(self, head: Head, body: bytes = b"") -> None:
        """Sends a frame, whole.

        Raises:
            Lost: the other side takes nothing for `FRAME_S`, or is gone.
        """
        with self._turn:
            try:
                self._push(frames.pack(head) + body)
            except OSError as e:
                raise Lost(str(e)) from e

    def _push(self, data: bytes) -> None:
        left, last_s = memoryview(data), time.monotonic()
        while left:
            try:
                sent = self._socket.sendmsg([left[:_CHUNK_BYTES]])
            except TimeoutError:
                if time.monotonic() - last_s > FRAME_S:
                    raise
                continue
            left, last_s = left[sent:], time.monotonic()

    def receive(self, within_s: float | None = None) -> Frame:
        """The next frame.

        Args:
            within_s: longest time until it is whole; None to wait for its beginning for ever.

        Raises:
            Lost: the other side ended between two frames, or in one, or was too slow.
            TrocarError: what came is not a frame that is allowed.
        """
        began_s = time.monotonic()
        while True:
            frame = self._pull()
            if frame is not None:
                return frame
            now_s = time.monotonic()
            if self._collector.empty:
                began_s = began_s if within_s is not None else now_s
            if now_s - began_s > (FRAME_S if within_s is None else within_s):
                raise Lost("a frame did not arrive in time")

    def _pull(self) -> Frame | None:
        try:
            data = self._socket.recv(min(self._collector.wanted, _CHUNK_BYTES))
        except TimeoutError:
            return None
        except OSError as e:
            raise Lost(str(e)) from e
        if not data:
            raise Lost("the other side ended")
        return self._collector.feed(data)

    def close(self) -> None:
        """Ends the connection; a thread that reads it hears of it. Twice is once."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(path: Path, uid: int | None = None) -> socket.socket:
    """Connects to the socket at `path`.

    Args:
        uid: the user that must listen there; the own one when None.

    Raises:
        OSError: nobody listens there; `Stranger` when somebody else does, who is told nothing.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.connect(str(path))
        peers.require(made, peers.own() if uid is None else uid, path)
    except OSError:
        made.close()
        raise
    return made


class Listener(socket.socket):
    """Accepts the processes of one user; whoever else comes is let go unheard."""

    def __init__(self, path: Path, uid: int) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path, self._uid = path, uid

    def accept(self) -> tuple[socket.socket, Any]:
        while True:
            connection, where = super().accept()
            try:
                peers.require(connection, self._uid, self._path)
            except OSError:
                connection.close()
                continue
            return connection, where


def listen(path: Path, backlog: int, uid: int | None = None) -> Listener:
    """Listens at `path`, in a folder that nobody else may write.

    What is left of a dead process is replaced; where somebody listens, nobody else begins to.

    Args:
        uid: the user whose processes are heard; the own one when None.

    Raises:
        ClientError: `cannot_listen`.
    """
    _require_possible(path)
    made = Listener(path, peers.own() if uid is None else uid)
    try:
        with _alone_in(path.parent):
            _require_free(path)
            _appear(made, path, backlog)
    except OSError as e:
        made.close()
        raise _cannot(path, e.strerror or str(e)) from None
    except errors.TrocarError:
        made.close()
        raise
    return made


def _require_possible(path: Path) -> None:
    if not peers.KNOWN_HERE:
        raise _cannot(path, "this system does not say which user is at the other end of a socket")
    if len(os.fsencode(path)) > _MOST_PATH:
        reason = f"its name is longer than {_MOST_PATH} bytes, the most that a socket's may have"
        raise _cannot(path, reason, "Name a shorter path.")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes from beginning to listen in a folder, which must be ours alone to write."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(held)
        if found.st_uid != peers.own() or found.st_mode & 0o022:
            reason = "others may write in its folder, and so take the place of who listens there"
            step = "Use a folder of the user that listens, with mode 0700, or 0710 and the group of who connects."
            raise _cannot(folder, reason, step)
        deadline_s = time.monotonic() + _TURN_S
        while not _locked(held):
            if time.monotonic() > deadline_s:
                raise _cannot(folder, "another process begins to listen there and does not end")
            time.sleep(_TURN_S / 100)
        yield
    finally:
        os.close(held)


def _locked(held: int) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _require_free(path: Path) -> None:
    """Refuses a place where somebody listens, or where something else is than a socket."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise _cannot(path, "there is something else than a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        found = asking.connect_ex(str(path))
    if found not in (errno.ENOENT, errno.ECONNREFUSED):
        raise _cannot(path, "somebody listens there", "Stop that process, or name another path.")


def _appear(made: Listener, path: Path, backlog: int) -> None:
    """Puts the socket into its place when it answers, and not before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    made.bind(str(partial))
    partial.chmod(0o660)  # its folder says who may come here: one user, or a group
    made.listen(backlog)
    partial.rename(path)


def _cannot(path: Path, why: str, step: str | None = None) -> errors.TrocarError:
    return errors.refuse("cannot_listen", "socket", f"{str(path)!r}: {why}", next_step=step)

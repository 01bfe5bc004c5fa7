"""Whole frames over one unix socket, and nothing else. It does not know what frames are for.

Reading waits for ever between two frames and `FRAME_S` inside one; a peer that sends byte by byte, or does not
take what is sent to it, is one that is not there.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from trocar import errors
from trocar.wire import frames
from trocar.wire.frames import Frame, Head

FRAME_S: Final = 60.0
_TICK_S: Final = 2.0
_CHUNK_BYTES: Final = 1 << 20
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


def connect(path: Path) -> socket.socket:
    """Connects to the socket at `path`.

    Raises:
        OSError: nobody listens there.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.connect(str(path))
    except OSError:
        made.close()
        raise
    return made


def listen(path: Path, backlog: int) -> socket.socket:
    """Listens at `path`, for processes of its user and group; what is left of a dead process is replaced.

    Raises:
        ClientError: `cannot_listen`.
    """
    if len(os.fsencode(path)) > _MOST_PATH:
        reason = f"{str(path)!r} is longer than {_MOST_PATH} bytes, the most that a socket's name may have"
        raise errors.refuse("cannot_listen", "socket", reason, next_step="Name a shorter path.")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)
        made.bind(str(partial))
        partial.chmod(0o660)  # its folder says who may come here: three users, or one
        made.listen(backlog)
        partial.rename(path)  # it appears when somebody answers, and not before
    except OSError as e:
        made.close()
        raise errors.refuse("cannot_listen", "socket", f"{str(path)!r}: {e.strerror}") from None
    return made

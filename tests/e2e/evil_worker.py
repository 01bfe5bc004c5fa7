"""A worker that is none: greets like an honest one, and answers the first order in a way that no honest one does.

Run as a process of its own: `evil_worker.py SOCKET FACTS HOW`.
"""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path

from trocar.host.streams import listen
from trocar.wire import frames, orders
from trocar.wire.frames import Head, Kind, Status

SECRET = b"secret-weights-0.125 "
HOWS = (
    "good", "shorter", "longer", "empty", "4 GiB", "unknown order", "finished order", "extra frame", "another kind",
    "no kind", "no status", "no header", "words in a fault", "code that is none", "node that is none", "tail",
)  # fmt: skip


def answer(how: str, number: int, right: bytes) -> bytes:
    """The bytes that go out for an order whose right answer has the length of `right`."""
    good = frames.pack(Head(Kind.result, number, len(right))) + right
    fault = lambda body: frames.pack(Head(Kind.result, number, len(body), Status.fault)) + body  # noqa: E731
    return {
        "good": good,
        "shorter": frames.pack(Head(Kind.result, number, len(right) - 4)) + right[4:],
        "longer": frames.pack(Head(Kind.result, number, len(right) + len(SECRET))) + right + SECRET,
        "empty": frames.pack(Head(Kind.result, number, 0)),
        "4 GiB": frames.pack(Head(Kind.result, number, frames.MAX_LENGTH)) + SECRET * 100,
        "unknown order": frames.pack(Head(Kind.result, number + 9, len(right))) + right,
        "finished order": frames.pack(Head(Kind.result, 1, 0)),
        "extra frame": good + good,
        "another kind": frames.pack(Head(Kind.answer, number, len(right))) + right,
        "no kind": struct.pack(">4sBBHQI", frames.MAGIC, 77, 0, 0, number, len(right)) + right,
        "no status": struct.pack(">4sBBHQI", frames.MAGIC, Kind.result, 5, 0, number, len(right)) + right,
        "no header": SECRET * 10,
        "words in a fault": fault(SECRET),
        "code that is none": fault(struct.pack(">II", len(orders.FAULTS), 0)),
        "node that is none": fault(struct.pack(">II", 0, 1000)),
        "tail": good + SECRET,
    }[how]


def read(connection: socket.socket) -> frames.Frame:
    collector = frames.Collector(lambda _: None)
    while True:
        data = connection.recv(min(collector.wanted, 1 << 16))
        if not data:
            raise EOFError
        frame = collector.feed(data)
        if frame is not None:
            return frame


def main(path: str, facts: str, how: str, length: int) -> None:
    right = struct.pack(f"<{length}f", *([-1.0] * length))
    listener = listen(Path(path), 4)
    while True:
        connection, _ = listener.accept()
        try:
            while True:
                frame = read(connection)
                if frame.head.kind is Kind.facts:
                    body = Path(facts).read_bytes()
                    connection.sendall(frames.pack(Head(Kind.result, frame.head.number, len(body))) + body)
                elif frame.head.kind is Kind.run:
                    connection.sendall(answer(how, frame.head.number, right))
                else:
                    connection.sendall(frames.pack(Head(Kind.result, frame.head.number, 0)))
        except (EOFError, OSError):
            connection.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

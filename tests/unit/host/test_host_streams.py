"""Frames over real sockets: whole, in turn, and never for longer than a peer is worth."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_parts import folder

from trocar.errors import TrocarError
from trocar.host import streams
from trocar.host.streams import Lost, Stream, connect, listen
from trocar.wire import frames
from trocar.wire.frames import Head, Kind

Pair = tuple[Stream, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    mine, other = socket.socketpair()
    stream = Stream(mine, frames.at_most(call=1 << 24, answer=10))
    yield stream, other
    stream.close()
    other.close()


def test_a_large_frame_goes_through_in_pieces(pair: Pair) -> None:
    stream, other = pair
    back = Stream(other, frames.at_most(call=1 << 24))
    body = bytes(range(256)) * (1 << 14)
    sender = threading.Thread(target=stream.put, args=(Head(Kind.call, 5, len(body)), body))
    sender.start()
    frame = back.receive()
    sender.join()
    assert (frame.head.number, frame.body) == (5, body)


def test_frames_of_many_senders_do_not_mix(pair: Pair) -> None:
    stream, other = pair
    back = Stream(other, frames.at_most(call=1 << 24))
    bodies = [bytes([i]) * 50_000 for i in range(20)]
    senders = [
        threading.Thread(target=stream.put, args=(Head(Kind.call, i, len(b)), b))
        for i, b in enumerate(bodies)
    ]
    for each in senders:
        each.start()
    found = [back.receive() for _ in senders]
    for each in senders:
        each.join()
    assert sorted(f.body for f in found) == bodies
    assert all(f.body[0] == f.head.number for f in found)


def test_an_end_between_frames_and_in_one_is_the_same(pair: Pair) -> None:
    stream, other = pair
    other.sendall(frames.pack(Head(Kind.answer, 1, 10))[:7])
    other.close()
    with pytest.raises(Lost):
        stream.receive()


def test_what_is_not_allowed_is_refused_by_its_header(pair: Pair) -> None:
    stream, other = pair
    other.sendall(frames.pack(Head(Kind.answer, 1, 11)))
    with pytest.raises(TrocarError) as caught:
        stream.receive()
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("within_s", [None, 0.3])
def test_a_frame_that_does_not_go_on_ends(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, within_s: float | None
) -> None:
    monkeypatch.setattr(streams, "FRAME_S", 0.3)
    stream, other = pair
    other.sendall(frames.pack(Head(Kind.answer, 1, 10)) + b"half")
    started_s = time.monotonic()
    with pytest.raises(Lost, match="in time"):
        stream.receive(within_s)
    assert time.monotonic() - started_s < 6


def test_waiting_for_a_frame_can_end_too(pair: Pair) -> None:
    with pytest.raises(Lost, match="in time"):
        pair[0].receive(0.1)


def test_a_peer_that_reads_nothing_is_none(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FRAME_S", 0.2)
    body = bytes(8 << 20)
    with pytest.raises(Lost):
        pair[0].put(Head(Kind.call, 1, len(body)), body)


def test_closing_wakes_who_reads() -> None:
    mine, other = socket.socketpair()
    stream = Stream(mine, frames.at_most())
    threading.Timer(0.2, stream.close).start()
    with pytest.raises(Lost):
        stream.receive()
    other.close()


def test_a_socket_appears_when_somebody_listens_and_replaces_a_dead_one() -> None:
    with folder() as root:
        first = listen(root / "s", 1)
        first.close()
        with pytest.raises(ConnectionRefusedError):
            connect(root / "s")
        second = listen(root / "s", 1)
        connect(root / "s").close()
        assert [p.name for p in root.iterdir()] == ["s"]
        assert (root / "s").stat().st_mode & 0o777 == 0o660
        second.close()


@pytest.mark.parametrize("name", ["x" * 120, "no/such/folder"])
def test_a_path_that_cannot_be_listened_on_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrocarError) as caught:
        listen(tmp_path / name, 1)
    assert caught.value.code == "cannot_listen"

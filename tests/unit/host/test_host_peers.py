"""Who is at the other end of a socket, and who may begin to listen at a place."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from host_parts import Three, folder, three

from trocar.errors import TrocarError
from trocar.host import peers, streams
from trocar.host.front.front import Bearer, Front
from trocar.host.peers import Stranger
from trocar.host.streams import Stream, connect, listen
from trocar.wire import calls, frames
from trocar.wire.calls import Ending
from trocar.wire.frames import Head, Kind

OTHER = os.geteuid() + 1


@pytest.fixture(autouse=True)
def _says_it_again() -> None:
    peers._say.cache_clear()


def silent(connection: socket.socket) -> bool:
    """Whether the other side ends the connection without a word."""
    connection.settimeout(10)
    with suppress(ConnectionResetError):
        return connection.recv(100) == b""
    return True


def refused(path: Path) -> TrocarError:
    with pytest.raises(TrocarError) as caught:
        listen(path, 1)
    assert (caught.value.code, caught.value.path) == ("cannot_listen", "socket")
    return caught.value


# ---- who is there ---------------------------------------------------------------------------------


def test_nothing_is_said_to_another_user_who_listens(caplog: pytest.LogCaptureFixture) -> None:
    with folder() as root, listen(root / "s", 4) as listener:
        for _ in range(2):
            with pytest.raises(Stranger):
                connect(root / "s", OTHER)
        came, _ = listener.accept()
        assert silent(came)
        came.close()
        connect(root / "s", os.geteuid()).close()
    said = [r for r in caplog.records if r.name == "trocar.host.peers"]
    assert [r.levelno for r in said] == [logging.ERROR]
    assert (
        f"user {os.geteuid()} is at the other end of {root / 's'}, where only user {OTHER}" in said[0].message
    )


def test_another_user_who_comes_is_not_heard() -> None:
    with folder() as root, listen(root / "s", 4, OTHER) as listener:
        accepted: list[Any] = []

        def accept() -> None:
            with suppress(OSError):
                accepted.append(listener.accept())

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        for _ in range(3):
            came = connect(root / "s")
            with suppress(BrokenPipeError):
                came.sendall(b"x" * 100)
            assert silent(came)
            came.close()
        assert accepted == []
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_place_may_be_for_oneself() -> None:
    with folder() as root, listen(root / "s", 4, os.geteuid()) as listener:
        mine = connect(root / "s")
        came, _ = listener.accept()
        came.sendall(b"heard")
        assert mine.recv(100) == b"heard"
        came.close()
        mine.close()


@pytest.mark.parametrize(
    ("uid_map", "unnamed", "named"),
    [
        ("         0          0 4294967295\n", str(os.geteuid()), True),
        (f"{os.geteuid()} {os.geteuid()} 1\n", "65534", os.geteuid() != 65534),
        (f"{os.geteuid()} {os.geteuid()} 1\n", str(os.geteuid()), False),
        ("", str(os.geteuid()), False),
        (None, "65534", False),
    ],
)
def test_a_number_that_many_users_have_is_nobodys(
    uid_map: str | None, unnamed: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if uid_map is not None:
        (tmp_path / "map").write_text(uid_map)
    (tmp_path / "unnamed").write_text(unnamed)
    monkeypatch.setattr(peers, "_MAP", tmp_path / "map")
    monkeypatch.setattr(peers, "_UNNAMED", tmp_path / "unnamed")
    one, other = socket.socketpair()
    with one, other:
        if named:
            peers.require(one, os.geteuid(), Path("s"))
        else:
            with pytest.raises(Stranger):
                peers.require(one, os.geteuid(), Path("s"))


def test_a_system_that_names_nobody_is_not_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "KNOWN_HERE", False)
    with folder() as root:
        assert "which user" in refused(root / "s").reason


# ---- who may take a place -------------------------------------------------------------------------


def test_nobody_takes_the_place_of_who_listens() -> None:
    with folder() as root:
        first = listen(root / "s", 1)
        assert "somebody listens there" in refused(root / "s").reason
        connect(root / "s").close()
        assert [p.name for p in root.iterdir()] == ["s"]
        first.close()
        second = listen(root / "s", 1)
        second.close()


def test_somebody_who_does_not_answer_listens_too() -> None:
    with folder() as root, listen(root / "s", 0):
        full = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(4)]
        for each in full:
            each.setblocking(False)
            each.connect_ex(str(root / "s"))
        assert "somebody listens there" in refused(root / "s").reason
        for each in full:
            each.close()


def test_one_of_many_who_begin_at_once_listens() -> None:
    with folder() as root, ThreadPoolExecutor(16) as pool:
        first = listen(root / "s", 1)
        first.close()  # something that all of them would replace

        def attempt(_: int) -> socket.socket | None:
            with suppress(TrocarError):
                return listen(root / "s", 1)
            return None

        # the name of what is not there yet has the number of the process, so threads stand in for processes
        made = [m for m in pool.map(attempt, range(16)) if m is not None]
        assert len(made) == 1
        made[0].close()


def test_what_is_no_socket_stays() -> None:
    with folder() as root:
        (root / "s").write_text("mine")
        assert "something else than a socket" in refused(root / "s").reason
        assert (root / "s").read_text() == "mine"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_may_write_is_no_place_to_listen(mode: int) -> None:
    with folder() as root:
        root.chmod(mode)
        error = refused(root / "s")
        assert "others may write" in error.reason
        assert "0710" in error.refusals[0].next_step
        root.chmod(0o710)
        listen(root / "s", 1).close()


def test_a_folder_that_somebody_holds_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_TURN_S", 0.2)
    with folder() as root, streams._alone_in(root):
        started_s = time.monotonic()
        assert "does not end" in refused(root / "s").reason
        assert time.monotonic() - started_s < 5


# ---- a worker that wants to be the gate -----------------------------------------------------------


@pytest.fixture(scope="module")
def host(tiny: Any) -> Any:
    with three(tiny, fake=True) as made:
        yield made


def test_who_listens_beside_the_gate_does_not_become_it(host: Three) -> None:
    """The attack of the review: what a worker does at its start, done at the gate's name."""
    assert "somebody listens there" in refused(host.root / "g").reason
    assert host.front.handles(Bearer(host.keys["alice"])).status == 200


def test_a_gate_of_another_user_hears_no_key(host: Three) -> None:
    """Somebody who could take the gate's place in the folder all the same; the front states who the gate is."""
    heard: list[str | None] = []
    with folder() as root, listen(root / "g", 8) as listener:

        def be_the_gate() -> None:
            for _ in range(2):
                stream = Stream(listener.accept()[0], frames.at_most(call=calls.MOST_CALL_BYTES))
                with suppress(streams.Lost):
                    frame = stream.receive()
                    heard.append(calls.unpack_call(frame.body).words.secret)
                    body = calls.pack_answer(Ending(status=200), json.dumps({"weights": "00"}).encode())
                    stream.put(Head(Kind.answer, frame.head.number, len(body)), body)
                stream.close()

        thread = threading.Thread(target=be_the_gate, daemon=True)
        thread.start()
        with pytest.raises(TrocarError) as caught:
            Front(root / "g", OTHER).handles(Bearer(host.keys["alice"]))
        assert caught.value.code == "ledger_unavailable"
        assert heard == []
        believes = Front(root / "g")
        assert believes.handles(Bearer(host.keys["alice"])).payload == b'{"weights": "00"}'
        assert heard == [host.keys["alice"]]  # so the front alone decided it
        believes.close()
        thread.join(10)

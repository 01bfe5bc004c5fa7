"""Front and desk: what a front may say, what the gate makes of it, and what happens when one of them is away."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from host_parts import Three, codes_of, folder, three, until

from trocar.errors import ProgramError, TrocarError, refuse
from trocar.host.front.front import Bearer, Front
from trocar.host.gate import desk
from trocar.host.streams import Lost, Stream, connect, listen
from trocar.wire import calls, frames
from trocar.wire.calls import Words
from trocar.wire.frames import Head, Kind


@pytest.fixture(scope="module")
def host(tiny: Any) -> Iterator[Three]:
    with three(tiny, fake=True) as made:
        yield made


def raw(host: Three, body: bytes, kind: Kind = Kind.call) -> tuple[calls.Ending, bytes]:
    """The answer to a frame that no honest front sends."""
    stream = Stream(connect(host.root / "g"), frames.at_most(answer=1 << 20))
    stream.put(Head(kind, 3, len(body)), body)
    try:
        return calls.unpack_answer(stream.receive(20).body)
    finally:
        stream.close()


@pytest.mark.parametrize("body", [b"", b"\x00" * 10, b"\x00\x00\x00\x02{}" + b"\x00" * 4, b"secret" * 50])
def test_what_is_no_call_is_refused(host: Three, body: bytes) -> None:
    ending, payload = raw(host, body)
    assert ending.status in (400, 422)
    assert set(codes_of(payload)) <= {"bad_frame", "bad_json", "missing_field"}


def test_every_verb_of_the_table_is_answered() -> None:
    from typing import get_args

    public = {"health", "models", "capabilities"}
    assert set(desk._VERBS) | public == set(get_args(calls.Verb))


@pytest.mark.parametrize("verb", sorted(set(desk._VERBS)))
def test_no_verb_works_without_a_key(host: Three, verb: Any) -> None:
    for secret, code in ((None, "no_key"), ("trk_" + "0" * 16 + "_" + "A" * 43, "bad_key")):
        ending, payload = raw(host, calls.pack_call(Words(verb=verb, secret=secret)))
        assert (ending.status, codes_of(payload)) == (401, [code])


def test_a_request_is_read_as_strictly_as_from_the_network(host: Three) -> None:
    words = Words(verb="run", secret=host.keys["alice"]).model_dump_json().encode()
    for request, code in (
        (b'{"model": 1}', "missing_field"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b"", "bad_json"),
    ):
        body = calls._with_length(words) + calls._with_length(request)
        assert code in codes_of(raw(host, body)[1])


def test_a_frame_of_another_kind_ends_the_connection(host: Three) -> None:
    with pytest.raises(Lost):
        raw(host, b"", Kind.run)


def test_a_fault_of_ours_says_nothing(host: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("secret")

    monkeypatch.setattr(host.service, "handles", broken)
    who = host.front.authenticate(host.keys["alice"])
    with pytest.raises(TrocarError) as caught:
        host.front.handles(who)
    assert caught.value.code == "internal"
    assert "secret" not in str(caught.value)


def test_a_refusal_is_entered_by_the_gate_and_told_as_it_is(host: Three) -> None:
    who = host.front.authenticate(host.keys["alice"])
    error = refuse("bad_value", "nodes[1]", "not this")
    told = host.front.refused(who, "req_1", error)
    assert told.as_json() == error.as_json()
    [entry] = host.gate.ledger.entries(request_id="req_1")
    assert entry.kind == "refused"


def test_a_caller_who_is_refused_too_often_is_told_to_wait(
    host: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.service._pace, "wait_s", lambda *_: 7.0)
    who = host.front.authenticate(host.keys["alice"])
    told = host.front.refused(who, "req_2", refuse("bad_value", "", "x"))
    assert (told.code, told.retry_after_s) == ("too_many_refusals", 7)


def test_an_idle_connection_that_ended_is_replaced(host: Three) -> None:
    assert host.front.health().status == 200
    for stream in host.front._idle:
        stream.close()
    assert host.front.health().status == 200


def test_connections_are_kept_up_to_a_number(host: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    from trocar.host.front import front

    monkeypatch.setattr(front, "IDLE", 0)
    lonely = Front(host.root / "g")
    assert lonely.health().status == 200
    assert lonely._idle == []


def test_without_a_gate_nothing_leaves() -> None:
    with folder() as root:
        front = Front(root / "g")
        with pytest.raises(TrocarError) as caught:
            front.health()
        assert (caught.value.code, caught.value.retryable) == ("ledger_unavailable", True)
        listener = listen(root / "g", 1)
        listener.close()
        with pytest.raises(TrocarError):
            front.health()


def test_a_gate_that_ends_in_the_middle_is_away() -> None:
    import threading

    with folder() as root:
        listener = listen(root / "g", 1)

        def once() -> None:
            connection, _ = listener.accept()
            connection.recv(1 << 16)
            connection.close()

        thread = threading.Thread(target=once)
        thread.start()
        with pytest.raises(TrocarError) as caught:
            Front(root / "g").health()
        thread.join()
        listener.close()
        assert caught.value.code == "ledger_unavailable"


def test_a_request_too_large_for_a_frame_is_refused_here(
    host: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MOST_CALL_BYTES", 10)
    with pytest.raises(TrocarError) as caught:
        host.front.health()
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("wait_s", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_wait_that_is_none_is_refused_by_the_gate(host: Three, wait_s: float) -> None:
    who = host.front.authenticate(host.keys["alice"])
    with pytest.raises(ProgramError) as caught:
        host.front.job_result(who, "job_x", wait_s)
    assert (caught.value.code, caught.value.path) == ("bad_value", "wait_s")


def test_more_fronts_than_there_are_places_are_not_let_in(
    host: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "CONNECTIONS", 0)
    with pytest.raises(TrocarError):
        Front(host.root / "g").health()


def test_a_secret_is_not_shown() -> None:
    assert "trk_x" not in repr(Bearer("trk_x"))


def test_the_http_door_is_the_same(host: Three) -> None:
    """The application around a front: answers, refusals with their request id, and headers."""
    import asyncio

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(host.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            key = {"authorization": f"Bearer {host.keys['bob']}"}
            return [
                await http.get("/healthz"),
                await http.get("/v1/handles", headers=key),
                await http.get("/v1/handles"),
            ]

    healthy, mine, nobody = asyncio.run(ask())
    assert (healthy.status_code, mine.status_code, nobody.status_code) == (200, 200, 401)
    assert json.loads(mine.content) == {"handles": [], "stored_bytes": 0}
    assert nobody.json()["error"]["request_id"] == nobody.headers["x-request-id"]


def test_closing_the_desk_ends_its_connections(tiny: Any) -> None:
    with three(tiny, fake=True) as made:
        made.front.health()
        [stream] = made.front._idle
        assert isinstance(stream._socket, socket.socket)
    until(lambda: not made.front._idle)

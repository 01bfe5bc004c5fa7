"""The gate's side of a worker: what an honest one says is used, anything else cuts the line, freezes and alerts."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_parts import WAIT_S, Peer, Three, folder, three, until

from trocar.errors import TrocarError
from trocar.gate.gate import Gate
from trocar.gate.policy import Role, Tier
from trocar.host.gate import house, remote, suspects
from trocar.host.gate import line as lines
from trocar.service.service import Service
from trocar.wire import frames, orders
from trocar.wire.frames import HEAD_BYTES, Head, Kind, Status
from trocar.wire.orders import Hello, Pinned
from trocar.wire.requests import RunRequest

LP = {"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}
READ = {"op": "read", "id": "r", "site": "resid_post.1", "at": "prompt[*]"}
KEPT = {"op": "capture", "id": "kept", "of": ["r"]}
LENGTH = 4 * 2 * 1
GOOD = np.array([[-1.0, -2.0]], dtype="<f4").tobytes()
OVERHEAD = 256


@pytest.fixture
def host(tiny: Any) -> Iterator[Three]:
    with three(tiny, fake=True) as made:
        yield made


@pytest.fixture
def peer(host: Three) -> Iterator[Peer]:
    made = Peer(host.root / "w")
    made.accept()
    host.line.wait(WAIT_S)
    yield made
    made.close()


def start(host: Three, *nodes: dict[str, Any], who: str = "alice", prompt: str = "abc") -> str:
    body = {"model": "tiny", "prompts": [prompt], "program": {"nodes": list(nodes or (LP,))}}
    caller = host.front.authenticate(host.keys[who])
    released = host.front.run(caller, RunRequest.model_validate_json(json.dumps(body)), {}, None)
    return str(json.loads(released.payload)["job"])


def ending(host: Three, job: str, who: str = "alice") -> TrocarError:
    """How a job fails."""
    with pytest.raises(TrocarError) as caught:
        host.front.job_result(host.front.authenticate(host.keys[who]), job, WAIT_S)
    return caught.value


def result(host: Three, job: str) -> Any:
    released = host.front.job_result(host.front.authenticate(host.keys["alice"]), job, WAIT_S)
    assert released.status == 200
    return json.loads(released.payload)


def said(host: Three, job: str) -> str:
    """Whatever a client hears of a job's end."""
    caller = host.front.authenticate(host.keys["alice"])
    try:
        return host.front.job_result(caller, job, WAIT_S).payload.decode()
    except TrocarError as e:
        return json.dumps(e.as_json())


def charged(host: Three) -> int:
    return max(account.charged_bits for account in host.gate.ledger.balances())


# ---- an honest worker -----------------------------------------------------------------------------


def test_declared_bytes_become_an_answer(host: Three, peer: Peer) -> None:
    job = start(host)
    order = peer.next(Kind.run)
    sheet, vectors = orders.run_sheet(order.body)
    assert (sheet.model, sheet.tenant, vectors) == ("tiny", "alice", {})
    peer.answer(order.head.number, GOOD)
    assert result(host, job)["outputs"]["lp"]["logprobs"] == [[-1.0, -2.0]]


def test_one_byte_at_a_time_is_slow_and_fine(host: Three, peer: Peer) -> None:
    job = start(host)
    number = peer.next(Kind.run).head.number
    for byte in frames.pack(Head(Kind.result, number, LENGTH)) + GOOD:
        peer.send(bytes([byte]))
    assert result(host, job)["outputs"]["lp"]["logprobs"] == [[-1.0, -2.0]]


@pytest.mark.parametrize("code", [c for c in orders.FAULTS if c != "cancelled"])
def test_a_fault_is_a_number_and_the_words_are_ours(host: Three, peer: Peer, code: str) -> None:
    from trocar.codes import CODES

    job = start(host)
    number = peer.next(Kind.run).head.number
    peer.answer(number, orders.pack_fault(code, 0), Status.fault)
    error = ending(host, job)
    assert (error.code, error.path, error.reason) == (code, "program.nodes[0]", CODES[code].summary)
    assert charged(host) == OVERHEAD
    assert host.held() == 0


def test_results_arrive_in_any_order(host: Three, peer: Peer) -> None:
    jobs = [start(host, prompt=f"p{i}") for i in range(5)]
    numbers = [peer.next(Kind.run) for _ in jobs]
    prompts = [orders.run_sheet(f.body)[0].request.prompts[0] for f in numbers]
    for i in (3, 0, 4, 1, 2):
        peer.answer(numbers[i].head.number, np.array([[float(-i), -9.0]], dtype="<f4").tobytes())
    found = {prompts[i]: -float(i) for i in range(5)}
    for i, job in enumerate(jobs):
        assert result(host, job)["outputs"]["lp"]["logprobs"][0][0] == found[f"p{i}"]


def test_progress_is_not_told(host: Three, peer: Peer) -> None:
    job = start(host)
    number = peer.next(Kind.run).head.number
    who = host.front.authenticate(host.keys["alice"])
    assert json.loads(host.front.job(who, job).payload)["done"] == 0
    peer.answer(number, GOOD)
    result(host, job)


def test_counters_and_problems(host: Three, peer: Peer) -> None:
    import threading

    told: list[Any] = []
    asks: list[Callable[[], Any]] = [
        host.service._models["tiny"].worker.stats,
        host.service._models["tiny"].worker.check,
    ]
    for ask, kind, body in zip(
        asks, (Kind.stats, Kind.check), (orders.pack_stats(dict.fromkeys(orders.STATS, 3)), orders.pack_count(2)),
        strict=True,
    ):  # fmt: skip
        thread = threading.Thread(target=lambda ask=ask: told.append(ask()))
        thread.start()
        peer.answer(peer.next(kind).head.number, body)
        thread.join(WAIT_S)
    assert told[0].tokens == 3
    assert told[1] == ["the worker of 'tiny' found 2 problems; see its log"]


# ---- a worker that is none ------------------------------------------------------------------------


def other_length(n: int) -> Callable[[int], bytes]:
    return lambda number: frames.pack(Head(Kind.result, number, n)) + b"x" * min(n, 64)


TAMPERED: dict[str, Callable[[int], bytes]] = {
    "shorter": other_length(LENGTH - 1),
    "shorter by a number": other_length(LENGTH - 4),
    "longer": other_length(LENGTH + 1),
    "empty": other_length(0),
    "4 GiB": other_length((1 << 32) - 1),
    "an order that there is not": lambda n: frames.pack(Head(Kind.result, n + 1000, LENGTH)) + GOOD,
    "number 0": lambda _: frames.pack(Head(Kind.result, 0, LENGTH)) + GOOD,
    "the greeting again": lambda _: frames.pack(Head(Kind.result, 1, 0)),
    "another kind": lambda n: frames.pack(Head(Kind.run, n, LENGTH)) + GOOD,
    "an answer to a front": lambda n: frames.pack(Head(Kind.answer, n, LENGTH)) + GOOD,
    "no status": lambda n: struct.pack(">4sBBHQI", frames.MAGIC, Kind.result, 9, 0, n, LENGTH) + GOOD,
    "no kind": lambda n: struct.pack(">4sBBHQI", frames.MAGIC, 0, 0, 0, n, LENGTH) + GOOD,
    "filler": lambda n: struct.pack(">4sBBHQI", frames.MAGIC, Kind.result, 0, 1, n, LENGTH) + GOOD,
    "no header": lambda _: b"secret weights, as text" * 4,
    "a fault with words": lambda n: frames.pack(Head(Kind.result, n, 30, Status.fault)) + b"s" * 30,
    "a fault of no code": lambda n: frames.pack(Head(Kind.result, n, 8, Status.fault)) + struct.pack(">II", 16, 0),
    "a fault at no node": lambda n: frames.pack(Head(Kind.result, n, 8, Status.fault)) + struct.pack(">II", 0, 2),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_anything_else_cuts_the_line_freezes_and_alerts(
    host: Three, peer: Peer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [start(host), start(host, who="bob", prompt="other")]
    number = peer.next(Kind.run).head.number
    peer.next(Kind.run)
    with caplog.at_level(logging.CRITICAL, "trocar"):
        peer.send(TAMPERED[how](number))
        for job, who in zip(jobs, ("alice", "bob"), strict=True):
            error = ending(host, job, who)
            assert error.code == "bad_result"
            assert "secret" not in json.dumps(error.as_json())
    assert peer.was_cut()
    assert "ALERT" in caplog.text
    assert "secret" not in caplog.text
    assert host.frozen("tiny")
    assert host.held() == 0
    assert charged(host) == 2 * OVERHEAD
    with pytest.raises(TrocarError) as caught:
        start(host, prompt="next")
    assert caught.value.code == "lineage_frozen"
    assert host.service.check() == [f"the worker is not to be trusted: {host.line.distrusted}"]


def test_a_second_result_of_one_order_is_an_extra_frame(host: Three, peer: Peer) -> None:
    job = start(host)
    number = peer.next(Kind.run).head.number
    peer.answer(number, GOOD)
    result(host, job)
    running = start(host, prompt="other")
    peer.next(Kind.run)
    peer.answer(number, GOOD)
    assert ending(host, running).code == "bad_result"
    assert host.frozen("tiny")


def test_a_frame_that_nobody_asked_for_cuts_the_line_while_nothing_runs(host: Three, peer: Peer) -> None:
    peer.answer(77, b"")
    until(lambda: host.frozen("tiny"))
    assert peer.was_cut()


def test_an_untrusted_worker_is_not_met_again(host: Three, peer: Peer) -> None:
    peer.answer(77, b"")
    until(lambda: bool(host.line.distrusted))
    with pytest.raises(TrocarError) as caught:
        host.line.wait(0.1)
    assert caught.value.code == "bad_result"
    peer._listener.settimeout(1.0)
    with pytest.raises(TimeoutError):
        peer._listener.accept()


def test_bytes_beside_a_frame_are_not_read_with_it(host: Three, peer: Peer) -> None:
    """An answer that is right and goes on: the answer counts, what follows cuts the line."""
    job = start(host)
    number = peer.next(Kind.run).head.number
    peer.send(frames.pack(Head(Kind.result, number, LENGTH)) + GOOD + b"secret" * 10)
    until(lambda: host.frozen("tiny"))
    assert "secret" not in said(host, job)


# ---- a worker that dies ---------------------------------------------------------------------------


def test_a_worker_that_dies_costs_the_overhead_and_the_next_one_goes_on(host: Three, peer: Peer) -> None:
    job = start(host, READ, KEPT)
    sheet, _ = orders.run_sheet(peer.next(Kind.run).body)
    peer.cut()
    error = ending(host, job)
    assert (error.code, error.retryable, error.status) == ("worker_lost", True, 503)
    assert error.retry_after_s is not None
    assert (charged(host), host.held()) == (OVERHEAD, 0)
    peer.accept()
    erased = orders.read(orders.EraseSheet, peer.next(Kind.erase).body)
    assert erased.handles == (sheet.handles[0]["kept"],)
    peer.answer(peer.heard[-1].head.number)
    host.line.wait(WAIT_S)
    again = start(host)
    peer.answer(peer.next(Kind.run).head.number, GOOD)
    assert result(host, again)["outputs"]


def test_half_a_frame_is_a_death_and_none_of_it_is_used(host: Three, peer: Peer) -> None:
    job = start(host)
    number = peer.next(Kind.run).head.number
    peer.send(frames.pack(Head(Kind.result, number, LENGTH)) + GOOD[:-1])
    peer.cut()
    assert ending(host, job).code == "worker_lost"


def test_a_frame_that_stops_is_a_death(host: Three, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    from trocar.host import streams

    monkeypatch.setattr(streams, "FRAME_S", 0.5)
    job = start(host)
    number = peer.next(Kind.run).head.number
    peer.send(frames.pack(Head(Kind.result, number, LENGTH))[: HEAD_BYTES - 3])
    assert ending(host, job).code == "worker_lost"


def test_a_request_that_killed_twice_is_not_run_again(host: Three, peer: Peer) -> None:
    for _ in range(2):
        job = start(host, prompt="poison")
        peer.next(Kind.run)
        peer.cut()
        assert ending(host, job).code == "worker_lost"
        peer.accept()
        host.line.wait(WAIT_S)
    assert ending(host, start(host, prompt="poison")).code == "quarantined"
    fine = start(host)
    peer.answer(peer.next(Kind.run).head.number, GOOD)
    assert result(host, fine)["outputs"]


def test_a_request_that_comes_through_is_no_suspect(host: Three, peer: Peer) -> None:
    for how in ("cut", "answer", "cut", "answer"):
        job = start(host)
        number = peer.next(Kind.run).head.number
        if how == "answer":
            peer.answer(number, GOOD)
            result(host, job)
        else:
            peer.cut()
            ending(host, job)
            peer.accept()
            host.line.wait(WAIT_S)


def test_a_request_that_fails_between_two_deaths_stays_a_suspect(host: Three, peer: Peer) -> None:
    for how in ("cut", "fail", "cut"):
        job = start(host, prompt="poison")
        number = peer.next(Kind.run).head.number
        if how == "fail":
            peer.answer(number, orders.pack_fault("internal", None), Status.fault)
            assert ending(host, job).code == "internal"
        else:
            peer.cut()
            assert ending(host, job).code == "worker_lost"
            peer.accept()
            host.line.wait(WAIT_S)
    assert ending(host, start(host, prompt="poison")).code == "quarantined"


def test_of_a_secret_the_gate_tells_the_same_of_a_worker(tiny_of: Callable[..., Any]) -> None:
    """What the gate itself says of a worker is no word of the worker's, and a place is one of the program."""
    secret = tiny_of("tiny", open_weights=False, weight_bits=10**12)
    with three(secret, fake=True) as made:
        key = made.gate.keys.create("ada", Tier.trusted, Role.researcher).secret
        host = replace(made, keys={**made.keys, "ada": key})
        peer = Peer(host.root / "w")
        peer.accept()
        host.line.wait(WAIT_S)
        job = start(host, who="ada")
        peer.answer(peer.next(Kind.run).head.number, orders.pack_fault("edit_not_finite", 0), Status.fault)
        error = ending(host, job, "ada")
        assert (error.code, error.path) == ("edit_not_finite", "program.nodes[0]")
        for _ in range(2):
            job = start(host, who="ada")
            peer.next(Kind.run)
            peer.cut()
            error = ending(host, job, "ada")
            assert (error.code, error.retryable) == ("worker_lost", True)
            peer.accept()
            host.line.wait(WAIT_S)
        assert ending(host, start(host, who="ada"), "ada").code == "quarantined"
        job = start(host, who="ada", prompt="other")
        peer.answer(peer.next(Kind.run).head.number, GOOD + b"more")
        assert ending(host, job, "ada").code == "bad_result"
        assert host.frozen("tiny")
        peer.close()


def test_suspects_are_forgotten_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(suspects.time, "monotonic", lambda: now_s[0])
    known = suspects.Suspects()
    for _ in range(2):
        known.died("a")
    with pytest.raises(TrocarError):
        known.require_harmless("a")
    now_s[0] += suspects.REMEMBERED_S
    known.require_harmless("a")
    for i in range(suspects.MOST + 10):
        known.died(str(i))
    assert len(known._deaths) == suspects.MOST


# ---- waiting, stopping, other models --------------------------------------------------------------


def test_without_a_worker_orders_are_refused_at_once(tiny: Any) -> None:
    with three(tiny, fake=True) as host:
        started_s = time.monotonic()
        assert ending(host, start(host)).code == "worker_lost"
        assert time.monotonic() - started_s < 5
        with pytest.raises(TrocarError) as caught:
            host.line.wait(0.1)
        assert caught.value.code == "worker_lost"


def test_a_worker_of_other_models_is_refused_and_nobody_is_accused(tiny: Any) -> None:
    with three(tiny, fake=True) as host:
        peer = Peer(host.root / "w")
        peer.accept(Status.fault)
        with pytest.raises(TrocarError) as caught:
            host.line.wait(WAIT_S)
        assert caught.value.code == "checksum_mismatch"
        assert not host.frozen("tiny")
        peer.close()


@pytest.mark.parametrize("network", ["closed", "allowed"])
def test_the_gate_says_of_the_network_what_the_worker_agreed_to(
    tiny: Any, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folder() as root:
        gate = Gate(f"sqlite:///{tmp_path}/ledger.db")
        manifest = SimpleNamespace(name="tiny")
        monkeypatch.setattr(house, "locate", lambda _: (tmp_path, manifest))
        monkeypatch.setattr(house, "pinned", lambda *_: Pinned(facts=tiny.facts, engine="hf"))
        monkeypatch.setattr(house, "codec_at", lambda _: tiny.text)
        peer = Peer(root / "w")
        heard = ThreadPoolExecutor(1).submit(peer.accept)
        service = house.assemble(["tiny"], tmp_path, root / "w", gate, within_s=WAIT_S, network=network)
        heard.result(WAIT_S)
        assert orders.read(Hello, peer.heard[0].body).network == network
        told = json.loads(service.capabilities().payload)
        assert (told["isolation"], told["network"]) == ("host", network)
        assert set(told) == set(json.loads(Service.capabilities(service).payload))
        service.close()
        peer.close()


def test_a_worker_in_a_network_is_refused_by_a_gate_that_says_it_is_in_none(tiny: Any) -> None:
    with three(tiny, fake=True) as host:
        peer = Peer(host.root / "w")
        peer.accept(Status.fault, node=0)
        with pytest.raises(TrocarError) as caught:
            host.line.wait(WAIT_S)
        assert caught.value.code == "network_open"
        assert "--network allowed" in caught.value.refusals[0].next_step
        assert not host.frozen("tiny")
        peer.close()


def test_a_worker_that_does_not_stop_is_not_waited_for(
    host: Three, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GRACE_S", 0.2)
    job = start(host)
    number = peer.next(Kind.run).head.number
    caller = host.front.authenticate(host.keys["alice"])
    host.front.cancel(caller, job)
    assert peer.next(Kind.cancel).head.number == number
    assert ending(host, job).code == "cancelled"
    peer.answer(number, GOOD)  # late, and thrown away
    again = start(host, prompt="again")
    peer.answer(peer.next(Kind.run).head.number, GOOD)
    assert result(host, again)["outputs"]
    assert not host.line.distrusted


def test_stopping_fails_what_waits(host: Three, peer: Peer) -> None:
    job = start(host)
    peer.next(Kind.run)
    host.service.halt()
    assert ending(host, job).code == "internal"
    assert peer.next(Kind.cancel)


def test_a_result_too_large_for_a_frame_is_refused_before_it_is_asked_for(
    host: Three, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "MOST_RESULT_BYTES", LENGTH - 1)
    assert ending(host, start(host)).code == "too_expensive"
    monkeypatch.setattr(orders, "MOST_ORDER_BYTES", 10)
    assert ending(host, start(host)).code == "too_large"
    assert peer.connection is not None


def test_a_line_that_breaks_while_it_sends_is_a_death(
    host: Three, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise lines.Lost("gone")

    assert host.line._stream is not None
    monkeypatch.setattr(host.line._stream, "put", broken)
    assert ending(host, start(host)).code == "worker_lost"
    assert peer.was_cut()

"""The worker's side: orders run, failures become numbers, prints go to its log, and nothing survives its gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from host_parts import WAIT_S, Three, bench_on, folder, three, until

from trocar.codes import CODES
from trocar.engine.hf.engine import HFEngine
from trocar.errors import TrocarError, refuse
from trocar.host.streams import Lost, Stream, connect
from trocar.host.worker import cell
from trocar.host.worker.house import bench_of
from trocar.service.local import LocalWorker
from trocar.service.passes import Passes
from trocar.store import Store
from trocar.wire import frames, orders
from trocar.wire.frames import Head, Kind, Status
from trocar.wire.orders import Ask, Hello, Pinned
from trocar.wire.requests import FitRequest, RunRequest

SECRET = "secret-weights-0.125"
READ = {"op": "read", "id": "r", "site": "resid_post.1", "at": "prompt[*]"}
KEPT = {"op": "capture", "id": "kept", "of": ["r"]}
LP = {"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}
TEXT = {"op": "text", "id": "text"}


@pytest.fixture(scope="module")
def own(tiny_of: Callable[..., Any]) -> Any:
    return tiny_of()


@pytest.fixture
def host(own: Any) -> Iterator[Three]:
    with three(own) as made:
        yield made


def start(host: Three, *nodes: dict[str, Any], prompts: Any = ("abc",), **generation: Any) -> str:
    body = {
        "model": "tiny",
        "prompts": list(prompts),
        "program": {"nodes": list(nodes)},
        "generation": generation,
    }
    who = host.front.authenticate(host.keys["alice"])
    released = host.front.run(who, RunRequest.model_validate_json(json.dumps(body)), {}, None)
    return str(json.loads(released.payload)["job"])


def ending(host: Three, job: str) -> TrocarError:
    with pytest.raises(TrocarError) as caught:
        host.front.job_result(host.front.authenticate(host.keys["alice"]), job, WAIT_S)
    return caught.value


def test_what_a_library_says_stays_inside(host: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError(SECRET)

    monkeypatch.setattr(Passes, "run", broken)
    error = ending(host, start(host, LP))
    assert (error.code, error.reason) == ("internal", CODES["internal"].summary)
    assert SECRET not in json.dumps(error.as_json())


@pytest.mark.parametrize(
    ("code", "path", "seen", "where"),
    [
        ("edit_not_finite", "lp", "edit_not_finite", "program.nodes[0]"),
        ("result_not_finite", SECRET, "result_not_finite", ""),
        ("store_damaged", "", "store_damaged", ""),
        ("budget_exhausted", "program.nodes[0]", "internal", "program.nodes[0]"),
        ("bad_value", SECRET, "internal", ""),
    ],
)
def test_a_refusal_becomes_a_code_and_a_node(
    host: Three, monkeypatch: pytest.MonkeyPatch, code: str, path: str, seen: str, where: str
) -> None:
    def broken(*_: Any) -> Any:
        raise refuse(code, path, SECRET, next_step=SECRET, closest=SECRET)

    monkeypatch.setattr(Passes, "run", broken)
    error = ending(host, start(host, LP))
    assert (error.code, error.path) == (seen, where)
    assert SECRET not in json.dumps(error.as_json())


def test_a_fit_that_fails_says_as_little(host: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise refuse("fit_not_converged", SECRET, SECRET)

    who = host.front.authenticate(host.keys["alice"])
    prompts = [f"{chr(97 + i % 26)}{i}" for i in range(20)]
    job = start(host, {**READ, "at": "prompt[-1]"}, KEPT, prompts=prompts)
    made = json.loads(host.front.job_result(who, job, WAIT_S).payload)["outputs"]["kept"]["handle"]
    monkeypatch.setattr(LocalWorker, "_save", broken)
    request = FitRequest(handle=made, kind="mean_diff", labels=tuple(i % 2 == 0 for i in range(20)))
    job = json.loads(host.front.fit(who, request, None).payload)["job"]
    error = ending(host, job)
    assert (error.code, error.path, error.reason) == (
        "fit_not_converged",
        "",
        CODES["fit_not_converged"].summary,
    )


def test_a_real_fault_of_a_program_names_its_node(host: Three) -> None:
    huge = [
        {"op": "edit.scale", "id": f"big{i}", "site": f"resid_post.{i}", "at": "prompt[*]", "by": by}
        for i, by in enumerate((2.0, 1e6))
    ]
    error = ending(host, start(host, *huge, LP))
    assert (error.code, error.path) == ("edit_not_finite", "program.nodes[1]")


def test_when_the_gate_goes_what_runs_is_stopped_and_leaves_no_rows(host: Three) -> None:
    start(host, READ, KEPT, TEXT, max_new_tokens=230, stop_at_eos=False)
    engine_busy = lambda: host.service._models["tiny"].worker.stats().live_requests > 0  # noqa: E731
    until(engine_busy)
    host.line.close()
    until(lambda: host.store.list("alice") == [])


def test_an_order_that_is_cancelled_late_leaves_no_rows(host: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LocalWorker.run

    def late(worker: Any, order: Any, watch: Any) -> Any:
        found = plain(worker, order, watch)
        watch.cancel()
        return found

    monkeypatch.setattr(LocalWorker, "run", late)
    assert ending(host, start(host, READ, KEPT)).code == "cancelled"
    assert host.store.list("alice") == []


def test_an_order_that_was_checked_otherwise_is_not_run(host: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = orders.run_sheet
    from trocar.host.worker import bench

    def other(body: bytes) -> Any:
        sheet, vectors = plain(body)
        return sheet.model_copy(update={"digest": "0" * 64}), vectors

    monkeypatch.setattr(bench.orders, "run_sheet", other)
    assert ending(host, start(host, LP)).code == "internal"


# ---- frames that no gate sends --------------------------------------------------------------------


@pytest.fixture
def bench(own: Any) -> Iterator[tuple[Path, Pinned]]:
    with ExitStack() as undo:
        root = undo.enter_context(folder())
        store = Store(root / "store")
        undo.callback(store.close)
        engine = HFEngine(own)
        undo.callback(engine.close)
        bench_on(bench_of([(own, engine)], store), root / "w", undo)
        yield root / "w", Pinned(facts=engine.facts, engine=engine.name)


def exchange(path: Path, kind: Kind, body: bytes) -> frames.Frame:
    stream = Stream(connect(path), frames.at_most(result=1 << 20))
    stream.put(Head(kind, 4, len(body)), body)
    try:
        return stream.receive(WAIT_S)
    finally:
        stream.close()


def test_facts_are_told_when_they_are_asked(bench: tuple[Path, Pinned]) -> None:
    path, mine = bench
    frame = exchange(path, Kind.facts, Ask(model="tiny").model_dump_json().encode())
    assert orders.read(Pinned, frame.body) == mine
    assert exchange(path, Kind.facts, Ask(model="x").model_dump_json().encode()).head.status is Status.fault


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, Status.done),
        ({"norms": {}}, Status.done),
        ({"n_layers": 5}, Status.fault),
        ({"name": "x"}, Status.fault),
    ],
)
def test_a_worker_says_when_it_has_other_models(
    bench: tuple[Path, Pinned], changed: dict[str, Any], status: Status
) -> None:
    path, mine = bench
    other = mine.model_copy(update={"facts": mine.facts.model_copy(update=changed)})
    frame = exchange(path, Kind.hello, Hello(models=(other,)).model_dump_json().encode())
    assert frame.head.status is status
    assert len(frame.body) == (orders.FAULT_BYTES if status is Status.fault else 0)


@pytest.mark.parametrize("alone", [False, True])
def test_a_worker_with_a_network_contradicts_a_gate_that_says_it_has_none(own: Any, alone: bool) -> None:
    with ExitStack() as undo:
        root = undo.enter_context(folder())
        store = Store(root / "store")
        undo.callback(store.close)
        engine = HFEngine(own)
        undo.callback(engine.close)
        bench_on(bench_of([(own, engine)], store, alone=alone), root / "w", undo)
        mine = Pinned(facts=engine.facts, engine=engine.name)
        for network, fits in (("allowed", True), ("closed", alone)):
            hello = Hello(models=(mine,), network=network).model_dump_json().encode()  # type: ignore[arg-type]
            body = exchange(root / "w", Kind.hello, hello).body
            assert body == (b"" if fits else orders.pack_fault("internal", 0))


@pytest.mark.parametrize("kind", [Kind.run, Kind.fit, Kind.erase, Kind.hello, Kind.stats, Kind.check])
def test_what_is_no_order_is_a_fault(bench: tuple[Path, Pinned], kind: Kind) -> None:
    assert exchange(bench[0], kind, b"not an order").body == orders.pack_fault("internal", None)


def test_a_kind_that_is_none_of_a_gate_ends_the_visit_and_the_next_is_served(
    bench: tuple[Path, Pinned],
) -> None:
    path, _ = bench
    with pytest.raises(Lost):
        exchange(path, Kind.call, b"")
    assert exchange(path, Kind.stats, Ask(model="tiny").model_dump_json().encode()).head.status is Status.done


# ---- the process ----------------------------------------------------------------------------------

INSIDE = """
import os, resource, socket, sys
from pathlib import Path
from trocar.host.worker import cell
said = cell.close_network()
cell.keep_inside()
cell.speak_into(Path(sys.argv[1]))
print("secret on stdout", flush=True)
os.write(2, b"secret on stderr")
links = [line.split(":")[0].strip() for line in open("/proc/self/net/dev").read().splitlines()[2:]]
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[2])), timeout=2)
    reached = True
except OSError:
    reached = False
print("RESULT", said, links, reached, resource.getrlimit(resource.RLIMIT_CORE), flush=True)
"""


def test_a_process_gives_up_network_core_dumps_and_its_voice(tmp_path: Path) -> None:
    import socket

    server = socket.create_server(("127.0.0.1", 0))
    log = tmp_path / "worker.log"
    ran = subprocess.run(
        [sys.executable, "-c", INSIDE, str(log), str(server.getsockname()[1])],
        capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ),
    )  # fmt: skip
    server.close()
    assert (ran.stdout, ran.stderr) == ("", "")
    said = log.read_text()
    assert "secret on stdout" in said
    assert "secret on stderr" in said
    assert log.stat().st_mode & 0o777 == 0o600
    alone = "RESULT True" in said
    assert ("RESULT True ['lo'] False (0, 0)" in said) is alone
    assert alone or "RESULT False" in said  # where a namespace is not allowed, the process says so


def test_a_log_that_is_too_long_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "worker.log"
    log.write_bytes(b"x" * 10)
    monkeypatch.setattr(cell, "_MOST_LOG_BYTES", 9)
    monkeypatch.setattr(cell.os, "dup2", lambda *_: None)
    cell.speak_into(log)
    assert (tmp_path / "worker.log.old").read_bytes() == b"x" * 10
    assert log.read_bytes() == b""


def test_where_there_are_no_namespaces_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell.sys, "platform", "darwin")
    assert cell.close_network() is False

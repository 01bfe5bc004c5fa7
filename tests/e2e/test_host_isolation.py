"""Three processes: the same bytes as one, deaths that cost what they must, and a worker that nobody has to believe."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_server
import httpx
import pytest
from evil_worker import HOWS, SECRET
from host_room import COME_UP_S, NETWORK, Door, Started, by_hand, code, serving, tiny_cache, until
from leaky_worker import SECRET as LEAK

from trocar.engine.hf.engine import HFEngine
from trocar.errors import TrocarError
from trocar.gate.gate import Gate
from trocar.gate.policy import Role, Tier
from trocar.host.gate.house import assemble
from trocar.models.load import load
from trocar.wire.orders import Pinned
from trocar.wire.requests import RunRequest

pytestmark = pytest.mark.e2e
OVERHEAD = 256
IDS = re.compile(r"(act|art|job|req)_[0-9a-f]{24,32}")
DIGESTS = re.compile(r'"(program|request)_digest":"[0-9a-f]{64}"')
READ = {"op": "read", "id": "r", "site": "resid_post.1", "at": "prompt[*]"}
LAST = {**READ, "at": "prompt[-1]"}
KEPT = {"op": "capture", "id": "kept", "of": ["r"]}
LP = {"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}
TEXT = {"op": "text", "id": "text"}
SCALE = {"op": "edit.scale", "id": "e", "site": "resid_post.1", "at": "prompt[*]", "by": 1.0}


def body(*nodes: dict[str, Any], prompts: Any = ("abc", "hello"), **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompts": list(prompts), "program": {"nodes": list(nodes)}, **more}


LONG = body(
    READ,
    KEPT,
    TEXT,
    prompts=[f"{i}" for i in range(40)],
    generation={"max_new_tokens": 240, "stop_at_eos": False},
)
QUICK = body(LP)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny_cache(tmp_path_factory.mktemp("cache")) as home:
        yield home


@pytest.fixture(scope="module")
def host(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with serving(tmp_path_factory.mktemp("host"), model, "host") as started:
        yield started


@pytest.fixture
def sockets() -> Iterator[Path]:
    import tempfile

    made = Path(tempfile.mkdtemp(prefix="trocar-test-"))  # a short name: those of sockets are limited
    yield made
    shutil.rmtree(made, ignore_errors=True)


# ---- the same answers -----------------------------------------------------------------------------


def plain(heard: httpx.Response) -> str:
    """An answer without random ids, and without digests of requests that hold one."""
    assert heard.status_code == 200, heard.text
    return DIGESTS.sub("", IDS.sub("ID", heard.text))


def everything(door: Door) -> dict[str, str]:
    """Every kind of request, as text without ids."""
    many = [f"{chr(97 + i % 26)}{i}" for i in range(40)]
    runs = {
        "run": QUICK,
        "lens": body(LAST, {"op": "lens", "id": "l", "of": ["r"], "top_k": 5}),
        "text": body(TEXT, generation={"max_new_tokens": 7, "temperature": 1.0, "seed": 3}),
        "sweep": body(SCALE, LP, sweep=[{"node": "e", "field": "by", "values": [0.5, 2.0]}]),
    }
    found = {name: door.ask("/v1/runs", run) for name, run in runs.items()}
    found["capture"] = door.ask("/v1/runs", body(LAST, KEPT, prompts=many))
    handle = found["capture"].json()["outputs"]["kept"]["handle"]
    stored = {"op": "stored", "id": "s", "handle": handle, "site": "resid_post.1", "prompts": [3]}
    put = {"op": "edit.set", "id": "e", "site": "resid_post.1", "at": "prompt[-1]", "value": "s"}
    found["stored"] = door.ask("/v1/runs", body(stored, put, LP, prompts=["abc"]))
    labels = [i % 2 == 0 for i in range(40)]
    found["fit"] = door.ask("/v1/fits", {"handle": handle, "kind": "logistic", "labels": labels})
    inner = {**stored, "handle": "step0.kept", "prompts": [0]}
    steps = [body(LAST, KEPT, prompts=["abc"]), body(inner, put, LP, prompts=["xyz"])]
    found["session"] = door.ask("/v1/sessions", {"steps": steps})
    found["erase"] = door.send("DELETE", f"/v1/handles/{handle}")
    texts = {name: plain(heard) for name, heard in found.items()}
    gone = door.send("GET", f"/v1/handles/{handle}")
    assert (gone.status_code, code(gone)) == (404, "handle_not_found")
    wrong = door.send("POST", "/v1/runs", body({**READ, "site": "resid_post.99"}, KEPT))
    return {**texts, "wrong": IDS.sub("ID", wrong.text)}


def test_three_processes_answer_as_one(host: Started, model: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "one", model, "process") as one:
        told = one.door.send("GET", "/v1/capabilities").json()
        assert (told["isolation"], told["network"]) == ("process", "allowed")
        expected = everything(one.door)
        facts = one.door.send("GET", "/v1/models").json()
    assert host.door.send("GET", "/v1/capabilities").json()["isolation"] == "host"
    assert host.door.send("GET", "/v1/models").json() == facts
    found = everything(host.door)
    assert found == expected
    assert set(found) >= {"run", "lens", "text", "capture", "stored", "sweep", "session", "fit", "erase"}


def test_the_start_says_what_it_is(host: Started) -> None:
    said = host.serving.said()
    assert "isolation: host" in said
    assert f"trocar ready {host.door.url}" in said
    assert said.count(host.door.secret) == 1
    alone = "worker: has no network" in said
    assert alone or "worker: shares this machine's network" in said
    assert ("network closed" in host.log) is alone
    told = host.door.send("GET", "/v1/capabilities").json()
    assert told["network"] == ("closed" if alone else "allowed") == NETWORK


def test_the_worker_has_no_sockets_but_unix_ones(host: Started) -> None:
    assert host.door.ask("/v1/runs", QUICK).status_code == 200
    proc = Path("/proc") / str(host.parts()["worker"])
    links = [os.readlink(fd) for fd in (proc / "fd").iterdir()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    spaces = (
        proc,
        Path("/proc/self"),
    )  # a connection belongs to the network of whoever made it: the gate's, ours
    of_unix = {
        line.split()[6] for at in spaces for line in (at / "net" / "unix").read_text().splitlines()[1:]
    }
    assert len(inodes) == 2  # the one it listens on, and the gate
    assert inodes <= of_unix
    for at in spaces:
        for table in ("tcp", "tcp6", "udp", "udp6", "raw"):
            lines = (at / "net" / table).read_text().splitlines()[1:]
            assert not [line for line in lines if line.split()[9] in inodes]


def test_who_is_not_known_is_refused_by_the_gate(host: Started) -> None:
    stranger = Door(host.door.url, "trk_" + "0" * 16 + "_" + "A" * 43)
    heard = stranger.send("GET", "/v1/handles")
    assert (heard.status_code, code(heard)) == (401, "bad_key")
    assert heard.headers["www-authenticate"] == "Bearer"


# ---- processes that die ---------------------------------------------------------------------------


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def answers_again(door: Door, within_s: float = COME_UP_S) -> None:
    """Waits until a request goes through; what is refused meanwhile says why."""
    seen = set()

    def goes_through() -> bool:
        heard = door.send("POST", "/v1/runs", QUICK)
        if heard.status_code == 202:
            heard = door.result(heard.json()["job"])
        if heard.status_code == 200:
            return True
        seen.add(code(heard))
        time.sleep(0.5)
        return False

    until(goes_through, within_s)
    assert seen <= {"worker_lost", "ledger_unavailable"}


def test_a_worker_that_is_killed_costs_the_overhead_and_comes_back(host: Started) -> None:
    answers_again(host.door)
    before = len(host.door.kinds())
    worker = host.parts()["worker"]
    job = host.door.start("/v1/runs", LONG)
    until(host.door.running)
    kill(worker)
    heard = host.door.result(job)
    assert (heard.status_code, code(heard)) == (503, "worker_lost")
    assert int(heard.headers["retry-after"]) >= 1
    ended = [k for k in host.door.kinds()[before:] if k[0] != "refused"]
    assert ended == [("admitted", 0), ("cancelled", OVERHEAD)]
    answers_again(host.door)
    assert host.parts()["worker"] != worker
    left = host.door.send("GET", "/v1/handles").json()["handles"]
    assert [h for h in left if h["kind"] == "activations"] == []


def test_a_gate_that_is_killed_charges_in_full_and_comes_back(host: Started) -> None:
    answers_again(host.door)
    gate = host.parts()["gate"]
    before = len(host.door.kinds())
    plan = host.door.send("POST", "/v1/plan", LONG).json()["cost"]["total_bits"]
    job = host.door.start("/v1/runs", LONG)
    until(host.door.running)
    kill(gate)
    until(lambda: host.parts().get("gate", gate) != gate, COME_UP_S)
    answers_again(host.door)
    new = [k for k in host.door.kinds()[before:] if k[0] in ("admitted", "recovered", "settled", "cancelled")]
    assert new[:2] == [("admitted", 0), ("recovered", plan)]
    gone = host.door.send("GET", f"/v1/jobs/{job}/result")
    assert code(gone) == "job_not_found"
    until(lambda: not host.door.running())


def test_a_front_that_is_killed_comes_back_on_the_same_address(host: Started) -> None:
    front = host.parts()["front"]
    kill(front)

    def answers() -> bool:
        try:
            return host.door.send("GET", "/v1/handles").status_code == 200
        except httpx.TransportError:
            return False

    until(answers, COME_UP_S)
    assert host.parts()["front"] != front


def test_stopping_ends_all_of_them_and_the_ledger_is_whole(host: Started) -> None:
    parts = host.parts()
    job = host.door.start("/v1/runs", LONG)
    until(host.door.running)
    exit_code, took_s = host.serving.stop()
    assert exit_code == 0
    assert took_s < 20
    assert not [pid for pid in parts.values() if Path(f"/proc/{pid}").exists()]
    ran = cli_server.command(host.serving.home, "ledger", "verify", "--data", str(host.serving.data))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert job


def test_a_policy_that_asks_for_three_is_not_taken_over_by_one(model: Path, tmp_path: Path) -> None:
    """A folder that is nobody's catalog counts as a secret."""
    secret = shutil.copytree(model, tmp_path / "secret")
    with serving(tmp_path / "one", secret, "process") as one:
        (one.serving.data / "policy.toml").write_text("[settings]\nisolation = 'host'\n")
        one.serving.process.send_signal(signal.SIGHUP)
        until(lambda: "docs/errors/limit_changed.md" in one.serving.said())
        said = one.serving.said()
        assert "the policy stays as it was" in said
        assert "[limit_changed] at settings.isolation" in said
        assert "policy read again" not in said
        assert one.door.send("GET", "/v1/models").status_code == 200


# ---- workers that nobody has to believe -----------------------------------------------------------


def test_what_a_worker_says_stays_in_its_log(model: Path, sockets: Path, tmp_path: Path) -> None:
    """The three started by hand; the worker prints secrets, logs them, and fails with them."""
    leaky = (sys.executable, str(Path(__file__).with_name("leaky_worker.py")))
    with by_hand(tmp_path / "hand", sockets, model, leaky) as (door, said):
        heard = [door.ask("/v1/runs", body(LP, prompts=[p])) for p in ("fine", "raise", "refuse", "invent")]
        assert [h.status_code for h in heard] == [200, 500, 422, 500]
        assert [code(h) for h in heard[1:]] == ["internal", "edit_not_finite", "internal"]
        listed = [
            door.send("GET", path) for path in ("/v1/ledger", "/v1/handles", "/v1/engine", "/v1/models")
        ]
        for each in (*heard, *listed):
            assert LEAK not in each.text
            assert LEAK not in str(each.headers)
        assert LEAK not in said.read_text()
    assert LEAK not in said.read_text()
    assert (tmp_path / "hand" / "data" / "worker.log").read_text().count(LEAK) >= 20


@pytest.fixture(scope="module")
def facts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an honest worker says of the model."""
    engine = HFEngine(load(model))
    pinned = Pinned(facts=engine.facts, engine=engine.name)
    engine.close()
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(pinned.model_dump_json())
    return path


def outcome(attempt: Callable[[], Any]) -> str:
    """How an attempt ends, and everything that is said of it."""
    try:
        return str(attempt().payload)
    except TrocarError as e:
        return json.dumps(e.as_json())


@pytest.mark.parametrize("how", HOWS)
def test_a_worker_process_that_is_not_honest(
    how: str, model: Path, facts: Path, sockets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = str(Path(__file__).with_name("evil_worker.py"))
    command = [sys.executable, script, str(sockets / "w"), str(facts), how, "4"]
    evil = subprocess.Popen(command, env=cli_server.environment(tmp_path))
    gate = Gate(f"sqlite:///{tmp_path}/ledger.db")
    try:
        service = assemble([str(model)], tmp_path, sockets / "w", gate, within_s=60)
        secret = gate.keys.create("alice", Tier.open, Role.operator).secret
        who = service.authenticate(secret)
        request = RunRequest.model_validate_json(json.dumps(QUICK))
        job = json.loads(service.run(who, request, {}, None).payload)["job"]
        said = outcome(lambda: service.job_result(who, job, 30.0))
        kinds = lambda: [e.kind for e in gate.ledger.entries(limit=100)]  # noqa: E731
        if how != "good":
            until(lambda: "frozen" in kinds())
            until(lambda: "worker_alert" in kinds())
            again = outcome(lambda: service.run(who, request, {}, None))
            assert "lineage_frozen" in again
            assert "ALERT" in caplog.text
        assert ('"lp"' in said) or ("bad_result" in said) or ("lineage_frozen" in said)
        assert ("bad_result" in said) or how in ("good", "extra frame", "tail")
        assert SECRET.decode().strip() not in said + caplog.text
        assert sum(a.held_bits for a in gate.ledger.balances()) == 0
        assert gate.ledger.check() == []
        service.close()
    finally:
        evil.kill()
        evil.wait()

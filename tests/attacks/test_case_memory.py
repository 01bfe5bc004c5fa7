"""Case 59: requests that no limit forbids and no memory holds, against a server whose models run in a process apart."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_server
import httpx
import numpy as np
import pytest
from case_room import LOGPROBS
from host_room import COME_UP_S, Door, Started, code, serving, tiny_cache, until
from http_room import request

from trocar.wire import tensors

pytestmark = pytest.mark.e2e
OVERHEAD = 256
FEATURES = 100_000
ROWS = 250
PRICE = OVERHEAD + 3 * ROWS * 32
MARGIN_BYTES = 160 << 20
ATTEMPTS = 10
SMALL = request(LOGPROBS, prompts=["abc"])
LONG = request(
    {"op": "text", "id": "text"},
    prompts=[f"{i}" for i in range(40)],
    max_new_tokens=240,
    stop_at_eos=False,
)


def bomb(token: int = 97) -> bytes:
    """Features of a large dictionary on four layers: 0.4 GB for one prompt, which the checker admits."""
    width, zeros = 32, np.zeros(FEATURES, np.float32)
    names = {"w_enc": "we", "b_enc": "be", "w_dec": "wd", "b_dec": "bd"}
    nodes: list[dict[str, Any]] = [{"op": "sae", "id": "sae", **names}]
    for layer in range(4):
        nodes += [
            {"op": "read", "id": f"r{layer}", "site": f"resid_post.{layer}", "at": "prompt[*]"},
            {"op": "encode", "id": f"f{layer}", "of": f"r{layer}", "sae": "sae"},
        ]
    for layer in range(3):  # each of the first three is held until the last is there
        nodes += [
            {"op": "add", "id": f"a{layer}", "a": f"f{layer}", "b": "f3"},
            {"op": "norm", "id": f"n{layer}", "of": f"a{layer}"},
            {"op": "score", "id": f"s{layer}", "of": f"n{layer}"},
        ]
    arrays = {
        "we": np.ones((width, FEATURES), np.float32),
        "be": zeros,
        "wd": np.zeros((FEATURES, width), np.float32),
        "bd": np.zeros(width, np.float32),
    }
    return tensors.pack(json.dumps(request(*nodes, prompts=[[token] * ROWS])).encode(), arrays)


def explode(door: Door, frame: bytes, path: str = "/v1/runs") -> httpx.Response:
    headers = {"content-type": tensors.MEDIA_TYPE}
    heard = door.send("POST", path, content=frame, headers=headers)
    return door.result(heard.json()["job"]) if heard.status_code == 202 else heard


def data_bytes(pid: int) -> int:
    """Private memory that a process may write, as the kernel counts it for a limit."""
    [line] = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmData:")]
    return int(line.split()[1]) << 10


def narrow(host: Started, most_bytes: int) -> None:
    """So much memory and no more, for the worker that runs and for those that are started after it."""
    for pid in (host.parts()["worker"], host.serving.process.pid):
        resource.prlimit(pid, resource.RLIMIT_DATA, (most_bytes, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with (
        tiny_cache(tmp_path_factory.mktemp("cache")) as model,
        serving(tmp_path_factory.mktemp("host"), model, "host") as started,
    ):
        yield started


def served(door: Door, body: dict[str, Any]) -> httpx.Response:
    """The answer of somebody who sends a request again as long as the worker is not there."""
    heard: list[httpx.Response] = []

    def ended() -> bool:
        said = door.send("POST", "/v1/runs", body)
        heard.append(door.result(said.json()["job"]) if said.status_code == 202 else said)
        if heard[-1].status_code == 503:
            assert code(heard[-1]) == "worker_lost"
            time.sleep(0.5)
        return heard[-1].status_code != 503

    until(ended, COME_UP_S)
    return heard[-1]


def books_are_whole(host: Started) -> None:
    ran = cli_server.command(host.serving.home, "audit", "verify", "--data", str(host.serving.data))
    assert ran.returncode == 0, ran.stdout + ran.stderr


def ended(door: Door) -> list[tuple[str, int]]:
    """How the requests of a key ended: kind of entry and bits."""
    return [k for k in door.kinds() if k[0] in ("settled", "cancelled", "recovered")]


def test_case_59_a_worker_that_is_killed_while_two_run(host: Started) -> None:
    """Both get their bits back but for the overhead and are told to try again; the next worker serves them."""
    mallory, victor = host.key("mallory", "open"), host.key("victor", "open")
    quiet, worker = victor.ask("/v1/runs", SMALL), host.parts()["worker"]
    jobs = {door: door.start("/v1/runs", LONG) for door in (mallory, victor)}
    until(lambda: host.door.send("GET", "/v1/engine").json()["live_requests"] == 2)
    os.kill(worker, signal.SIGKILL)
    for door, job in jobs.items():
        heard = door.result(job)
        assert (heard.status_code, code(heard)) == (503, "worker_lost")
        assert int(heard.headers["retry-after"]) >= 1
    assert served(victor, SMALL).json()["outputs"] == quiet.json()["outputs"]
    assert mallory.ask("/v1/runs", LONG).status_code == 200
    (lost, bits), (again, _) = ended(mallory)
    assert (lost, bits, again) == ("cancelled", OVERHEAD, "settled")
    assert host.parts()["worker"] != worker
    books_are_whole(host)


def test_case_59_a_request_that_no_memory_holds(host: Started) -> None:
    """Under a limit of memory an admitted request fails or ends the worker; either way it gets back all but the
    overhead, and others are served by a sound worker after each attempt."""
    mallory, victor = host.key("mallory2", "open"), host.key("victor2", "open")
    quiet = served(victor, SMALL)
    assert explode(mallory, bomb(), "/v1/plan").json()["admitted"]
    most_bytes = data_bytes(host.parts()["worker"]) + MARGIN_BYTES
    assert explode(mallory, bomb(token=98)).status_code == 200  # with memory there is nothing wrong with it
    narrow(host, most_bytes)
    first, seen, frame = host.parts()["worker"], list[str](), bomb()
    while host.parts().get("worker") == first and len(seen) < ATTEMPTS:
        heard = explode(mallory, frame)
        assert heard.status_code in (500, 503)
        seen.append(code(heard))
        for prompt in (
            "abc",
            f"{len(seen)}" * (7 + len(seen)),
        ):  # a number of rows that is new to the worker, too
            beside = served(victor, request(LOGPROBS, prompts=[prompt]))
            assert beside.status_code == 200, (seen, beside.text)
            if prompt == "abc":
                assert beside.json()["outputs"] == quiet.json()["outputs"]
    assert seen
    assert set(seen) <= {"internal", "worker_lost"}
    assert host.parts()["worker"] != first, seen
    assert ended(mallory) == [("settled", PRICE), *[("cancelled", OVERHEAD)] * len(seen)]
    assert "frozen" not in [kind for kind, _ in host.door.kinds()]
    books_are_whole(host)

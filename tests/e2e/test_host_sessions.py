"""Sessions on three processes: one above the budget runs nothing, one that is cancelled stops at the worker."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_server
import pytest
from host_room import Door, Started, code, make_model, serving, tree, until

pytestmark = pytest.mark.e2e
OVERHEAD = 256
SECRET_BITS = 20_000_000  # an agent's: 2,000 bits for life, 500 on a day
ROW_BITS = 9 + 8  # a token of 300 and a number
READ = {"op": "read", "id": "r", "site": "resid_post.1", "at": "prompt[-1]"}
TOP = {"op": "lens", "id": "top", "of": ["r"], "top_k": 1}
KEPT = {"op": "capture", "id": "kept", "of": ["r"]}
SOON_S = 10.0


def step(
    *nodes: dict[str, Any], prompts: Any = ("abc", "hello"), most: int = 0, model: str = "tiny"
) -> dict[str, Any]:
    generation = {"max_new_tokens": most, "stop_at_eos": False}
    return {
        "model": model,
        "prompts": list(prompts),
        "program": {"nodes": list(nodes)},
        "generation": generation,
    }


SLOW = step({"op": "text", "id": "text"}, most=240)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A server of an open model and of a secret one."""
    parts, root = tree(), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TROCAR_CACHE", str(root))
        tiny = make_model(root, parts.random_llama(), parts.byte_tokenizer())
        shut = make_model(root, parts.random_llama(), parts.byte_tokenizer(), "shut", SECRET_BITS)
        with serving(tmp_path_factory.mktemp("host"), tiny, "host", shut) as started:
            yield started


def engine(host: Started) -> dict[str, int]:
    """What the worker counts over its models."""
    found: dict[str, int] = host.door.send("GET", "/v1/engine").json()
    return found


def rows_on_disk(host: Started) -> list[Path]:
    return list((host.serving.data / "store").rglob("*.safetensors"))


def left_bits(door: Door, model: str) -> int:
    return int(door.send("GET", "/v1/ledger").json()["budgets"][model]["left_bits"])


def test_a_session_above_the_budget_runs_nothing(host: Started) -> None:
    """Each step alone is admitted: what is left is more than one costs and less than both do."""
    eve = host.key("eve", "agent")
    left, forwards = left_bits(eve, "shut"), engine(host)["forwards"]
    prompts = ["a"] * ((left - OVERHEAD) // ROW_BITS)
    asked = step(READ, TOP, prompts=prompts, model="shut")
    plan = eve.send("POST", "/v1/plan", asked).json()
    assert (plan["admitted"], plan["cost"]["total_bits"]) == (True, OVERHEAD + ROW_BITS * len(prompts))
    for keep in (False, True):
        heard = eve.send("POST", "/v1/sessions", {"steps": [asked, asked], "keep": keep})
        assert (heard.status_code, code(heard)) == (403, "budget_exhausted")
    assert (left_bits(eve, "shut"), engine(host)["forwards"]) == (left, forwards)
    assert [kind for kind, _ in eve.kinds()] == ["key_created", "refused", "refused"]
    alone = eve.ask("/v1/runs", asked)
    assert int(alone.headers["x-trocar-bits"]) == plan["cost"]["total_bits"]
    assert engine(host)["forwards"] > forwards


def test_a_session_within_the_budget_pays_one_overhead(host: Started) -> None:
    """So two steps may fit that cost more than the budget when they are asked for one by one."""
    amy = host.key("amy", "agent")
    left = left_bits(amy, "shut")
    asked = step(READ, TOP, prompts=["a"] * ((left - OVERHEAD) // (2 * ROW_BITS)), model="shut")
    each = amy.send("POST", "/v1/plan", asked).json()["cost"]["total_bits"]
    assert 2 * each > left
    heard = amy.ask("/v1/sessions", {"steps": [asked, asked]})
    assert heard.status_code == 200
    assert int(heard.headers["x-trocar-bits"]) == 2 * each - OVERHEAD <= left


@pytest.mark.parametrize("moment", ["a step was done", "a step runs", *range(4)])
def test_a_cancelled_session_stops_at_the_worker(host: Started, moment: str | int) -> None:
    """When a step was done, while one runs, and whenever it hits. Its texts would take much longer; nothing of it is
    left, it pays for having been admitted, and the worker is free at once.
    """
    amy = host.key(f"amy-{str(moment).replace(' ', '-')}", "open")
    steps = [step(READ, KEPT), *[SLOW] * 12]
    job = amy.start("/v1/sessions", {"steps": steps, "keep": True})
    done = lambda: amy.send("GET", f"/v1/jobs/{job}").json()["done"]  # noqa: E731
    if moment == "a step was done":
        until(lambda: done() >= 2)
    elif moment == "a step runs":
        until(host.door.running)
    else:
        time.sleep(random.uniform(0, 0.5))
    began_s = time.monotonic()
    amy.send("DELETE", f"/v1/jobs/{job}")
    heard = amy.result(job)
    assert time.monotonic() - began_s < SOON_S
    assert (heard.status_code, code(heard)) == (422, "cancelled")
    assert engine(host)["live_requests"] == engine(host)["live_sequences"] == 0
    forwards = engine(host)["forwards"]
    assert amy.ask("/v1/runs", step(READ, KEPT)).status_code == 200
    assert engine(host)["forwards"] == forwards + 1  # nothing else is computed any more
    assert [k for k in amy.kinds() if k[1] > 0] == [("cancelled", OVERHEAD), ("settled", OVERHEAD)]
    [kept] = amy.send("GET", "/v1/handles").json()["handles"]
    assert len(rows_on_disk(host)) == 1
    amy.send("DELETE", f"/v1/handles/{kept['handle']}")
    until(lambda: rows_on_disk(host) == [])


def test_the_books_are_whole_after_all_of_it(host: Started) -> None:
    ran = cli_server.command(host.serving.home, "audit", "verify", "--data", str(host.serving.data))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert host.log.count("Traceback") == 0

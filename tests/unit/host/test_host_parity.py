"""Three processes answer as one does, byte for byte but for random ids; here the three share a process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from host_parts import Three, codes_of, plain, three, until

from trocar.errors import NotFound, TrocarError
from trocar.wire.requests import FitRequest, RunRequest, SessionRequest, TokenizeRequest

READ = {"op": "read", "id": "r", "site": "resid_post.1", "at": "prompt[*]"}
KEPT = {"op": "capture", "id": "kept", "of": ["r"]}
LP = {"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}
TEXT = {"op": "text", "id": "text"}
V = {"v": np.linspace(-1, 1, 32, dtype=np.float32)}


def run_of(*nodes: dict[str, Any], prompts: Any = ("abc", "hello"), **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompts": list(prompts), "program": {"nodes": list(nodes)}, **more}


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "logprobs": (run_of(LP), {}),
    "lens": (run_of({**READ, "at": "prompt[-1]"}, {"op": "lens", "id": "l", "of": ["r"], "top_k": 5}), {}),
    "text": (run_of(TEXT, generation={"max_new_tokens": 7, "temperature": 1.0, "seed": 3}), {}),
    "tensor": (
        run_of(
            {"op": "tensor", "id": "t", "name": "v"},
            {"op": "edit.add", "id": "e", "site": "resid_post.1", "at": "prompt[*]", "value": "t"},
            LP, TEXT, generation={"max_new_tokens": 4},
        ),
        V,
    ),
    "sweep": (
        run_of(
            {"op": "edit.scale", "id": "e", "site": "resid_post.1", "at": "prompt[*]", "by": 1.0}, LP,
            sweep=[{"node": "e", "field": "by", "values": [0.5, 1.0, 2.0]}],
        ),
        {},
    ),
    "capture": (run_of(READ, KEPT, LP), {}),
    "gen": (
        run_of(
            {**READ, "at": "gen[0:3]"}, KEPT, {"op": "score", "id": "s", "of": "n"},
            generation={"max_new_tokens": 5},
        ),
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tiny_of: Callable[..., Any]) -> Iterator[Three]:
    with three(tiny_of()) as made:  # a model of its own: two engines do not share one
        yield made
        assert made.service.check() == []
        assert made.held() == 0


@pytest.fixture(scope="module")
def process(serve: Callable[..., Any], tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = serve(tmp_path_factory.mktemp("one"), [tiny])
    yield made
    made.service.close()


DIGESTS = re.compile(rb'"(program|request)_digest":"[0-9a-f]{64}"')
"""Of requests that name a handle, whose id is random."""


class Two:
    """The same request to both."""

    def __init__(self, host: Three, process: Any) -> None:
        self.sides = [
            (host.front, host.front.authenticate(host.keys["alice"])),
            (process.service, process.principals["alice"]),
        ]

    def ask(self, verb: str, *requests: Any) -> list[bytes]:
        """How each side's job ends; a request for each, or one for both."""
        both = requests if len(requests) == 2 else requests * 2
        found = []
        for (service, who), given in zip(self.sides, both, strict=True):
            started = getattr(service, verb)(who, *given)
            job = json.loads(started.payload)["job"]
            released = service.job_result(who, job, 20.0)
            assert released.status == 200, released.payload
            found.append(released.payload)
        return found

    def same(self, verb: str, *requests: Any) -> list[bytes]:
        found = self.ask(verb, *requests)
        one, other = (plain(x) if len(requests) == 1 else DIGESTS.sub(b"", plain(x)) for x in found)
        assert one == other
        return found


@pytest.fixture
def two(host: Three, process: Any) -> Two:
    return Two(host, process)


def parsed(model: Any, body: Any) -> Any:
    return model.model_validate_json(json.dumps(body))


def handles(found: list[bytes]) -> list[str]:
    return [json.loads(payload)["outputs"]["kept"]["handle"] for payload in found]


def fixed(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    body, vectors = RUNS[name]
    if name == "gen":  # scores are of a value of one number
        nodes = body["program"]["nodes"]
        body = {**body, "program": {"nodes": [n for n in nodes if n["op"] != "score"]}}
    return body, vectors


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same(two: Two, name: str) -> None:
    body, vectors = fixed(name)
    found = two.same("run", (parsed(RunRequest, body), vectors, None))
    assert json.loads(found[0])["receipt"]["released_bits"]


def test_stored_rows_fits_and_what_they_made_are_the_same(two: Two) -> None:
    prompts = [f"{chr(97 + i % 26)}{i}" for i in range(40)]
    body = run_of({**READ, "at": "prompt[-1]"}, KEPT, prompts=prompts)
    rows = handles(two.same("run", (parsed(RunRequest, body), {}, None)))
    used = [
        parsed(
            RunRequest,
            run_of(
                {"op": "stored", "id": "s", "handle": handle, "site": "resid_post.1", "prompts": [0]},
                {"op": "edit.set", "id": "e", "site": "resid_post.1", "at": "prompt[-1]", "value": "s"},
                LP,
                prompts=["abc"],
            ),
        )
        for handle in rows
    ]  # fmt: skip
    two.same("run", *((request, {}, None) for request in used))
    fits = [
        FitRequest(handle=handle, kind="logistic", labels=tuple(i % 2 == 0 for i in range(40)))
        for handle in rows
    ]
    found = two.same("fit", *((fit, None) for fit in fits))
    for options in (
        {"kind": "lda", "folds": 3},
        {"kind": "multinomial", "class_weight": "balanced"},
        {"kind": "logistic", "l1": 2.0, "folds": 2},
    ):
        two.same(
            "fit", *((FitRequest(**(fit.model_dump(exclude_unset=True) | options)), None) for fit in fits)
        )
    made = [json.loads(payload)["outputs"]["fit"]["artifact"] for payload in found]
    vectors = [
        parsed(
            RunRequest,
            run_of(
                {"op": "vector", "id": "d", "handle": artifact, "site": "resid_post.1"},
                {"op": "edit.add", "id": "e", "site": "resid_post.1", "at": "prompt[-1]", "value": "d"},
                LP,
            ),
        )
        for artifact in made
    ]
    two.same("run", *((request, {}, None) for request in vectors))
    for (service, who), handle in zip(two.sides, rows, strict=True):
        assert json.loads(service.erase(who, handle).payload)["erased"]
        with pytest.raises(NotFound):
            service.handle(who, handle)


def test_erasing_erases_the_rows(two: Two, host: Three) -> None:
    rows = handles(two.ask("run", (parsed(RunRequest, RUNS["capture"][0]), {}, None)))
    assert [x.id for x in host.store.list("alice")].count(rows[0]) == 1
    for (service, who), handle in zip(two.sides, rows, strict=True):
        service.erase(who, handle)
    assert rows[0] not in [x.id for x in host.store.list("alice")]


def test_sessions_are_the_same(two: Two) -> None:
    body = {
        "steps": [
            run_of({**READ, "at": "prompt[-1]"}, KEPT, prompts=["abc"]),
            run_of(
                {"op": "stored", "id": "s", "handle": "step0.kept", "site": "resid_post.1"},
                {"op": "edit.set", "id": "e", "site": "resid_post.1", "at": "prompt[-1]", "value": "s"},
                LP,
                prompts=["xyz"],
            ),
        ]
    }
    request = parsed(SessionRequest, body)
    two.same("session", (request, {}, None))


def test_plans_and_public_facts_are_the_same(two: Two) -> None:
    for verb, given in (
        ("plan", (parsed(RunRequest, RUNS["sweep"][0]), {})),
        ("tokenize", (TokenizeRequest(model="tiny", texts=("abc", "\u00e9")),)),
        ("handles", ()),
    ):
        found = [getattr(service, verb)(who, *given).payload for service, who in two.sides]
        if verb != "handles":
            assert found[0] == found[1]
    assert json.loads(two.sides[0][0].capabilities().payload)["isolation"] == "host"
    assert two.sides[0][0].models().payload == two.sides[1][0].models().payload


def test_refusals_are_the_same(two: Two) -> None:
    wrong = parsed(RunRequest, run_of({**READ, "site": "resid_post.99"}, KEPT))
    said = []
    for service, who in two.sides:
        with pytest.raises(TrocarError) as caught:
            service.run(who, wrong, {}, None)
        said.append(caught.value.as_json())
    assert said[0] == said[1]


def test_an_idempotency_key_gives_the_same_bytes_for_nothing(two: Two, host: Three) -> None:
    front, who = two.sides[0]
    request = parsed(RunRequest, RUNS["logprobs"][0])
    jobs = []
    for _ in range(2):
        job = json.loads(front.run(who, request, {}, "once").payload)["job"]
        jobs.append(front.job_result(who, job, 20.0))
    assert jobs[0].payload == jobs[1].payload
    assert jobs[0].charge is not None
    assert jobs[1].charge is not None
    assert (jobs[1].charge.bits, jobs[1].charge.replayed) == (0, True)


def test_a_job_can_be_cancelled(host: Three) -> None:
    who = host.front.authenticate(host.keys["bob"])
    body = run_of(TEXT, generation={"max_new_tokens": 200, "stop_at_eos": False})
    job = json.loads(host.front.run(who, parsed(RunRequest, body), {}, None).payload)["job"]
    host.front.cancel(who, job)
    with pytest.raises(TrocarError) as caught:
        host.front.job_result(who, job, 20.0)
    assert caught.value.code == "cancelled"
    until(lambda: host.held() == 0)


def test_counters_are_for_operators(host: Three) -> None:
    alice, bob = (host.front.authenticate(host.keys[name]) for name in ("alice", "bob"))
    assert json.loads(host.front.engine(alice).payload)["forwards"] > 0
    with pytest.raises(TrocarError) as caught:
        host.front.engine(bob)
    assert caught.value.code == "not_allowed"


def test_a_key_that_is_none_is_refused_before_anything_is_read(host: Three) -> None:
    for secret, code in ((None, "no_key"), ("trk_x", "bad_key")):
        with pytest.raises(TrocarError) as caught:
            host.front.authenticate(secret)
        assert caught.value.code == code


def test_codes_of_reads_refusals() -> None:
    assert codes_of(b'{"error": {"refusals": [{"code": "x"}]}}') == ["x"]

"""The happy paths of every route, what they charge, and what one tenant sees of another: nothing."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from http_room import LOGPROBS, TEXT, Caller, capture, edit, read, request

OVERHEAD = 256
SCALAR = 32


def _capture(caller: Caller, prompts: Any = ("abc", "hello"), *sites: str) -> str:
    sites = sites or ("resid_post.1",)
    nodes = [read(s, name=f"r{i}") for i, s in enumerate(sites)]
    heard = caller.run(request(*nodes, capture(*[n["id"] for n in nodes]), prompts=prompts))
    assert heard.status == 200, heard.json
    return str(heard.json["outputs"]["kept"]["handle"])


def test_public_facts_need_no_key(nobody: Caller) -> None:
    assert nobody.get("/healthz").json["status"] == "ok"
    models = {m["name"]: m for m in nobody.get("/v1/models").json["models"]}
    assert set(models) == {"tiny", "shut"}
    assert "attn_out_post" in models["tiny"]["unavailable"]
    assert "attn_probs" in models["tiny"]["sites"]
    capabilities = nobody.get("/v1/capabilities").json
    assert capabilities["engines"] == {"tiny": "hf", "shut": "hf"}
    assert {"read", "capture", "text"} <= {o["op"] for o in capabilities["ops"]}
    document = nobody.get("/openapi.json").json
    assert {"RunRequest", "RunResult"} <= set(document["components"]["schemas"])
    page = nobody.get("/docs")
    assert page.status == 200
    assert b"/docs/static/swagger-ui-bundle.js" in page.body


def test_tokenize(bob: Caller) -> None:
    view = bob.post("/v1/tokenize", {"model": "tiny", "texts": ["abc", "é"]}).json
    assert view["texts"][0] == ["a", "b", "c"]
    assert [len(x) for x in view["ids"]] == [3, 2]


def test_a_run_charges_what_it_released_and_never_more_than_its_plan(bob: Caller) -> None:
    body = request({**LOGPROBS, "at": "prompt[*]"}, edit("scale", "resid_post.1", at="prompt[*]", by=1.5))
    plan = bob.post("/v1/plan", body).json
    before, _ = bob.account()
    started = bob.post("/v1/runs", body)
    assert started.status == 202
    assert started.json["state"] in ("QUEUED", "RUNNING", "COMPLETED")
    heard = bob.result(started.json["job"])
    result = heard.json
    entries, budgets = bob.account()
    new = entries[len(before) :]
    assert [e["kind"] for e in new] == ["admitted", "settled"]
    bits = int(heard.headers["x-trocar-bits"])
    assert new[1]["bits"] == bits == sum(result["receipt"]["released_bits"].values())
    assert result["receipt"]["reserved_bits"] == plan["cost"]["total_bits"] == bits
    assert bits == OVERHEAD + 2 * SCALAR + 8 * 2 * SCALAR
    assert heard.headers["x-trocar-bits-left"] == "uncapped"
    assert budgets["tiny"]["spent_bits"] >= bits
    edits = result["receipt"]["edits"]
    assert [(e["id"], e["op"], e["rows"]) for e in edits] == [("e", "edit.scale", 8)]
    assert edits[0]["norm_after"] == pytest.approx(1.5 * edits[0]["norm_before"], rel=1e-5)
    assert result["tokens"] == [["a", "b", "c"], ["h", "e", "l", "l", "o"]]
    assert bob.get(f"/v1/jobs/{started.json['job']}").json["state"] == "COMPLETED"


def test_a_text_that_stops_early_costs_less_than_its_plan(server: Any, bob: Caller) -> None:
    from dataclasses import replace

    body = request(TEXT, prompts=["abc"], max_new_tokens=20)
    first = bob.run(request(TEXT, prompts=["abc"], max_new_tokens=1, stop_at_eos=False)).json["outputs"][
        "text"
    ]["ids"][0][0]
    engine = server.engines["tiny"]
    was, models = engine._body, server.service._models
    model = models["tiny"]
    engine._body = replace(was, eos=frozenset({first}))
    models["tiny"] = replace(model, facts=model.facts.model_copy(update={"eos": (first,)}))
    try:
        plan = bob.post("/v1/plan", body).json["cost"]["total_bits"]
        heard = bob.run(body)
    finally:
        engine._body, models["tiny"] = was, model
    text = heard.json["outputs"]["text"]
    assert (text["finished"], text["ids"], text["texts"]) == ([True], [[]], [""])
    assert int(heard.headers["x-trocar-bits"]) == OVERHEAD + 9
    assert plan == OVERHEAD + 21 * 9


def test_an_idempotent_replay_is_the_same_bytes_for_nothing(bob: Caller) -> None:
    body = request(LOGPROBS)
    first = bob.run(body, idempotency_key="once")
    entries, budgets = bob.account()
    again = bob.run(body, idempotency_key="once")
    assert again.body == first.body
    assert (again.headers["x-trocar-bits"], again.headers["x-trocar-replayed"]) == ("0", "true")
    assert first.headers["x-trocar-replayed"] == "false"
    after, left = bob.account()
    assert left == budgets
    assert [e["kind"] for e in after[len(entries) :]] == ["replayed"]
    assert after[-1]["bits"] == 0
    other = bob.post("/v1/runs", request(LOGPROBS, prompts=["other"]), idempotency_key="once")
    assert (other.status, other.refusal["code"]) == (409, "idempotency_conflict")
    assert bob.account() == (after, left)


def test_an_idempotency_key_is_ones_own(bob: Caller, alice: Caller) -> None:
    bob.run(request(LOGPROBS), idempotency_key="shared")
    heard = alice.run(request(LOGPROBS, prompts=["mine"]), idempotency_key="shared")
    assert (heard.status, heard.headers["x-trocar-replayed"]) == (200, "false")


def test_capture_fit_steer_and_score(bob: Caller) -> None:
    """The whole way: rows stay, a probe stays, both are used by name, then deleted."""
    words = [f"{'good' if i % 2 else 'bad'} {i}" for i in range(24)]
    handle = _capture(bob, words, "resid_post.1", "resid_post.2")
    facts = bob.get(f"/v1/handles/{handle}").json
    assert (facts["kind"], facts["rows"], facts["widths"]) == (
        "activations",
        24,
        {"resid_post.1": 32, "resid_post.2": 32},
    )
    labels = [i % 2 for i in range(24)]
    started = bob.post("/v1/fits", {"handle": handle, "kind": "mean_diff", "labels": labels})
    assert started.status == 202
    fitted = bob.result(started.json["job"])
    assert fitted.status == 200, fitted.json
    fit = fitted.json["outputs"]["fit"]
    numbers = sum(len(s["metrics"]) for s in fit["sites"])
    assert int(fitted.headers["x-trocar-bits"]) == OVERHEAD + numbers * SCALAR
    artifact = fit["artifact"]
    direction = {"op": "vector", "id": "d", "handle": artifact, "site": "resid_post.1"}
    steered = bob.run(
        request(direction, edit("add", "resid_post.1", value="d", coef=3.0), LOGPROBS, prompts=["abc"])
    )
    plain = bob.run(request(LOGPROBS, prompts=["abc"]))
    assert steered.json["outputs"]["lp"]["logprobs"] != plain.json["outputs"]["lp"]["logprobs"]
    score = {"op": "score", "id": "s", "of": "r", "probe": artifact, "site": "resid_post.1"}
    scored = bob.run(request(read("resid_post.1", "prompt[*]"), score, prompts=["abc"])).json["outputs"]["s"]
    assert len(scored["scores"]) == 3
    listed = {h["handle"]: h["kind"] for h in bob.get("/v1/handles").json["handles"]}
    assert (listed[handle], listed[artifact]) == ("activations", "artifact")
    for name in (handle, artifact):
        assert bob.delete(f"/v1/handles/{name}").json == {"handle": name, "erased": True}
        assert bob.get(f"/v1/handles/{name}").refusal["code"] == "handle_not_found"


def test_a_patch_through_the_store_is_a_patch(bob: Caller) -> None:
    """Rows captured from one prompt and set in another give the first prompt's answer (last layer, last token)."""
    handle = _capture(bob, ["hello"], "resid_post.3")
    stored = {"op": "stored", "id": "s", "handle": handle, "site": "resid_post.3"}
    patched = bob.run(
        request(stored, edit("set", "resid_post.3", at="prompt[-1]", value="s"), LOGPROBS, prompts=["xyz"])
    )
    clean = bob.run(request(LOGPROBS, prompts=["hello"]))
    corrupt = bob.run(request(LOGPROBS, prompts=["xyz"]))
    found, wanted, base = (h.json["outputs"]["lp"]["logprobs"][0] for h in (patched, clean, corrupt))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert found != pytest.approx(base, abs=1e-2)


def test_a_foreign_handle_is_an_absent_one(server: Any, alice: Caller, bob: Caller) -> None:
    handle = _capture(alice, ["hello"], "resid_post.1")
    absent = "act_" + "0" * 32
    forwards, before = server.forwards(), bob.account()

    def ask(name: str) -> list[Any]:
        stored = {"op": "stored", "id": "s", "handle": name, "site": "resid_post.1"}
        body = request(
            stored, edit("set", "resid_post.1", at="prompt[-1]", value="s"), LOGPROBS, prompts=["xyz"]
        )
        heard = [
            bob.post("/v1/runs", body),
            bob.post("/v1/plan", body),
            bob.post("/v1/fits", {"handle": name, "kind": "ridge", "labels": [1.0]}),
            bob.get(f"/v1/handles/{name}"),
            bob.delete(f"/v1/handles/{name}"),
        ]
        return [(h.status, {k: str(v).replace(name, "HANDLE") for k, v in h.refusal.items()}) for h in heard]

    foreign = ask(handle)
    assert foreign == ask(absent)
    assert {refusal["code"] for _, refusal in foreign} == {"handle_not_found"}
    assert (server.forwards(), bob.account()) == (forwards, before)
    assert alice.get(f"/v1/handles/{handle}").status == 200
    assert handle not in bob.get("/v1/handles").body.decode()


def test_a_job_of_somebody_else_is_no_job(alice: Caller, bob: Caller) -> None:
    job = alice.post("/v1/runs", request(LOGPROBS)).json["job"]
    alice.result(job)
    absent = "job_" + "0" * 32

    def ask(name: str) -> list[Any]:
        heard = [
            bob.get(f"/v1/jobs/{name}"),
            bob.get(f"/v1/jobs/{name}/result"),
            bob.delete(f"/v1/jobs/{name}"),
        ]
        return [(h.status, {k: str(v).replace(name, "JOB") for k, v in h.refusal.items()}) for h in heard]

    assert ask(job) == ask(absent)
    assert ask(job)[0][1]["code"] == "job_not_found"


def test_ledgers_are_ones_own(alice: Caller, bob: Caller) -> None:
    alice.run(request(LOGPROBS))
    a, b = alice.get("/v1/ledger").json, bob.get("/v1/ledger").json
    assert a["key"] != b["key"]
    assert not {e["seq"] for e in a["entries"]} & {e["seq"] for e in b["entries"]}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"labels": [1, 0]}, "bad_labels"),
        ({"labels": [1] * 12}, "too_few_rows"),
        ({"groups": [1, 2]}, "bad_labels"),
        ({"test_fraction": 1.5}, "bad_value"),
        ({"kind": "svm"}, "bad_value"),
        ({"labels": []}, "bad_value"),
    ],
)
def test_a_bad_fit_is_refused_before_anything(bob: Caller, change: dict[str, Any], code: str) -> None:
    handle = _capture(bob, [f"word {i}" for i in range(12)])
    before = bob.account()
    body = {"handle": handle, "kind": "logistic", "labels": [i % 2 for i in range(12)], **change}
    heard = bob.post("/v1/fits", body)
    assert (heard.status, heard.refusal["code"]) == (422, code), heard.refusal
    assert bob.account() == before
    bob.delete(f"/v1/handles/{handle}")


class Gatekeeper:
    """Holds the engine before its next batch, so that jobs stay where they are."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._plain, self.open = engine, engine._run, threading.Event()

    def __enter__(self) -> Gatekeeper:
        def held(taken: Any) -> None:
            self.open.wait(30)
            self._plain(taken)

        self._engine._run = held
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        del self._engine._run


def test_a_result_that_is_not_there_yet_is_a_202(server: Any, bob: Caller) -> None:
    with Gatekeeper(server.engines["tiny"]) as gate:
        job = bob.post("/v1/runs", request(LOGPROBS)).json["job"]
        started = time.monotonic()
        heard = bob.get(f"/v1/jobs/{job}/result", params={"wait_s": 0.3})
        assert 0.25 < time.monotonic() - started < 5
        assert heard.status == 202
        assert heard.json["state"] in ("QUEUED", "RUNNING")
        assert "x-trocar-bits" not in heard.headers
        gate.open.set()
        assert bob.result(job).status == 200


def test_a_cancelled_run_pays_only_the_overhead(server: Any, bob: Caller) -> None:
    before, _ = bob.account()
    with Gatekeeper(server.engines["tiny"]) as gate:
        jobs = [
            bob.post(
                "/v1/runs", request(read("resid_post.1"), capture("r"), {**LOGPROBS, "at": "prompt[*]"})
            ).json["job"]
            for _ in range(36)
        ]
        states = [bob.get(f"/v1/jobs/{j}").json["state"] for j in jobs]
        assert set(states) == {"RUNNING"}
        for job in jobs:
            assert bob.delete(f"/v1/jobs/{job}").status == 200
        gate.open.set()
        heard = [bob.result(j) for j in jobs]
    assert {(h.status, h.refusal["code"]) for h in heard} == {(422, "cancelled")}
    assert {bob.get(f"/v1/jobs/{j}").json["state"] for j in jobs} == {"CANCELLED"}
    new = bob.account()[0][len(before) :]
    assert sorted(e["kind"] for e in new) == ["admitted"] * 36 + ["cancelled"] * 36
    assert {e["bits"] for e in new if e["kind"] == "cancelled"} == {OVERHEAD}
    assert bob.get("/v1/handles").json["stored_bytes"] >= 0
    assert server.engines["tiny"].stats().live_requests == 0


def test_cancelling_a_job_that_is_done_changes_nothing(bob: Caller) -> None:
    job = bob.post("/v1/runs", request(LOGPROBS)).json["job"]
    first = bob.result(job)
    assert bob.delete(f"/v1/jobs/{job}").json["state"] == "COMPLETED"
    assert bob.result(job).body == first.body


def test_a_long_generation_can_be_cancelled_while_it_runs(server: Any, bob: Caller) -> None:
    job = bob.post("/v1/runs", request(TEXT, prompts=["abc"], max_new_tokens=250, stop_at_eos=False)).json[
        "job"
    ]
    while server.engines["tiny"].stats().live_requests == 0:
        time.sleep(0.002)
    bob.delete(f"/v1/jobs/{job}")
    assert bob.result(job).refusal["code"] == "cancelled"
    assert (bob.account()[0][-1]["kind"], bob.account()[0][-1]["bits"]) == ("cancelled", OVERHEAD)


def test_a_run_that_fails_pays_the_overhead_and_leaves_no_rows(bob: Caller) -> None:
    before, _ = bob.account()
    stored = bob.get("/v1/handles").json
    blow = [edit("scale", "resid_post.1", at="prompt[*]", by=1e6) | {"id": f"e{i}"} for i in range(3)]
    heard = bob.run(request(read("resid_post.1"), capture("r"), *blow, LOGPROBS))
    assert (heard.status, heard.refusal["code"]) == (422, "edit_not_finite")
    new = bob.account()[0][len(before) :]
    assert [(e["kind"], e["bits"]) for e in new] == [("admitted", 0), ("cancelled", OVERHEAD)]
    assert bob.get("/v1/handles").json == stored


def test_a_key_that_is_revoked_while_its_job_runs_gets_nothing(server: Any) -> None:
    from trocar.gate.policy import Role, Tier

    gate = server.service.gate
    key = gate.keys.create("mallory", Tier.open, Role.researcher)
    mallory = Caller(server.app, key.secret)
    with Gatekeeper(server.engines["tiny"]) as hold:
        job = mallory.post("/v1/runs", request(read("resid_post.1"), capture("r"))).json["job"]
        gate.keys.revoke(key.principal.key_id)
        hold.open.set()
        done = server.service._jobs
        from trocar.errors import TrocarError

        with pytest.raises(TrocarError) as caught:
            done.wait(key.principal, job, 20)
    assert caught.value.code == "bad_key"
    assert mallory.get(f"/v1/jobs/{job}").refusal["code"] == "bad_key"
    entries = gate.ledger.latest(key.principal.key_id, 10)
    assert [str(e.kind) for e in entries if e.kind in ("admitted", "settled", "cancelled")] == [
        "admitted",
        "cancelled",
    ]
    assert server.store.list("mallory") == []


def test_many_waiters_do_not_keep_others_from_asking(server: Any, bob: Caller, nobody: Caller) -> None:
    with Gatekeeper(server.engines["tiny"]) as gate:
        job = bob.post("/v1/runs", request(LOGPROBS)).json["job"]
        threads = [
            threading.Thread(target=bob.get, args=(f"/v1/jobs/{job}/result?wait_s=20",)) for _ in range(45)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        started = time.monotonic()
        assert bob.get(f"/v1/jobs/{job}").status == 200
        assert nobody.get("/healthz").status == 200
        assert time.monotonic() - started < 5
        gate.open.set()
        for thread in threads:
            thread.join(20)


def test_too_many_unfinished_jobs_cost_nothing(server: Any, bob: Caller, alice: Caller) -> None:
    with Gatekeeper(server.engines["tiny"]) as gate:
        jobs = [bob.post("/v1/runs", request(LOGPROBS)).json["job"] for _ in range(64)]
        before = bob.account()
        heard = bob.post("/v1/runs", request(LOGPROBS))
        assert (heard.status, heard.refusal["code"]) == (503, "queue_full")
        assert 1 <= int(heard.headers["retry-after"]) <= 60  # from how long this tenant's jobs took
        assert heard.json["error"]["retry_after_s"] == int(heard.headers["retry-after"])
        assert bob.account() == before
        assert alice.post("/v1/plan", request(LOGPROBS)).status == 200
        gate.open.set()
        assert {bob.result(j).status for j in jobs} == {200}


def test_a_small_budget_is_spent_to_the_end_and_not_beyond(eve: Caller) -> None:
    body = request(LOGPROBS, prompts=["abc"], model="shut")
    price = eve.post("/v1/plan", body).json["cost"]["total_bits"]
    left = eve.post("/v1/plan", body).json["budget"]["left_bits"]
    assert left == 2000
    for _ in range(left // price):
        heard = eve.run(body)
        assert heard.status == 200
        left -= int(heard.headers["x-trocar-bits"])
        assert int(heard.headers["x-trocar-bits-left"]) == left
    refused = eve.post("/v1/runs", body)
    assert (refused.status, refused.refusal["code"]) == (403, "budget_exhausted")
    assert eve.post("/v1/plan", body).json["admitted"] is False


def test_a_retried_request_whose_first_answer_was_lost_gets_the_running_job(server: Any, bob: Caller) -> None:
    body = request(LOGPROBS)
    before = len(bob.account()[0])
    with Gatekeeper(server.engines["tiny"]):
        first = bob.post("/v1/runs", body, idempotency_key="lost-answer")
        again = bob.post("/v1/runs", body, idempotency_key="lost-answer")
        other = bob.post("/v1/runs", request(LOGPROBS, prompts=["other"]), idempotency_key="lost-answer")
    assert (again.status, again.json["job"]) == (202, first.json["job"])
    assert (other.status, other.refusal["code"]) == (409, "idempotency_conflict")
    bob.get(f"/v1/jobs/{first.json['job']}/result", params={"wait_s": 20})
    assert [e["kind"] for e in bob.account()[0][before:]] == ["admitted", "settled"]

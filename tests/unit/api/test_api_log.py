"""Refusals are entries of the log: whose, of which request, why; never twice, never of strangers, never a flood."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_room import LOGPROBS, Caller, capture, read, request

from trocar.gate.chain import Entry
from trocar.gate.policy import Role, Tier


@pytest.fixture
def fresh(serve: Callable[..., Any], tiny: Any, tmp_path: Path) -> Iterator[Any]:
    made = serve(tmp_path, [tiny])
    yield made
    assert made.service.check() == []
    made.service.close()


@pytest.fixture
def bob(fresh: Any) -> Caller:
    return Caller(fresh.app, fresh.keys["bob"])


def refusals(server: Any, request_id: str = "") -> list[Entry]:
    entries = server.service.gate.ledger.entries(limit=1000, request_id=request_id)
    return [entry for entry in entries if entry.kind == "refused"]


def strict(server: Any, per_minute: int) -> None:
    """Goes on under a policy that answers fewer refusals."""
    gate = server.service.gate
    people = gate.policy.people.model_copy(update={"refusals_per_minute": per_minute})
    gate.change_policy(gate.policy.model_copy(update={"people": people}))


BAD: dict[str, tuple[str, str, Any]] = {
    "a program": ("POST", "/v1/runs", request(read("resid_pots.1"), capture("r"))),
    "a plan": ("POST", "/v1/plan", request(read("resid_pots.1"), capture("r"))),
    "a body": ("POST", "/v1/runs", {"modell": "tiny"}),
    "a handle": ("GET", "/v1/handles/act_" + "0" * 32, None),
    "a job": ("GET", "/v1/jobs/job_" + "0" * 32, None),
    "a result": ("GET", "/v1/jobs/job_" + "0" * 32 + "/result", None),
    "a wait": ("GET", "/v1/jobs/job_x/result?wait_s=99", None),
    "a number": ("GET", "/v1/jobs/job_x/result?wait_s=x", None),
    "a role": ("GET", "/v1/engine", None),
    "a model": ("POST", "/v1/tokenize", {"model": "gpt", "texts": ["a"]}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_refusal_is_an_entry_under_the_request_id_of_its_answer(fresh: Any, bob: Caller, name: str) -> None:
    method, path, body = BAD[name]
    heard = bob.send(method, path, json=body) if body else bob.send(method, path)
    assert 400 <= heard.status < 500
    [entry] = refusals(fresh)
    assert entry.request_id == heard.headers["x-request-id"] == heard.json["error"]["request_id"]
    assert entry.key_id == fresh.principals["bob"].key_id
    detail = json.loads(entry.detail)
    told = heard.json["error"]["refusals"]
    assert detail["codes"] == [refusal["code"] for refusal in told]
    assert (detail["path"], detail["reason"]) == (told[0]["path"], told[0]["reason"])
    assert (entry.held_bits, entry.charged_bits) == (0, 0)


def test_every_code_of_an_answer_is_in_its_entry(fresh: Any, bob: Caller) -> None:
    heard = bob.post(
        "/v1/runs", request(read("resid_pots.1"), read("resid_post.9", name="q"), capture("r", "q"))
    )
    [entry] = refusals(fresh)
    assert len(heard.json["error"]["refusals"]) == 2
    assert json.loads(entry.detail)["codes"] == ["unknown_site", "layer_out_of_range"]


def test_words_that_are_hard_to_write_down_are_written_down(fresh: Any, bob: Caller) -> None:
    for text in ("\ud800" * 40, "\U0001f300" * 300, "\x00\n", "x" * 5000):
        heard = bob.send(
            "POST",
            "/v1/runs",
            content=json.dumps({"model": text, "prompts": ["a"], "program": {"nodes": [LOGPROBS]}}),
            headers={"content-type": "application/json"},
        )
        assert heard.status in (400, 404, 422), heard.body
        [entry] = refusals(fresh, heard.headers["x-request-id"])
        assert len(entry.detail) <= 16_384


def test_strangers_leave_no_entry(fresh: Any) -> None:
    for key in (None, "x", "trk_" + "0" * 16 + "_" + "A" * 43, "trt_" + "A" * 60):
        for _ in range(3):
            assert Caller(fresh.app, key).get("/v1/ledger").status == 401
    assert refusals(fresh) == []


def test_what_nobody_need_be_known_for_leaves_no_entry(fresh: Any, bob: Caller) -> None:
    assert bob.get("/v1/nothing").status == 404
    assert bob.get("/v1/models").status == 200
    assert refusals(fresh) == []


def test_a_charged_request_has_its_own_entries(fresh: Any, bob: Caller) -> None:
    started = bob.post("/v1/runs", request(LOGPROBS))
    bob.result(started.json["job"])
    found = fresh.service.gate.ledger.entries(request_id=started.headers["x-request-id"])
    assert [entry.kind for entry in found] == ["admitted", "settled"]
    assert refusals(fresh) == []


def test_how_a_job_ended_is_told_often_and_entered_once(
    fresh: Any, bob: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trocar import errors
    from trocar.gate.gate import Gate

    reasons = [
        errors.refuse("result_not_finite", "", "no number"),
        errors.refuse("lineage_frozen", "", "frozen"),
        errors.refuse("bad_key", "", "revoked meanwhile"),
        errors.refuse("handle_not_found", "handle", "deleted meanwhile"),
        errors.full("engine full", 1.0),
        errors.refuse("internal", "", "a fault"),
    ]
    for reason in reasons:

        def broken(*_: Any, reason: Any = reason) -> Any:
            raise reason

        with monkeypatch.context() as patch:
            patch.setattr(Gate, "release", broken)
            started = bob.post("/v1/runs", request(LOGPROBS))
            job = started.json["job"]
            for _ in range(3):
                assert bob.result(job).refusal["code"] == reason.code
        found = fresh.service.gate.ledger.entries(request_id=started.headers["x-request-id"])
        assert [entry.kind for entry in found] == ["admitted", "cancelled"]
    assert refusals(fresh) == []


def test_too_many_refusals_are_told_to_wait_and_are_not_entered(fresh: Any, bob: Caller) -> None:
    strict(fresh, 3)
    alice = Caller(fresh.app, fresh.keys["alice"])
    codes = [bob.get("/v1/handles/x").refusal["code"] for _ in range(3)]
    assert codes == ["handle_not_found"] * 3
    for _ in range(5):
        heard = bob.get("/v1/handles/x")
        assert (heard.status, heard.refusal["code"]) == (503, "too_many_refusals")
        assert 1 <= int(heard.headers["retry-after"]) <= 20
        assert heard.json["error"]["retry_after_s"] == int(heard.headers["retry-after"])
        assert heard.json["error"]["retryable"] is True
    assert len(refusals(fresh)) == 3
    assert bob.get("/v1/handles").status == 200  # what is not refused goes on
    assert bob.run(request(LOGPROBS)).status == 200
    assert alice.get("/v1/handles/x").refusal["code"] == "handle_not_found"  # and others too


def test_refusals_that_hide_a_faster_oracle_are_none(fresh: Any, bob: Caller) -> None:
    """While a key must wait, its good and its bad guesses look the same."""
    strict(fresh, 1)
    bob.get("/v1/handles/x")
    guesses = ["act_" + "0" * 32, "x", "art_" + "f" * 32]
    heard = [bob.get(f"/v1/handles/{guess}") for guess in guesses]
    assert {(h.status, h.refusal["code"], h.refusal["reason"]) for h in heard} == {
        (503, "too_many_refusals", heard[0].refusal["reason"])
    }


def test_tokens_of_a_key_share_its_pace(fresh: Any, bob: Caller, tmp_path: Path) -> None:
    gate = fresh.service.gate
    token = gate.keys.mint(fresh.principals["bob"], root=tmp_path / "tokens.key").text
    strict(fresh, 2)
    who = Caller(fresh.app, token)
    assert [c.get("/v1/handles/x").status for c in (bob, who, bob, who)] == [404, 404, 503, 503]


def test_a_log_that_cannot_be_written_tells_nothing(
    fresh: Any, bob: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trocar.gate.refusals import unavailable

    def broken(*_: Any) -> None:
        raise unavailable("full")

    monkeypatch.setattr(fresh.service.gate.ledger, "refuse", broken)
    heard = bob.get("/v1/handles/x")
    assert (heard.status, heard.refusal["code"]) == (500, "ledger_unavailable")


@pytest.mark.parametrize("role", [Role.checker, Role.auditor])
def test_who_only_looks_runs_nothing_and_that_is_written_down(fresh: Any, role: Role) -> None:
    made = fresh.service.gate.keys.create("desk", Tier.open, role)
    heard = Caller(fresh.app, made.secret).post("/v1/runs", request(LOGPROBS))
    assert (heard.status, heard.refusal["code"]) == (403, "not_allowed")
    assert [entry.key_id for entry in refusals(fresh)] == [made.principal.key_id]
    assert fresh.forwards() == 0

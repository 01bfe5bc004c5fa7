"""Tokens over HTTP: narrower than their key in every part, accounts of their own, and at an end when they are ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_room import LOGPROBS, TEXT, Caller, capture, edit, read, request

from trocar.gate.policy import Role, Tier
from trocar.gate.scopes import EVERYTHING, Scope
from trocar.grants.tokens import attenuate, ids

Give = Callable[..., str]


@pytest.fixture
def fresh(serve: Callable[..., Any], tiny: Any, tiny_of: Callable[..., Any], tmp_path: Path) -> Iterator[Any]:
    made = serve(tmp_path, [tiny, tiny_of("other")])
    yield made
    assert made.service.check() == []
    made.service.close()


@pytest.fixture
def give(fresh: Any, tmp_path: Path) -> Give:
    """A token of bob's key."""

    def of(scope: Scope = EVERYTHING, role: Any = None) -> str:
        gate = fresh.service.gate
        return str(gate.keys.mint(fresh.principals["bob"], scope, role, root=tmp_path / "tokens.key").text)

    return of


@pytest.fixture
def bob(fresh: Any) -> Caller:
    return Caller(fresh.app, fresh.keys["bob"])


def caller(server: Any, secret: str) -> Caller:
    return Caller(server.app, secret)


def words(**parts: Any) -> Scope:
    return Scope(
        **{part: frozenset(value) if isinstance(value, set) else value for part, value in parts.items()}
    )


READS = request(read("resid_post.1"), capture("r"))
EDITS = request(edit("scale", "resid_post.2", at="all", by=2.0), read("resid_post.1"), capture("r"))
SWEPT = {
    **request(edit("scale", "resid_post.1", at="all", by=2.0), LOGPROBS),
    "sweep": [{"node": "e", "field": "layer", "values": [1, 3]}],
}
OUTSIDE: dict[str, tuple[Scope, dict[str, Any], str]] = {
    "another model": (words(models={"other"}), READS, "model"),
    "another op": (words(ops={"read", "logprobs"}), READS, "program.nodes[1].op"),
    "an edit": (words(ops={"read", "capture"}), EDITS, "program.nodes[0].op"),
    "one edit of a family": (words(ops={"edit.add", "read", "capture"}), EDITS, "program.nodes[0].op"),
    "another layer": (words(sites={"resid_post.2"}), EDITS, "program.nodes[1].site"),
    "another family": (words(sites={"z", "resid_post.1"}), EDITS, "program.nodes[0].site"),
    "a layer of a sweep": (words(sites={"resid_post.1"}), SWEPT, "sweep[0].values[1]"),
    "more bits": (words(most_bits=300), request(TEXT, max_new_tokens=8), "bits"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_case_37_a_wider_request_is_refused_with_its_place(fresh: Any, give: Give, name: str) -> None:
    scope, body, path = OUTSIDE[name]
    forwards = fresh.forwards()
    for token in (
        give(scope),
        attenuate(give(), scope),
        attenuate(give(scope), words(models={"tiny", "other"})),
    ):
        who = caller(fresh, token)
        heard = who.post("/v1/runs", body)
        assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (403, "out_of_scope", path)
    _, budgets = who.account()
    assert {view["spent_bits"] for view in budgets.values()} == {0}
    assert fresh.forwards() == forwards
    assert caller(fresh, fresh.keys["bob"]).run(body).status == 200  # the key itself may


def test_case_37_inside_all_its_parts_it_runs(fresh: Any, give: Give) -> None:
    scope = words(models={"tiny"}, ops={"read", "capture", "edit"}, sites={"resid_post"}, most_bits=400)
    who = caller(fresh, give(scope))
    assert who.run(EDITS).status == 200
    listed = caller(fresh, fresh.keys["bob"]).get("/v1/handles").json["handles"]
    assert listed  # what a token makes is its tenant's


def test_case_37_sessions_and_fits_have_their_places_too(fresh: Any, give: Give) -> None:
    bob = caller(fresh, fresh.keys["bob"])
    handle = bob.run(request(read("resid_post.1"), capture("r"), prompts=list("abcdefgh"))).json["outputs"][
        "kept"
    ]["handle"]
    fit = {"handle": handle, "kind": "mean_diff", "labels": [0, 1] * 4}
    session = {"steps": [READS, {**EDITS, "sweep": []}]}
    for scope, route, body, path in (
        (words(ops={"read", "capture"}), "/v1/sessions", session, "steps[1].program.nodes[0].op"),
        (words(sites={"resid_post.1"}), "/v1/sessions", session, "steps[1].program.nodes[0].site"),
        (words(ops={"read", "capture"}), "/v1/fits", fit, "kind"),
        (words(sites={"resid_post.2"}), "/v1/fits", fit, "handle[0]"),
        (words(models={"other"}), "/v1/fits", fit, "model"),
    ):
        heard = caller(fresh, give(scope)).post(route, body)
        assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (403, "out_of_scope", path), (
            body
        )
    inside = caller(fresh, give(words(ops={"fit"}, sites={"resid_post"})))
    assert inside.result(inside.post("/v1/fits", fit).json["job"]).status == 200


def test_case_37_the_bits_of_a_token_end_after_two_requests(fresh: Any, give: Give) -> None:
    body = request(LOGPROBS, prompts=["abc"])
    bob = caller(fresh, fresh.keys["bob"])
    price = int(bob.post("/v1/plan", body).json["cost"]["total_bits"])
    token = attenuate(give(words(most_bits=10 * price)), words(most_bits=2 * price + price // 2))
    who = caller(fresh, token)
    left = [int(who.run(body).headers["x-trocar-bits-left"]) for _ in range(2)]
    assert left == [price + price // 2, price // 2]
    heard = who.post("/v1/runs", body)
    assert (heard.status, heard.refusal["code"]) == (403, "budget_exhausted")
    assert f"token {ids(token)[1]}" in heard.refusal["reason"]
    plan = who.post("/v1/plan", body).json
    assert (plan["admitted"], plan["budget"]["left_bits"]) == (False, price // 2)
    assert bob.run(body).status == 200
    twin = caller(fresh, attenuate(token, EVERYTHING))  # the limit of a block is for all that is made from it
    assert twin.post("/v1/runs", body).refusal["code"] == "budget_exhausted"


def test_case_37_a_revoked_token_is_nobody_with_all_that_was_made_from_it(fresh: Any, give: Give) -> None:
    first, other = give(), give()
    second = attenuate(first, words(models={"tiny"}))
    for token in (first, second, other):
        assert caller(fresh, token).get("/v1/ledger").status == 200
    fresh.service.gate.keys.revoke_token(ids(second)[1])
    assert [caller(fresh, t).get("/v1/ledger").status for t in (first, second, other)] == [200, 401, 200]
    fresh.service.gate.keys.revoke_token(ids(first)[0])
    assert [caller(fresh, t).get("/v1/ledger").status for t in (first, second, other)] == [401, 401, 200]
    heard = caller(fresh, second).post("/v1/runs", READS)
    assert (heard.status, heard.refusal["code"]) == (401, "bad_key")


def test_case_37_with_the_key_its_tokens_end(fresh: Any, give: Give) -> None:
    tokens = (give(), attenuate(give(), words(models={"tiny"}), "agent"))
    fresh.service.gate.keys.revoke(fresh.principals["bob"].key_id)
    assert [caller(fresh, token).get("/v1/ledger").refusal["code"] for token in tokens] == ["bad_key"] * 2


def test_case_37_a_token_revoked_while_it_computes_gets_nothing(
    fresh: Any, give: Give, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = attenuate(give(), words(models={"tiny"}))
    gate = fresh.service.gate
    settle = gate.ledger.settle

    def late(*args: Any) -> Any:
        gate.keys.revoke_token(ids(token)[1])
        return settle(*args)

    monkeypatch.setattr(gate.ledger, "settle", late)
    who, bob = caller(fresh, token), caller(fresh, fresh.keys["bob"])
    started = who.post("/v1/runs", request(LOGPROBS))
    heard = bob.result(started.json["job"])  # the job is the tenant's
    assert (heard.status, heard.refusal["code"]) == (401, "bad_key")
    kinds = [e.kind for e in gate.ledger.entries(request_id=started.headers["x-request-id"])]
    assert kinds == ["admitted", "cancelled"]


def test_case_37_after_its_time_a_token_is_nobody(fresh: Any, give: Give) -> None:
    now_ms = time.time_ns() // 1_000_000
    token = attenuate(give(), words(expires_ms=now_ms + 1500))
    who = caller(fresh, token)
    assert who.run(request(LOGPROBS), idempotency_key="once").status == 200
    time.sleep(max(0.0, (now_ms + 1600 - time.time_ns() // 1_000_000) / 1000))
    again = who.post("/v1/runs", request(LOGPROBS), idempotency_key="once")
    assert (again.status, again.refusal["code"]) == (401, "bad_key")


def test_case_37_what_the_key_got_is_not_replayed_to_a_narrower_token(fresh: Any, give: Give) -> None:
    bob = caller(fresh, fresh.keys["bob"])
    first = bob.run(READS, idempotency_key="once")
    narrow = caller(fresh, give(words(ops={"logprobs"})))
    heard = narrow.post("/v1/runs", READS, idempotency_key="once")
    assert (heard.status, heard.refusal["code"]) == (403, "out_of_scope")
    again = bob.run(READS, idempotency_key="once")
    assert (again.body, again.headers["x-trocar-bits"]) == (first.body, "0")


def test_case_37_the_names_that_a_token_takes_are_its_own(fresh: Any, bob: Caller, give: Give) -> None:
    """An agent that uses a name first does not keep it from its person, nor from another token."""
    text = give()
    agent, other = caller(fresh, text), caller(fresh, give())
    first = agent.run(READS, idempotency_key="nightly")
    for who in (bob, other):
        mine = who.run(request(LOGPROBS), idempotency_key="nightly")
        assert (mine.status, mine.headers["x-trocar-replayed"]) == (200, "false")
    again = agent.run(READS, idempotency_key="nightly")
    assert (again.body, again.headers["x-trocar-replayed"]) == (first.body, "true")


def test_case_37_nor_is_a_job_of_the_key_found_that_still_runs(
    fresh: Any, give: Give, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    from trocar.service.runs import Run

    go, work = threading.Event(), Run.work
    monkeypatch.setattr(Run, "work", lambda self, job: (go.wait(20), work(self, job))[1])
    bob = caller(fresh, fresh.keys["bob"])
    job = bob.post("/v1/runs", READS, idempotency_key="once").json["job"]
    try:
        heard = caller(fresh, give(words(ops={"logprobs"}))).post("/v1/runs", READS, idempotency_key="once")
        assert (heard.status, heard.refusal["code"]) == (403, "out_of_scope")
        heard = caller(fresh, give()).post("/v1/runs", READS, idempotency_key="once")
        assert heard.json.get("job") != job
        assert caller(fresh, give()).get(f"/v1/jobs/{job}").status == 404
        assert bob.post("/v1/runs", READS, idempotency_key="once").json["job"] == job
    finally:
        go.set()
    assert bob.result(job).status == 200


def test_case_37_texts_that_are_almost_tokens(fresh: Any, give: Give) -> None:
    import base64

    from trocar.grants.biscuits import Root
    from trocar.grants.tokens import sign

    token = attenuate(give(), words(models={"tiny"}))
    raw = base64.urlsafe_b64decode(token[4:] + "=" * (-len(token[4:]) % 4))
    shorter = give()
    forged = sign(Root.make(), fresh.principals["bob"].key_id)
    unsigned = "eyJhbGciOiJub25lIn0.eyJrZXkiOiJib2IifQ."
    for text in (token[:-1], token[:-40], token + "A", "trt_" + base64.urlsafe_b64encode(raw[:-8]).decode().rstrip("="),
                 shorter[:-60] + token[-60:], forged, "trt_" + unsigned, unsigned, token.upper(), "trt_"):  # fmt: skip
        heard = caller(fresh, text).get("/v1/ledger")
        assert (heard.status, heard.refusal["code"]) == (401, "bad_key"), text


def test_a_token_is_no_operator_and_an_agent_stays_one(fresh: Any, tmp_path: Path) -> None:
    gate = fresh.service.gate
    token = gate.keys.mint(fresh.principals["alice"], root=tmp_path / "tokens.key").text
    assert caller(fresh, fresh.keys["alice"]).get("/v1/engine").status == 200
    assert caller(fresh, token).get("/v1/engine").refusal["code"] == "not_allowed"
    agent = attenuate(token, EVERYTHING, "agent")
    again = attenuate(agent, EVERYTHING)
    for text in (agent, again):
        assert gate.keys.authenticate(text).role == "agent"
        assert caller(fresh, text).get("/v1/engine").refusal["code"] == "not_allowed"
        assert caller(fresh, text).run(request(LOGPROBS)).status == 200
    assert gate.keys.authenticate(again).tier is Tier.open


# ---- the door -------------------------------------------------------------------------------------


def test_a_key_asks_for_a_token_that_is_shown_once(fresh: Any, bob: Caller) -> None:
    scope = {"models": ["tiny"], "ops": ["logprobs"], "most_bits": 5000}
    heard = bob.post("/v1/tokens", {"scope": scope, "role": "agent"})
    assert (heard.status, heard.headers["cache-control"]) == (200, "no-store")
    token = heard.json["token"]
    assert [heard.json["token_id"]] == list(ids(token))
    who = fresh.service.gate.keys.authenticate(token)
    assert who.scope == words(models={"tiny"}, ops={"logprobs"}, most_bits=5000)
    assert (who.key_id, who.role) == (fresh.principals["bob"].key_id, "agent")
    assert caller(fresh, token).run(request(LOGPROBS)).status == 200
    assert caller(fresh, token).post("/v1/runs", READS).refusal["code"] == "out_of_scope"
    [entry] = [e for e in fresh.service.gate.ledger.entries(limit=1000) if e.kind == "minted"]
    assert token not in str(entry)
    other = bob.post("/v1/tokens", {})
    assert other.json["token_id"] != heard.json["token_id"]
    assert fresh.service.gate.keys.authenticate(other.json["token"]).role == "researcher"


def test_a_token_asks_for_none(fresh: Any, bob: Caller, give: Give) -> None:
    for token in (give(), bob.post("/v1/tokens", {}).json["token"]):
        heard = caller(fresh, token).post("/v1/tokens", {})
        assert (heard.status, heard.refusal["code"]) == (403, "not_allowed")
        assert "attenuate" in heard.refusal["reason"]
    assert caller(fresh, "x").post("/v1/tokens", {}).status == 401


def test_a_token_is_never_more_than_its_key(fresh: Any) -> None:
    keys = fresh.service.gate.keys
    narrow = keys.create("bob", Tier.open, Role.agent, scope=words(models={"tiny"}, most_bits=900))
    token = caller(fresh, narrow.secret).post("/v1/tokens", {"scope": {"most_bits": 10**9}}).json["token"]
    who = keys.authenticate(token)
    assert (who.scope.models, who.scope.most_bits, who.role) == (frozenset({"tiny"}), 900, "agent")
    for role in (Role.checker, Role.auditor):
        made = keys.create("desk", Tier.open, role).secret
        assert caller(fresh, made).post("/v1/tokens", {}).refusal["code"] == "not_allowed"


WRONG: list[tuple[Any, str, str]] = [
    ({"scope": {"ops": ["lense"]}}, "bad_value", "scope.ops"),
    ({"scope": {"sites": ["resid_pots"]}}, "unknown_site", "scope.sites"),
    ({"scope": {"models": ["a b"]}}, "bad_value", "scope.models"),
    ({"scope": {"models": []}}, "bad_value", "scope.models"),
    ({"scope": {"models": "tiny"}}, "bad_value", "scope.models"),
    ({"scope": {"most_bits": -1}}, "bad_value", "scope.most_bits"),
    ({"scope": {"most_bits": 1.5}}, "bad_value", "scope.most_bits"),
    ({"scope": {"expires_ms": 2**63}}, "bad_value", "scope.expires_ms"),
    ({"scope": {"bits": 5}}, "unknown_field", "scope.bits"),
    ({"role": "owner"}, "bad_value", "role"),
]


@pytest.mark.parametrize(("body", "code", "path"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_no_scope(fresh: Any, bob: Caller, body: Any, code: str, path: str) -> None:
    heard = bob.post("/v1/tokens", body)
    assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (422, code, path)
    assert "minted" not in [e.kind for e in fresh.service.gate.ledger.entries(limit=1000)]


def test_a_key_makes_so_many_in_a_minute(fresh: Any, bob: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    from trocar.service import minting

    monkeypatch.setattr(minting, "MOST_PER_MINUTE", 2)
    assert [bob.post("/v1/tokens", {}).status for _ in range(2)] == [200, 200]
    heard = bob.post("/v1/tokens", {})
    assert (heard.status, heard.refusal["code"]) == (503, "queue_full")
    assert int(heard.headers["retry-after"]) >= 29


def test_a_server_without_a_place_for_its_secret_signs_none(fresh: Any, bob: Caller) -> None:
    fresh.service.gate._token_root = None
    heard = bob.post("/v1/tokens", {})
    assert (heard.status, heard.refusal["code"]) == (403, "not_allowed")


def test_a_token_ends_only_what_it_made(fresh: Any, bob: Caller, give: Give) -> None:
    """It may read what its person's key captured, within its scope, and end what it made or had made."""
    text = give()
    mine, child, other = (caller(fresh, t) for t in (text, attenuate(text, words(models={"tiny"})), give()))
    kept = bob.run(READS).json["outputs"]["kept"]["handle"]
    made = child.run(READS).json["outputs"]["kept"]["handle"]
    assert {h["handle"] for h in other.get("/v1/handles").json["handles"]} == {kept, made}
    for who, handle in ((mine, kept), (child, kept), (other, made)):
        heard = who.delete(f"/v1/handles/{handle}")
        assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (403, "out_of_scope", "handle")
    assert mine.delete(f"/v1/handles/{made}").status == 200
    assert bob.delete(f"/v1/handles/{kept}").status == 200


def test_a_scope_covers_handles_and_plans(fresh: Any, bob: Caller, give: Give) -> None:
    handle = bob.run(READS).json["outputs"]["kept"]["handle"]
    for scope in (words(models={"other"}), words(sites={"resid_post.2", "z"})):
        narrow = caller(fresh, give(scope))
        assert narrow.get("/v1/handles").json["handles"] == []
        for heard in (narrow.get(f"/v1/handles/{handle}"), narrow.delete(f"/v1/handles/{handle}"),
                      narrow.post("/v1/plan", READS)):  # fmt: skip
            assert (heard.status, heard.refusal["code"]) == (403, "out_of_scope")
    wide = caller(fresh, give(words(models={"tiny"}, sites={"resid_post"})))
    assert wide.get(f"/v1/handles/{handle}").json["rows"] == 2
    assert wide.post("/v1/plan", READS).status == 200


@pytest.mark.parametrize("role", [Role.auditor, Role.checker])
def test_who_runs_nothing_has_no_business_with_handles_and_jobs(fresh: Any, bob: Caller, role: Role) -> None:
    gate = fresh.service.gate
    looker = caller(fresh, gate.keys.create("bob", Tier.open, role).secret)
    job = bob.post("/v1/runs", READS).json["job"]
    handle = bob.result(job).json["outputs"]["kept"]["handle"]
    verbs = [looker.get, looker.delete]
    asked = [verb(path) for verb in verbs for path in (f"/v1/handles/{handle}", f"/v1/jobs/{job}")]
    asked += [looker.get("/v1/handles"), looker.get(f"/v1/jobs/{job}/result"), looker.post("/v1/plan", READS)]
    assert {(heard.status, heard.refusal["code"]) for heard in asked} == {(403, "not_allowed")}
    assert bob.get(f"/v1/handles/{handle}").status == 200

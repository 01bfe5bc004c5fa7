"""Every way the API says no: the code, the place, the shape; no forward pass ran and nothing was charged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from http_room import LOGPROBS, TEXT, Caller, capture, edit, read, request

from trocar.api.app import MAX_BODY_BYTES
from trocar.wire import tensors

ADD = {"op": "tensor", "id": "v", "name": "v"}
STORED = {"op": "stored", "id": "s", "handle": "act_" + "0" * 32, "site": "resid_post.1"}


@pytest.fixture
def nothing_happens(server: Any, alice: Caller, bob: Caller, eve: Caller) -> Iterator[None]:
    """No forward pass, and nothing new in anybody's account but refusals, while the test runs."""
    before = server.forwards(), [spent(c) for c in (alice, bob, eve)]
    yield
    assert (server.forwards(), [spent(c) for c in (alice, bob, eve)]) == before


def spent(caller: Caller) -> tuple[Any, Any]:
    entries, budgets = caller.account()
    return [e for e in entries if e["kind"] != "refused"], budgets


BAD_PROGRAMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unknown site": ("unknown_site", "program.nodes[0].site", request(read("resid_pots.1"), capture("r"))),
    "layer out of range": (
        "layer_out_of_range",
        "program.nodes[0].site",
        request(read("resid_post.4"), capture("r")),
    ),
    "site not served": (
        "site_unavailable",
        "program.nodes[0].site",
        request(read("attn_out_post.1"), capture("r")),
    ),
    "logits": ("site_unavailable", "program.nodes[0].site", request(read("logits"), capture("r"))),
    "after its layer": (
        "edit_after_layer",
        "program.nodes[1].value",
        request(read("resid_post.3"), edit("set", "resid_post.1", at="prompt[-1]", value="r"), LOGPROBS),
    ),
    "unknown tensor": (
        "unknown_tensor",
        "program.nodes[0].name",
        request(ADD, edit("add", "resid_post.1", value="v"), LOGPROBS),
    ),
    "unknown op": ("unknown_op", "program.nodes[0].op", request({"op": "edit.ad", "id": "e"}, LOGPROBS)),
    "unknown field": (
        "unknown_field",
        "program.nodes[0].sites",
        request({**read("resid_post.1"), "sites": 1}, capture("r")),
    ),
    "missing field": ("missing_field", "program.nodes[0].of", request({"op": "lens", "id": "x"})),
    "position": (
        "position_out_of_range",
        "program.nodes[0].at",
        request(read("resid_post.1", "prompt[9]"), capture("r")),
    ),
    "nothing generated": ("touches_nothing", "program.nodes[0]", request(TEXT)),
    "special token": ("special_token_text", "prompts[0]", request(LOGPROBS, prompts=["<|end|>"])),
    "token id": ("unknown_token", "prompts[0]", request(LOGPROBS, prompts=[[1, 300]])),
    "empty prompt": ("empty_prompt", "prompts[0]", request(LOGPROBS, prompts=[[]])),
    "too long": ("prompt_too_long", "prompts[0]", request(LOGPROBS, prompts=["x" * 257])),
    "absent handle": (
        "handle_not_found",
        "program.nodes[0].handle",
        request(STORED, edit("set", "resid_post.1", at="prompt[-1]", value="s"), LOGPROBS),
    ),
    "huge coefficient": (
        "bad_value",
        "program.nodes[0].by",
        request(edit("scale", "resid_post.1", by=1e30), LOGPROBS),
    ),
}


@pytest.mark.usefixtures("nothing_happens")
@pytest.mark.parametrize("route", ["/v1/runs", "/v1/plan"])
@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_a_bad_program_is_refused_before_anything(bob: Caller, name: str, route: str) -> None:
    code, path, body = BAD_PROGRAMS[name]
    heard = bob.post(route, body)
    assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (422, code, path)
    assert heard.json["error"]["kind"] == "ProgramError"


@pytest.mark.usefixtures("nothing_happens")
def test_the_nearest_spelling_is_named(bob: Caller) -> None:
    assert (
        bob.post("/v1/runs", request(read("resid_pots.1"), capture("r"))).refusal["closest"] == "resid_post.1"
    )
    assert bob.post("/v1/runs", request(LOGPROBS, model="tinny")).refusal["closest"] == "tiny"


@pytest.mark.usefixtures("nothing_happens")
def test_a_vector_of_the_wrong_width(bob: Caller) -> None:
    body = request(ADD, edit("add", "resid_post.1", value="v"), LOGPROBS)
    heard = bob.frame("/v1/runs", body, {"v": np.ones(31)})
    assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (
        422,
        "width_mismatch",
        "program.nodes[1].value",
    )


@pytest.mark.usefixtures("nothing_happens")
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite(bob: Caller, number: float) -> None:
    vector = np.ones(32, dtype=np.float32)
    packed = bytearray(
        tensors.pack(
            json.dumps(request(ADD, edit("add", "resid_post.1", value="v"), LOGPROBS)).encode(), {"v": vector}
        )
    )
    packed[-4:] = np.float32(number).tobytes()
    heard = bob.send("POST", "/v1/runs", content=bytes(packed), headers={"content-type": tensors.MEDIA_TYPE})
    assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (400, "not_finite", "tensors.v")


@pytest.mark.usefixtures("nothing_happens")
@pytest.mark.parametrize("path", ["/v1/runs", "/v1/plan", "/v1/fits", "/v1/tokenize"])
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{", "bad_json"),
        (b"\xff", "bad_json"),
        (b'{"model": "tiny", "model": "shut"}', "duplicate_key"),
        (b'{"seed": NaN}', "not_finite"),
        (b'{"seed": 1e999}', "not_finite"),
        (b"[" * 5000, "too_large"),
    ],
)
def test_a_body_that_cannot_be_read(bob: Caller, path: str, raw: bytes, code: str) -> None:
    heard = bob.send("POST", path, content=raw, headers={"content-type": "application/json"})
    assert (heard.status, heard.refusal["code"]) == (400, code)


@pytest.mark.usefixtures("nothing_happens")
def test_the_envelope_of_a_body(bob: Caller) -> None:
    raw = json.dumps(request(LOGPROBS)).encode()
    packed = bob.send(
        "POST",
        "/v1/runs",
        content=raw,
        headers={"content-type": "application/json", "content-encoding": "gzip"},
    )
    assert (packed.status, packed.refusal["code"]) == (400, "bad_json")
    typed = bob.send("POST", "/v1/runs", content=raw, headers={"content-type": "application/x-pickle"})
    assert (typed.status, typed.refusal["code"], typed.refusal["path"]) == (400, "bad_json", "content-type")
    frame = bob.send("POST", "/v1/runs", content=raw, headers={"content-type": tensors.MEDIA_TYPE})
    assert (frame.status, frame.refusal["code"]) == (400, "bad_frame")


@pytest.mark.usefixtures("nothing_happens")
def test_a_body_that_is_too_large_is_cut_off(bob: Caller) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 4 * MAX_BODY_BYTES:
            sent += 1 << 20
            yield b" " * (1 << 20)

    heard = bob.send("POST", "/v1/runs", content=endless(), headers={"content-type": "application/json"})
    assert (heard.status, heard.refusal["code"]) == (400, "too_large")


PRIVATE = [
    ("POST", "/v1/tokenize"), ("POST", "/v1/plan"), ("POST", "/v1/runs"), ("POST", "/v1/fits"),
    ("GET", "/v1/jobs/job_x"), ("GET", "/v1/jobs/job_x/result"), ("DELETE", "/v1/jobs/job_x"),
    ("GET", "/v1/handles"), ("GET", "/v1/handles/act_x"), ("DELETE", "/v1/handles/act_x"),
    ("GET", "/v1/ledger"), ("GET", "/v1/engine"), ("POST", "/v1/sessions"),
    ("POST", "/v1/airlock/exports"), ("POST", "/v1/airlock/raises"), ("GET", "/v1/airlock"),
    ("GET", "/v1/airlock/tick_x"), ("GET", "/v1/airlock/tick_x/file"), ("POST", "/v1/airlock/tick_x/approve"),
    ("POST", "/v1/tokens"),
]  # fmt: skip


@pytest.mark.usefixtures("nothing_happens")
@pytest.mark.parametrize(("method", "path"), PRIVATE)
def test_every_private_route_wants_a_key(server: Any, nobody: Caller, method: str, path: str) -> None:
    heard = nobody.send(method, path, content=b"not even read")
    assert (heard.status, heard.refusal["code"], heard.headers["www-authenticate"]) == (
        401,
        "no_key",
        "Bearer",
    )
    for wrong in ("x", "trk_" + "0" * 16 + "_" + "A" * 43, server.keys["bob"][:-1] + "!"):
        heard = Caller(server.app, wrong).send(method, path)
        assert (heard.status, heard.refusal["code"]) == (401, "bad_key")
    basic = nobody.send(method, path, headers={"authorization": f"Basic {server.keys['bob']}"})
    assert basic.refusal["code"] == "no_key"


def test_private_routes_are_all_of_them(server: Any) -> None:
    """A new route must be public on purpose."""
    public = {"/v1/models", "/v1/capabilities", "/healthz", "/docs", "/openapi.json"}
    found = {p for p, _ in server.app.openapi()["paths"].items()}
    named = {"job_x": "{job}", "act_x": "{handle}", "tick_x/approve": "{ticket}/{step}", "tick_x": "{ticket}"}
    private = {path for _, path in PRIVATE}
    for made_up, name in named.items():
        private = {path.replace(made_up, name) for path in private}
    assert found - public == private


@pytest.mark.usefixtures("nothing_happens")
def test_what_is_not_there(bob: Caller) -> None:
    for method, path in (
        ("GET", "/v1/nothing"),
        ("GET", "/"),
        ("GET", "/v1/runs"),
        ("PUT", "/v1/models"),
        ("POST", "/v1/handles"),
    ):
        heard = bob.send(method, path)
        assert (heard.status, heard.refusal["code"]) == (404, "no_route"), path
    for path in ("/v1/jobs/job_" + "0" * 32, "/v1/jobs/%00", "/v1/jobs/" + "9" * 500):
        heard = bob.get(path)
        assert (heard.status, heard.refusal["code"]) == (404, "job_not_found")
    for handle in ("act_" + "0" * 32, "art_" + "0" * 32, "art_", "x", "..%2f..%2fetc"):
        for heard in (bob.get(f"/v1/handles/{handle}"), bob.delete(f"/v1/handles/{handle}")):
            assert heard.status == 404
            assert heard.refusal["code"] in ("handle_not_found", "no_route")


@pytest.mark.usefixtures("nothing_happens")
def test_an_unknown_model(bob: Caller) -> None:
    for path, body in (
        ("/v1/runs", request(LOGPROBS, model="gpt")),
        ("/v1/tokenize", {"model": "gpt", "texts": ["a"]}),
    ):
        heard = bob.post(path, body)
        assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (404, "unknown_model", "model")


@pytest.mark.usefixtures("nothing_happens")
@pytest.mark.parametrize("wait_s", ["abc", "nan", "inf", "-1", "30.5", "1e400", ""])
def test_a_wait_that_makes_no_sense(bob: Caller, wait_s: str) -> None:
    heard = bob.get("/v1/jobs/job_x/result", params={"wait_s": wait_s})
    assert (heard.status, heard.refusal["code"], heard.refusal["path"]) == (422, "bad_value", "wait_s")


@pytest.mark.usefixtures("nothing_happens")
@pytest.mark.parametrize("key", ["a b", "x" * 201, "\xe9"])
def test_a_malformed_idempotency_key(bob: Caller, key: str) -> None:
    heard = bob.send(
        "POST", "/v1/runs", json=request(LOGPROBS), headers={"idempotency-key": key.encode("latin-1")}
    )
    assert (heard.status, heard.refusal["code"]) == (422, "bad_value")


@pytest.mark.usefixtures("nothing_happens")
def test_operators_only(bob: Caller, alice: Caller) -> None:
    heard = bob.get("/v1/engine")
    assert (heard.status, heard.refusal["code"]) == (403, "not_allowed")
    assert alice.get("/v1/engine").json["forwards"] >= 0


@pytest.mark.usefixtures("nothing_happens")
def test_a_budget_that_is_too_small(eve: Caller) -> None:
    """Refused at the price, whatever the program would really have released."""
    body = request(
        read("resid_post.1", "prompt[*]"),
        {"op": "lens", "id": "lens", "of": ["r"], "top_k": 20},
        model="shut",
    )
    plan = eve.post("/v1/plan", body)
    assert plan.status == 200
    assert plan.json["admitted"] is False
    assert plan.json["cost"]["total_bits"] > plan.json["budget"]["left_bits"]
    heard = eve.post("/v1/runs", body)
    assert (heard.status, heard.refusal["code"], heard.json["error"]["category"]) == (
        403,
        "budget_exhausted",
        "policy",
    )


@pytest.mark.usefixtures("nothing_happens")
def test_an_uncapped_key_on_weights_that_are_not_open(alice: Caller) -> None:
    heard = alice.post("/v1/runs", request(LOGPROBS, model="shut"))
    assert (heard.status, heard.refusal["code"]) == (403, "not_allowed")


@pytest.mark.usefixtures("nothing_happens")
def test_nothing_that_a_client_says_names_the_request(bob: Caller) -> None:
    heard = bob.get("/v1/nothing", headers={"x-request-id": "mine"})
    assert heard.headers["x-request-id"] != "mine"
    assert heard.headers["cache-control"] == "no-store"
    assert heard.headers["x-content-type-options"] == "nosniff"


def test_a_fault_of_ours_tells_only_the_request(
    server: Any, bob: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.service, "models", broken)
    heard = bob.get("/v1/models")
    assert (heard.status, heard.refusal["code"]) == (500, "internal")
    assert b"secret" not in heard.body
    assert b"ZeroDivision" not in heard.body

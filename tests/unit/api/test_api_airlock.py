"""The airlock over plain HTTP: strict bodies, one file for one charge, and refusals with their codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from http_room import Caller, capture, read, request
from safetensors.numpy import load

from trocar.grants.scope import Scope

WORDS = [x + y for x in "abcd" for y in "klmn"]
WHY = {"reason": "Figure 3 of the paper.", "controls": "One laptop, deleted after."}


@pytest.fixture(scope="module")
def who(house: Any) -> Callable[[str], Caller]:
    return lambda name: Caller(house.app, house.keys[name])


@pytest.fixture(scope="module")
def rows(who: Callable[[str], Caller]) -> str:
    body = request(read("resid_post.2"), capture("r"), model="shut", prompts=WORDS)
    return str(who("ada").run(body).json["outputs"]["kept"]["handle"])


@pytest.fixture(scope="module")
def few(who: Callable[[str], Caller]) -> str:
    """As many rows of a site as the key has directions of it."""
    body = request(read("resid_post.2"), capture("r"), model="shut", prompts=WORDS[:8])
    return str(who("ada").run(body).json["outputs"]["kept"]["handle"])


@pytest.fixture(scope="module")
def probe(who: Callable[[str], Caller], rows: str) -> str:
    body = {"handle": rows, "kind": "mean_diff", "labels": [i % 2 for i in range(len(WORDS))]}
    started = who("ada").post("/v1/fits", body).json["job"]
    return str(who("ada").result(started).json["outputs"]["fit"]["artifact"])


def asked(caller: Caller, handle: str, **headers: str) -> Any:
    heard = caller.post("/v1/airlock/exports", {"handle": handle, **WHY}, **headers)
    assert heard.status == 200, heard.json
    return heard


def step(caller: Caller, ticket: Any, word: str, **body: Any) -> Any:
    return caller.post(f"/v1/airlock/{ticket['ticket']}/{word}", {"digest": ticket["digest"], **body})


def test_a_probe_leaves_over_http(who: Any, probe: str, house: Any) -> None:
    ada = who("ada")
    heard = asked(ada, probe)
    ticket = heard.json
    assert heard.headers["x-trocar-bits"] == str(256 + 3 * 64 + 256)
    assert (ticket["state"], ticket["holder"], ticket["review"]) == ("submitted", "ada", None)
    assert step(who("bea"), ticket, "approve", words="fine").json["state"] == "seconded"
    assert step(who("cid"), ticket, "approve").json["state"] == "approved"
    shown = ada.get(f"/v1/airlock/{ticket['ticket']}").json
    assert [s["holder"] for s in shown["steps"]] == ["ada", "bea", "cid"]
    first = ada.get(f"/v1/airlock/{ticket['ticket']}/file")
    assert (first.status, first.headers["content-type"]) == (200, "application/octet-stream")
    assert first.headers["x-trocar-bits"] == str(ticket["price_bits"])
    assert first.headers["cache-control"] == "no-store"
    assert first.headers["x-content-type-options"] == "nosniff"
    again = ada.get(f"/v1/airlock/{ticket['ticket']}/file")
    assert again.body == first.body
    assert (again.headers["x-trocar-bits"], again.headers["x-trocar-replayed"]) == ("0", "true")
    assert again.headers["x-trocar-bits-left"] == first.headers["x-trocar-bits-left"]
    file = load(first.body)
    held = house.store.open_artifact("lab", probe).arrays["resid_post.2"]["direction"]
    codes, scales = file["resid_post.2/direction:codes"], file["resid_post.2/direction:scales"]
    assert (np.abs(codes * scales[:, None] - held) <= scales * (0.5 + 1e-6)).all()
    settled = [e["bits"] for e in ada.account()[0] if e["kind"] == "settled"]
    assert settled[-2:] == [256 + 3 * 64 + 256, ticket["price_bits"]]


def test_asking_again_under_one_key_is_asking_once(who: Any, probe: str) -> None:
    ada = who("ada")
    one = asked(ada, probe, idempotency_key="once")
    two = asked(ada, probe, idempotency_key="once")
    assert two.body == one.body
    assert two.headers["x-trocar-replayed"] == "true"


def test_the_reviewer_sees_what_the_author_does_not(who: Any, few: str) -> None:
    ticket = asked(who("ada"), few).json
    seen = who("bea").get(f"/v1/airlock/{ticket['ticket']}").json
    assert (seen["you"], seen["parts"][0]["one_hot_columns"]) == ("checker", 0)
    assert (ticket["you"], ticket["parts"][0]["one_hot_columns"]) == ("author", None)
    assert seen["review"]["lineage_left_bits"] > 0
    assert seen["review"]["earlier"]
    assert seen["digest"] == ticket["digest"]


@pytest.mark.parametrize("name", ["bea", "boss", "ann"])
def test_nobody_else_gets_the_file(who: Any, probe: str, name: str) -> None:
    ticket = asked(who("ada"), probe).json
    for checker in ("bea", "cid"):
        step(who(checker), ticket, "approve")
    heard = who(name).get(f"/v1/airlock/{ticket['ticket']}/file")
    assert (heard.status, heard.refusal["code"]) == (403, "not_allowed")
    assert heard.headers["content-type"] == "application/json"


def test_what_is_not_there(who: Any, probe: str, rows: str) -> None:
    ticket = asked(who("ada"), probe).json
    for path in (
        f"/v1/airlock/{ticket['ticket']}",
        f"/v1/airlock/{ticket['ticket']}/file",
        "/v1/airlock/" + "0" * 32,
    ):
        heard = who("mal").get(path)
        assert (heard.status, heard.refusal["code"]) == (404, "airlock_not_found")
    heard = who("mal").post("/v1/airlock/exports", {"handle": rows, **WHY})
    assert (heard.status, heard.refusal["code"]) == (404, "handle_not_found")
    assert step(who("mal"), ticket, "withdraw").refusal["code"] == "airlock_not_found"
    assert step(who("ada"), ticket, "withdraw").json["state"] == "withdrawn"


def test_bodies_are_read_strictly(who: Any, probe: str) -> None:
    ada, ticket = who("ada"), asked(who("ada"), probe).json
    where = f"/v1/airlock/{ticket['ticket']}"
    cases: list[tuple[str, Any, str]] = [
        ("/v1/airlock/exports", {"handle": probe, "reason": "x" * 20}, "missing_field"),
        ("/v1/airlock/exports", {"handle": probe, **WHY, "why": 1}, "unknown_field"),
        ("/v1/airlock/exports", {"handle": 7, **WHY}, "bad_value"),
        (
            "/v1/airlock/exports",
            {"handle": probe, "reason": "short", "controls": WHY["controls"]},
            "bad_value",
        ),
        ("/v1/airlock/raises", {"model": "shut", **WHY, "life_bits": -1}, "bad_value"),
        ("/v1/airlock/raises", {"model": "shutt", **WHY}, "unknown_model"),
        (f"{where}/approve", {"words": "yes"}, "missing_field"),
        (f"{where}/approve", {"digest": "abc"}, "bad_value"),
        (f"{where}/withdraw", {"words": "because"}, "bad_value"),
        (f"{where}/release", {}, "bad_value"),
    ]
    for path, body, code in cases:
        heard = ada.post(path, body)
        assert heard.refusal["code"] == code, (path, body, heard.json)
    assert ada.get("/v1/airlock", params={"state": "waiting"}).refusal["code"] == "bad_value"
    assert ada.get("/v1/airlock", params={"limit": "many"}).refusal["code"] == "bad_value"


def test_a_refused_export_is_told_with_every_reason(who: Any) -> None:
    body = request(read("z.1"), read("attn_out.1", name="s"), capture("r", "s"), model="shut", prompts=WORDS)
    handle = who("ada").run(body).json["outputs"]["kept"]["handle"]
    heard = who("ada").post("/v1/airlock/exports", {"handle": handle, **WHY})
    assert heard.status == 403
    reasons = [r["reason"].partition(":")[0] for r in heard.json["error"]["refusals"]]
    assert {r["code"] for r in heard.json["error"]["refusals"]} == {"export_refused"}
    assert sorted(reasons) == ["early_layer", "early_layer", "linear_map"]
    assert who("ada").account()[0][-1]["bits"] in (0, 256)


def test_a_key_without_export_in_its_scope_is_outside(who: Any, probe: str, house: Any) -> None:
    ada = house.principals["ada"]
    narrow = Scope(ops=frozenset({"read", "capture", "fit"}))
    made = house.service.gate.keys.create("lab", ada.tier, ada.role, holder="ada", scope=narrow)
    heard = Caller(house.app, made.secret).post("/v1/airlock/exports", {"handle": probe, **WHY})
    assert (heard.status, heard.refusal["code"]) == (403, "out_of_scope")
    assert "'export'" in heard.refusal["reason"]


def test_a_raise_is_asked_for_and_applied(who: Any) -> None:
    ada = who("ada")
    ticket = ada.post("/v1/airlock/raises", {"model": "shut", "life_bits": 250_000_000, **WHY}).json
    assert (ticket["kind"], ticket["limits"]["life_bits"]) == ("raise", 250_000_000)
    step(who("bea"), ticket, "approve")
    assert step(who("boss"), ticket, "approve").json["state"] == "approved"
    assert step(ada, ticket, "apply").json["state"] == "released"
    assert ada.get("/v1/ledger").json["budgets"]["shut"]["limit_bits"] == 250_000_000


def test_the_public_key_is_public(who: Any, house: Any) -> None:
    told = Caller(house.app, None).get("/v1/capabilities").json
    assert told["airlock"] == {"public_key": house.service.gate.airlock.public_key}


def test_the_description_names_the_routes_and_their_models(house: Any) -> None:
    told = Caller(house.app, None).get("/openapi.json").json
    assert {p for p in told["paths"] if "airlock" in p} == {
        "/v1/airlock", "/v1/airlock/exports", "/v1/airlock/raises", "/v1/airlock/{ticket}",
        "/v1/airlock/{ticket}/file", "/v1/airlock/{ticket}/{step}",
    }  # fmt: skip
    assert {"ExportRequest", "RaiseRequest", "StepRequest", "TicketView", "TicketsView"} <= set(
        told["components"]["schemas"]
    )

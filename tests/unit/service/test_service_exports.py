"""Exports as use cases: what is asked, checked, charged and told, to whom; numbers come back within half a step."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from trocar import errors
from trocar.errors import TrocarError
from trocar.gate import schema
from trocar.gate.limits import EVERYONE
from trocar.gate.manifest import verify
from trocar.grants.scope import Scope
from trocar.graph import ops
from trocar.graph.program import Program
from trocar.service.exports import CHECK_BITS, DIGEST_BITS, _numbers_of
from trocar.wire import airlock as a
from trocar.wire.requests import FitRequest, RunRequest

WORDS = tuple(x + y for x in "abcd" for y in "klmn")
LABELS = tuple(i % 2 for i in range(len(WORDS)))
REASON, CONTROLS = "Figure 3 of the paper.", "One laptop, deleted after."
OVERHEAD = 256


def run(house: Any, who: str, *nodes: Any, model: str = "shut", prompts: tuple[str, ...] = WORDS) -> str:
    """The handle that a program captures."""
    request = RunRequest(model=model, prompts=prompts, program=Program(nodes=nodes))
    view = json.loads(house.service.run(house.principals[who], request, {}, None).payload)
    return str(result(house, who, view["job"])["outputs"]["kept"]["handle"])


def captured(house: Any, who: str, *sites: str, at: str = "prompt[-1]", **where: Any) -> str:
    reads = [ops.Read(id=f"r{i}", site=site, at=at) for i, site in enumerate(sites)]
    return run(house, who, *reads, ops.Capture(id="kept", of=tuple(n.id for n in reads)), **where)


def result(house: Any, who: str, job: str) -> Any:
    return json.loads(house.service.job_result(house.principals[who], job, 30.0).payload)


def fitted(house: Any, who: str, of: str, **fields: Any) -> str:
    request = FitRequest(handle=of, **({"kind": "mean_diff", "labels": LABELS} | fields))
    view = json.loads(house.service.fit(house.principals[who], request, None).payload)
    return str(result(house, who, view["job"])["outputs"]["fit"]["artifact"])


def submit(house: Any, who: Any, handle: str, key: str | None = None) -> Any:
    principal = house.principals[who] if isinstance(who, str) else who
    request = a.ExportRequest(handle=handle, reason=REASON, controls=CONTROLS)
    return house.service.exports.submit(principal, request, key)


def told(released: Any) -> Any:
    return json.loads(released.payload)


def step(house: Any, who: str, ticket: Any, word: a.Step, words: str = "") -> Any:
    request = a.StepRequest(digest=ticket["digest"], words=words)
    return told(house.service.exports.step(house.principals[who], ticket["ticket"], word, request))


def agree(house: Any, ticket: Any) -> Any:
    step(house, "bea", ticket, "approve")
    return step(house, "cid", ticket, "approve")


def file(house: Any, who: str, ticket: Any) -> Any:
    return house.service.exports.file(house.principals[who], ticket["ticket"])


def show(house: Any, who: str, ticket: Any) -> Any:
    return told(house.service.exports.show(house.principals[who], ticket["ticket"]))


def charged(house: Any, who: str, model: str = "shut") -> int:
    owner = f"key:{house.principals[who].key_id}"
    found = house.service.gate.ledger.balances()
    return sum(x.charged_bits for x in found if (x.owner, x.lineage) == (owner, model))


def code(call: Any) -> str:
    with pytest.raises(TrocarError) as caught:
        call()
    return str(caught.value.code)


def codes(error: TrocarError) -> set[str]:
    return {refusal.reason.partition(":")[0] for refusal in error.refusals}


@pytest.fixture(scope="module")
def probe(house: Any) -> str:
    return fitted(house, "ada", captured(house, "ada", "resid_post.2"))


def test_a_probe_leaves_after_two_others_agreed(house: Any, probe: str) -> None:
    before = charged(house, "ada")
    released = submit(house, "ada", probe)
    ticket = told(released)
    asked = OVERHEAD + DIGEST_BITS + 3 * CHECK_BITS
    assert released.charge.bits == asked == charged(house, "ada") - before
    assert (ticket["state"], ticket["checks"], ticket["reasons"]) == ("submitted", "pass", [])
    assert (ticket["kind"], ticket["needed"], ticket["you"]) == ("artifact", 2, "author")
    price = OVERHEAD + 8 * (2 * (32 + 2) + 1 + 2)
    assert (ticket["price_bits"], ticket["limit_bits"]) == (price, 20_000_000)
    assert agree(house, ticket)["state"] == "approved"
    out = file(house, "ada", ticket)
    assert (out.media_type, out.charge.bits, out.charge.replayed) == (
        "application/octet-stream",
        price,
        False,
    )
    assert charged(house, "ada") - before == asked + price
    opened = verify(out.payload, house.service.gate.airlock.public_key)
    assert opened.faults == ()
    assert [(p["name"], p["site"], p["origin"]) for p in opened.manifest["parts"]] == [
        (f"resid_post.2/{name}", "resid_post.2", "fit") for name in ("direction", "weights", "bias")
    ]
    held, sent = house.store.open_artifact("lab", probe).arrays["resid_post.2"], load(out.payload)
    for name, array in held.items():
        codes_, scales = sent[f"resid_post.2/{name}:codes"], sent[f"resid_post.2/{name}:scales"]
        assert (np.abs(codes_ * scales[:, None] - array) <= scales * (0.5 + 1e-6)).all()
        assert np.abs(array).max() > 0
    again = file(house, "ada", ticket)
    assert (again.payload, again.charge.bits, again.charge.replayed) == (out.payload, 0, True)
    assert again.charge.left_bits == out.charge.left_bits
    assert charged(house, "ada") - before == asked + price
    everyone = [x for x in house.service.gate.ledger.balances() if (x.owner, x.lineage) == (EVERYONE, "shut")]
    assert everyone[0].charged_bits >= asked + price


def test_only_who_asked_gets_the_file(house: Any, probe: str) -> None:
    ticket = told(submit(house, "ada", probe))
    assert code(lambda: file(house, "ada", ticket)) == "airlock_state"
    agree(house, ticket)
    for who, expected in {
        "bea": "not_allowed", "boss": "not_allowed", "dot": "not_allowed", "ann": "not_allowed",
        "mal": "airlock_not_found",
    }.items():  # fmt: skip
        assert code(lambda who=who: file(house, who, ticket)) == expected, who
    assert show(house, "bea", ticket)["state"] == "approved"


def test_rows_are_looked_at_and_come_back(house: Any) -> None:
    handle = captured(house, "ada", "resid_post.3", at="prompt[-1]", prompts=WORDS[:4])
    ticket = told(submit(house, "ada", handle))
    assert (ticket["kind"], ticket["checks"]) == ("rows", "review")
    assert {reason["code"] for reason in ticket["reasons"]} == {"rows"}
    agree(house, ticket)
    sent = load(file(house, "ada", ticket).payload)
    held = house.store.open("lab", handle).read("resid_post.3")
    scales = sent["resid_post.3/rows:scales"][:, None]
    assert held.shape == (4, 32)
    assert (np.abs(sent["resid_post.3/rows:codes"] * scales - held) <= scales * (0.5 + 1e-6)).all()


def test_more_rows_of_a_site_than_its_directions_are_refused_before_anybody_looks(house: Any) -> None:
    """A trusted key has a quarter of a width of 32; another name of the same stream has no more."""
    for site in ("resid_post.2", "resid_pre.3", "attn_in.3"):
        handle = captured(house, "ann", site, prompts=WORDS[:9])
        before = charged(house, "ann")
        with pytest.raises(errors.PolicyRefusal) as caught:
            submit(house, "ann", handle)
        assert (caught.value.code, caught.value.path) == ("rank_exhausted", "resid_pre.3")
        assert charged(house, "ann") - before == OVERHEAD


def test_rows_that_may_not_leave(house: Any) -> None:
    def edited() -> str:
        write = ops.EditScale(id="e", site="resid_post.2", at="prompt[*]", by=2.0)
        read = ops.Read(id="r", site="mlp_act.3", at="prompt[-1]")
        return run(house, "ada", write, read, ops.Capture(id="kept", of=("r",)))

    cases = {
        captured(house, "ada", "resid_post.0"): {"early_layer"},
        captured(house, "ada", "embeddings"): {"early_layer"},
        captured(house, "ada", "z.2", "attn_out.2"): {"linear_map"},
        edited(): {"near_write"},
    }
    for handle, expected in cases.items():
        before = charged(house, "ada")
        with pytest.raises(errors.PolicyRefusal) as caught:
            submit(house, "ada", handle)
        assert caught.value.code == "export_refused"
        assert expected <= codes(caught.value), handle
        assert charged(house, "ada") - before == OVERHEAD  # that it was looked at stays charged
    failed = told(house.service.exports.list(house.principals["bea"], "failed"))["tickets"]
    assert len(failed) == len(cases)


def test_an_artifact_remembers_where_its_rows_were_read(house: Any) -> None:
    ticket = told(
        submit(house, "ada", fitted(house, "ada", captured(house, "ada", "resid_post.1", at="prompt[0]")))
    )
    assert [(p["first"], p["blocks"]) for p in ticket["parts"]] == [(True, None)] * 3
    assert {reason["code"] for reason in ticket["reasons"]} == {"early_layer"}


def test_a_fit_that_is_close_to_one_row_is_treated_as_one(house: Any) -> None:
    alone = (True, True) + (False,) * (len(WORDS) - 2)
    deep, early = captured(house, "ada", "resid_post.2"), captured(house, "ada", "resid_post.1")
    ticket = told(submit(house, "ada", fitted(house, "ada", deep, labels=alone)))
    assert {reason["code"] for reason in ticket["reasons"]} == {"few_rows"}
    near_row = fitted(house, "ada", early, labels=alone)
    with pytest.raises(TrocarError) as caught:
        submit(house, "ada", near_row)
    assert (caught.value.code, codes(caught.value)) == ("export_refused", {"few_rows"})


def test_open_weights_need_nobody_and_give_their_maps(house: Any, true_weights: Any) -> None:
    words = tuple(x + y + x for x in "abcdefghij" for y in "klmnopqrst")
    of = captured(house, "free", "z.2", "attn_out.2", model="tiny", prompts=words)
    art = fitted(
        house, "free", of, kind="linear_map", labels=None, target=of, target_site="attn_out.2", l2=1e-9
    )
    ticket = told(submit(house, "free", art))
    assert (ticket["reasons"], ticket["state"]) == ([], "approved")
    assert (ticket["needed"], ticket["limit_bits"]) == (0, None)
    assert {(p["origin"], p["label"]) for p in ticket["parts"]} == {("activation_fit", "WEIGHT")}
    sent = load(file(house, "free", ticket).payload)
    made = sent["z.2/map:codes"] * sent["z.2/map:scales"][:, None]
    true = true_weights.model.layers[2].self_attn.o_proj.weight.numpy()
    assert np.linalg.norm(made.T - true) / np.linalg.norm(true) < 0.05
    assert told(submit(house, "free", of))["state"] == "approved"


def test_the_same_request_under_the_same_key_is_one(house: Any, probe: str) -> None:
    one, before = submit(house, "ada", probe, "k1"), charged(house, "ada")
    two = submit(house, "ada", probe, "k1")
    assert (two.payload, two.charge.bits, two.charge.replayed) == (one.payload, 0, True)
    assert charged(house, "ada") == before
    other = a.ExportRequest(handle=probe, reason=REASON + "!", controls=CONTROLS)
    ask = house.service.exports.submit
    assert code(lambda: ask(house.principals["ada"], other, "k1")) == "idempotency_conflict"


def test_what_is_not_yours_is_not_there(house: Any, probe: str) -> None:
    assert code(lambda: submit(house, "mal", probe)) == "handle_not_found"
    assert code(lambda: submit(house, "ada", "art_" + "0" * 32)) == "handle_not_found"
    ticket = told(submit(house, "ada", probe))
    for call in (show, file, lambda h, w, t: step(h, w, t, "withdraw")):
        assert code(lambda call=call: call(house, "mal", ticket)) == "airlock_not_found"
        absent = {**ticket, "ticket": "0" * 32}
        assert code(lambda call=call, absent=absent: call(house, "ada", absent)) == "airlock_not_found"
    assert told(house.service.exports.list(house.principals["mal"]))["tickets"] == []
    assert ticket["ticket"] in {
        t["ticket"] for t in told(house.service.exports.list(house.principals["ann"]))["tickets"]
    }
    assert step(house, "ada", ticket, "withdraw")["state"] == "withdrawn"


def test_a_credential_without_export_asks_nothing(house: Any, probe: str) -> None:
    ticket, ada = told(submit(house, "ada", probe)), house.principals["ada"]
    outside = {
        "ops": Scope(ops=frozenset({"read", "capture", "fit"})),
        "models": Scope(models=frozenset({"tiny"})),
        "sites": Scope(sites=frozenset({"resid_post.3"})),
    }
    before, exports = house.service.gate.ledger.head(), house.service.exports
    for scope in outside.values():
        narrow = replace(ada, scope=scope)
        assert code(lambda narrow=narrow: submit(house, narrow, probe)) == "out_of_scope"
        assert code(lambda narrow=narrow: exports.show(narrow, ticket["ticket"])) == "out_of_scope"
        assert code(lambda narrow=narrow: exports.file(narrow, ticket["ticket"])) == "out_of_scope"
        assert ticket["ticket"] not in {t["ticket"] for t in told(exports.list(narrow))["tickets"]}
    poor = replace(ada, scope=Scope(most_bits=ticket["price_bits"] - 1))
    assert code(lambda: submit(house, poor, probe)) == "out_of_scope"
    assert house.service.gate.ledger.head() == before
    enough = Scope(
        models=frozenset({"shut"}), ops=frozenset({"export"}), sites=frozenset({"resid_post"}),
        most_bits=ticket["price_bits"],
    )  # fmt: skip
    made = house.service.gate.keys.create("lab", ada.tier, ada.role, holder="ada", scope=enough)
    ticket = told(submit(house, made.principal, probe))
    agree(house, ticket)
    # the bits of a credential are an account of their own, and asking took some of them
    assert code(lambda: house.service.exports.file(made.principal, ticket["ticket"])) == "budget_exhausted"


def test_an_agent_waits_for_a_signature(house: Any, probe: str) -> None:
    ticket = told(submit(house, "bot", probe))
    assert (ticket["state"], ticket["you"]) == ("unsigned", "agent")
    assert code(lambda: step(house, "bea", ticket, "approve")) == "airlock_state"
    assert code(lambda: step(house, "bot", ticket, "sign")) == "not_allowed"
    assert step(house, "ann", ticket, "sign")["state"] == "submitted"
    agree(house, ticket)
    assert code(lambda: file(house, "ann", ticket)) == "not_allowed"
    assert file(house, "bot", ticket).charge.bits == ticket["price_bits"]


def test_what_checks_count_in_numbers_is_for_reviewers(house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that look like chosen inputs: the author hears the code once, the reviewers how many columns and where."""
    handle = captured(house, "ada", "attn_out.3", "mlp_out.2", prompts=WORDS[:8])
    worker = house.service._models["shut"].worker

    def chosen(self: Any, order: Any) -> Any:
        return {f.name: np.eye(*f.shape, dtype=np.float32) for f in order.fields}

    monkeypatch.setattr(type(worker), "numbers", chosen)
    ticket = told(submit(house, "ada", handle))
    own = [r for r in ticket["reasons"] if r["code"] == "one_hot"]
    assert [(r["path"], any(c.isdigit() for c in r["text"])) for r in own] == [("parts", False)]
    assert {p["one_hot_columns"] for p in ticket["parts"]} == {None}
    assert ticket["review"] is None
    for who in ("bea", "boss", "dot"):
        seen = show(house, who, ticket)
        assert [r["path"] for r in seen["reasons"] if r["code"] == "one_hot"] == ["parts[0]", "parts[1]"]
        assert {p["one_hot_columns"] for p in seen["parts"]} == {8}
        assert seen["review"]["lineage_left_bits"] > 0
    assert show(house, "ann", ticket)["parts"] == ticket["parts"]
    assert show(house, "ann", ticket)["reasons"] == ticket["reasons"]


def test_numbers_that_are_not_finite_are_told_in_one_bit(house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = captured(house, "ada", "resid_post.2", "resid_post.3")
    worker = house.service._models["shut"].worker

    def broken(self: Any, order: Any) -> Any:
        return {f.name: np.full(f.shape, np.nan, np.float32) for f in order.fields}

    monkeypatch.setattr(type(worker), "numbers", broken)
    before = charged(house, "ada")
    with pytest.raises(errors.PolicyRefusal) as caught:
        submit(house, "ada", handle)
    assert [(r.path, r.reason) for r in caught.value.refusals] == [
        ("parts", "not_finite: some numbers are NaN or infinite")
    ]
    assert charged(house, "ada") - before == OVERHEAD


def test_a_worker_that_gives_other_arrays_is_at_fault(
    house: Any, probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = house.service._models["shut"].worker
    for made in ({}, {"resid_post.2/direction": np.zeros(31, np.float32)}):
        monkeypatch.setattr(type(worker), "numbers", lambda *_, made=made: made)
        before = charged(house, "ada")
        assert code(lambda: submit(house, "ada", probe)) == "bad_result"
        assert charged(house, "ada") - before == OVERHEAD
        assert code(lambda: submit(house, "ada", probe)) == "lineage_frozen"
        house.service.gate.ledger.thaw("shut", key_id="op")


def test_what_was_asked_and_not_charged_keeps_its_whole_price(
    house: Any, probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a request is entered its author can look at the digest of its numbers, also when the answer fails."""

    def broken(*_: Any, **__: Any) -> Any:
        raise errors.refuse("ledger_unavailable", "", "the disk")

    monkeypatch.setattr(type(house.service.gate.ledger), "settle", broken)
    before = charged(house, "ada")
    assert code(lambda: submit(house, "ada", probe)) == "ledger_unavailable"
    assert charged(house, "ada") - before == OVERHEAD + DIGEST_BITS + 3 * CHECK_BITS


def test_a_workers_words_do_not_leave(house: Any, probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = house.service._models["shut"].worker

    def speaks(*_: Any) -> Any:
        raise errors.refuse("bad_value", "0.123", "weights: 0.5 -0.25")

    monkeypatch.setattr(type(worker), "numbers", speaks)
    with pytest.raises(errors.ServerFault) as caught:
        submit(house, "ada", probe)
    assert (caught.value.code, caught.value.path) == ("internal", "")
    assert "weights" not in str(caught.value)


def test_a_worker_gives_what_the_gate_declares(house: Any, probe: str) -> None:
    gate, worker = house.service.gate, house.service._models["shut"].worker
    for handle in (probe, captured(house, "ada", "resid_post.*".replace("*", "1"), "z.3", at="prompt[*]")):
        order = _numbers_of(gate.handles.find("lab", handle))
        arrays = worker.numbers(order)
        schema.require(arrays, order.fields)
        assert all(np.abs(array).max() > 0 for array in arrays.values())


def test_too_much_at_once_is_refused_before_a_number_is_read(
    house: Any, probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = house.service.gate
    airlock = gate.policy.outputs.airlock.model_copy(update={"most_bytes": 70})
    outputs = gate.policy.outputs.model_copy(update={"airlock": airlock})
    monkeypatch.setattr(gate, "policy", gate.policy.model_copy(update={"outputs": outputs}))
    head = gate.ledger.head()
    with pytest.raises(errors.PolicyRefusal) as caught:
        submit(house, "ada", probe)
    assert (caught.value.code, codes(caught.value)) == ("export_refused", {"too_many_bytes"})
    assert gate.ledger.head() == head


def test_who_may_not_ask_spends_nothing(house: Any, probe: str) -> None:
    head, ask = house.service.gate.ledger.head(), house.service.exports.submit
    short = a.ExportRequest(handle=probe, reason="because", controls=CONTROLS)
    assert code(lambda: ask(house.principals["ada"], short)) == "bad_value"
    escape = a.ExportRequest(handle=probe, reason=REASON + "\x1b[2J", controls=CONTROLS)
    assert code(lambda: ask(house.principals["ada"], escape)) == "bad_value"
    nobody = replace(house.principals["ada"], holder="")
    assert code(lambda: submit(house, nobody, probe)) == "not_allowed"
    assert house.service.gate.ledger.head() == head


def test_a_step_is_taken_on_what_was_seen(house: Any, probe: str) -> None:
    ticket, exports = told(submit(house, "ada", probe)), house.service.exports
    bea, name = house.principals["bea"], ticket["ticket"]
    assert code(lambda: exports.step(bea, name, "approve", a.StepRequest())) == "missing_field"
    other = a.StepRequest(digest="0" * 64)
    for word in ("approve", "reject", "withdraw"):
        assert code(lambda word=word: exports.step(bea, name, word, other)) == "airlock_state"
    assert code(lambda: step(house, "bea", ticket, "reject")) == "bad_value"
    assert code(lambda: step(house, "ada", ticket, "withdraw", "why not")) == "bad_value"
    assert code(lambda: step(house, "ada", ticket, "approve")) == "not_allowed"
    ended = step(house, "bea", ticket, "reject", "more than figure 3 needs")
    assert (ended["state"], ended["steps"][-1]["words"]) == ("rejected", "more than figure 3 needs")
    assert code(lambda: step(house, "cid", ticket, "approve")) == "airlock_state"


def test_the_list_is_asked_for_by_state(house: Any) -> None:
    exports, bea = house.service.exports, house.principals["bea"]
    assert code(lambda: exports.list(bea, "waiting")) == "bad_value"
    for limit in (0, 1001):
        assert code(lambda limit=limit: exports.list(bea, None, limit)) == "bad_value"
    found = told(exports.list(bea, "rejected", 1))["tickets"]
    assert [t["state"] for t in found] == ["rejected"]
    assert found[0]["limit_bits"] == 20_000_000


def test_larger_limits_are_asked_for_and_applied(house: Any) -> None:
    exports, ada = house.service.exports, house.principals["ada"]
    request = a.RaiseRequest(model="shut", life_bits=300_000_000, reason=REASON, controls=CONTROLS)
    head = house.service.gate.ledger.head().seq
    ticket = told(exports.submit_raise(ada, request))
    assert (ticket["kind"], ticket["price_bits"], ticket["parts"]) == ("raise", 0, [])
    owner = f"key:{ada.key_id}"
    assert ticket["limits"] == {"owner": owner, "life_bits": 300_000_000, "day_bits": 20_000_000}
    assert house.service.gate.ledger.head().seq == head + 1
    step(house, "bea", ticket, "approve")
    assert step(house, "cid", ticket, "approve")["state"] == "seconded"  # no owner among them
    assert step(house, "boss", ticket, "approve")["state"] == "approved"
    assert code(lambda: file(house, "ada", ticket)) == "airlock_state"
    assert step(house, "ada", ticket, "apply")["state"] == "released"
    mine = [x for x in house.service.gate.ledger.balances() if (x.owner, x.lineage) == (owner, "shut")]
    assert mine[0].limit_bits == 300_000_000
    lower = request.model_copy(update={"life_bits": 1})
    assert code(lambda: exports.submit_raise(ada, lower)) == "bad_value"
    unused = request.model_copy(update={"owner": "project:nobody"})
    assert code(lambda: exports.submit_raise(house.principals["boss"], unused)) == "bad_value"
    other = request.model_copy(update={"owner": f"key:{house.principals['mal'].key_id}"})
    assert code(lambda: exports.submit_raise(ada, other)) == "not_allowed"
    assert (
        code(lambda: exports.submit_raise(ada, request.model_copy(update={"model": "shu"})))
        == "unknown_model"
    )
    narrow = replace(ada, scope=Scope(ops=frozenset({"fit"})))
    assert code(lambda: exports.submit_raise(narrow, request)) == "out_of_scope"

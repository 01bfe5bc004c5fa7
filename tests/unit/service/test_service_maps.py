"""Fits to activations: a piece of the weights where they are open, refused where they are a secret."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from trocar.errors import TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation, Program
from trocar.wire.requests import FitRequest, RunRequest

WORDS = tuple(a + b + a for a in "abcdefghij" for b in "klmnopqrst")


def captured(server: Any, who: str, model: str, *sites: str, prompts: tuple[str, ...] = WORDS) -> str:
    nodes = tuple(ops.Read(id=f"r{i}", site=s, at="prompt[-1]") for i, s in enumerate(sites))
    program = Program(nodes=(*nodes, ops.Capture(id="kept", of=tuple(n.id for n in nodes))))
    request = RunRequest(model=model, prompts=prompts, program=program, generation=Generation())
    view = json.loads(server.service.run(server.principals[who], request, {}, None).payload)
    return str(result(server, who, view["job"])["outputs"]["kept"]["handle"])


def result(server: Any, who: str, job: str) -> Any:
    return json.loads(server.service.job_result(server.principals[who], job, 30.0).payload)


def fit(server: Any, who: str, handle: str, **fields: Any) -> Any:
    request = FitRequest(handle=handle, kind=fields.pop("kind", "linear_map"), **fields)
    view = json.loads(server.service.fit(server.principals[who], request, None).payload)
    return result(server, who, view["job"])


def code(call: Any) -> str:
    with pytest.raises(TrocarError) as caught:
        call()
    return caught.value.code


def test_a_map_between_two_ends_is_the_matrix(server: Any, true_weights: Any) -> None:
    handle = captured(server, "alice", "tiny", "z.2", "attn_out.2")
    made = fit(server, "alice", handle, target=handle, target_site="attn_out.2", l2=1e-9, seed=1)
    output = made["outputs"]["fit"]
    assert output["n_train"] + output["n_test"] == len(WORDS)
    by_site = {s["site"]: s["metrics"] for s in output["sites"]}
    assert by_site["z.2"]["r2"] > 0.999
    view = json.loads(server.service.handle(server.principals["alice"], output["artifact"]).payload)
    assert (view["kind"], view["widths"]) == ("artifact", {"z.2": 32, "attn_out.2": 32})
    held = server.store.open_artifact("alice", output["artifact"]).arrays["z.2"]
    true = true_weights.model.layers[2].self_attn.o_proj.weight.numpy()
    assert np.linalg.norm(held["map"].T - true) / np.linalg.norm(true) < 0.05


def test_secret_weights_have_no_maps(server: Any) -> None:
    handle = captured(server, "eve", "shut", "z.2", "attn_out.2", prompts=WORDS[:8])
    before = server.service.gate.ledger.head()
    assert code(lambda: fit(server, "eve", handle, target=handle, target_site="attn_out.2")) == "policy"
    assert server.service.gate.ledger.head() == before


def test_a_map_is_asked_for_as_one(server: Any) -> None:
    handle = captured(server, "alice", "tiny", "resid_post.1", prompts=WORDS[:8])
    labels = tuple(i % 2 for i in range(8))
    other = captured(server, "alice", "tiny", "resid_post.1", prompts=WORDS[:7])
    cases: list[tuple[str, dict[str, Any]]] = [
        ("missing_field", {}),
        ("missing_field", {"kind": "mean_diff"}),
        ("bad_value", {"kind": "mean_diff", "labels": labels, "target": handle}),
        ("bad_value", {"target": handle, "target_site": "resid_post.1", "labels": labels}),
        ("wrong_handle", {"target": handle, "target_site": "resid_post.9"}),
        ("rows_mismatch", {"target": other, "target_site": "resid_post.1"}),
        ("handle_not_found", {"target": "act_" + "0" * 32}),
    ]
    for expected, fields in cases:
        assert code(lambda fields=fields: fit(server, "alice", handle, **fields)) == expected


def test_a_map_is_no_direction(server: Any) -> None:
    handle = captured(server, "alice", "tiny", "resid_post.1", prompts=WORDS[:8])
    made = fit(server, "alice", handle, target=handle, target_site="resid_post.1")["outputs"]["fit"][
        "artifact"
    ]
    nodes = (ops.Vector(id="v", handle=made, site="resid_post.1"), ops.Read(id="r", site="resid_post.1"))
    program = Program(nodes=(*nodes, ops.Dot(id="d", a="r", b="v"), ops.Score(id="s", of="d")))
    request = RunRequest(model="tiny", prompts=("a",), program=program)
    assert code(lambda: server.service.plan(server.principals["alice"], request, {})) == "wrong_handle"
    assert code(lambda: fit(server, "alice", made, target=made)) == "wrong_handle"

"""Fits over the wire: what each kind releases, keeps and refuses, and that its options reach the rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from trocar.errors import TrocarError
from trocar.graph import ops
from trocar.graph.cost import Prices
from trocar.graph.program import Program
from trocar.service import fits
from trocar.service.metrics import METRICS, names
from trocar.wire.requests import FitRequest, RunRequest

SITE, N = "resid_post.1", 48
LETTERS = "abc"
WORDS = tuple(f"{i}{LETTERS[i % 3]}" for i in range(N))
TWO, THREE = tuple(int(i % 3 == 0) for i in range(N)), tuple(i % 3 for i in range(N))


@pytest.fixture(scope="module")
def handle(server: Any) -> str:
    nodes = (ops.Read(id="r", site=SITE, at="prompt[-1]"), ops.Capture(id="kept", of=("r",)))
    request = RunRequest(model="tiny", prompts=WORDS, program=Program(nodes=nodes))
    released = server.service.run(server.principals["alice"], request, {}, None)
    return str(finish(server, released)["outputs"]["kept"]["handle"])


def finish(server: Any, released: Any) -> Any:
    job = json.loads(released.payload)["job"]
    return json.loads(server.service.job_result(server.principals["alice"], job, 30.0).payload)


def fit(server: Any, handle: str, kind: str, labels: Any, **more: Any) -> Any:
    request = FitRequest(handle=handle, kind=kind, labels=labels, **more)  # type: ignore[arg-type]
    return finish(server, server.service.fit(server.principals["alice"], request, None))["outputs"]["fit"]


def metrics(output: Any) -> dict[str, float]:
    (site,) = output["sites"]
    return dict(site["metrics"])


def kept(server: Any, output: Any) -> Any:
    return server.store.open_artifact("alice", output["artifact"]).arrays[SITE]


def refusal(call: Any) -> tuple[str, str]:
    with pytest.raises(TrocarError) as caught:
        call()
    return caught.value.code, caught.value.path


def test_lda_is_a_probe_that_scores_and_steers(server: Any, handle: str) -> None:
    output = fit(server, handle, "lda", TWO)
    found = metrics(output)
    assert tuple(found) == METRICS["lda"]
    assert found["auroc"] > 0.9
    assert found["brier_low"] <= found["brier"] <= found["brier_high"]
    used = Program(
        nodes=(
            ops.Vector(id="d", handle=output["artifact"], site=SITE),
            ops.EditAdd(id="e", site=SITE, at="prompt[-1]", value="d"),
            ops.Read(id="r", site=SITE, at="prompt[-1]"),
            ops.Score(id="s", of="r", probe=output["artifact"], site=SITE),
        )
    )
    request = RunRequest(model="tiny", prompts=WORDS[:1], program=used)
    answer = finish(server, server.service.run(server.principals["alice"], request, {}, None))
    assert answer["outputs"]["s"]["kind"] == "score"


def test_many_classes_have_a_probe_each_and_no_one_direction(server: Any, handle: str) -> None:
    output = fit(server, handle, "multinomial", THREE)
    assert tuple(metrics(output)) == METRICS["multinomial"]
    assert metrics(output)["accuracy"] > 0.5
    arrays = kept(server, output)
    assert {name: a.shape for name, a in arrays.items()} == {
        "directions": (3, 32), "class_weights": (3, 32), "biases": (3,),
    }  # fmt: skip
    view = json.loads(server.service.handle(server.principals["alice"], output["artifact"]).payload)
    assert view["widths"] == {SITE: 32}
    vector = ops.Vector(id="d", handle=output["artifact"], site=SITE)
    edit = ops.EditAdd(id="e", site=SITE, at="prompt[-1]", value="d")
    program = Program(nodes=(vector, edit, ops.Text(id="t")))
    request = RunRequest(model="tiny", prompts=WORDS[:1], program=program)
    code, path = refusal(lambda: server.service.run(server.principals["alice"], request, {}, None))
    assert (code, path) == ("wrong_handle", "program.nodes[0].site")


def test_folds_add_three_numbers_to_every_kind(server: Any, handle: str) -> None:
    for kind, labels in (("logistic", TWO), ("mean_diff", TWO), ("ridge", tuple(map(float, THREE)))):
        found = metrics(fit(server, handle, kind, labels, folds=4))
        score = "r2" if kind == "ridge" else "auroc"
        assert tuple(found)[-3:] == (f"{score}_folds", f"{score}_folds_least", f"{score}_folds_most")
        assert found[f"{score}_folds_least"] <= found[f"{score}_folds"] <= found[f"{score}_folds_most"]


def test_penalties_and_class_weights_reach_the_rows(server: Any, handle: str) -> None:
    plain = kept(server, fit(server, handle, "logistic", TWO))
    even = kept(server, fit(server, handle, "logistic", TWO, class_weight="balanced"))
    sparse = kept(server, fit(server, handle, "logistic", TWO, l1=3.0))
    assert even["bias"][0] != plain["bias"][0]
    assert np.count_nonzero(sparse["weights"]) < np.count_nonzero(plain["weights"]) == 32


@pytest.mark.parametrize(
    ("kind", "labels", "more", "path"),
    [
        ("lda", TWO, {"l1": 1.0}, "l1"),
        ("ridge", TWO, {"class_weight": "balanced"}, "class_weight"),
        ("logistic", TWO, {"folds": 1}, "folds"),
        ("mean_diff", TWO, {"l2": 1.0}, "l2"),
    ],
)
def test_an_option_of_another_kind_is_refused_before_anything_is_spent(
    server: Any, handle: str, kind: str, labels: Any, more: Any, path: str
) -> None:
    before = server.service.gate.ledger.head()
    assert refusal(lambda: fit(server, handle, kind, labels, **more)) == ("bad_value", path)
    assert refusal(lambda: fit(server, handle, "lda", THREE)) == ("bad_labels", "labels")
    assert server.service.gate.ledger.head() == before


def test_a_map_takes_no_options_of_probes(server: Any, handle: str) -> None:
    more = {"target": handle, "target_site": SITE}
    for option in ({"l1": 1.0}, {"class_weight": "balanced"}, {"folds": 2}):
        assert refusal(lambda o=option: fit(server, handle, "linear_map", None, **more, **o)) == (
            "bad_value", "kind",
        )  # fmt: skip


def test_scores_that_a_worker_would_not_hold_are_refused(
    server: Any, handle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "MOST_SCORES", 6 * N)
    fit(server, handle, "multinomial", THREE)
    assert refusal(lambda: fit(server, handle, "multinomial", THREE, folds=2)) == ("bad_value", "folds")
    monkeypatch.setattr(fits, "MOST_SCORES", 6 * N - 1)
    assert refusal(lambda: fit(server, handle, "multinomial", THREE)) == ("bad_value", "labels")


def test_the_price_follows_from_the_request_alone(server: Any, handle: str) -> None:
    service = server.service
    of, prices = service.gate.handles.find("alice", handle), service.gate.prices(server.principals["alice"])
    for kind in ("lda", "multinomial", "logistic"):
        for folds in (0, 5):
            request = FitRequest(handle=handle, kind=kind, labels=TWO, folds=folds)  # type: ignore[arg-type]
            cost = _cost(request, of, prices)
            assert cost.bits_out["fit"] == (len(METRICS[kind]) + 3 * (folds > 0)) * prices.norm_bits
            assert len(names(request)) * prices.norm_bits == cost.bits_out["fit"]


def _cost(request: FitRequest, of: Any, prices: Prices) -> Any:
    return fits.ask(request, of, None, prices.rules).cost(prices)

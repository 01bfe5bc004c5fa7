"""A sweep is one request, one hold and one job, and gives what its variants give one by one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trocar import errors
from trocar.errors import Overloaded, TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation, Program
from trocar.graph.sweep import Axis
from trocar.service import passes
from trocar.wire.requests import RunRequest

WAIT_S = 30.0
VECTOR = {"v": np.linspace(-2, 2, 32, dtype=np.float32)}
STEER = (
    ops.Tensor(id="v", name="v"),
    ops.EditAdd(id="steer", site="resid_post.1", at="all", value="v"),
    ops.Logprobs(id="lp", tokens=(1, 2)),
)
COEF = Axis(node="steer", field="coef", values=(0.0, 1.0, -3))
LAYER = Axis(node="steer", field="layer", values=(2, 3))


@pytest.fixture
def fresh(serve: Callable[..., Any], tiny: Any, tmp_path: Path) -> Iterator[Any]:
    made = serve(tmp_path, [tiny])
    yield made
    made.service.close()


def request(*axes: Axis, nodes: Any = STEER, most: int = 0, prompts: Any = ("abc", "hello")) -> RunRequest:
    generation = Generation(max_new_tokens=most, stop_at_eos=False)
    return RunRequest(
        model="tiny", prompts=prompts, program=Program(nodes=nodes), generation=generation, sweep=axes
    )


def start(
    server: Any, asked: RunRequest, key: str | None = None, vectors: Any = None, who: str = "alice"
) -> str:
    arrays = VECTOR if vectors is None else vectors
    return str(json.loads(server.service.run(server.principals[who], asked, arrays, key).payload)["job"])


def result(server: Any, job: str, who: str = "alice") -> dict[str, Any]:
    released = server.service.job_result(server.principals[who], job, WAIT_S)
    assert released.status == 200, released.payload
    found: dict[str, Any] = json.loads(released.payload)
    return found


def run(server: Any, asked: RunRequest, **more: Any) -> dict[str, Any]:
    return result(server, start(server, asked, **more))


def held(server: Any) -> int:
    return sum(account.held_bits for account in server.service.gate.ledger.balances())


def alone(server: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The same variant as a run of its own."""
    coef, layer = settings["steer.coef"], settings.get("steer.layer", 1)
    edit = ops.EditAdd(id="steer", site=f"resid_post.{layer}", at="all", value="v", coef=coef)
    return run(server, request(nodes=(STEER[0], edit, STEER[2])))


def test_variants_give_what_runs_give(server: Any) -> None:
    found = run(server, request(COEF, LAYER))
    assert [v["settings"] for v in found["sweep"]] == [
        {"steer.coef": c, "steer.layer": layer} for c in (0.0, 1.0, -3) for layer in (2, 3)
    ]
    rows = [v["outputs"]["lp"]["logprobs"] for v in found["sweep"]]
    for variant, logprobs in zip(found["sweep"], rows, strict=True):
        single = alone(server, variant["settings"])
        assert variant["outputs"]["lp"]["positions"] == single["outputs"]["lp"]["positions"]
        assert np.allclose(logprobs, single["outputs"]["lp"]["logprobs"], atol=2e-3)
        (edit,), (expected,) = variant["edits"], single["receipt"]["edits"]
        assert (edit["site"], edit["rows"]) == (expected["site"], expected["rows"])
        assert np.isclose(edit["norm_after"], expected["norm_after"], rtol=1e-3)
    assert np.allclose(rows[0], rows[1], atol=1e-4)  # coefficient 0 at any layer is the model
    assert np.abs(np.subtract(rows[0], rows[2])).max() > 0.01
    assert np.abs(np.subtract(rows[2], rows[3])).max() > 0.01


def test_generation_in_every_variant(server: Any) -> None:
    nodes = (*STEER[:2], ops.Text(id="text"))
    found = run(server, request(COEF, nodes=nodes, most=6))
    singles = [
        run(
            server,
            request(nodes=(STEER[0], STEER[1].model_copy(update={"coef": float(c)}), nodes[2]), most=6),
        )
        for c in COEF.values
    ]
    assert [v["outputs"]["text"]["ids"] for v in found["sweep"]] == [
        s["outputs"]["text"]["ids"] for s in singles
    ]


def test_one_bill(server: Any) -> None:
    """The price is the variants' with one overhead, and the plan says the same."""
    plan = json.loads(server.service.plan(server.principals["alice"], request(COEF), VECTOR).payload)
    assert (plan["variants"], plan["prompts"]) == (3, 2)
    single = json.loads(server.service.plan(server.principals["alice"], request(), VECTOR).payload)
    assert single["variants"] == 1
    over = single["cost"]["bits_out"]["overhead"]
    assert plan["cost"]["total_bits"] == 3 * (single["cost"]["total_bits"] - over) + over
    assert plan["outputs"][0]["bits"] == 3 * single["outputs"][0]["bits"]
    job = start(server, request(COEF))
    released = server.service.job_result(server.principals["alice"], job, WAIT_S)
    receipt = json.loads(released.payload)["receipt"]
    assert released.charge.bits == sum(receipt["released_bits"].values()) == receipt["reserved_bits"]
    assert receipt["reserved_bits"] == plan["cost"]["total_bits"]
    assert (receipt["edits"], receipt["program_digest"]) == ([], plan["program_digest"])
    view = json.loads(server.service.job(server.principals["alice"], job).payload)
    assert (view["kind"], view["done"], view["total"]) == ("run", 6, 6)


def test_without_a_sweep_the_answer_has_no_such_field(server: Any) -> None:
    assert set(run(server, request())) == {"outputs", "tokens", "receipt"}


def test_a_sweep_of_one_value_is_a_sweep(server: Any) -> None:
    found = run(server, request(Axis(node="steer", field="coef", values=(2,))))
    assert found["outputs"] == {}
    assert [v["settings"] for v in found["sweep"]] == [{"steer.coef": 2}]


def test_every_variant_captures(fresh: Any) -> None:
    nodes = (
        *STEER[:2],
        ops.Read(id="r", site="resid_post.2", at="prompt[-1]"),
        ops.Capture(id="kept", of=("r",)),
    )
    found = run(fresh, request(COEF, nodes=nodes))
    handles = [v["outputs"]["kept"]["handle"] for v in found["sweep"]]
    assert len(set(handles)) == 3
    store = fresh.store
    rows = [store.open("alice", h).read("resid_post.2") for h in handles]
    assert [r.shape for r in rows] == [(2, 32)] * 3
    assert np.abs(rows[0] - rows[2]).max() > 0.01


def test_a_sweep_larger_than_its_window(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "IN_FLIGHT", 2)
    axis = Axis(node="steer", field="coef", values=tuple(range(7)))
    found = run(server, request(axis))
    assert [v["settings"]["steer.coef"] for v in found["sweep"]] == list(range(7))


def test_a_full_engine_delays_a_sweep(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh.engines["tiny"]
    plain, tried = engine.submit, []

    def full_sometimes(task: Any) -> Any:
        tried.append(task.request)
        if len(tried) in (2, 3):
            raise errors.full("100 requests are waiting", 1.0)
        return plain(task)

    monkeypatch.setattr(engine, "submit", full_sometimes)
    assert len(run(fresh, request(COEF))["sweep"]) == 3
    assert len(tried) == 5


def test_an_engine_that_is_full_from_the_start_refuses(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_task: Any) -> Any:
        raise errors.full("100 requests are waiting", 1.0)

    monkeypatch.setattr(fresh.engines["tiny"], "submit", full)
    with pytest.raises(Overloaded):
        run(fresh, request(COEF))
    assert held(fresh) == 0


def test_a_variant_that_fails_stops_the_others_and_takes_their_rows(fresh: Any) -> None:
    nodes = (
        *STEER[:2],
        ops.Read(id="r", site="resid_post.2", at="prompt[-1]"),
        ops.Capture(id="kept", of=("r",)),
    )
    axis = Axis(node="steer", field="coef", values=(0, 1, 1_000_000))
    huge = {"v": np.full(32, 1e6, np.float32)}
    with pytest.raises(TrocarError) as caught:
        run(fresh, request(axis, nodes=nodes), vectors=huge)
    assert caught.value.code == "edit_not_finite"
    assert fresh.store.list("alice") == []
    assert held(fresh) == 0
    assert fresh.engines["tiny"].stats().live_requests == 0
    assert fresh.service.check() == []


def test_a_cancelled_sweep_stops(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the cancel comes, no variant runs on and nothing stays reserved."""
    monkeypatch.setattr(passes, "IN_FLIGHT", 2)
    started = threading.Event()
    plain = fresh.engines["tiny"].submit
    monkeypatch.setattr(fresh.engines["tiny"], "submit", lambda t: (plain(t), started.set())[0])
    nodes = (*STEER[:2], ops.Text(id="text"))
    axis = Axis(node="steer", field="coef", values=tuple(range(64)))
    job = start(fresh, request(axis, nodes=nodes, most=200))
    assert started.wait(WAIT_S)
    fresh.service.cancel(fresh.principals["alice"], job)
    with pytest.raises(TrocarError) as caught:
        result(fresh, job)
    assert caught.value.code == "cancelled"
    assert held(fresh) == 0
    assert fresh.engines["tiny"].stats().live_requests == 0


def test_a_retried_sweep_is_the_same_job_and_then_the_same_answer(fresh: Any) -> None:
    asked = request(COEF)
    job = start(fresh, asked, key="once")
    first = result(fresh, job)
    again = start(fresh, asked, key="once")
    released = fresh.service.job_result(fresh.principals["alice"], again, WAIT_S)
    assert released.charge.replayed
    assert json.loads(released.payload) == first
    with pytest.raises(TrocarError) as caught:
        start(fresh, request(LAYER), key="once")
    assert caught.value.code == "idempotency_conflict"


def test_a_refused_sweep_spends_nothing(fresh: Any) -> None:
    before = fresh.service.gate.ledger.head()
    with pytest.raises(TrocarError) as caught:
        start(fresh, request(Axis(node="steer", field="layer", values=(1, 9))))
    assert (caught.value.code, caught.value.path) == ("layer_out_of_range", "sweep[0].values[1]")
    assert fresh.service.gate.ledger.head() == before


def test_what_variants_share_is_read_in_every_one(fresh: Any) -> None:
    """Edits and reads below the layer where variants part, captured rows, several lengths of prompts."""
    below = (
        ops.Tensor(id="v", name="v"),
        ops.EditAdd(id="low", site="resid_post.0", at="prompt[1:]", value="v", coef=0.5),
        ops.Read(id="r0", site="resid_post.0", at="prompt[-1]"),
        ops.Read(id="r3", site="resid_post.3", at="prompt[-1]"),
        ops.Lens(id="lens", of=("r0", "r3"), top_k=3),
        ops.Capture(id="kept", of=("r0", "r3")),
    )
    edit = ops.EditAdd(id="steer", site="resid_post.2", at="all", value="v")
    prompts = ("abc", "hello there", "xy", "a longer prompt than these")
    found = run(fresh, request(COEF, nodes=(*below, edit), prompts=prompts))
    assert fresh.engines["tiny"].stats().shared_rows > 0
    store = fresh.store
    for variant in found["sweep"]:
        swept = edit.model_copy(update={"coef": float(variant["settings"]["steer.coef"])})
        single = run(fresh, request(nodes=(*below, swept), prompts=prompts))
        mine, alone_ = variant["outputs"], single["outputs"]
        assert mine["lens"]["ids"] == alone_["lens"]["ids"]
        assert np.allclose(mine["lens"]["logprobs"], alone_["lens"]["logprobs"], atol=2e-3)
        rows = [store.open("alice", o["kept"]["handle"]) for o in (mine, alone_)]
        for site in ("resid_post.0", "resid_post.3"):
            a, b = (r.read(site) for r in rows)
            assert np.allclose(a, b, atol=1e-4)
        assert [e["rows"] for e in variant["edits"]] == [e["rows"] for e in single["receipt"]["edits"]]

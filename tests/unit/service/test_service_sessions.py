"""A session: checked whole before it runs, one job and one hold; what it captured never leaves and then is gone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trocar import errors
from trocar.errors import TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation, Program
from trocar.graph.sweep import Axis
from trocar.service.passes import Passes
from trocar.wire.requests import RunRequest, SessionRequest

WAIT_S = 30.0
READ = ops.Read(id="r", site="resid_post.1", at="prompt[-1]")
KEPT = ops.Capture(id="kept", of=("r",))
LOGPROBS = ops.Logprobs(id="lp", tokens=(1, 2, 3))
CLEAN = (READ, KEPT, LOGPROBS)


def stored(**fields: Any) -> ops.Stored:
    return ops.Stored(**{"id": "s", "handle": "step0.kept", "site": "resid_post.1", **fields})


def put(at: str = "prompt[-1]", site: str = "resid_post.1", value: str = "s") -> ops.EditSet:
    return ops.EditSet(id="patch", site=site, at=at, value=value)


PATCHED = (stored(), put(), LOGPROBS)


@pytest.fixture
def fresh(serve: Callable[..., Any], tiny: Any, tmp_path: Path) -> Iterator[Any]:
    made = serve(tmp_path, [tiny])
    yield made
    made.service.close()


def step(
    *nodes: Any, prompts: Any = ("abc", "hello"), most: int = 0, model: str = "tiny", **more: Any
) -> RunRequest:
    generation = Generation(max_new_tokens=most, stop_at_eos=False)
    return RunRequest(
        model=model, prompts=prompts, program=Program(nodes=nodes), generation=generation, **more
    )


def start(
    server: Any, *steps: RunRequest, key: str | None = None, vectors: Any = None, keep: bool = False
) -> str:
    asked = SessionRequest(steps=steps, keep=keep)
    released = server.service.session(server.principals["alice"], asked, vectors or {}, key)
    return str(json.loads(released.payload)["job"])


def released(server: Any, job: str) -> Any:
    found = server.service.job_result(server.principals["alice"], job, WAIT_S)
    assert found.status == 200, found.payload
    return found


def run(server: Any, *steps: RunRequest, **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(released(server, start(server, *steps, **more)).payload)["steps"]
    return found


def refusals(server: Any, *steps: RunRequest, **more: Any) -> tuple[errors.Refusal, ...]:
    """Why a session was not admitted; nothing ran and nothing was spent."""
    before, forwards = server.service.gate.ledger.head(), server.forwards()
    with pytest.raises(TrocarError) as caught:
        start(server, *steps, **more)
    assert (server.service.gate.ledger.head(), server.forwards()) == (before, forwards)
    assert all(r.next_step for r in caught.value.refusals)
    return caught.value.refusals


def held(server: Any) -> int:
    return sum(account.held_bits for account in server.service.gate.ledger.balances())


def logprobs(result: dict[str, Any]) -> Any:
    return np.array(result["outputs"]["lp"]["logprobs"])


def test_a_prompt_patched_with_its_own_rows_is_unchanged(fresh: Any) -> None:
    clean, patched = run(fresh, step(*CLEAN), step(*PATCHED))
    assert np.abs(logprobs(clean) - logprobs(patched)).max() < 1e-4
    assert patched["receipt"]["edits"][0]["rows"] == 2
    assert fresh.store.list("alice") == []
    assert held(fresh) == 0


def test_rows_of_one_prompt_change_another(fresh: Any) -> None:
    """As the same rows do through a handle of an ordinary run."""
    one, other = step(*CLEAN), step(*PATCHED, prompts=("xyz", "world"))
    plain = step(LOGPROBS, prompts=("xyz", "world"))
    _, patched, unpatched = run(fresh, one, other, plain)
    assert np.abs(logprobs(patched) - logprobs(unpatched)).max() > 0.01
    (kept,) = run(fresh, one, keep=True)
    handle = kept["outputs"]["kept"]["handle"]
    request = step(stored(handle=handle), put(), LOGPROBS, prompts=("xyz", "world"))
    job = json.loads(fresh.service.run(fresh.principals["alice"], request, {}, None).payload)["job"]
    assert np.allclose(logprobs(json.loads(released(fresh, job).payload)), logprobs(patched), atol=1e-4)


def test_captures_are_kept_or_gone(fresh: Any) -> None:
    (gone,) = run(fresh, step(*CLEAN))
    assert set(gone["outputs"]) == {"lp"}
    assert fresh.store.list("alice") == []
    (kept,) = run(fresh, step(*CLEAN), keep=True)
    assert kept["outputs"]["kept"]["handle"] in {i.id for i in fresh.store.list("alice")}


def test_every_kind_of_captured_rows(fresh: Any) -> None:
    """Several rows per prompt, a mean, a wider site, and rows chosen by prompt and place."""
    first = step(
        ops.Read(id="all", site="resid_post.0", at="prompt[*]"),
        ops.Read(id="m", site="mlp_act.1", at="prompt[*]"),
        ops.Capture(id="rows", of=("all",)),
        ops.Capture(id="mean", of=("m",), reduce="mean"),
        LOGPROBS,
    )
    same = step(stored(handle="step0.rows", site="resid_post.0"), put("prompt[*]", "resid_post.0"), LOGPROBS)
    means = step(stored(handle="step0.mean", site="mlp_act.1"), put("prompt[-1]", "mlp_act.1"), LOGPROBS)
    chosen = step(
        stored(handle="step0.rows", site="resid_post.0", prompts=(1, 1), at="prompt[-1]"),
        put("prompt[-1]", "resid_post.0"),
        LOGPROBS,
    )
    clean, again, meant, swapped = run(fresh, first, same, means, chosen)
    assert np.abs(logprobs(clean) - logprobs(again)).max() < 1e-4
    assert np.abs(logprobs(clean) - logprobs(meant)).max() > 1e-3
    assert np.abs(logprobs(clean)[0] - logprobs(swapped)[0]).max() > 1e-3
    assert np.abs(logprobs(clean)[1] - logprobs(swapped)[1]).max() < 1e-4


def test_a_step_may_generate_and_a_step_may_sweep(fresh: Any) -> None:
    axis = Axis(node="patch", field="layer", values=(1, 2))
    text, swept = run(
        fresh, step(READ, KEPT, ops.Text(id="text"), most=4), step(*PATCHED, sweep=(axis,)), keep=False
    )
    assert [len(ids) for ids in text["outputs"]["text"]["ids"]] == [4, 4]
    assert [v["settings"] for v in swept["sweep"]] == [{"patch.layer": 1}, {"patch.layer": 2}]
    captured = run(
        fresh, step(*CLEAN, sweep=(Axis(node="lp", field="at", values=("prompt[0]", "prompt[1]")),))
    )
    assert [set(v["outputs"]) for v in captured[0]["sweep"]] == [{"lp"}, {"lp"}]
    assert fresh.store.list("alice") == []


def test_arrays_belong_to_steps(fresh: Any) -> None:
    nodes = (ops.Tensor(id="v", name="v"), ops.EditAdd(id="e", site="resid_post.1", value="v"), LOGPROBS)
    arrays = {"step0.v": np.zeros(32, np.float32), "step1.v": np.full(32, 2.0, np.float32)}
    still, moved = run(fresh, step(*nodes), step(*nodes), vectors=arrays)
    assert still["receipt"]["edits"][0]["norm_after"] == still["receipt"]["edits"][0]["norm_before"]
    assert np.abs(logprobs(still) - logprobs(moved)).max() > 0.01
    for name in ("v", "step2.v"):
        (found,) = refusals(fresh, step(*nodes), step(*nodes), vectors={**arrays, name: arrays["step0.v"]})
        assert (found.code, found.path) == ("unknown_tensor", f"tensors.{name}")


def test_one_bill(fresh: Any) -> None:
    answer = released(fresh, start(fresh, step(*CLEAN), step(*PATCHED)))
    first, second = (s["receipt"] for s in json.loads(answer.payload)["steps"])
    assert set(first["released_bits"]) == {"overhead", "lp", "kept"}
    assert set(second["released_bits"]) == {"receipts", "lp"}
    assert answer.charge.bits == sum(sum(x["released_bits"].values()) for x in (first, second))
    costs = [first["reserved_bits"], second["reserved_bits"]]
    assert answer.charge.bits == sum(costs) - first["released_bits"]["overhead"]
    view = json.loads(fresh.service.account(fresh.principals["alice"]).payload)
    assert view["budgets"]["tiny"]["spent_bits"] == answer.charge.bits


def test_the_job_of_a_session(fresh: Any) -> None:
    job = start(fresh, step(*CLEAN), step(*PATCHED), step(LOGPROBS))
    released(fresh, job)
    view = json.loads(fresh.service.job(fresh.principals["alice"], job).payload)
    assert (view["kind"], view["state"], view["done"], view["total"]) == ("session", "COMPLETED", 6, 6)


# ---- refused before anything runs -----------------------------------------------------------------

GEN = ops.Read(id="r", site="resid_post.1", at="gen[*]")


@pytest.mark.parametrize(
    ("steps", "code", "path", "names", "closest"),
    [
        ([step(*CLEAN), step(stored(handle="step0.kpt"), put(), LOGPROBS)],
         "handle_not_found", "steps[1].program.nodes[0].handle", "captures nothing under 'kpt'", "step0.kept"),
        ([step(*CLEAN), step(stored(handle="step1.kept"), put(), LOGPROBS)],
         "handle_not_found", "steps[1].program.nodes[0].handle", "step 1 does not run before step 1", None),
        ([step(*CLEAN), step(*PATCHED), step(stored(handle="step7.kept"), put(), LOGPROBS)],
         "handle_not_found", "steps[2].program.nodes[0].handle", "step 7 does not run before step 2", None),
        ([step(LOGPROBS), step(*PATCHED)],
         "handle_not_found", "steps[1].program.nodes[0].handle", "step 0 captures nothing", None),
        ([step(GEN, KEPT, most=3), step(*PATCHED)],
         "wrong_handle", "steps[1].program.nodes[0].handle", "rows of generated tokens", None),
        ([step(*CLEAN, sweep=(Axis(node="r", field="layer", values=(1, 2)),)), step(*PATCHED)],
         "wrong_handle", "steps[1].program.nodes[0].handle", "step 0 is a sweep", None),
        ([step(*CLEAN), step(*PATCHED, prompts=("abc",))],
         "rows_mismatch", "steps[1].program.nodes[0].handle", "holds rows of 2 prompts", None),
        ([step(*CLEAN), step(stored(site="resid_post.2"), put(), LOGPROBS)],
         "wrong_handle", "steps[1].program.nodes[0].site", "holds nothing for 'resid_post.2'", "resid_post.1"),
        ([step(*CLEAN), step(stored(), put(site="mlp_act.1"), LOGPROBS)],
         "width_mismatch", "steps[1].program.nodes[1].value", "width", None),
        ([step(*CLEAN), step(stored(), put("prompt[0:2]"), LOGPROBS)],
         "rows_mismatch", "steps[1].program.nodes[1].value", "1 rows on one side and 2", None),
        ([step(*CLEAN), step(ops.Vector(id="v", handle="step0.kept", site="resid_post.1"), put(value="v"), LOGPROBS)],
         "wrong_handle", "steps[1].program.nodes[0].handle", "holds activations, not artifact", None),
        ([step(*CLEAN), step(READ, ops.Score(id="s", of="r", probe="step3.x", site="resid_post.1"))],
         "handle_not_found", "steps[1].program.nodes[1].probe", "step 3 does not run before", None),
        ([step(*CLEAN), step(*PATCHED, model="other")],
         "bad_value", "steps[1].model", "'other' is not the model of the first step, 'tiny'", None),
        ([step(*CLEAN, model="tny")], "unknown_model", "steps[0].model", "'tny'", "tiny"),
        ([step(*CLEAN), step(LOGPROBS, prompts=("",))], "empty_prompt", "steps[1].prompts[0]", "no tokens", None),
    ],
)  # fmt: skip
def test_what_a_session_cannot_be(
    server: Any, steps: list[RunRequest], code: str, path: str, names: str, closest: str | None
) -> None:
    (found,) = refusals(server, *steps)
    assert (found.code, found.path, found.closest) == (code, path, closest)
    assert names in found.reason


def test_a_name_of_a_session_means_nothing_elsewhere(server: Any) -> None:
    with pytest.raises(TrocarError) as caught:
        server.service.run(server.principals["alice"], step(*PATCHED), {}, None)
    assert (caught.value.code, caught.value.path) == ("handle_not_found", "program.nodes[0].handle")


def test_a_session_above_the_budget_runs_nothing(server: Any) -> None:
    """Each step alone would fit, whatever the policy leaves of the day."""
    eve, facts = server.principals["eve"], server.service.facts["shut"]
    left = server.service.gate.budget(eve, facts).left_bits
    rows = (left - 256) // (9 + 8)
    asked = step(READ, ops.Lens(id="top", of=("r",), top_k=1), prompts=("a",) * rows, model="shut")
    plan = json.loads(server.service.plan(eve, asked, {}).payload)
    assert plan["admitted"]
    before = server.forwards()
    with pytest.raises(TrocarError) as caught:
        server.service.session(eve, SessionRequest(steps=(asked, asked)), {}, None)
    assert caught.value.code == "budget_exhausted"
    assert (server.forwards(), server.service.gate.budget(eve, facts).left_bits) == (before, left)


# ---- what goes wrong while it runs ----------------------------------------------------------------


def fails_in_step(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> list[str]:
    """Lets a step of a session fail when it has run; gives the numbers of the steps that ran."""
    plain, ran = Passes.run, list[str]()

    def breaking(self: Passes, *args: Any) -> Any:
        results = plain(self, *args)
        ran.append(self.order.id.rpartition(".")[2])
        if ran[-1] == str(step):
            raise error
        return results

    monkeypatch.setattr(Passes, "run", breaking)
    return ran


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("step_at", [0, 1])
def test_a_step_that_fails_takes_everything_back(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, step_at: int, keep: bool
) -> None:
    ran = fails_in_step(monkeypatch, step_at, OSError(5, "input/output error"))
    with pytest.raises(TrocarError) as caught:
        run(fresh, step(*CLEAN), step(*PATCHED, READ, KEPT), keep=keep)
    assert caught.value.code == "internal"
    assert ran == ["0", "1"][: step_at + 1]
    assert fresh.store.list("alice") == []
    assert held(fresh) == 0
    assert fresh.service.check() == []


def test_a_session_that_cannot_be_released_leaves_nothing(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise errors.refuse("result_not_finite", "", "no")

    monkeypatch.setattr(type(fresh.service.gate), "release", refused)
    with pytest.raises(TrocarError):
        run(fresh, step(*CLEAN), keep=True)
    assert fresh.store.list("alice") == []
    assert held(fresh) == 0


def test_rows_deleted_between_the_steps(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant may delete a handle of a session that still runs: the session says so and holds nothing."""
    plain = Passes.arrays

    def deleting(self: Passes, results: Any) -> Any:
        made = plain(self, results)
        for info in fresh.store.list("alice"):
            fresh.store.delete("alice", info.id)
        return made

    monkeypatch.setattr(Passes, "arrays", deleting)
    with pytest.raises(TrocarError) as caught:
        run(fresh, step(*CLEAN), step(*PATCHED))
    assert caught.value.code == "handle_not_found"
    assert held(fresh) == 0


def test_a_cancelled_session_stops_between_or_within_steps(fresh: Any) -> None:
    slow = step(ops.Text(id="text"), most=200)
    job = start(fresh, step(*CLEAN), slow, slow, slow, keep=True)
    deadline_s = time.monotonic() + WAIT_S
    while fresh.service._jobs.view(fresh.principals["alice"], job).done < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    fresh.service.cancel(fresh.principals["alice"], job)
    with pytest.raises(TrocarError) as caught:
        released(fresh, job)
    assert caught.value.code == "cancelled"
    assert fresh.store.list("alice") == []
    assert held(fresh) == 0
    assert fresh.engines["tiny"].stats().live_requests == 0


def test_a_retried_session_is_one(fresh: Any) -> None:
    steps = (step(*CLEAN), step(*PATCHED))
    first = released(fresh, start(fresh, *steps, key="once"))
    again = released(fresh, start(fresh, *steps, key="once"))
    assert again.charge.replayed
    assert again.payload == first.payload
    with pytest.raises(TrocarError) as caught:
        start(fresh, *steps, key="once", keep=True)
    assert caught.value.code == "idempotency_conflict"

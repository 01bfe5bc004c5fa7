"""Whatever ends a request, its reservation ends with it: charged, or the overhead kept and the rest refunded."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trocar import errors
from trocar.errors import ProgramError, ServerFault, TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation, Program
from trocar.service import fits, local
from trocar.service.metrics import METRICS
from trocar.wire.requests import FitRequest, RunRequest

WAIT_S = 20.0
CAPTURE = (ops.Read(id="r", site="resid_post.1", at="prompt[-1]"), ops.Capture(id="kept", of=("r",)))


@pytest.fixture
def fresh(serve: Callable[..., Any], tiny: Any, tmp_path: Path) -> Iterator[Any]:
    made = serve(tmp_path, [tiny])
    yield made
    made.service.close()


def run(
    server: Any, *nodes: Any, prompts: tuple[Any, ...] = ("abc",), most: int = 0, who: str = "alice"
) -> str:
    generation = Generation(max_new_tokens=most, stop_at_eos=False)
    request = RunRequest(model="tiny", prompts=prompts, program=Program(nodes=nodes), generation=generation)
    released = server.service.run(server.principals[who], request, {}, None)
    return str(json.loads(released.payload)["job"])


def wait(server: Any, job: str, who: str = "alice") -> dict[str, Any]:
    released = server.service.job_result(server.principals[who], job, WAIT_S)
    assert released.status == 200, released.payload
    found: dict[str, Any] = json.loads(released.payload)
    return found


def held(server: Any) -> int:
    """Bits still reserved, over all accounts."""
    return sum(account.held_bits for account in server.service.gate.ledger.balances())


def test_a_finished_run_holds_nothing(fresh: Any) -> None:
    wait(fresh, run(fresh, *CAPTURE))
    assert held(fresh) == 0
    assert fresh.service.check() == []


def test_a_store_that_breaks_fails_the_run_and_gives_back(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trocar.store import Writer

    def broken(*_: Any) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(Writer, "append", broken)
    job = run(fresh, *CAPTURE)
    neighbour = run(fresh, ops.Logprobs(id="lp", tokens=(1,)), who="bob")
    with pytest.raises(ServerFault) as caught:
        wait(fresh, job)
    assert caught.value.code == "internal"
    assert wait(fresh, neighbour, "bob")["outputs"]["lp"]
    assert held(fresh) == 0
    assert fresh.store.list("alice") == []


def test_rows_deleted_while_they_are_written_fail_the_run(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant may delete a handle that is not finished: the run says so and holds nothing."""
    from trocar.store import Writer

    plain = Writer.finish

    def late(writer: Any) -> Any:
        fresh.store.delete("alice", writer.id)
        return plain(writer)

    monkeypatch.setattr(Writer, "finish", late)
    with pytest.raises(TrocarError) as caught:
        wait(fresh, run(fresh, *CAPTURE))
    assert caught.value.code == "handle_not_found"
    assert held(fresh) == 0


def test_closing_gives_back_what_waits(serve: Callable[..., Any], tiny: Any, tmp_path: Path) -> None:
    """Forty jobs, most of them without a worker, one generating: all end, none stays reserved."""
    server = serve(tmp_path, [tiny])
    jobs = [run(server, ops.Text(id="text"), most=250) for _ in range(40)]
    ledger, closed = server.service.gate.ledger, []
    close = server.service.gate.close
    server.service.gate.close = lambda: closed.append(held(server)) or close()
    started = time.monotonic()
    server.service.close()
    assert time.monotonic() - started < 15
    assert closed == [0]
    states = {server.service._jobs.view(server.principals["alice"], j).state for j in jobs}
    assert states <= {"CANCELLED", "FAILED", "COMPLETED"}
    assert ledger is not None


def _captured(
    server: Any,
    n: int = 12,
    who: str = "alice",
    *,
    prompts: Any = None,
    at: str = "prompt[-1]",
    most: int = 0,
) -> str:
    nodes = (ops.Read(id="r", site="resid_post.1", at=at), ops.Capture(id="kept", of=("r",)))
    words = prompts or tuple(f"word {i}" for i in range(n))
    return str(
        wait(server, run(server, *nodes, prompts=words, most=most, who=who), who)["outputs"]["kept"]["handle"]
    )


def _fit(server: Any, handle: str, labels: tuple[Any, ...], **more: Any) -> Any:
    request = FitRequest(handle=handle, kind=more.pop("kind", "mean_diff"), labels=labels, **more)
    return json.loads(server.service.fit(server.principals["alice"], request, None).payload)["job"]


def test_a_fit_that_cannot_be_released_leaves_no_artifact(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = _captured(fresh)

    def refused(*_: Any) -> Any:
        raise errors.refuse("result_not_finite", "", "no")

    monkeypatch.setattr(type(fresh.service.gate), "release", refused)
    job = _fit(fresh, handle, tuple(i % 2 for i in range(12)))
    with pytest.raises(TrocarError):
        wait(fresh, job)
    assert fresh.store.list_artifacts("alice") == []
    assert held(fresh) == 0


def test_a_cancelled_fit_stops_between_sites(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = _captured(fresh)
    plain = local._load

    def cancelling(reader: Any, watch: Any, index: int, site: str) -> Any:
        fresh.service._jobs.cancel(fresh.principals["alice"], watch.job.id)
        return plain(reader, watch, index, site)

    monkeypatch.setattr(local, "_load", cancelling)
    with pytest.raises(TrocarError) as caught:
        wait(fresh, _fit(fresh, handle, tuple(i % 2 for i in range(12))))
    assert caught.value.code == "cancelled"
    assert held(fresh) == 0


def test_labels_follow_prompts_that_have_several_rows_or_none(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are per prompt: repeated for each of its rows, and left out for a prompt that gave none."""
    seen: dict[str, Any] = {}

    def spy(_kind: str, _sources: Any, labels: Any, groups: Any, **_: Any) -> Any:
        seen.update(labels=list(labels), groups=groups)
        raise errors.refuse("bad_labels", "", "enough seen")

    monkeypatch.setattr(fits.analysis, "check", lambda *a, **k: spy(a[0], None, a[1], a[2]))
    several = _captured(fresh, prompts=("ab", "c", "defg"), at="prompt[*]")
    with pytest.raises(ProgramError):
        _fit(fresh, several, (1, 2, 3), kind="ridge")
    assert seen == {"labels": [1, 1, 2, 3, 3, 3, 3], "groups": [0, 0, 1, 2, 2, 2, 2]}
    handles, found = fresh.service.gate.handles, _captured(fresh, prompts=("a", "b", "c"))
    sparse = replace(handles.find("alice", found), counts=(1, 0, 1))
    monkeypatch.setattr(type(handles), "find", lambda *_: sparse)
    with pytest.raises(ProgramError):
        _fit(fresh, found, (1, 2, 3), kind="ridge")
    assert seen == {"labels": [1, 3], "groups": None}
    with pytest.raises(ProgramError):
        _fit(fresh, found, (1, 2, 3), kind="ridge", groups=(7, 8, 9))
    assert seen == {"labels": [1, 3], "groups": [7, 9]}


def test_rows_of_another_model_are_not_fitted(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = _captured(fresh)
    model = fresh.service._models["tiny"]
    other = replace(model, facts=model.facts.model_copy(update={"fingerprint": "sha256:" + "f" * 64}))
    monkeypatch.setitem(fresh.service._models, "tiny", other)
    before = fresh.service.gate.ledger.head()
    with pytest.raises(ProgramError) as caught:
        _fit(fresh, handle, tuple(i % 2 for i in range(12)))
    assert caught.value.code == "wrong_handle"
    assert fresh.service.gate.ledger.head() == before


def test_a_fit_releases_as_many_numbers_as_its_price(fresh: Any) -> None:
    handle = _captured(fresh, 24)
    for kind, folds in itertools.product(set(METRICS) - {"linear_map"}, (0, 2)):
        labels = tuple(float(i) for i in range(24)) if kind == "ridge" else tuple(i % 2 for i in range(24))
        found = wait(fresh, _fit(fresh, handle, labels, kind=kind, folds=folds))
        assert found["receipt"]["reserved_bits"] == sum(found["receipt"]["released_bits"].values())
        ((_, sent),) = (tuple(site.values()) for site in found["outputs"]["fit"]["sites"])
        assert len(sent) == len(METRICS[kind]) + (3 if folds else 0)

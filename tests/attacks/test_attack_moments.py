"""When something is seen: nothing of an admitted request before it is charged, and no moment that a worker chooses.

Beside the answer there are the account, the list of handles, the job's view and what a deletion says. An attacker may
look at all of them at any time, for nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import worker_room as w

from trocar import errors
from trocar.gate import policy_file

OVERHEAD = 256
TICK_S = 1.5
CAPTURE = w.CAPTURE["program"]["nodes"]
GEN = {
    "program": {
        "nodes": [
            {"id": "h", "op": "read", "site": "resid_post.1", "at": "gen[*]"},
            {"id": "out", "op": "capture", "of": ["h"]},
        ]
    },
    "generation": {"max_new_tokens": 6},
}


@pytest.fixture
def cell(tmp_path: Path, tiny_of: Callable[..., Any]) -> Iterator[w.Cell]:
    loaded = tiny_of(w.MODEL, open_weights=False, weight_bits=4_000_000_000)
    with w.cell(loaded, tmp_path) as made:
        yield made


@pytest.fixture
def slow(tmp_path: Path, tiny_of: Callable[..., Any]) -> Iterator[w.Cell]:
    """A house whose answers leave at long ticks."""
    policy = policy_file.read(f"version = 1\n[people.tiers.external]\ntick_ms = {int(1000 * TICK_S)}\n")
    loaded = tiny_of(w.MODEL, open_weights=False, weight_bits=4_000_000_000)
    with w.cell(loaded, tmp_path, policy) as made:
        yield made


def steps(n: int) -> dict[str, Any]:
    each = {"model": w.MODEL, "prompts": w.PROMPTS, **GEN}
    return {"steps": [each] * n, "keep": True}


def account(wire: w.Wire) -> tuple[str, ...]:
    """What can be seen beside the answer."""
    looks = [wire.ask("GET", path).body.decode() for path in ("/v1/ledger", "/v1/handles")]
    plan = wire.ask("POST", "/v1/plan", {"model": w.MODEL, "prompts": w.PROMPTS, **w.LENS})
    return (*looks, plan.body.decode())


def test_a_session_tells_nothing_of_its_steps_before_it_is_charged(cell: w.Cell) -> None:
    """Rows of generated tokens say how long each text is: the list of handles has them with the charge, not before."""
    wire, runs, go = cell.wire(), list[str](), threading.Event()

    def before(order: Any, _watch: Any) -> None:
        runs.append(order.id)
        if len(runs) == 3:
            assert go.wait(20)

    cell.worker.before = before
    job = wire.ask("POST", "/v1/sessions", steps(3)).json["job"]
    while len(runs) < 3:
        time.sleep(0.01)
    assert wire.ask("GET", "/v1/handles").json == {"handles": [], "stored_bytes": 0}
    wire.ask("DELETE", f"/v1/jobs/{job}")
    go.set()
    ended = wire.ask("GET", f"/v1/jobs/{job}/result?wait_s=30")
    assert ended.json["error"]["refusals"][0]["code"] == "cancelled"
    assert wire.ask("GET", "/v1/handles").json["handles"] == []
    assert wire.budget()["spent_bits"] == OVERHEAD


def test_a_session_that_ends_well_keeps_what_it_captured(cell: w.Cell) -> None:
    """The test above can fail: the same handles are there once they are charged."""
    wire = cell.wire()
    answer = wire.finish(wire.ask("POST", "/v1/sessions", steps(2)))
    assert answer.status == 200, answer.body
    told = {step["outputs"]["out"]["handle"] for step in answer.json["steps"]}
    assert {h["handle"] for h in wire.ask("GET", "/v1/handles").json["handles"]} == told
    assert wire.budget()["spent_bits"] > OVERHEAD


def test_a_run_whose_answer_is_refused_leaves_no_handle(cell: w.Cell) -> None:
    """An output without a row ends the request after its rows were captured."""
    wire, seen = cell.wire(), list[Any]()
    enter = cell.service.gate.handles.enter
    cell.service.gate.handles.enter = lambda *args: (seen.append(args), enter(*args))[1]  # type: ignore[method-assign]
    short = {"id": "late", "op": "read", "site": "resid_post.1", "at": "gen[5]"}
    program = {
        "program": {"nodes": [*GEN["program"]["nodes"], short, {"id": "n", "op": "norm", "of": "late"},
                              {"id": "s", "op": "score", "of": "n"}]},
        "generation": {"max_new_tokens": 6},
    }  # fmt: skip

    def stops_early(_order: Any, arrays: list[Any]) -> list[Any]:
        arrays[0]["lengths"] = arrays[0]["lengths"] * 0 + 1
        return arrays

    cell.worker.bend = stops_early
    answer = wire.run(program)
    assert answer.json["error"]["refusals"][0]["code"] == "edit_missed"
    assert seen == []
    assert wire.ask("GET", "/v1/handles").json["handles"] == []
    assert wire.budget()["spent_bits"] == OVERHEAD


@pytest.mark.parametrize("stall_s", [0.0, 0.4])
def test_a_deletion_says_nothing_of_the_worker(cell: w.Cell, stall_s: float) -> None:
    """Whatever code a worker answers with, and whenever: deleting says the same, at once."""
    wire, answers = cell.wire(), set[tuple[int, str, str]]()
    handle_of = [wire.run(w.CAPTURE).json["outputs"]["out"]["handle"] for _ in range(4)]

    def fails(handles: Any) -> None:
        time.sleep(stall_s)
        raise errors.refuse(codes[handles[0]], "weights", "0.125")

    codes = dict(zip(handle_of, ("bad_value", "disk_full", "handle_not_found", "internal"), strict=True))
    cell.worker.bend_erase = fails
    started_s = time.monotonic()
    for handle in handle_of:
        answers.add(w.seen(wire.ask("DELETE", f"/v1/handles/{handle}")))
    took_s = time.monotonic() - started_s
    assert len(answers) == 1
    assert {status for status, *_ in answers} == {200}
    assert took_s < 4 * stall_s or not stall_s


def test_a_fault_in_erasing_does_not_replace_the_runs_own(cell: w.Cell) -> None:
    def fails(_handles: Any) -> None:
        raise errors.refuse("disk_full", "weights", "0.125")

    def run_fails(*_: Any) -> Any:
        raise errors.refuse("edit_missed", "", "weights")

    wire = cell.wire()
    cell.worker.bend, cell.worker.bend_erase = run_fails, fails
    answer = wire.run(w.CAPTURE)
    assert answer.json["error"]["refusals"][0]["code"] == "edit_missed"


@pytest.mark.parametrize("how", ["well", "badly"])
def test_the_account_moves_at_ticks(slow: w.Cell, how: str) -> None:
    """However long the worker takes: account, handles and plans stay as they were until the job's tick."""
    moved_s = []
    for stall_s in (0.0, 0.7):
        wire = slow.wire()

        def late(_order: Any, arrays: list[Any], stall_s: float = stall_s) -> list[Any]:
            time.sleep(stall_s)
            if how == "badly":
                raise errors.refuse("edit_missed", "", "weights")
            return arrays

        slow.worker.bend = late
        started_s = time.monotonic()
        job = wire.ask("POST", "/v1/runs", {"model": w.MODEL, "prompts": w.PROMPTS, **w.CAPTURE}).json["job"]
        first = account(wire)
        while account(wire) == first and time.monotonic() - started_s < 10:
            time.sleep(0.02)
        moved_s.append(time.monotonic() - started_s)
        wire.ask("GET", f"/v1/jobs/{job}/result?wait_s=30")
    assert all(TICK_S - 0.1 < s < 2 * TICK_S - 0.2 for s in moved_s), moved_s


def test_a_request_to_the_airlock_is_answered_at_ticks(slow: w.Cell) -> None:
    """Whoever asks that rows leave hears of it at a tick, and so does whoever looks at the list."""
    wire = slow.wire()
    handle = wire.run(w.CAPTURE).json["outputs"]["out"]["handle"]
    took_s = []
    for stall_s in (0.0, 0.7):
        slow.worker.before_numbers = partial(time.sleep, stall_s)
        started_s = time.monotonic()
        body = {"handle": handle, "reason": "to look at them", "controls": "a locked room"}
        wire.ask("POST", "/v1/airlock/exports", body)
        took_s.append(time.monotonic() - started_s)
    assert all(TICK_S - 0.1 < s < 2 * TICK_S - 0.2 for s in took_s), took_s

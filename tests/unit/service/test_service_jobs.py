"""The table of jobs: states, cancelling, forgetting, closing; with work that is written here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from trocar import errors
from trocar.errors import NotFound, Overloaded, RunFailed, ServerFault
from trocar.gate import release
from trocar.gate.keys import KeyId, Principal, TenantId
from trocar.gate.policy import Role, Tier
from trocar.gate.scopes import EVERYTHING, Scope
from trocar.service import jobs as room
from trocar.service.jobs import Job, Jobs
from trocar.wire import about
from trocar.wire import results as r

WAIT_S = 10.0


def person(tenant: str, tokens: tuple[str, ...] = (), scope: Scope = EVERYTHING) -> Principal:
    key = KeyId(f"key-of-{tenant}")
    return Principal(
        key, TenantId(tenant), Tier.open, Role.researcher, tenant, tenant, scope, (), token_ids=tokens
    )


A, B, LAB = person("a"), person("b"), person("lab")


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    assert made.check() == []
    made.close()


def answer() -> Any:
    return release.public(about.HealthView(status="ok", version="x"))


def test_a_job_is_done(jobs: Jobs) -> None:
    def work(job: Job) -> Any:
        jobs.progress(job, 2)
        return answer()

    view = jobs.start(A, "run", 3, work)
    found = jobs.wait(A, view.job, WAIT_S)
    assert isinstance(found, release.Released)
    assert (jobs.view(A, view.job).state, jobs.view(A, view.job).done) == ("COMPLETED", 2)


@pytest.mark.parametrize(
    "error", [ValueError("secret"), KeyError("x"), errors.refuse("disk_full", "", "full")]
)
def test_a_job_that_fails(jobs: Jobs, error: Exception) -> None:
    def work(_job: Job) -> Any:
        raise error

    view = jobs.start(A, "run", 1, work)
    with pytest.raises(errors.TrocarError) as caught:
        jobs.wait(A, view.job, WAIT_S)
    assert caught.value.code == ("disk_full" if isinstance(error, errors.TrocarError) else "internal")
    assert "secret" not in str(caught.value)
    state = jobs.view(A, view.job)
    assert (state.state, state.refusals[0].code) == ("FAILED", caught.value.code)


def test_a_job_belongs_to_its_tenant(jobs: Jobs) -> None:
    view = jobs.start(A, "run", 1, lambda _: answer())
    for verb in (jobs.view, jobs.cancel, lambda t, j: jobs.wait(t, j, 0)):
        with pytest.raises(NotFound) as foreign:
            verb(B, view.job)
        assert foreign.value.code == "job_not_found"


def test_a_narrow_credential_has_what_it_asked_for(jobs: Jobs) -> None:
    """A key has every job of its tenant; a token, or a key with a scope, its own and those of tokens made from it."""
    mine, child, other = (person("a", tokens) for tokens in (("t",), ("t", "u"), ("v",)))
    scoped = person("a", scope=Scope(models=frozenset({"m"})))
    asked = {name: jobs.start(who, "run", 1, lambda _: answer()).job
             for name, who in (("key", A), ("token", mine), ("child", child))}  # fmt: skip
    sees: dict[str, set[str]] = {}
    for name, who in (("key", A), ("token", mine), ("child", child), ("other", other), ("scoped", scoped)):
        for job, job_id in asked.items():
            with suppress(NotFound):
                jobs.view(who, job_id)
                jobs.cancel(who, job_id)
                jobs.wait(who, job_id, WAIT_S)
                sees.setdefault(name, set()).add(job)
    assert sees == {
        "key": {"key", "token", "child"},
        "token": {"token", "child"},
        "child": {"child"},
        "scoped": {"key", "token", "child"},  # all of them were asked for with this key
    }


def test_tenants_take_turns(jobs: Jobs) -> None:
    """Whoever starts many jobs of one kind keeps a neighbour waiting for one of them at most."""
    go, done = threading.Event(), list[str]()

    def work(name: str) -> Any:
        def run(_job: Job) -> Any:
            assert go.wait(WAIT_S)
            done.append(name)
            return answer()

        return run

    views = [jobs.start(A, "fit", 1, work("a0"))]
    while jobs.view(A, views[0].job).state != "RUNNING":
        time.sleep(0.005)
    views += [jobs.start(A, "fit", 1, work(f"a{i}")) for i in range(1, 5)]
    late = jobs.start(B, "fit", 1, work("b"))
    later = jobs.start(A, "fit", 1, work("a5"))
    assert (jobs.view(B, late.job).ahead, jobs.view(A, later.job).ahead) == (1, 5)
    go.set()
    for view in (*views, later):
        jobs.wait(A, view.job, WAIT_S)
    assert done == ["a0", "a1", "b", "a2", "a3", "a4", "a5"]


def test_waiting_ends_after_its_time(jobs: Jobs) -> None:
    go = threading.Event()
    view = jobs.start(A, "run", 1, lambda _: (go.wait(WAIT_S), answer())[1])
    started = time.monotonic()
    found = jobs.wait(A, view.job, 0.1)
    assert isinstance(found, r.JobView)
    assert time.monotonic() - started < 2
    go.set()
    assert isinstance(jobs.wait(A, view.job, WAIT_S), release.Released)


def test_a_cancelled_job_finds_out_wherever_it_is(jobs: Jobs) -> None:
    """Waiting for a worker; before it said how it is stopped; after."""
    go, stopped = threading.Event(), []

    def block(job: Job) -> Any:
        go.wait(WAIT_S)
        jobs.require_wanted(job)
        jobs.stoppable(job, lambda: stopped.append(job.id))
        return answer()

    first = jobs.start(A, "fit", 1, block)
    queued = jobs.start(A, "fit", 1, block)
    while jobs.view(A, first.job).state != "RUNNING":
        time.sleep(0.005)
    assert jobs.view(A, queued.job).state == "QUEUED"
    assert jobs.view(A, queued.job).ahead == 0
    jobs.cancel(A, queued.job)
    jobs.cancel(A, first.job)
    go.set()
    for view in (first, queued):
        with pytest.raises(RunFailed) as caught:
            jobs.wait(A, view.job, WAIT_S)
        assert caught.value.code == "cancelled"
        assert jobs.view(A, view.job).state == "CANCELLED"

    ready, hold = threading.Event(), threading.Event()

    def running(job: Job) -> Any:
        jobs.stoppable(job, hold.set)
        ready.set()
        assert hold.wait(WAIT_S)
        raise errors.refuse("cancelled", "", "stopped")

    view = jobs.start(A, "run", 1, running)
    ready.wait(WAIT_S)
    jobs.cancel(A, view.job)
    with pytest.raises(RunFailed):
        jobs.wait(A, view.job, WAIT_S)


def test_stop_is_called_when_the_cancelling_came_first(jobs: Jobs) -> None:
    go, stopped = threading.Event(), []

    def late(job: Job) -> Any:
        go.wait(WAIT_S)
        jobs.stoppable(job, lambda: stopped.append(True))
        return answer()

    view = jobs.start(A, "run", 1, late)
    jobs.cancel(A, view.job)
    go.set()
    jobs.wait(A, view.job, WAIT_S)
    assert stopped == [True]


def test_unfinished_jobs_are_counted_per_tenant(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_UNFINISHED_PER_TENANT", 2)
    go = threading.Event()
    views = [jobs.start(A, "run", 1, lambda _: (go.wait(WAIT_S), answer())[1]) for _ in range(2)]
    for refused in (lambda: jobs.start(A, "run", 1, lambda _: answer()), lambda: jobs.require_room("a")):
        with pytest.raises(Overloaded) as caught:
            refused()
        assert caught.value.code == "queue_full"
    jobs.require_room("b")
    go.set()
    for view in views:
        jobs.wait(A, view.job, WAIT_S)
    jobs.require_room("a")


def test_old_and_many_results_are_forgotten(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_FINISHED_PER_TENANT", 3)
    mine = [jobs.finished(A, "run", 1, answer()).job for _ in range(5)]
    other = jobs.finished(B, "run", 1, answer()).job
    jobs.finished(A, "run", 1, answer())
    with pytest.raises(NotFound):
        jobs.view(A, mine[0])
    assert jobs.view(A, mine[-1]).state == "COMPLETED"
    assert jobs.view(B, other).state == "COMPLETED"
    monkeypatch.setattr(room, "KEEP_S", -1.0)
    jobs.finished(A, "run", 1, answer())
    with pytest.raises(NotFound):
        jobs.view(B, other)


def test_closing_runs_what_waits_so_that_it_can_give_back(jobs: Jobs) -> None:
    gave_back: list[str] = []

    def work(job: Job) -> Any:
        try:
            time.sleep(0.05)
            jobs.require_wanted(job)
            return answer()
        finally:
            gave_back.append(job.id)

    views = [jobs.start(A, "fit", 1, work) for _ in range(4)]
    jobs.close()
    assert sorted(gave_back) == sorted(v.job for v in views)
    assert {jobs.view(A, v.job).state for v in views} <= {"CANCELLED", "COMPLETED"}
    with pytest.raises(ServerFault):
        jobs.start(A, "run", 1, work)


def test_a_job_with_a_tick_ends_on_it_and_tells_nothing_before(jobs: Jobs) -> None:
    seen: list[Any] = []
    go = threading.Event()

    def work(job: Any) -> Any:
        jobs.progress(job, 2)
        seen.append(jobs.view(LAB, job.id))
        go.wait(WAIT_S)
        return answer()

    started = time.monotonic()
    view = jobs.start(LAB, "run", 3, work, tick_ms=200)
    assert (view.state, view.done, view.ahead) == ("RUNNING", 0, 0)
    time.sleep(0.25)
    go.set()
    while not isinstance(found := jobs.wait(LAB, view.job, WAIT_S), release.Released):
        assert (found.state, found.done) == ("RUNNING", 0)
    took = time.monotonic() - started
    assert took >= 0.4
    assert (seen[0].state, seen[0].done, seen[0].elapsed_s) == ("RUNNING", 0, 0.0)
    ended = jobs.view(LAB, view.job)
    assert (ended.state, ended.done, ended.total) == ("COMPLETED", 3, 3)
    assert ended.elapsed_s == pytest.approx(0.4)


@pytest.mark.parametrize("code", ["disk_full", "cancelled", None])
def test_a_job_that_fails_ends_on_its_tick_too(jobs: Jobs, code: str | None) -> None:
    def work(_job: Job) -> Any:
        raise errors.refuse(code, "", "no") if code else ValueError("no")

    started = time.monotonic()
    view = jobs.start(LAB, "run", 1, work, tick_ms=150)
    with pytest.raises(errors.TrocarError):
        jobs.wait(LAB, view.job, WAIT_S)
    assert time.monotonic() - started >= 0.15
    assert jobs.view(LAB, view.job).elapsed_s in (0.1, 0.2)  # 0.15, to one place


def test_a_cancelled_job_with_a_tick_says_so_on_its_tick(jobs: Jobs) -> None:
    stopped = threading.Event()

    def work(job: Job) -> Any:
        jobs.stoppable(job, stopped.set)
        stopped.wait(WAIT_S)
        jobs.require_wanted(job)
        return answer()

    view = jobs.start(LAB, "run", 1, work, tick_ms=300)
    assert jobs.cancel(LAB, view.job).state == "RUNNING"
    with pytest.raises(RunFailed):
        jobs.wait(LAB, view.job, WAIT_S)
    assert jobs.view(LAB, view.job).state == "CANCELLED"


def test_a_stop_does_not_wait_for_ticks() -> None:
    made = Jobs()
    view = made.start(LAB, "run", 1, lambda _: answer(), tick_ms=10_000)
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 5
    assert made.view(LAB, view.job).state == "COMPLETED"


def test_jobs_with_ticks_are_in_nobodys_way_and_nobody_is_in_theirs(jobs: Jobs) -> None:
    """How many wait before a job is for those to know of whom time may be known."""
    go = threading.Event()
    began = threading.Event()
    first = jobs.start(A, "fit", 1, lambda _: (began.set(), go.wait(WAIT_S), answer())[2])
    assert began.wait(WAIT_S)
    behind = [jobs.start(A, "fit", 1, lambda _: answer(), tick_ms=tick_ms) for tick_ms in (0, 50)]
    assert [jobs.view(A, view.job).ahead for view in behind] == [0, 0]
    third = jobs.start(A, "fit", 1, lambda _: answer())
    assert jobs.view(A, third.job).ahead == 2
    assert [jobs.view(A, view.job).state for view in behind] == ["QUEUED", "RUNNING"]
    go.set()
    for view in (first, *behind, third):
        assert isinstance(jobs.wait(A, view.job, WAIT_S), release.Released)

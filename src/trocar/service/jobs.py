"""Jobs: work that outlives the request that started it. States, progress, waiting; results in memory.

A job belongs to one tenant, and a narrow credential has only what it made itself; anybody else's question gets the
answer for a job that does not exist. Work runs on threads of its kind, for runs and sessions (which wait for the
engine) and for fits, shared by turns between tenants, so none starves another.
"""

from __future__ import annotations

import logging
import secrets
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, NewType

from trocar import errors
from trocar.gate.keys import Principal
from trocar.gate.release import Released
from trocar.service import ticks
from trocar.service.turns import Turns
from trocar.wire import results as r

log = logging.getLogger(__name__)
JobId = NewType("JobId", str)
Kind = Literal["run", "fit", "session"]
KEEP_S: Final = 3600.0
MAX_UNFINISHED_PER_TENANT: Final = 64
RECENT: Final = 16
MAX_FINISHED_PER_TENANT: Final = 256
MAX_WAITING_PER_TENANT: Final = 64
WORKERS: Final[dict[Kind, int]] = {"run": 256, "fit": 1, "session": 64}  # runs only wait for the engine


@dataclass(slots=True)
class Job:
    """One job; fields change under the table's lock.

    Attributes:
        maker: the credential that asked for it.
        unwanted: stays set once somebody cancelled it.
        tick_ms: it ends at whole multiples of this since its start, and says nothing before; 0 for a job of whom
            time and progress may be known.
        ticked: whether it waited for that moment.
    """

    id: JobId
    tenant: str
    maker: tuple[str, ...]
    kind: Kind
    total: int
    started_s: float
    state: r.JobState = "QUEUED"
    done: int = 0
    ended_s: float | None = None
    released: Released | None = None
    error: errors.TrocarError | None = None
    stop: Callable[[], None] | None = field(default=None, repr=False)
    unwanted: bool = False
    claim: Claim | None = None
    tick_ms: int = 0
    ticked: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """An idempotency key of one API key, and the request it was used for."""

    key_id: str
    idempotency_key: str
    request_digest: str


Work = Callable[[Job], Released]


class Jobs:
    """The table of jobs of one server."""

    def __init__(self) -> None:
        self._jobs: dict[JobId, Job] = {}
        self._changed = threading.Condition()
        self._waiting: Counter[str] = Counter()
        self._closing = False
        self._hurry = threading.Event()
        self._pools = {kind: Turns(n, f"trocar-{kind}") for kind, n in WORKERS.items()}

    def start(
        self,
        principal: Principal,
        kind: Kind,
        total: int,
        work: Work,
        claim: Claim | None = None,
        tick_ms: int = 0,
    ) -> r.JobView:
        """Queues work, which always runs: a job that nobody wants any more finds out by `require_wanted`.

        Raises:
            Overloaded: `queue_full` when the tenant has too many unfinished jobs.
            ServerFault: `internal` when the server is stopping.
        """
        job = self._made(principal, kind, total, claim=claim, tick_ms=tick_ms)
        with self._changed:
            self.require_room(job.tenant)
            self._forget_old(job.tenant)
            self._jobs[job.id] = job
            self._pools[kind].submit(job.tenant, partial(self._run, job, work))
        return self.view(principal, job.id)

    @staticmethod
    def _made(principal: Principal, kind: Kind, total: int, **known: Any) -> Job:
        name, started_s = JobId(f"job_{secrets.token_hex(16)}"), time.monotonic()
        return Job(name, principal.tenant, principal.credential, kind, total, started_s, **known)

    def require_room(self, tenant: str) -> None:
        """Refuses what `start` would refuse now, for callers who want to know before they pay."""
        with self._changed:
            unfinished = sum(1 for j in self._jobs.values() if j.tenant == tenant and j.state not in r.FINAL)
            if self._closing:
                raise errors.refuse("internal", "", "the server is stopping")
            if unfinished >= MAX_UNFINISHED_PER_TENANT:
                raise errors.full(f"{unfinished} of your jobs are unfinished", self._until_one_ends(tenant))

    def _until_one_ends(self, tenant: str) -> float:
        """Seconds until the oldest unfinished job should end, by how long the tenant's last ones took."""
        mine = [j for j in self._jobs.values() if j.tenant == tenant]
        took = [j.ended_s - j.started_s for j in mine if j.ended_s is not None][-RECENT:]
        oldest = min((j.started_s for j in mine if j.ended_s is None), default=time.monotonic())
        return statistics.fmean(took or [1.0]) - (time.monotonic() - oldest)

    def running(self, principal: Principal, claim: Claim | None) -> r.JobView | None:
        """The unfinished job of the same request: what a client gets who never heard the first answer."""
        with self._changed:
            for job in self._jobs.values():
                if (
                    claim is not None
                    and job.maker == principal.credential
                    and job.claim == claim
                    and job.state not in r.FINAL
                ):
                    return self._view(job)
        return None

    def finished(self, principal: Principal, kind: Kind, total: int, released: Released) -> r.JobView:
        """Enters a job whose answer exists already: a replay."""
        job = self._made(principal, kind, total, state="COMPLETED", done=total, released=released)
        job.ended_s = time.monotonic()
        with self._changed:
            self._forget_old(job.tenant)
            self._jobs[job.id] = job
        return self.view(principal, job.id)

    def view(self, principal: Principal, job_id: str) -> r.JobView:
        """State of a job.

        Raises:
            NotFound: `job_not_found`, the same for absent, expired and foreign.
        """
        with self._changed:
            return self._view(self._find(principal, job_id))

    def wait(self, principal: Principal, job_id: str, timeout_s: float) -> Released | r.JobView:
        """The result if the job completes in time, else its state; raises what made it fail.

        Raises:
            NotFound: `job_not_found`.
            Overloaded: `queue_full` when too many of the tenant's connections wait already.
        """
        with self._changed:
            job, tenant = self._find(principal, job_id), principal.tenant
            if job.state not in r.FINAL and timeout_s > 0:
                if self._waiting[tenant] >= MAX_WAITING_PER_TENANT:
                    raise errors.full(f"{MAX_WAITING_PER_TENANT} of your connections wait for a result", 1.0)
                self._waiting[tenant] += 1
                try:
                    self._changed.wait_for(lambda: job.state in r.FINAL, timeout_s)
                finally:
                    self._waiting[tenant] -= 1
            if job.error is not None:
                raise job.error
            return job.released if job.released is not None else self._view(job)

    def cancel(self, principal: Principal, job_id: str) -> r.JobView:
        """Asks a job to stop; one that still waits for its turn ends as soon as that comes."""
        with self._changed:
            job = self._find(principal, job_id)
        self._stop(job)
        return self.view(principal, job_id)

    def _stop(self, job: Job) -> None:
        with self._changed:
            job.unwanted, stop = True, job.stop
        if stop is not None:
            stop()

    def tick(self, job: Job) -> Callable[[], None]:
        """Waits for the moment at which it may be known that a job has ended."""
        return partial(self._to_tick, job)

    def watch(self, job: Job, before: int = 0) -> JobWatch:
        """For whoever does a job's work; `before` parts of it were done earlier."""
        return JobWatch(self, job, before)

    def stoppable(self, job: Job, stop: Callable[[], None]) -> None:
        """Says how a running job is stopped; it is stopped at once if it was cancelled before."""
        with self._changed:
            job.stop, unwanted = stop, job.unwanted
        if unwanted:
            stop()

    def require_wanted(self, job: Job) -> None:
        """Ends a cancelled job between two steps of its work.

        Raises:
            RunFailed: `cancelled`.
        """
        with self._changed:
            if job.unwanted:
                raise errors.refuse("cancelled", "", "the job was cancelled")

    def progress(self, job: Job, done: int) -> None:
        with self._changed:
            job.done = done
            self._changed.notify_all()

    def close(self) -> None:
        """Cancels what is unfinished and waits for it: each job gives back what it had reserved."""
        with self._changed:
            self._closing = True
            self._hurry.set()
            unfinished = [j for j in self._jobs.values() if j.state not in r.FINAL]
        for job in unfinished:
            self._stop(job)
        for pool in self._pools.values():
            pool.shutdown()

    def check(self) -> list[str]:
        """Broken invariants, for idle loops and `trocar doctor`."""
        with self._changed:
            return [f"{j.id} is {j.state} without result or error" for j in self._jobs.values() if _broken(j)]

    def _run(self, job: Job, work: Work) -> None:
        self._move(job, "RUNNING")
        try:
            released = work(job)
        except errors.TrocarError as e:
            self._to_tick(job)
            self._end(job, "CANCELLED" if e.code == "cancelled" else "FAILED", error=e)
        except Exception:
            log.exception("job %s failed", job.id)
            self._to_tick(job)
            self._end(job, "FAILED", error=errors.refuse("internal", "", "the job could not be run"))
        else:
            self._to_tick(job)
            self._end(job, "COMPLETED", released=released)

    def _to_tick(self, job: Job) -> None:
        """Waits for the job's next tick, so that its end tells no more of how long it took; a stop does not wait."""
        if job.tick_ms and not job.ticked:
            job.ticked = True
            self._hurry.wait(ticks.rest_s(job.started_s, job.tick_ms))

    def _move(self, job: Job, state: r.JobState) -> None:
        with self._changed:
            job.state = state
            self._changed.notify_all()

    def _end(
        self,
        job: Job,
        state: r.JobState,
        *,
        released: Released | None = None,
        error: errors.TrocarError | None = None,
    ) -> None:
        with self._changed:
            job.state, job.released, job.error, job.ended_s = state, released, error, time.monotonic()
            job.stop = None
            self._changed.notify_all()

    def _find(self, principal: Principal, job_id: str) -> Job:
        job = self._jobs.get(JobId(job_id))
        if job is None or not principal.owns(job.tenant, job.maker):
            raise errors.refuse("job_not_found", "job", f"there is no job {job_id[:80]!r}")
        return job

    def _view(self, job: Job) -> r.JobView:
        elapsed_s, state, done, ahead = (
            (job.ended_s or time.monotonic()) - job.started_s,
            job.state,
            job.done,
            0,
        )
        if job.tick_ms:
            elapsed_s -= elapsed_s % (job.tick_ms / 1000)
            state, done = (state, job.total) if state in r.FINAL else ("RUNNING", 0)
        elif state == "QUEUED":
            ahead = self._ahead(job)
        return r.JobView(
            job=job.id,
            kind=job.kind,
            state=state,
            done=done,
            total=job.total,
            ahead=ahead,
            elapsed_s=round(elapsed_s, 1),
            refusals=tuple(r.RefusalView(**x.as_json()) for x in job.error.refusals) if job.error else (),
        )

    def _ahead(self, job: Job) -> int:
        waiting = (j for j in self._jobs.values() if j.kind == job.kind and j.state == "QUEUED")
        mine = sum(1 for j in waiting if j.tenant == job.tenant and j.started_s < job.started_s)
        return self._pools[job.kind].ahead(job.tenant, mine)

    def _forget_old(self, tenant: str) -> None:
        """Drops results that are old, and the oldest of a tenant who has too many: they are in memory."""
        now = time.monotonic()
        ended = [j for j in self._jobs.values() if j.ended_s is not None]
        mine = sorted((j for j in ended if j.tenant == tenant), key=lambda j: j.ended_s or 0.0, reverse=True)
        gone = {j.id for j in ended if now - (j.ended_s or 0.0) > KEEP_S}
        for job_id in gone | {j.id for j in mine[MAX_FINISHED_PER_TENANT:]}:
            del self._jobs[job_id]


@dataclass(frozen=True, slots=True)
class JobWatch:
    """Tells a worker's progress to a job, and a job's end to a worker."""

    jobs: Jobs
    job: Job
    before: int

    def progress(self, done: int) -> None:
        self.jobs.progress(self.job, self.before + done)

    def stoppable(self, stop: Callable[[], None]) -> None:
        self.jobs.stoppable(self.job, stop)

    def require_wanted(self) -> None:
        self.jobs.require_wanted(self.job)


def _broken(job: Job) -> bool:
    return job.state in r.FINAL and job.released is None and job.error is None

"""The run use case: reserve, run in the shared batch, store what is captured, release what leaves."""

from __future__ import annotations

from dataclasses import dataclass

from trocar.gate.gate import Gate, Hold
from trocar.gate.release import Released
from trocar.service.jobs import Job, Jobs
from trocar.service.passes import Passes
from trocar.service.prepare import Prepared, Served
from trocar.store import Store


@dataclass(frozen=True, slots=True)
class Run:
    """One admitted run; `work` is what its job does."""

    prepared: Prepared
    served: Served
    store: Store
    gate: Gate
    jobs: Jobs
    tenant: str
    hold: Hold

    def work(self, job: Job) -> Released:
        passes = Passes(job.id, self.prepared, self.served, self.store, self.jobs, self.tenant)
        try:
            results = passes.run(job)
            step = passes.step(results, self.hold.cost.total_bits)
            return self.gate.release(self.hold, lambda press: press.run(step, self.hold.cost))
        except BaseException:
            self._undo(passes)
            raise

    def _undo(self, passes: Passes) -> None:
        """Nothing was released: the rows go, the overhead stays charged."""
        try:
            self.gate.cancel(self.hold)
        finally:
            passes.erase()

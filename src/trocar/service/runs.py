"""The run use case: reserve, run in the shared batch, enter what was captured, release what leaves."""

from __future__ import annotations

from dataclasses import dataclass

from trocar.gate.gate import Gate, Hold
from trocar.gate.release import Released
from trocar.service.jobs import Job, Jobs
from trocar.service.steps import Request
from trocar.service.worker import Model


@dataclass(frozen=True, slots=True)
class Run:
    """One admitted run; `work` is what its job does."""

    request: Request
    model: Model
    gate: Gate
    jobs: Jobs
    hold: Hold

    def work(self, job: Job) -> Released:
        try:
            ran = self.request.run(self.jobs.watch(job), {})
            self.gate.handles.add(ran.captured)
            return self.gate.release(self.hold, lambda press: press.run(ran.step, self.hold.cost))
        except BaseException as e:
            self._undo(e)
            raise

    def _undo(self, fault: BaseException) -> None:
        """Nothing was released: the rows go, the overhead stays charged."""
        try:
            self.gate.cancel(self.hold, fault)
        finally:
            self.gate.handles.forget(self.request.tenant, self.request.ids)
            self.model.worker.erase(self.request.tenant, self.request.ids)

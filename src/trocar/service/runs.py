"""The run use case: reserve, run in the shared batch, release what leaves together with what was captured."""

from __future__ import annotations

from dataclasses import dataclass

from trocar.gate.gate import Gate, Hold
from trocar.gate.release import Released
from trocar.service.ending import Ending
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
        request, tick = self.request, self.jobs.tick(job)
        end = Ending(self.gate, self.hold, tick, self.model.worker, request.tenant, request.ids)
        try:
            ran = request.run(self.jobs.watch(job), {})
            return end.release(lambda press: press.run(ran.step, self.hold.cost), ran.captured)
        except BaseException as e:
            end.undo(e)
            raise

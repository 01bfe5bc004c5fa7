"""The way of one request through the engine: a task per variant, the rows it captures, what comes back.

A run has one of these, a session one per step. Whoever owns it releases the result or erases the rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from trocar import errors
from trocar.engine.protocol import F32, RowTags, Task, TaskResult
from trocar.gate import release
from trocar.gate.answers import Raw
from trocar.graph import ops
from trocar.graph.check import Checked
from trocar.models.load import Loaded
from trocar.service import arrays
from trocar.service.jobs import Job, Jobs
from trocar.service.prepare import Prepared, Served
from trocar.service.values import probe_values, stored_values, vector_values
from trocar.store import RowTable, Store, Writer
from trocar.wire import results as r

IN_FLIGHT: Final = 32  # variants of one sweep that are in the engine at once: the queue belongs to everybody
FULL_S: Final = 0.2
NOTHING: Final[Mapping[str, str]] = {}
UNSAID: Final = r.Precision(scalar_bits=0, vector_bits=0, logprob_step=0.0, logprob_floor=None)
"""Stands in a receipt until the gate says how numbers left."""


@dataclass(frozen=True, slots=True)
class StoreSink:
    """Writes an engine's captured rows into a handle."""

    writer: Writer
    loaded: Loaded

    def append(self, vectors: Mapping[str, F32], tags: RowTags) -> None:
        ids = tags.token_ids.tolist()
        texts = dict(zip(ids, self.loaded.token_texts([max(i, 0) for i in ids]), strict=True))
        self.writer.append(
            vectors,
            RowTable.of(
                prompt=tags.prompts,
                position=tags.positions,
                token_id=tags.token_ids,
                token=["" if i < 0 else texts[i] for i in ids],  # a row of a whole prompt has no token
                phase=tags.phases,
            ),
        )


@dataclass(frozen=True, slots=True)
class Passes:
    """The variants of one prepared request; without a sweep there is one.

    Attributes:
        name: id of the request for the engine.
        writers: of each variant, what it captures, by the name of the output.
    """

    name: str
    prepared: Prepared
    served: Served
    store: Store
    jobs: Jobs
    tenant: str
    writers: list[dict[str, Writer]] = field(default_factory=list)

    def run(self, job: Job, made: Mapping[str, str] = NOTHING, before: int = 0) -> list[TaskResult]:
        """Runs every variant; when one fails, or the job is cancelled, the others are stopped.

        Args:
            made: handles by their name in a session.
            before: prompts of this job that were done before.
        """
        waiting = deque(range(len(self.prepared.variants)))
        running: dict[Future[TaskResult], int] = {}
        results: dict[int, TaskResult] = {}
        progress = _Progress(self.jobs, job, before)
        try:
            while waiting or running:
                self.jobs.require_wanted(job)
                self._fill(waiting, running, made, progress, begun=bool(results) or before > 0)
                self.jobs.stoppable(job, self._stop)
                if not running:
                    time.sleep(FULL_S)
                    continue
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results[running.pop(future)] = future.result()
        except BaseException:
            self._stop()
            wait(running)  # their rows may go only when nobody writes them any more
            raise
        return [results[i] for i in range(len(results))]

    def _fill(
        self,
        waiting: deque[int],
        running: dict[Future[TaskResult], int],
        made: Mapping[str, str],
        progress: _Progress,
        *,
        begun: bool,
    ) -> None:
        """Hands variants to the engine; a full engine refuses a request that has not begun, and delays one that has."""
        while waiting and len(running) < IN_FLIGHT:
            try:
                future = self.served.engine.submit(self._task(waiting[0], made, progress.of(waiting[0])))
            except errors.Overloaded as e:
                if e.code != "queue_full" or not (running or begun):
                    raise
                return
            running[future] = waiting.popleft()

    def _stop(self) -> None:
        for i in range(len(self.prepared.variants)):
            self.served.engine.cancel(self._id(i))

    def _id(self, variant: int) -> str:
        return self.name if len(self.prepared.variants) == 1 else f"{self.name}.{variant}"

    def _task(self, index: int, made: Mapping[str, str], progress: Callable[[int], None]) -> Task:
        prepared, checked = self.prepared, self.prepared.variants[index].checked
        return Task(
            request=self._id(index),
            checked=checked,
            tokens=prepared.tokens,
            vectors=vector_values(checked.program, prepared.vectors, self.store, self.tenant),
            stored=stored_values(checked, self.store, self.tenant, made),
            probes=probe_values(checked.program, self.store, self.tenant),
            sinks={n: StoreSink(w, self.served.loaded) for n, w in self._open(index, checked).items()},
            progress=progress,
            tenant=self.tenant,
            family=self.name if len(prepared.variants) > 1 else None,
            fork=prepared.fork,
        )

    def _open(self, index: int, checked: Checked) -> dict[str, Writer]:
        """A writer for each capture; a variant that was refused for lack of room keeps its own."""
        while len(self.writers) <= index:
            self.writers.append({})
        mine, facts = self.writers[index], self.served.facts
        for node in checked.outputs():
            if isinstance(node, ops.Capture) and node.id not in mine:
                widths = {str(checked.values[ref].sites[0]): checked.values[ref].width for ref in node.of}
                mine[node.id] = self.store.create(
                    self.tenant, facts.name, facts.fingerprint, widths, checked.program.digest()
                )
        return mine

    def step(self, results: list[TaskResult], reserved_bits: int) -> release.Step:
        """What the gate makes an answer of."""
        heads = self.served.facts.n_heads
        variants = [
            release.Variant(
                dict(variant.settings),
                Raw(
                    variant.checked, arrays.of_result(variant.checked, result, heads), self._finished(writers)
                ),
            )
            for variant, writers, result in zip(self.prepared.variants, self.writers, results, strict=True)
        ]
        tokens = tuple(tuple(self.served.loaded.token_texts(list(ids))) for ids in self.prepared.tokens)
        return release.Step(variants, bool(self.prepared.request.sweep), tokens, self._receipt(reserved_bits))

    @staticmethod
    def _finished(writers: Mapping[str, Writer]) -> dict[str, str]:
        """Handles of what was captured, which is complete now."""
        return {name: writer.finish().id for name, writer in writers.items()}

    def _receipt(self, reserved_bits: int) -> r.Receipt:
        facts = self.served.facts
        return r.Receipt(
            model=facts.name,
            fingerprint=facts.fingerprint,
            engine=self.served.engine.name,
            dtype=facts.dtype,
            program_digest=self.prepared.program.digest(),
            request_digest=self.prepared.digest,
            seed=self.prepared.request.generation.seed,
            edits=(),
            released_bits={},
            reserved_bits=reserved_bits,
            precision=UNSAID,
        )

    def erase(self) -> None:
        """Deletes everything that was captured."""
        for writer in [w for writers in self.writers for w in writers.values()]:
            with suppress(errors.NotFound):  # its owner may have deleted it already
                self.store.delete(self.tenant, writer.id)


@dataclass(frozen=True, slots=True)
class _Progress:
    """Finished prompts of a job, over the variants that run."""

    jobs: Jobs
    job: Job
    before: int
    done: dict[int, int] = field(default_factory=dict)

    def of(self, variant: int) -> Callable[[int], None]:
        def tell(done: int) -> None:
            self.done[variant] = done
            self.jobs.progress(self.job, self.before + sum(self.done.values()))

        return tell

"""The way of one order through the engine: a task per variant, the rows it captures, the arrays that come back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from trocar import errors
from trocar.engine.protocol import F32, Engine, RowTags, Task, TaskResult
from trocar.gate.schema import Arrays
from trocar.graph import ops
from trocar.graph.check import Checked
from trocar.models.load import Loaded
from trocar.service.arrays import of_result
from trocar.service.prepare import Prepared
from trocar.service.values import probe_values, stored_values, vector_values
from trocar.service.worker import RunOrder, Watch
from trocar.store import RowTable, Store, Writer
from trocar.store.ids import HandleId

IN_FLIGHT: Final = 32  # variants of one sweep that are in the engine at once: the queue belongs to everybody
FULL_S: Final = 0.2


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
    """The variants of one order; without a sweep there is one.

    Attributes:
        writers: of each variant, what it captures, by the name of the output.
    """

    order: RunOrder
    loaded: Loaded
    engine: Engine
    store: Store
    watch: Watch
    writers: list[dict[str, Writer]] = field(default_factory=list)

    @property
    def prepared(self) -> Prepared:
        return self.order.prepared

    def run(self) -> list[TaskResult]:
        """Runs every variant; when one fails, or the order is not wanted any more, the others are stopped."""
        waiting = deque(range(len(self.prepared.variants)))
        running: dict[Future[TaskResult], int] = {}
        results: dict[int, TaskResult] = {}
        progress = _Progress(self.watch)
        try:
            while waiting or running:
                self.watch.require_wanted()
                self._fill(waiting, running, progress, begun=bool(results) or self.order.begun)
                self.watch.stoppable(self._stop)
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
        progress: _Progress,
        *,
        begun: bool,
    ) -> None:
        """Hands variants to the engine; a full engine refuses a request that has not begun, and delays one that has."""
        while waiting and len(running) < IN_FLIGHT:
            try:
                future = self.engine.submit(self._task(waiting[0], progress.of(waiting[0])))
            except errors.Overloaded as e:
                if e.code != "queue_full" or not (running or begun):
                    raise
                return
            running[future] = waiting.popleft()

    def _stop(self) -> None:
        for i in range(len(self.prepared.variants)):
            self.engine.cancel(self._id(i))

    def _id(self, variant: int) -> str:
        return self.order.id if len(self.prepared.variants) == 1 else f"{self.order.id}.{variant}"

    def _task(self, index: int, progress: Callable[[int], None]) -> Task:
        prepared, checked = self.prepared, self.prepared.variants[index].checked
        tenant, made = self.order.tenant, self.order.made
        return Task(
            request=self._id(index),
            checked=checked,
            tokens=prepared.tokens,
            vectors=vector_values(checked.program, prepared.vectors, self.store, tenant),
            stored=stored_values(checked, self.store, tenant, made),
            probes=probe_values(checked.program, self.store, tenant),
            sinks={n: StoreSink(w, self.loaded) for n, w in self._open(index, checked).items()},
            progress=progress,
            tenant=tenant,
            family=self.order.id if len(prepared.variants) > 1 else None,
            fork=prepared.fork,
        )

    def _open(self, index: int, checked: Checked) -> dict[str, Writer]:
        """A writer for each capture; a variant that was refused for lack of room keeps its own."""
        while len(self.writers) <= index:
            self.writers.append({})
        mine, facts = self.writers[index], self.engine.facts
        for node in checked.outputs():
            if isinstance(node, ops.Capture) and node.id not in mine:
                widths = {str(checked.values[ref].sites[0]): checked.values[ref].width for ref in node.of}
                mine[node.id] = self.store.create(
                    self.order.tenant,
                    facts.name,
                    facts.fingerprint,
                    widths,
                    checked.program.digest(),
                    handle=HandleId(self.order.handles[index][node.id]),
                )
        return mine

    def arrays(self, results: Sequence[TaskResult]) -> list[Arrays]:
        """What the gate declared, of each variant; finishes what was captured."""
        for writers in self.writers:
            for writer in writers.values():
                writer.finish()
        heads = self.engine.facts.n_heads
        pairs = zip(self.prepared.variants, results, strict=True)
        return [of_result(variant.checked, result, heads) for variant, result in pairs]

    def erase(self) -> None:
        """Deletes everything that was captured."""
        for writer in [w for writers in self.writers for w in writers.values()]:
            with suppress(errors.NotFound):  # its owner may have deleted it already
                self.store.delete(self.order.tenant, writer.id)


@dataclass(frozen=True, slots=True)
class _Progress:
    """Finished prompts of an order, over the variants that run."""

    watch: Watch
    done: dict[int, int] = field(default_factory=dict)

    def of(self, variant: int) -> Callable[[int], None]:
        def tell(done: int) -> None:
            self.done[variant] = done
            self.watch.progress(sum(self.done.values()))

        return tell

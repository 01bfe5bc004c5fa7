"""`HFEngine`: one thread that owns the model and serves the prompts of all live requests, a batch at a time.

Prompts are taken in turns from the live requests, so a long request does not hold up a short one, and a
batch mixes whatever is waiting. The thread is the only one that touches the model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from trocar import errors
from trocar.engine.collect import Collector
from trocar.engine.executor import Group, Tallies
from trocar.engine.hf.batch import Batch, Body, Lane
from trocar.engine.hf.sampler import Sampler
from trocar.engine.protocol import EngineStats, Task, TaskResult
from trocar.engine.readout import Readout
from trocar.graph.facts import ModelFacts
from trocar.models.load import Loaded
from trocar.models.taps import tapped
from trocar.sites import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of a batch and of the queue.

    Attributes:
        batch_tokens: most padded tokens of a first pass.
        batch_sequences: most sequences in a batch.
        batch_bytes: most bytes of values that programs hold in a batch.
        gather_s: how long an idle engine waits for company after the first request.
        waiting_requests: most requests that may wait.
    """

    batch_tokens: int = 4096
    batch_sequences: int = 96
    batch_bytes: int = 1 << 30
    gather_s: float = 0.005
    waiting_requests: int = 256


@dataclass(slots=True)
class Live:
    """A request that is not finished: which prompts wait, how many are done, where results gather."""

    task: Task
    future: Future[TaskResult]
    tallies: Tallies
    collector: Collector
    waiting: deque[int]
    done: int = 0
    failed: errors.TrocarError | None = None


@dataclass(slots=True)
class Fill:
    """How full a batch is; its first sequence always fits."""

    limits: Limits
    longest: int = 0
    count: int = 0
    held_bytes: int = 0

    def takes(self, task: Task, prompt: int) -> bool:
        """Adds a prompt if it fits."""
        longest = max(self.longest, len(task.tokens[prompt]))
        held_bytes = self.held_bytes + task.checked.held_bytes[prompt]
        fits = (
            longest * (self.count + 1) <= self.limits.batch_tokens
            and self.count < self.limits.batch_sequences
            and held_bytes <= self.limits.batch_bytes
        )
        if self.count and not fits:
            return False
        self.longest, self.count, self.held_bytes = longest, self.count + 1, held_bytes
        return True


@dataclass(slots=True)
class Counters:
    forwards: int = 0
    sequences: int = 0
    tokens: int = 0
    most_requests: int = 0


class HFEngine:
    """The embedded engine. Thread-safe; `close()` stops its thread."""

    name = "hf"

    def __init__(self, loaded: Loaded, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._facts = loaded.facts
        self._body = _body(loaded)
        self._live: dict[str, Live] = {}
        self._turn: deque[str] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._over = False
        self._counters = Counters()
        self._thread = threading.Thread(target=self._loop, name="trocar-engine", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def submit(self, task: Task) -> Future[TaskResult]:
        """Queues a task.

        Raises:
            Overloaded: `queue_full`.
            ServerFault: `internal` when the engine is stopping.
        """
        tallies = Tallies(task)
        live = Live(task, Future(), tallies, Collector(task, tallies), deque(range(len(task.tokens))))
        with self._wake:
            if self._closing or self._over:
                raise _stopping()
            if len(self._live) >= self._limits.waiting_requests:
                raise errors.refuse("queue_full", "", f"{len(self._live)} requests are waiting")
            self._live[task.request] = live
            self._turn.append(task.request)
            self._wake.notify_all()
        return live.future

    def cancel(self, request: str) -> None:
        """Stops a request before its next token or batch; its future fails with `cancelled`."""
        with self._wake:
            live = self._live.get(request)
            if live is not None and live.failed is None:
                live.failed = errors.refuse("cancelled", "", "the job was cancelled")
                self._wake.notify_all()

    def stats(self) -> EngineStats:
        c = self._counters
        return EngineStats(c.forwards, c.sequences, c.tokens, c.most_requests, len(self._live))

    def check(self) -> list[str]:
        """Broken invariants; empty when idle and well."""
        found = [f"{r} is live but takes no turn" for r in self._live if r not in self._turn]
        if self._over and not self._closing:
            found.append("the engine thread is dead")
        return found

    def close(self) -> None:
        """Stops what runs before its next token and fails what waits; twice is once."""
        with self._wake:
            self._closing = True
            for live in self._live.values():
                live.failed = live.failed or _stopping()
            self._wake.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: bool(self._live) or self._closing)
                    if self._closing:
                        return
                if len(self._live) == 1:
                    time.sleep(self._limits.gather_s)
                self._serve_one_batch()
        finally:  # whatever ends this thread, nobody waits for it for ever
            self._abandon()

    def _abandon(self) -> None:
        with self._wake:
            self._over = True
            left = list(self._live.values())
            self._live.clear()
            self._turn.clear()
        for live in left:
            live.future.set_exception(live.failed or _stopping())

    def _serve_one_batch(self) -> None:
        taken = self._take()
        if taken:
            self._run(taken)
        for live in list(self._live.values()):
            if live.failed is not None or live.done == len(live.task.tokens):
                self._finish(live)

    def _take(self) -> list[tuple[Live, list[int]]]:
        """Prompts for the next batch, one at a time from each live request in turn, within the limits."""
        taken: dict[str, list[int]] = {}
        fill = Fill(self._limits)
        with self._wake:
            idle = 0
            while idle < len(self._turn):
                request = self._turn[0]
                self._turn.rotate(-1)
                live = self._live[request]
                if live.failed is not None or not live.waiting or not fill.takes(live.task, live.waiting[0]):
                    idle += 1
                    continue
                idle = 0
                taken.setdefault(request, []).append(live.waiting.popleft())
        return [(self._live[r], prompts) for r, prompts in taken.items()]

    def _run(self, taken: list[tuple[Live, list[int]]]) -> None:
        lanes = [lane for live, prompts in taken for lane in _lanes(live, prompts)]
        batch = Batch(self._body, lanes)
        try:
            batch.run()
        except Exception:  # one batch is lost, the engine is not
            log.exception("batch failed")
            _fail(taken, errors.refuse("internal", "", "the batch could not be run"))
        self._count(taken, lanes, batch)
        for live, prompts in taken:
            live.failed = live.failed or next(
                (x.group.failed for x in lanes if x.group.task is live.task and x.group.failed), None
            )
            live.done += len(prompts)
            _tell(live)

    def _count(self, taken: list[tuple[Live, list[int]]], lanes: list[Lane], batch: Batch) -> None:
        c = self._counters
        c.forwards += batch.forwards
        c.sequences += len(lanes)
        c.tokens += sum(len(x.tokens) + x.fed for x in lanes)
        c.most_requests = max(c.most_requests, len(taken))

    def _finish(self, live: Live) -> None:
        with self._wake:
            del self._live[live.task.request]
            self._turn.remove(live.task.request)
        if live.failed is not None:
            live.future.set_exception(live.failed)
            return
        try:
            result = live.collector.result()
        except errors.TrocarError as e:
            live.future.set_exception(e)
        except Exception:
            log.exception("the result of request %s could not be made", live.task.request)
            live.future.set_exception(errors.refuse("internal", "", "the result could not be made"))
        else:
            live.future.set_result(result)


def _lanes(live: Live, prompts: list[int]) -> list[Lane]:
    group = Group(live.task, tuple(prompts), live.tallies)
    generation = live.task.checked.generation
    return [
        Lane(
            group,
            live.collector,
            slot,
            live.task.tokens[p],
            Sampler(generation, p),
            lambda: live.failed is not None,
        )
        for slot, p in enumerate(prompts)
    ]


def _stopping() -> errors.TrocarError:
    return errors.refuse("internal", "", "the server is stopping")


def _tell(live: Live) -> None:
    try:
        live.task.progress(live.done)
    except Exception:
        log.exception("the progress of request %s could not be told", live.task.request)
        live.failed = live.failed or errors.refuse("internal", "", "the request's progress could not be told")


def _fail(taken: list[tuple[Live, list[int]]], error: errors.TrocarError) -> None:
    for live, _ in taken:
        live.failed = live.failed or error


def _body(loaded: Loaded) -> Body:
    norm = loaded.adapter.tap(Site("final_norm")).module
    readout = Readout(norm, loaded.model.get_output_embeddings())
    return Body(
        loaded.model.base_model,
        lambda visit: tapped(loaded.adapter, visit),
        readout,
        frozenset(loaded.facts.eos),
    )

"""`HFEngine`: one thread that owns the model and serves the prompts of all live requests, a step at a time.

Requests are admitted and retired at every step; prompts, chunks of prompts and single next tokens of strangers
share one forward pass over packed rows. The thread is the only one that touches the model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from trocar import errors
from trocar.engine.hf.attention import install
from trocar.engine.hf.kv import KV, KVShape, PrefixCache
from trocar.engine.hf.schedule import Chunk, Limits, Scheduler
from trocar.engine.hf.sequences import Live, cancelled
from trocar.engine.hf.stack import Stack
from trocar.engine.hf.step import Body, Pass
from trocar.engine.hf.validate import takes_steps, validate_packing
from trocar.engine.protocol import EngineStats, Task, TaskResult
from trocar.engine.readout import Readout
from trocar.graph.facts import ModelFacts
from trocar.models.load import Loaded

log = logging.getLogger(__name__)
__all__ = ["HFEngine", "Limits"]


class HFEngine:
    """The embedded engine. Thread-safe; `close()` stops its thread.

    Args:
        give_up: ends the process, where one may be ended: called when the engine takes no steps any more, before
            anybody who waits hears of it. Without it the engine goes on with what still works.

    Raises:
        RunFailed: `model_unsupported` when packed rows do not give what the model gives on its own.
    """

    name = "hf"

    def __init__(
        self, loaded: Loaded, limits: Limits | None = None, give_up: Callable[[], None] | None = None
    ) -> None:
        self._limits = limits or Limits()
        self._give_up = give_up
        self._body, self._shape = _body(loaded)
        self._facts = validate_packing(loaded, self._body, self._shape)
        kv = KV(self._shape, self._limits.tokens_of(self._shape))
        self._scheduler = Scheduler(self._limits, kv, PrefixCache(kv, kv.limit_tokens // 4))
        self._wake = threading.Condition()
        self._closing = False
        self._over = False
        self._forwards = self._tokens = self._done = self._most = self._failed = 0
        self._between_s, self._last_s = 1.0, time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="trocar-engine", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def submit(self, task: Task) -> Future[TaskResult]:
        """Queues a task.

        Raises:
            Overloaded: `queue_full`.
            ProgramError: `too_expensive` when one of its prompts can never fit.
            ServerFault: `internal` when the engine is stopping.
        """
        self._require_room(task)
        live = Live.of(task, 2.0 * self._facts.parameters)
        with self._wake:
            if self._closing or self._over:
                raise _stopping()
            if len(self._scheduler.live) >= self._limits.waiting_requests:
                raise errors.full(f"{len(self._scheduler.live)} requests are waiting", self._between_s)
            self._scheduler.add(live)
            self._wake.notify_all()
        return live.future

    def _require_room(self, task: Task) -> None:
        most = max(len(t) for t in task.tokens) + task.checked.generation.max_new_tokens
        limit = self._scheduler.kv.limit_tokens
        if KV.capacity(most) > limit:
            raise errors.refuse(
                "too_expensive",
                "prompts",
                f"a prompt with its text takes {most} tokens; this engine holds {limit}",
            )

    def cancel(self, request: str) -> None:
        """Stops a request before its next step; its future fails with `cancelled`."""
        with self._wake:
            live = self._scheduler.live.get(request)
            if live is not None:
                live.run.fail(cancelled())
                self._wake.notify_all()

    def stats(self) -> EngineStats:
        with self._wake:
            scheduler, counts = self._scheduler, self._scheduler.counts
            return EngineStats(
                forwards=self._forwards,
                sequences=self._done,
                tokens=self._tokens,
                most_requests=self._most,
                live_requests=len(scheduler.live),
                chunks=counts.chunks,
                preemptions=counts.preemptions,
                prefix_hit_tokens=counts.prefix_hit_tokens,
                shared_rows=counts.shared_rows,
                live_sequences=len(scheduler.running),
                kv_bytes=scheduler.kv.allocated_bytes,
            )

    def check(self) -> list[str]:
        """Broken invariants; empty when idle and well."""
        with self._wake:
            found = self._scheduler.check()
        if self._over and not self._closing:
            found.append("the engine thread is dead")
        return found

    def forget(self) -> None:
        """Empties the prefix cache."""
        with self._wake:
            self._scheduler.cache.clear()

    def close(self) -> None:
        """Stops what runs before its next step and fails what waits; twice is once."""
        with self._wake:
            self._closing = True
            for live in self._scheduler.live.values():
                live.run.fail(_stopping())
            self._wake.notify_all()
        self._thread.join()

    # ---- the thread ----

    def _loop(self) -> None:
        try:
            while self._serve():
                pass
        except BaseException:
            if self._give_up is not None:
                log.critical("the engine's thread has ended", exc_info=True)
                self._give_up()
            raise
        finally:  # whatever ends this thread, nobody waits for it for ever
            self._abandon()

    def _serve(self) -> bool:
        """One step, if anything is live; False when the engine is closing."""
        with self._wake:
            self._wake.wait_for(lambda: bool(self._scheduler.live) or self._closing)
            if self._closing:
                return False
            lonely = len(self._scheduler.live) == 1 and not self._scheduler.running
        if lonely:
            time.sleep(self._limits.gather_s)
        with self._wake:
            self._drop_failed()
            chunks = self._scheduler.plan()
        if chunks:
            self._run(chunks)
        with self._wake:
            over = self._retire()
        for live in over:
            _deliver(live)
        return True

    def _run(self, chunks: list[Chunk]) -> None:
        owners = {id(c.sequence.live): c.sequence.live for c in chunks}
        step = Pass(self._body, chunks)
        try:
            with torch.inference_mode():
                step.run()
        except Exception:  # one step is lost, the engine is not
            log.exception("a step failed")
            self._require_steps()
            for live in owners.values():
                live.run.fail(errors.refuse("internal", "", "the step could not be run"))
        self._forwards += 1
        self._tokens += sum(c.count for c in chunks)
        self._most = max(self._most, len(owners))

    def _require_steps(self) -> None:
        """Gives up when a step that nobody asked for fails too.

        Without memory oneDNN fails to prepare a product once and then, for every new number of rows, for ever.
        """
        if self._give_up is None:
            return
        self._failed += 1
        if not takes_steps(self._body, self._shape, self._limits.step_tokens + self._failed):
            log.critical("the engine takes no steps any more")
            self._give_up()

    def _drop_failed(self) -> None:
        for live in [x for x in self._scheduler.live.values() if x.run.failed is not None]:
            for sequence in [s for s in self._scheduler.running if s.live is live]:
                self._scheduler.retire(sequence)

    def _retire(self) -> list[Live]:
        """Takes finished prompts and requests out; gives the requests that are over."""
        scheduler = self._scheduler
        finished = [s for s in scheduler.running if s.finished and s.live.run.failed is None]
        # from the last place of a pool to the first: what leaves together then leaves no holes to close
        for sequence in sorted(finished, key=lambda s: -1 if s.slot is None else s.slot.index, reverse=True):
            scheduler.retire(sequence)
            sequence.live.collector.generated(sequence.prompt, *sequence.text(self._body.eos))
            sequence.live.done += 1
            self._done += 1
            _tell(sequence.live)
        over = [x for x in scheduler.live.values() if x.over]
        for live in over:
            scheduler.remove(live)
        if over:
            self._pace(len(over))
        return over

    def _pace(self, ended: int) -> None:
        """How long a request takes to make room for another, lately."""
        now = time.monotonic()
        self._between_s = 0.8 * self._between_s + 0.2 * (now - self._last_s) / ended
        self._last_s = now

    def _abandon(self) -> None:
        with self._wake:
            self._over = True
            left = list(self._scheduler.live.values())
            for live in left:
                self._scheduler.remove(live)
            self._scheduler.cache.clear()
        for live in left:
            live.future.set_exception(live.run.failed or _stopping())


def _deliver(live: Live) -> None:
    if live.run.failed is not None:
        live.future.set_exception(live.run.failed)
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


def _tell(live: Live) -> None:
    try:
        live.task.progress(live.done)
    except Exception:
        log.exception("the progress of request %s could not be told", live.task.request)
        live.run.fail(errors.refuse("internal", "", "the request's progress could not be told"))


def _stopping() -> errors.TrocarError:
    return errors.refuse("internal", "", "the server is stopping")


def _body(loaded: Loaded) -> tuple[Body, KVShape]:
    adapter, facts = loaded.adapter, loaded.facts
    attentions = [adapter.attention(i) for i in range(adapter.n_layers)]
    stack = Stack(adapter, install(loaded.model, attentions))
    body = Body(stack, Readout(adapter.final_norm, adapter.unembed), frozenset(facts.eos))
    return body, KVShape(adapter.n_layers, facts.n_kv_heads, facts.d_head, loaded.model.dtype)

"""A worker in another process, as the service sees it: orders become frames, declared bytes become arrays.

The length of what may come back follows from the check alone and is known before anything is read. Of a failure
come the number of a code and of a node; progress does not come at all, since a worker could speak with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from typing import Final

from trocar import errors
from trocar.engine.protocol import EngineStats
from trocar.gate import schema
from trocar.gate.schema import Arrays, Field
from trocar.host.gate.line import Errand, Line, Open
from trocar.service import metrics
from trocar.service.prepare import digest
from trocar.service.worker import FitOrder, NumbersOrder, RunOrder, Watch
from trocar.strict import Strict
from trocar.wire import orders
from trocar.wire.frames import Kind
from trocar.wire.orders import EraseSheet, FitSheet, NumbersSheet, Pinned, RunSheet

log = logging.getLogger(__name__)
GRACE_S: Final = 30.0
"""How long a worker may take to stop something that is not wanted any more."""
QUICK_S: Final = 30.0
LOOK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class RemoteWorker:
    """Runs orders for one model over the line to its worker."""

    line: Line
    pinned: Pinned

    @property
    def name(self) -> str:
        return self.pinned.engine

    def run(self, order: RunOrder, watch: Watch) -> list[Arrays]:
        prepared = order.prepared
        heads = self.pinned.facts.n_heads
        declared = [schema.fields(variant.checked, heads) for variant in prepared.variants]
        sheet = RunSheet(
            model=self.pinned.facts.name,
            order=order.id,
            tenant=order.tenant,
            request=prepared.request,
            handles=tuple(dict(named) for named in order.handles),
            made=dict(order.made),
            begun=order.begun,
            known=dict(prepared.known),
            prices=prepared.prices,
            digest=prepared.digest,
        )
        errand = Errand(
            Kind.run,
            _sized(orders.with_arrays(sheet, prepared.vectors)),
            _size(declared),
            tuple(f"program.nodes[{i}]" for i in range(len(prepared.program.nodes))),
            f"{order.tenant}:{prepared.digest}",
        )
        body = self._result(errand, watch)
        watch.progress(prepared.sequences)  # that it is all there, the gate knows by itself
        return _arrays(body, declared)

    def fit(self, order: FitOrder, watch: Watch) -> Arrays:
        shape = (len(order.sites), len(metrics.names(order.request)))
        declared = (Field("metrics", "<f4", shape),)
        sheet = FitSheet(
            model=self.pinned.facts.name,
            order=order.id,
            tenant=order.tenant,
            request=order.request,
            sites=order.sites,
            labels=None if order.labels is None else tuple(order.labels),
            groups=None if order.groups is None else tuple(order.groups),
            artifact=order.artifact,
        )
        errand = Errand(
            Kind.fit,
            _sized(_json(sheet)),
            _size([declared]),
            (),
            f"{order.tenant}:{digest(order.request, {})}",
        )
        body = self._result(errand, watch)
        watch.progress(len(order.sites))
        return _arrays(body, [declared])[0]

    def numbers(self, order: NumbersOrder) -> Arrays:
        sheet = NumbersSheet(
            model=self.pinned.facts.name,
            tenant=order.tenant,
            handle=order.handle,
            rows=order.rows,
            shapes={field.name: field.shape for field in order.fields},
        )
        body = self._quick(Kind.numbers, _size([order.fields]), _json(sheet))
        return _arrays(body, [order.fields])[0]

    def erase(self, tenant: str, handles: Sequence[str]) -> None:
        """Deletes rows now or, where the worker is not there, as soon as there is one again."""
        if not handles:
            return
        body = _json(EraseSheet(tenant=tenant, handles=tuple(handles)))
        try:
            self._quick(Kind.erase, 0, body)
        except errors.Overloaded:
            self.line.owe(body)
        except errors.ServerFault as e:
            log.warning("rows could not be erased: %s", e.reason)

    def stats(self) -> EngineStats:
        """Counters as the worker tells them: for operators, and believed by nobody."""
        return EngineStats(**orders.unpack_stats(self._quick(Kind.stats, orders.STATS_BYTES, self._named())))

    def check(self) -> list[str]:
        """How many problems the worker finds; what they are stands in its own log."""
        if self.line.distrusted:
            return [f"the worker is not to be trusted: {self.line.distrusted}"]
        n = orders.unpack_count(self._quick(Kind.check, orders.COUNT_BYTES, self._named()))
        return [f"the worker of {self.pinned.facts.name!r} found {n} problems; see its log"] if n else []

    def halt(self) -> None:
        self.line.halt()

    def close(self) -> None:
        self.line.close()

    def _named(self) -> bytes:
        return _json(orders.Ask(model=self.pinned.facts.name))

    def _quick(self, kind: Kind, length: int, body: bytes) -> bytes:
        entry = self.line.order(Errand(kind, body, length))
        try:
            return entry.result.result(QUICK_S)
        except Late:
            stalled = errors.refuse("internal", "", "the worker did not answer in time")
            self.line.give_up(entry, stalled)
            raise stalled from None

    def _result(self, errand: Errand, watch: Watch) -> bytes:
        watch.require_wanted()
        entry = self.line.order(errand)
        wait = _Wait(self.line, entry)
        watch.stoppable(wait.stop)
        return wait.result()


@dataclass(eq=False, slots=True)
class _Wait:
    """Somebody who waits for an errand, until nobody wants it and the worker had time to say so."""

    line: Line
    entry: Open
    stopped_s: float | None = None

    def stop(self) -> None:
        if self.stopped_s is None:
            self.stopped_s = time.monotonic()
            self.line.cancel(self.entry)

    def result(self) -> bytes:
        future: Future[bytes] = self.entry.result
        while True:
            try:
                return future.result(LOOK_S)
            except Late:
                if self.stopped_s is not None and time.monotonic() - self.stopped_s > GRACE_S:
                    self.line.give_up(self.entry, errors.refuse("cancelled", "", "the job was cancelled"))


def _json(sheet: Strict) -> bytes:
    return sheet.model_dump_json().encode()


def _sized(body: bytes) -> bytes:
    if len(body) > orders.MOST_ORDER_BYTES:
        raise errors.refuse(
            "too_large", "$", f"an order of {len(body)} bytes; at most {orders.MOST_ORDER_BYTES}"
        )
    return body


def _size(declared: Sequence[Sequence[Field]]) -> int:
    size_bytes = sum(field.size_bytes for fields in declared for field in fields)
    if size_bytes > orders.MOST_RESULT_BYTES:
        reason = f"a result of {size_bytes} bytes; at most {orders.MOST_RESULT_BYTES} leave a worker at once"
        raise errors.refuse("too_expensive", "program", reason)
    return size_bytes


def _arrays(body: bytes, declared: Sequence[Sequence[Field]]) -> list[Arrays]:
    view, offset = memoryview(body), 0
    found: list[Arrays] = []
    for fields in declared:
        arrays = {}
        for field in fields:
            arrays[field.name] = orders.unpack_array(view, offset, field.type, field.shape)
            offset += field.size_bytes
        found.append(arrays)
    return found

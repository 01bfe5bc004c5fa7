"""Takes orders from one gate, runs them beside each other, and sends back arrays or the number of a code.

Nothing that a library says, no traceback and no message goes into a frame: those are for the process's own log. One
gate is served at a time; when it goes, what runs for it is stopped and its rows are deleted.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Final

from trocar import errors
from trocar.gate import schema
from trocar.graph.facts import ModelFacts
from trocar.host.streams import Lost, Stream
from trocar.host.worker.sheets import Spoken, fit_order, run_order
from trocar.service.worker import Model, NumbersOrder, Watch
from trocar.wire import frames, orders
from trocar.wire.frames import Frame, Head, Kind, Status
from trocar.wire.orders import Ask, EraseSheet, FitSheet, Hello, NumbersSheet, Pinned

log = logging.getLogger(__name__)
AT_ONCE: Final = 320
_LIMITS: Final = {
    "hello": orders.MOST_ORDER_BYTES, "facts": 1 << 16, "run": orders.MOST_ORDER_BYTES,
    "fit": orders.MOST_ORDER_BYTES, "cancel": 0, "erase": 1 << 24, "stats": 1 << 16, "check": 1 << 16,
    "numbers": 1 << 20,
}  # fmt: skip


@dataclass(eq=False, slots=True)
class Wanted:
    """Whether somebody still waits for an order, and how it is stopped; progress goes nowhere."""

    unwanted: bool = False
    stop: Callable[[], None] | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)

    def progress(self, done: int) -> None:
        """A worker does not speak while it works."""

    def stoppable(self, stop: Callable[[], None]) -> None:
        with self.turn:
            self.stop, unwanted = stop, self.unwanted
        if unwanted:
            stop()

    def require_wanted(self) -> None:
        if self.unwanted:
            raise errors.refuse("cancelled", "", "the order was cancelled")

    def cancel(self) -> None:
        with self.turn:
            self.unwanted, stop = True, self.stop
        if stop is not None:
            stop()


@dataclass(frozen=True, slots=True)
class Bench:
    """The models of one worker process.

    Attributes:
        problems: broken invariants of what the models share.
        alone: whether this process has no network.
    """

    models: Mapping[str, Model]
    problems: Callable[[], list[str]]
    alone: bool = False

    def serve(self, listener: socket.socket) -> None:
        """Serves one gate after another until the listener is closed."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            visit = Visit(self, Stream(connection, frames.at_most(**_LIMITS)))
            try:
                visit.serve()
            finally:
                visit.end()


@dataclass(eq=False, slots=True)
class Visit:
    """One gate at the bench, from its first frame to its last."""

    bench: Bench
    stream: Stream
    facts: dict[str, ModelFacts] = field(default_factory=dict)
    running: dict[int, Wanted] = field(default_factory=dict)
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(AT_ONCE, thread_name_prefix="trocar-order")
    )
    fits: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="trocar-fit")
    )

    def serve(self) -> None:
        while True:
            try:
                self._take(self.stream.receive())
            except Lost:
                return
            except errors.TrocarError as e:
                log.error("the gate sent what is no order: %s", e.reason)  # noqa: TRY400 - its reason says it all
                return

    def end(self) -> None:
        """Stops what runs, and waits until nobody writes rows any more."""
        self.stream.close()
        for wanted in tuple(self.running.values()):
            wanted.cancel()
        self.pool.shutdown()
        self.fits.shutdown()

    def _take(self, frame: Frame) -> None:
        number = frame.head.number
        if frame.head.kind is Kind.cancel:
            wanted = self.running.get(number)
            if wanted is not None:
                wanted.cancel()
            return
        work = _WORK[frame.head.kind]
        wanted = self.running[number] = Wanted()
        pool = self.fits if frame.head.kind is Kind.fit else self.pool
        pool.submit(self._do, work, frame, wanted)

    def _do(self, work: Work, frame: Frame, wanted: Wanted) -> None:
        try:
            status, body = self._done(work, frame, wanted)
            with suppress(Lost):
                self.stream.put(Head(Kind.result, frame.head.number, len(body), status), body)
        except BaseException:  # no memory even for the answer: a gate must not wait for it for ever
            self.stream.close()
            log.critical("order %d could not be answered", frame.head.number, exc_info=True)
        finally:
            del self.running[frame.head.number]

    def _done(self, work: Work, frame: Frame, wanted: Wanted) -> tuple[Status, bytes]:
        try:
            return Status.done, work(self, frame.body, wanted)
        except errors.TrocarError as e:
            log.warning("order %d: %s", frame.head.number, e.code)
            return Status.fault, orders.pack_fault(e.code, None)
        except _AtNode as e:
            return Status.fault, orders.pack_fault(e.code, e.node)
        except Exception:
            log.exception("order %d failed", frame.head.number)
            return Status.fault, orders.pack_fault("internal", None)

    # ---- one method per kind of order ----

    def hello(self, body: bytes, _watch: Watch) -> bytes:
        """Takes the gate's facts over: both sides must check programs by the very same numbers."""
        hello = orders.read(Hello, body)
        if hello.network == "closed" and not self.bench.alone:
            log.error("the gate says that this process has no network, and it has")
            raise _AtNode("internal", orders.GREETED.index("network"))
        for pinned in hello.models:
            mine = self._model(pinned.facts.name)
            if not same(pinned, _pinned(mine)):
                log.error("model %s: its facts are not those that were pinned", pinned.facts.name)
                raise errors.refuse("internal", "model", "the facts are not those that were pinned")
            self.facts[pinned.facts.name] = pinned.facts
        return b""

    def tell(self, body: bytes, _watch: Watch) -> bytes:
        """The facts of a model, once."""
        return _pinned(self._model(orders.read(Ask, body).model)).model_dump_json().encode()

    def run(self, body: bytes, watch: Watch) -> bytes:
        sheet, vectors = orders.run_sheet(body)
        model, facts = self._model(sheet.model), self.facts[sheet.model]
        order = run_order(sheet, vectors, Spoken(facts, model.text))
        try:
            arrays = model.worker.run(order, watch)
        except errors.TrocarError as e:
            raise _AtNode(e.code, _node(e.path, [n.id for n in order.prepared.program.nodes])) from e
        declared = [schema.fields(v.checked, facts.n_heads) for v in order.prepared.variants]
        self._require_wanted(
            watch, model, sheet.tenant, [h for named in sheet.handles for h in named.values()]
        )
        return b"".join(
            orders.pack_arrays(found, [f.name for f in fields])
            for found, fields in zip(arrays, declared, strict=True)
        )

    def fit(self, body: bytes, watch: Watch) -> bytes:
        sheet = orders.read(FitSheet, body)
        model = self._model(sheet.model)
        arrays = model.worker.fit(fit_order(sheet), watch)
        self._require_wanted(watch, model, sheet.tenant, [sheet.artifact])
        return orders.pack_arrays(arrays, ["metrics"])

    def numbers(self, body: bytes, _watch: Watch) -> bytes:
        sheet = orders.read(NumbersSheet, body)
        fields = tuple(schema.Field(name, "<f4", shape) for name, shape in sheet.shapes.items())
        order = NumbersOrder(sheet.tenant, sheet.handle, sheet.rows, fields)
        return orders.pack_arrays(self._model(sheet.model).worker.numbers(order), list(sheet.shapes))

    @staticmethod
    def _require_wanted(watch: Watch, model: Model, tenant: str, made: Sequence[str]) -> None:
        """What nobody waits for any more leaves nothing behind."""
        try:
            watch.require_wanted()
        except errors.TrocarError:
            model.worker.erase(tenant, made)
            raise

    def erase(self, body: bytes, _watch: Watch) -> bytes:
        sheet = orders.read(EraseSheet, body)
        next(iter(self.bench.models.values())).worker.erase(
            sheet.tenant, sheet.handles
        )  # they share the store
        return b""

    def stats(self, body: bytes, _watch: Watch) -> bytes:
        found = asdict(self._model(orders.read(Ask, body).model).worker.stats())
        return orders.pack_stats(found)

    def check(self, body: bytes, _watch: Watch) -> bytes:
        found = self._model(orders.read(Ask, body).model).worker.check() + self.bench.problems()
        for problem in found:
            log.error("check: %s", problem)
        return orders.pack_count(len(found))

    def _model(self, name: str) -> Model:
        if name not in self.bench.models:
            raise errors.refuse("internal", "model", f"this worker has no model {name[:80]!r}")
        return self.bench.models[name]


Work = Callable[[Visit, bytes, Watch], bytes]
_WORK: Final[dict[Kind, Work]] = {
    Kind.hello: Visit.hello,
    Kind.facts: Visit.tell,
    Kind.run: Visit.run,
    Kind.fit: Visit.fit,
    Kind.erase: Visit.erase,
    Kind.stats: Visit.stats,
    Kind.check: Visit.check,
    Kind.numbers: Visit.numbers,
}


class _AtNode(Exception):
    """A fault of a program, at the number of a node."""

    def __init__(self, code: str, node: int | None) -> None:
        super().__init__(code)
        self.code, self.node = code, node


def _node(path: str, names: Sequence[str]) -> int | None:
    """The number of the node that a refusal is about; engines say its name or its place."""
    places = [*names, *(f"program.nodes[{i}]" for i in range(len(names)))]
    return places.index(path) % len(names) if path in places else None


def _pinned(model: Model) -> Pinned:
    return Pinned(facts=model.facts, engine=model.engine)


def same(a: Pinned, b: Pinned) -> bool:
    """Whether two models are one; mean norms differ in their last bits from machine to machine."""
    return _plain(a) == _plain(b)


def _plain(pinned: Pinned) -> Pinned:
    return pinned.model_copy(update={"facts": pinned.facts.model_copy(update={"norms": {}})})

"""The three parts of a server in one process, and a peer that is no worker, on real unix sockets."""

from __future__ import annotations

import json
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trocar.api.app import create_app
from trocar.engine.hf.engine import HFEngine, Limits
from trocar.gate.gate import Gate
from trocar.gate.policy import Role, Tier
from trocar.host.front.front import Front
from trocar.host.gate.desk import Desk
from trocar.host.gate.house import Alarm
from trocar.host.gate.line import Line
from trocar.host.gate.remote import RemoteWorker
from trocar.host.streams import listen
from trocar.host.worker.bench import Bench
from trocar.host.worker.house import bench_of
from trocar.service.service import Service
from trocar.service.worker import Model
from trocar.store import Store
from trocar.wire import frames, orders
from trocar.wire.frames import Head, Kind, Status
from trocar.wire.orders import Hello, Pinned

WAIT_S = 20.0
IDS = re.compile(r"(act|art|job|req)_[0-9a-f]{24,32}")


def plain(payload: bytes) -> bytes:
    """An answer without its random ids."""
    return IDS.sub("ID", payload.decode()).encode()


@contextmanager
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="trocar-test-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline_s, "it does not happen"
        time.sleep(0.01)


@dataclass
class Peer:
    """Speaks to a line as a worker would, or would not."""

    path: Path
    heard: list[frames.Frame] = field(default_factory=list)
    connection: socket.socket | None = None

    def __post_init__(self) -> None:
        self._listener = listen(self.path, 8)
        self._listener.settimeout(WAIT_S)

    def accept(self, hello: Status = Status.done, node: int | None = None) -> None:
        """Takes a line and answers its greeting."""
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(WAIT_S)
        frame = self.read()
        assert frame.head.kind is Kind.hello
        body = orders.pack_fault("internal", node) if hello is Status.fault else b""
        self.answer(frame.head.number, body, hello)

    def read(self) -> frames.Frame:
        """The next frame of the line."""
        assert self.connection is not None
        collector = frames.Collector(lambda _: None)
        while True:
            data = self.connection.recv(min(collector.wanted, 1 << 20))
            assert data, "the line was cut"
            frame = collector.feed(data)
            if frame is not None:
                self.heard.append(frame)
                return frame

    def next(self, kind: Kind) -> frames.Frame:
        while True:
            frame = self.read()
            if frame.head.kind is kind:
                return frame

    def answer(self, number: int, body: bytes = b"", status: Status = Status.done) -> None:
        self.send(frames.pack(Head(Kind.result, number, len(body), status)) + body)

    def send(self, raw: bytes) -> None:
        assert self.connection is not None
        self.connection.sendall(raw)

    def cut(self) -> None:
        assert self.connection is not None
        self.connection.close()

    def was_cut(self) -> bool:
        """Whether the other side has ended the connection."""
        assert self.connection is not None
        try:
            while self.connection.recv(1 << 16):
                pass
        except OSError:
            return True
        return True

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self._listener.close()


def bench_on(bench: Bench, path: Path, undo: ExitStack) -> None:
    """Serves a bench at `path` on a thread."""
    listener = listen(path, 8)
    thread = threading.Thread(target=bench.serve, args=(listener,), daemon=True)
    thread.start()

    def stop() -> None:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(WAIT_S)

    undo.callback(stop)


@dataclass(frozen=True)
class Three:
    """Front, gate and worker.

    Attributes:
        keys: secrets; `alice` is an operator.
    """

    front: Front
    app: Any
    gate: Gate
    service: Service
    line: Line
    store: Store
    keys: Mapping[str, str]
    root: Path

    def held(self) -> int:
        return sum(account.held_bits for account in self.gate.ledger.balances())

    def frozen(self, lineage: str) -> bool:
        kinds = [e.kind for e in self.gate.ledger.entries(limit=1000, lineage=lineage)]
        return "frozen" in kinds and "worker_alert" in kinds


@contextmanager
def three(loaded: Any, *, fake: bool = False, **limits: Any) -> Iterator[Three]:
    """A whole server in three parts, around one loaded model; `fake` leaves the worker to the caller."""
    with ExitStack() as undo:
        root = undo.enter_context(folder())
        store = Store(root / "store")
        undo.callback(store.close)
        facts = loaded.facts
        if not fake:
            engine = HFEngine(loaded, Limits(**limits))
            undo.callback(engine.close)
            facts = engine.facts  # an engine may serve fewer sites than a model has
            bench_on(bench_of([(loaded, engine)], store), root / "w", undo)
        gate = Gate(f"sqlite:///{root}/ledger.db")
        pinned = Pinned(facts=facts, engine="hf")
        line = Line(root / "w", Hello(models=(pinned,)), Alarm(gate, (facts.lineage,)))
        model = Model(facts, loaded.text, RemoteWorker(line, pinned), pinned.engine)
        service = Service([model], gate, isolation="host")
        undo.callback(service.close)
        if not fake:
            line.wait(WAIT_S)
        desk = Desk(service, listen(root / "g", 64))
        undo.callback(desk.close)
        threading.Thread(target=desk.serve, daemon=True).start()
        front = Front(root / "g")
        undo.callback(front.close)
        keys = {
            "alice": gate.keys.create("alice", Tier.open, Role.operator).secret,
            "bob": gate.keys.create("bob", Tier.open, Role.researcher).secret,
        }
        yield Three(front, create_app(front), gate, service, line, store, keys, root)


def codes_of(payload: bytes) -> list[str]:
    return [x["code"] for x in json.loads(payload)["error"]["refusals"]]

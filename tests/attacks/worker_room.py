"""A compromised worker: a real engine whose answers are bent before the service sees them, and the wire as an
attacker sees it: every byte of every answer.

The worker knows the weights. What it may still do is decided by the gate, which it does not hold.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from trocar.api.app import create_app
from trocar.engine.hf.engine import HFEngine
from trocar.engine.protocol import EngineStats, Task, TaskResult
from trocar.gate.gate import Gate
from trocar.gate.policy import Policy, Role, Tier
from trocar.graph.facts import ModelFacts
from trocar.service.local import LocalWorker
from trocar.service.service import Service
from trocar.service.worker import FitOrder, Model, NumbersOrder, RunOrder, Watch
from trocar.store import Store

Bend = Callable[[Task, TaskResult], TaskResult]
PROMPTS = [[1, 2, 3, 4], [5, 6, 7, 8]]
MODEL = "secret"
LOOK_S = 0.05


def straight(_task: Task, result: TaskResult) -> TaskResult:
    return result


@dataclass
class BentEngine:
    """An engine in the attacker's hands.

    Attributes:
        bend: what it makes of an honest result.
        before: what it does when a task arrives; it may raise.
        lie: what it says of itself.
    """

    honest: Any
    bend: Bend = straight
    before: Callable[[Task], None] = lambda _task: None
    lie: Callable[[ModelFacts], ModelFacts] = lambda facts: facts
    calls_itself: str = "hf"

    @property
    def facts(self) -> ModelFacts:
        return self.lie(self.honest.facts)

    @property
    def name(self) -> str:
        return self.calls_itself

    def submit(self, task: Task) -> Future[TaskResult]:
        self.before(task)
        bent: Future[TaskResult] = Future()

        def hand_on(done: Future[TaskResult]) -> None:
            try:
                bent.set_result(self.bend(task, done.result()))
            except Exception as e:  # noqa: BLE001 - the worker may fail in any way it likes
                bent.set_exception(e)

        self.honest.submit(task).add_done_callback(hand_on)
        return bent

    def cancel(self, request: str) -> None:
        self.honest.cancel(request)

    def stats(self) -> EngineStats:
        found: EngineStats = self.honest.stats()
        return found

    def check(self) -> list[str]:
        return []

    def close(self) -> None:
        self.honest.close()

    def behave(self) -> None:
        self.bend, self.before, self.lie, self.calls_itself = straight, lambda _t: None, lambda f: f, "hf"


@dataclass
class BentWorker:
    """A whole worker in the attacker's hands: what it gives to the gate, and what it tells while it works.

    Attributes:
        bend: what it makes of honest arrays.
        before: what it does when an order arrives; it may raise.
        bend_fit: what it makes of a fit's numbers.
        bend_erase: what it does when rows are to go.
        before_numbers: what it does when numbers are asked for, for the airlock.
    """

    honest: LocalWorker
    bend: Callable[[RunOrder, list[Any]], Any] = lambda _order, arrays: arrays
    before: Callable[[RunOrder, Watch], None] = lambda _order, _watch: None
    bend_fit: Callable[[Any], Any] = lambda arrays: arrays
    bend_erase: Callable[[Sequence[str]], None] = lambda _handles: None
    before_numbers: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return self.honest.name

    def run(self, order: RunOrder, watch: Watch) -> list[Any]:
        self.before(order, watch)
        found: list[Any] = self.bend(order, [dict(arrays) for arrays in self.honest.run(order, watch)])
        return found

    def fit(self, order: FitOrder, watch: Watch) -> Any:
        return self.bend_fit(dict(self.honest.fit(order, watch)))

    def numbers(self, order: NumbersOrder) -> Any:
        self.before_numbers()
        return self.honest.numbers(order)

    def erase(self, tenant: str, handles: Sequence[str]) -> None:
        self.bend_erase(handles)
        self.honest.erase(tenant, handles)

    def stats(self) -> EngineStats:
        return self.honest.stats()

    def check(self) -> list[str]:
        return []

    def halt(self) -> None:
        self.honest.halt()

    def close(self) -> None:
        self.honest.close()

    def behave(self) -> None:
        self.bend, self.before = lambda _order, arrays: arrays, lambda _order, _watch: None
        self.bend_fit, self.bend_erase = lambda arrays: arrays, lambda _handles: None
        self.before_numbers = lambda: None


@dataclass(frozen=True)
class Heard:
    """One answer as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def charged_bits(self) -> int:
        return int(self.headers.get("x-trocar-bits", "0"))


RANDOM = (
    (re.compile(r"(job|act|art)_[0-9a-f]{32}"), r"\1_*"),
    (re.compile(r"req_[0-9a-f]{24}"), "req_*"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "digest"),
    (re.compile(r'"seq":\d+|"(spent|left)_bits":\d+'), "count"),
    (re.compile(r'"elapsed_s":[0-9.]+'), "elapsed"),
    (re.compile(r"\d{4}-\d\d-\d\dT[0-9:+]+"), "time"),
)
CHOSEN_BY_THE_GATE = {"x-trocar-ledger-seq", "x-trocar-ledger-head", "x-trocar-bits-left", "x-request-id"}


def seen(answer: Heard) -> tuple[int, str, str]:
    """What may differ between two answers only by the worker's doing: ids, digests and times taken out."""
    headers = {k: v for k, v in answer.headers.items() if k not in CHOSEN_BY_THE_GATE | {"content-length"}}
    return answer.status, plain(json.dumps(headers, sort_keys=True)), plain(answer.body.decode())


def plain(text: str) -> str:
    for pattern, stand_in in RANDOM:
        text = pattern.sub(stand_in, text)
    return text


@dataclass
class Wire:
    """An attacker with a key: plain HTTP, and everything that was heard.

    Attributes:
        peeks: what was said of a job while it ran.
    """

    app: Any
    secret: str
    heard: list[Heard] = field(default_factory=list)
    peeks: list[Heard] = field(default_factory=list)

    def ask(self, method: str, path: str, body: Any = None) -> Heard:
        async def go() -> Heard:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            headers = {"authorization": f"Bearer {self.secret}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as http:
                got = await http.request(method, path, headers=headers, json=body)
                return Heard(got.status_code, dict(got.headers), got.content)

        found = asyncio.run(go())
        self.heard.append(found)
        return found

    def run(self, program: Mapping[str, Any]) -> Heard:
        """The answer to a program, once there is one."""
        started = self.ask("POST", "/v1/runs", {"model": MODEL, "prompts": PROMPTS, **program})
        return self.finish(started)

    def finish(self, started: Heard) -> Heard:
        """The answer of a job that was started."""
        if started.status != 202:
            return started
        path = f"/v1/jobs/{started.json['job']}"
        time.sleep(LOOK_S)
        self.peeks.append(self.ask("GET", path))
        self.heard.pop()  # what it says depends on the moment
        answer = self.ask("GET", f"{path}/result?wait_s=30")
        while answer.status == 202:
            answer = self.ask("GET", f"{path}/result?wait_s=30")
        self.ask("GET", path)
        return answer

    def plan(self, program: Mapping[str, Any]) -> Any:
        return self.ask("POST", "/v1/plan", {"model": MODEL, "prompts": PROMPTS, **program}).json

    def budget(self) -> Any:
        return self.ask("GET", "/v1/ledger").json["budgets"][MODEL]


@dataclass(frozen=True)
class Cell:
    """A service whose only worker is compromised."""

    service: Service
    engine: BentEngine
    worker: BentWorker
    app: Any

    def wire(self, tenant: str = "eve", tier: Tier = Tier.external) -> Wire:
        return Wire(self.app, self.service.gate.keys.create(tenant, tier, Role.researcher).secret)

    def behave(self) -> None:
        """The worker is honest again, and an operator lets it go on."""
        self.engine.behave()
        self.worker.behave()
        self.service.gate.ledger.thaw(self.engine.honest.facts.lineage, key_id="op")


@contextmanager
def cell(loaded: Any, folder: Path, policy: Policy | None = None) -> Iterator[Cell]:
    gate, store = Gate(f"sqlite:///{folder / 'ledger.db'}", policy), Store(folder / "store")
    engine = BentEngine(HFEngine(loaded))
    worker = BentWorker(LocalWorker(loaded, engine, store))
    service = Service([Model(engine.facts, loaded.text, worker, engine.name)], gate, (store,))
    try:
        yield Cell(service, engine, worker, create_app(service))
    finally:
        service.close()


# ---- innocent programs ----------------------------------------------------------------------------


def _read(site: str = "resid_post.1", at: str = "prompt[*]") -> dict[str, Any]:
    return {"id": "h", "op": "read", "site": site, "at": at}


NORM = {"id": "n", "op": "norm", "of": "h"}
SCORE = {"program": {"nodes": [_read(), NORM, {"id": "out", "op": "score", "of": "n"}]}}
TWO_SCORES = {"program": {"nodes": [*SCORE["program"]["nodes"], {"id": "more", "op": "score", "of": "n"}]}}
TRUTH = {
    "program": {
        "nodes": [
            _read(),
            NORM,
            {"id": "g", "op": "gt", "a": "n", "b": 1.0},
            {"id": "out", "op": "score", "of": "g"},
        ]
    }
}
LENS = {"program": {"nodes": [_read(), {"id": "out", "op": "lens", "of": ["h"], "top_k": 3}]}}
LOGPROBS = {"program": {"nodes": [{"id": "out", "op": "logprobs", "at": "prompt[*]", "tokens": [1, 2, 3]}]}}
METRIC = {"program": {"nodes": [{"id": "out", "op": "metric", "metric": "logit_diff", "tokens": [1, 2]}]}}
PATTERN = {
    "program": {
        "nodes": [
            {"id": "h", "op": "read", "site": "attn_probs.1", "at": "prompt[2:4]", "keys": "prompt[0:2]"},
            {"id": "out", "op": "pattern", "of": "h"},
        ]
    }
}
TEXT = {
    "program": {"nodes": [{"id": "out", "op": "text"}]},
    "generation": {"max_new_tokens": 6},
}
GENERATED = {
    "program": {"nodes": [_read(at="gen[*]"), NORM, {"id": "out", "op": "score", "of": "n"}]},
    "generation": {"max_new_tokens": 6},
}
CAPTURE = {"program": {"nodes": [_read(), {"id": "out", "op": "capture", "of": ["h"]}]}}
EDIT = {
    "program": {
        "nodes": [
            {"id": "e", "op": "edit.scale", "site": "resid_post.0", "at": "prompt[-1]", "by": 2.0},
            *SCORE["program"]["nodes"],
        ]
    }
}

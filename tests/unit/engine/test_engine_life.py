"""The engine's own life: queueing, cancelling, closing, and a thread that dies. Nobody ever waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import count
from typing import Any

import pytest
import torch

from trocar.engine import visits
from trocar.engine.hf import step as step_room
from trocar.engine.hf.engine import HFEngine, Limits
from trocar.engine.hf.stack import Stack
from trocar.engine.protocol import Task
from trocar.errors import Overloaded, RunFailed, ServerFault, TrocarError
from trocar.graph import check, ops
from trocar.graph.cost import Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope

WAIT_S = 20.0


@pytest.fixture
def engine(tiny: Any) -> Iterator[HFEngine]:
    made = HFEngine(tiny, Limits(waiting_requests=4))
    yield made
    made.close()


TEXT = (ops.Text(id="text"),)


def task(engine: HFEngine, name: str, most: int = 2, prompts: int = 1, nodes: tuple[Any, ...] = TEXT) -> Task:
    generation = Generation(max_new_tokens=most, stop_at_eos=False)
    tokens = ((1, 2, 3),) * prompts
    scope = Scope(engine.facts, tuple(len(t) for t in tokens), generation, {}, {}, lambda _: ())
    checked = check.check(Program(nodes=nodes), scope, Prices(32, 256))
    return Task(name, checked, tokens, {}, {}, {}, {}, lambda _: None)


def test_a_task_is_answered(engine: HFEngine) -> None:
    result = engine.submit(task(engine, "a", prompts=3)).result(WAIT_S)
    assert [len(ids) for ids in result.outputs["text"].ids] == [2, 2, 2]
    stats = engine.stats()
    assert (stats.forwards, stats.sequences, stats.tokens) == (2, 3, 3 * 3 + 3)
    assert engine.check() == []


def test_a_full_queue_says_so(engine: HFEngine) -> None:
    with engine._wake:
        futures = [engine.submit(task(engine, str(i))) for i in range(4)]
        with pytest.raises(Overloaded) as caught:
            engine.submit(task(engine, "x"))
    assert caught.value.code == "queue_full"
    assert [f.result(WAIT_S) is not None for f in futures] == [True] * 4


def test_cancelling_before_it_runs(engine: HFEngine) -> None:
    with engine._wake:
        waiting = engine.submit(task(engine, "a"))
        other = engine.submit(task(engine, "b"))
        engine.cancel("a")
    with pytest.raises(RunFailed) as caught:
        waiting.result(WAIT_S)
    assert caught.value.code == "cancelled"
    assert other.result(WAIT_S)
    engine.cancel("never heard of")
    assert engine.stats().sequences == 1


class Pause:
    """Stops the engine's thread in front of one decode step; counts the sequences of each."""

    def __init__(self, patch: pytest.MonkeyPatch, step: int) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.sequences: list[int] = []
        plain = step_room.Pass.run

        def paused(this: step_room.Pass) -> None:
            if all(c.sequence.decoding for c in this.chunks):
                self.sequences.append(len(this.chunks))
                if len(self.sequences) == step:
                    self.reached.set()
                    self.go.wait(WAIT_S)
            plain(this)

        patch.setattr(step_room.Pass, "run", paused)


def test_cancelling_while_it_runs_ends_at_the_next_token(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other request in the batch goes on as if it had been alone."""
    alone = engine.submit(task(engine, "x", most=12)).result(WAIT_S)
    pause = Pause(monkeypatch, step=3)
    with engine._wake:
        a, b = engine.submit(task(engine, "a", most=200)), engine.submit(task(engine, "b", most=12))
    assert pause.reached.wait(WAIT_S)
    engine.cancel("a")
    pause.go.set()
    assert b.result(WAIT_S) == alone
    with pytest.raises(RunFailed) as caught:
        a.result(WAIT_S)
    assert caught.value.code == "cancelled"
    assert pause.sequences == [2] * 3 + [1] * 8


def test_closing_stops_a_generation_at_the_next_token(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, pause = HFEngine(tiny), Pause(monkeypatch, step=2)
    future = engine.submit(task(engine, "a", most=250))
    assert pause.reached.wait(WAIT_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    while not engine._closing:
        time.sleep(0.001)
    time.sleep(0.02)
    pause.go.set()
    closer.join(WAIT_S)
    with pytest.raises(ServerFault):
        future.result(1)
    assert len(pause.sequences) == 2


def test_an_edit_never_writes_into_the_live_tensor(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another module may hold that tensor; only the tap may decide to write it in place."""
    plain, visited = visits.Visitor.__call__, []

    def watching(self: visits.Visitor, x: torch.Tensor) -> torch.Tensor | None:
        before = x.clone()
        new = plain(self, x)
        assert torch.equal(x, before)
        visited.append(new is not None)
        return new

    monkeypatch.setattr(visits.Visitor, "__call__", watching)
    edits = tuple(
        ops.EditScale(id=f"e{i}", site=s, by=2.0)
        for i, s in enumerate(
            ("embeddings", "resid_pre.1", "q.1", "z.1", "resid_mid.1", "mlp_act.2", "final_norm")
        )
    )
    engine.submit(task(engine, "a", nodes=(*edits, ops.Text(id="text")))).result(WAIT_S)
    assert visited == [True] * 2 * 7


def test_closing_fails_what_waits_and_refuses_what_comes(tiny: Any) -> None:
    engine = HFEngine(tiny)
    with engine._wake:
        long = engine.submit(task(engine, "a", most=250))
        late = engine.submit(task(engine, "b", most=250))
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join(WAIT_S)
    assert not closer.is_alive()
    for future in (long, late):
        with pytest.raises(ServerFault) as caught:
            future.result(1)
        assert "stopping" in caught.value.reason
    with pytest.raises(ServerFault):
        engine.submit(task(engine, "c"))
    engine.close()
    assert engine.stats().live_requests == 0
    assert engine.check() == []


def test_a_batch_that_breaks_fails_its_requests_and_no_later_one(
    engine: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise IndexError("a bug of ours")

    with monkeypatch.context() as patch:
        patch.setattr(step_room.Pass, "run", broken)
        with pytest.raises(ServerFault) as caught:
            engine.submit(task(engine, "a")).result(WAIT_S)
    assert caught.value.code == "internal"
    assert "bug" not in str(caught.value)
    assert engine.submit(task(engine, "b")).result(WAIT_S)
    assert engine.check() == []


@pytest.mark.parametrize("lasting", [False, True])
def test_an_engine_that_takes_no_steps_any_more_gives_up(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    """A step that fails alone ends one request; one that fails again without it ends the process, where that may be,
    before anybody hears that the request failed."""
    given_up: list[bool] = []
    engine = HFEngine(tiny, give_up=lambda: given_up.append(future.done()))
    plain, calls = Stack.forward, count()

    def broken(*args: Any) -> Any:
        if next(calls) == 0 or lasting:
            raise MemoryError
        return plain(*args)

    monkeypatch.setattr(Stack, "forward", broken)
    with engine._wake:
        future = engine.submit(task(engine, "a"))
    with pytest.raises(ServerFault):
        future.result(WAIT_S)
    assert given_up == ([False] if lasting else [])
    if not lasting:
        assert engine.submit(task(engine, "b")).result(WAIT_S)
        assert engine.check() == []
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HFEngine(tiny)

    def die() -> None:
        raise SystemError("the interpreter broke")

    monkeypatch.setattr(engine, "_serve", die)
    future: Future[Any] = engine.submit(task(engine, "a"))
    with pytest.raises(TrocarError):
        future.result(WAIT_S)
    engine._thread.join(WAIT_S)
    assert engine.check() == ["the engine thread is dead"]
    with pytest.raises(ServerFault):
        engine.submit(task(engine, "b"))


def test_requests_take_turns(tiny: Any) -> None:
    """A request of one prompt does not wait for the whole of one with fifty."""
    engine = HFEngine(tiny, Limits(sequences=4))
    seen: list[str] = []
    many, one = task(engine, "many", prompts=50), task(engine, "one")
    with engine._wake:
        futures = {"many": engine.submit(many), "one": engine.submit(one)}
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: seen.append(name))
    for future in futures.values():
        future.result(WAIT_S)
    time.sleep(0.05)
    assert seen == ["one", "many"]
    engine.close()

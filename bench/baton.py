"""Two sides that take turns forward pass by forward pass, so that both meet the same moments of a busy machine.

Whole turns of some seconds meet different neighbours, and CPU time on a shared machine moves by tenths with them.
Here the thread of each side waits before every forward pass until the other one has made its own, and a side's
time is the CPU time of its threads. A side that is done lets the other run on.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import room
from trocar.engine.hf.engine import HFEngine
from trocar.engine.protocol import TaskResult
from trocar.models.load import Loaded


class Baton:
    """Who runs; sides are numbers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._here: set[int] = set()
        self._holder = 0

    def enter(self, *sides: int) -> None:
        with self._changed:
            self._here = set(sides)

    def leave(self, side: int) -> None:
        with self._changed:
            self._here.discard(side)
            self._changed.notify_all()

    def pass_on(self, side: int) -> None:
        """Gives the other side its turn and waits for the next one here."""
        with self._changed:
            others = self._here - {side}
            if side not in self._here or not others:
                return
            self._holder = min(others)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._holder == side or not self._here - {side})


@dataclass
class Side:
    """A model of its own, and the thread that runs it.

    Attributes:
        module: what every forward pass goes through.
        stamps: CPU seconds of the thread that runs the model, at the beginning of each pass of the latest run.
        elsewhere: the model runs in a thread of its own, not in the one that asks.
        thread: which thread ran the model.
    """

    number: int
    baton: Baton
    module: Any
    elsewhere: bool = False
    stamps: list[float] = field(default_factory=list)
    thread: int = 0

    def __post_init__(self) -> None:
        self.module.register_forward_pre_hook(self._before)

    def _before(self, _module: Any, _args: Any) -> None:
        self.baton.pass_on(self.number)
        self.thread = threading.get_ident()
        self.stamps.append(time.thread_time())

    def measure(self, verb: Callable[[], object]) -> Measured:
        """Runs `verb` in this thread; a model that runs in another one must have run there before."""
        other = self.thread if self.elsewhere else None
        self.stamps.clear()
        begun = _clocks(other)
        try:
            verb()
        finally:
            self.baton.leave(self.number)
        steps = [b - a for a, b in zip(self.stamps[1:-1], self.stamps[2:], strict=True)]
        return Measured(_clocks(other) - begun, statistics.median(steps), len(self.stamps))


def _clocks(other: int | None) -> float:
    """CPU seconds of this thread, and of another one if there is one."""
    there = 0.0 if other is None else time.clock_gettime(time.pthread_getcpuclockid(other))
    return time.thread_time() + there


@dataclass(frozen=True)
class Measured:
    """CPU seconds of a run, of one of its decode passes, and how many passes it took."""

    seconds: float
    decode: float
    passes: int


@dataclass
class Served:
    """A side that is an engine of ours."""

    number: int
    baton: Baton
    loaded: Loaded
    runner: HFEngine = field(init=False)
    side: Side = field(init=False)
    results: list[TaskResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runner = room.engine(self.loaded)
        self.side = Side(self.number, self.baton, self.loaded.adapter.inner, elsewhere=True)

    def serve(self, asks: Sequence[room.Ask]) -> Callable[[], object]:
        """What serves these requests, checked before; leaves `results`."""
        tasks = [ask.task(self.loaded) for ask in asks]

        def run() -> None:
            self.results = room.together(self.runner, tasks)

        return run


def race(*sides: tuple[Side, Callable[[], object]]) -> list[Measured]:
    """Runs all sides, pass by pass in turns."""
    sides[0][0].baton.enter(*(side.number for side, _ in sides))
    found: dict[int, Measured] = {}

    def run(side: Side, verb: Callable[[], object]) -> None:
        found[side.number] = side.measure(verb)

    threads = [threading.Thread(target=run, args=pair) for pair in sides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[side.number] for side, _ in sides]


def both_ways(
    served: Sequence[Served], first: Sequence[room.Ask], second: Sequence[room.Ask]
) -> list[list[Measured]]:
    """Two kinds of traffic against each other on two copies of a model, once with either copy."""
    return [
        race((one.side, one.serve(first)), (two.side, two.serve(second)))
        for one, two in (served, served[::-1])
    ]


def two_copies(ref: str, warm: Sequence[room.Ask]) -> list[Served]:
    """Two engines on copies of a model, warmed with some requests."""
    from trocar.models.load import load

    baton = Baton()
    served = [Served(number, baton, load(ref)) for number in range(2)]
    for one in served:
        one.serve(warm)()
    return served

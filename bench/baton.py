"""Two engines that take turns pass by pass, so that both meet the same moments of a busy machine.

Whole turns of some seconds meet different neighbours, and CPU time on a shared machine moves by tenths with them.
Here each engine's thread waits before every forward pass until the other one has made its own, and each side's
time is the CPU time of its thread. A side that is done lets the other run on.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import room
from trocar.engine.hf.engine import HFEngine
from trocar.engine.protocol import Task
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
    """One engine on a model of its own.

    Attributes:
        stamps: CPU seconds of the engine's thread at the beginning of each pass of the latest run.
    """

    number: int
    baton: Baton
    loaded: Loaded
    runner: HFEngine = field(init=False)
    stamps: list[float] = field(default_factory=list)
    _clock: int = 0

    def __post_init__(self) -> None:
        self.runner = room.engine(self.loaded)
        self.loaded.adapter.inner.register_forward_pre_hook(self._before)

    def _before(self, _module: Any, _args: Any) -> None:
        self.baton.pass_on(self.number)
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self.stamps.append(time.thread_time())

    def seconds(self) -> float:
        """CPU time of the engine's thread; it must have run before."""
        return time.clock_gettime(self._clock)


@dataclass(frozen=True)
class Measured:
    """CPU seconds of a run, of one of its decode passes, and how many passes it took."""

    seconds: float
    decode: float
    passes: int


def together(*sides: tuple[Side, Sequence[Task]]) -> list[Measured]:
    """Runs the tasks of all sides, pass by pass in turns."""
    sides[0][0].baton.enter(*(side.number for side, _ in sides))
    begun = [side.seconds() for side, _ in sides]
    threads = []
    for side, tasks in sides:
        side.stamps.clear()
        threads.append(threading.Thread(target=_run, args=(side, tasks)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [
        Measured(
            side.seconds() - start,
            statistics.median(b - a for a, b in zip(side.stamps[1:-1], side.stamps[2:], strict=True)),
            len(side.stamps),
        )
        for (side, _), start in zip(sides, begun, strict=True)
    ]


def _run(side: Side, tasks: Sequence[Task]) -> None:
    try:
        room.together(side.runner, tasks)
    finally:
        side.baton.leave(side.number)

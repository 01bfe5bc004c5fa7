"""Three processes and who looks after them: started, waited for, started again when one dies, stopped in order.

A dead worker is started again and fails what it ran; a dead gate is started again and charges what it held in full;
a dead front is started again on the same socket. One that does not come up three times in a row ends the server.
Nothing is asked of the three, and nothing but "ready" is heard from them.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from trocar import errors
from trocar.cli.address import Address
from trocar.cli.child import ALONE
from trocar.cli.inherited import environment
from trocar.cli.plan import Plan
from trocar.cli.serve_options import Network
from trocar.cli.worker import LOG

log = logging.getLogger(__name__)
LOAD_S: Final = 900.0
LOOK_S: Final = 0.1
TRIES: Final = 3
MOST_PAUSE_S: Final = 30.0
STOP_S: Final = {"front": 6.0, "gate": 5.0, "worker": 5.0}


@dataclass(eq=False, slots=True)
class Process:
    """One of the three.

    Attributes:
        words: its command line after `trocar`.
        fds: descriptors that it inherits.
        output: where its output goes; ours when None.
        failed: starts in a row that did not come up.
    """

    name: str
    words: tuple[str, ...]
    fds: tuple[int, ...] = ()
    output: Path | None = None
    child: subprocess.Popen[bytes] | None = None
    ready: int = -1
    came_up: bool = False
    failed: int = 0
    again_s: float = 0.0

    def start(self) -> None:
        """Starts it; it ends when we do, because then its input ends."""
        self.forget()
        self.ready, inherited = os.pipe()
        command = [sys.executable, "-m", "trocar.cli.app", *self.words, "--ready-fd", str(inherited)]
        with ExitStack() as stack:
            stack.callback(os.close, inherited)
            output = None if self.output is None else stack.enter_context(_appending(self.output))
            self.child = subprocess.Popen(  # noqa: S603 - our own interpreter and our own module
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment(self.name, os.environ),
                pass_fds=(inherited, *self.fds), start_new_session=True,
            )  # fmt: skip
        self.came_up = False

    def heard(self, within_s: float) -> bytes:
        """What it said of being ready; nothing when it did not yet, or ended."""
        if self.came_up:
            return b""
        found, _, _ = select.select([self.ready], [], [], within_s)
        said = os.read(self.ready, 1) if found else b""
        if said:
            self.came_up, self.failed = True, 0
        return said

    @property
    def ended(self) -> bool:
        return self.child is not None and self.child.poll() is not None

    def signal(self, how: signal.Signals) -> None:
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(how)

    def wait(self, within_s: float) -> None:
        if self.child is not None:
            try:
                self.child.wait(max(within_s, 0.0))
            except subprocess.TimeoutExpired:
                log.warning("the %s did not stop in time", self.name)
                self.child.kill()
                self.child.wait()

    def forget(self) -> None:
        """Lets go of what is left of a child that ended."""
        if self.child is not None and self.child.stdin is not None:
            self.child.stdin.close()
        if self.ready >= 0:
            os.close(self.ready)
            self.ready = -1


@dataclass(frozen=True, slots=True)
class Household:
    """The three, in the order in which they come up."""

    worker: Process
    gate: Process
    front: Process
    deaths_s: list[float] = field(default_factory=list)

    @property
    def all(self) -> tuple[Process, ...]:
        return (self.worker, self.gate, self.front)

    def start(self) -> bool:
        """Starts them and waits; whether the worker has no network.

        Raises:
            RunFailed: `start_failed` when one of them ends.
        """
        for each in self.all:
            each.start()
        heard = [self._come_up(each) for each in self.all]
        return heard[0] != ALONE

    def _come_up(self, process: Process) -> bytes:
        deadline_s = time.monotonic() + LOAD_S
        while time.monotonic() < deadline_s:
            said = process.heard(LOOK_S)
            if said:
                return said
            ended = next((each for each in self.all if each.ended), None)
            if ended is not None:
                raise _failed(ended)
        raise _failed(process)

    def look_after(self) -> None:
        """Starts again what died, until one does not come up any more or a signal comes.

        Raises:
            RunFailed: `start_failed`.
        """
        while True:
            time.sleep(LOOK_S)
            for each in self.all:
                each.heard(0.0)
                if each.ended:
                    self._again(each)

    def _again(self, process: Process) -> None:
        now_s = time.monotonic()
        if not process.again_s:
            process.failed += not process.came_up
            if process.failed >= TRIES:
                raise _failed(process)
            self.deaths_s[:] = [s for s in self.deaths_s if now_s - s < 10 * MOST_PAUSE_S] + [now_s]
            pause_s = min(LOOK_S * 2 ** len(self.deaths_s), MOST_PAUSE_S)
            log.error("the %s has died; it is started again in %.1f s", process.name, pause_s)
            process.again_s = now_s + pause_s
        if now_s >= process.again_s:
            process.again_s = 0.0
            process.start()

    def stop(self) -> None:
        """The gate first, so that whoever waits hears of it; the front then; the worker when nobody asks it."""
        self.gate.signal(signal.SIGTERM)
        self.front.signal(signal.SIGTERM)
        for each in (self.front, self.gate):
            each.wait(STOP_S[each.name])
        self.worker.signal(signal.SIGTERM)
        self.worker.wait(STOP_S["worker"])
        for each in self.all:
            each.forget()


def serve_in_three(plan: Plan, address: Address, on_ready: Callable[[], None], network: Network) -> None:
    """Serves until SIGTERM or SIGINT. Call it on the main thread.

    Args:
        network: what the worker must keep to, and what the gate tells everybody.

    Raises:
        RunFailed: `start_failed`.
    """
    with ExitStack() as stack:
        run = Path(tempfile.mkdtemp(prefix="trocar-"))  # a short name: those of sockets are limited
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        household = _household(plan, address, run, network)
        stack.callback(household.stop)
        signal.signal(
            signal.SIGHUP, lambda *_: household.gate.signal(signal.SIGHUP)
        )  # it reads the policy again
        try:
            alone = household.start()
            said = (
                "has no network"
                if alone
                else "shares this machine's network, which it was not allowed to leave"
            )
            print(f"worker: {said}; its output is in {plan.folder.root / LOG}", flush=True)
            on_ready()
            household.look_after()
        except KeyboardInterrupt:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_IGN)


def _household(plan: Plan, address: Address, run: Path, network: Network) -> Household:
    models = tuple(word for name in plan.models for word in ("--model", name))
    data = ("--data", str(plan.folder.root))
    level = ("--log-level", plan.log_level.value)
    worker, gate = (str(_folder(run / name) / "socket") for name in ("worker", "gate"))
    listener, mine = address.socket.fileno(), str(os.geteuid())
    save = ("--save-key",) if plan.save_key else ()
    sockets = ("--worker", worker, "--worker-user", mine, "--socket", gate, "--front-user", mine)
    of_gate, cell = ("--gate-user", mine), ("--network", network.value)
    rules = _named("--policy", plan.policy) + _named("--anchors", plan.anchors)
    return Household(
        Process(
            "worker",
            ("worker", *models, "--socket", worker, *of_gate, *cell, *data, *plan.sizes.words()),
            output=plan.folder.root / LOG,
        ),
        Process(
            "gate", ("gate", *models, *sockets, *cell, "--url", address.url, *data, *level, *save, *rules)
        ),
        Process(
            "front", ("front", "--gate", gate, *of_gate, "--listen-fd", str(listener), *level), (listener,)
        ),
    )


def _folder(path: Path) -> Path:
    """A folder of its own for each socket: who listens in one has no business in the other."""
    path.mkdir(mode=0o700)
    return path


def _named(option: str, path: Path | None) -> tuple[str, ...]:
    return () if path is None else (option, str(path))


def _appending(path: Path) -> _Opened:
    return _Opened(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))


class _Opened:
    """A descriptor for as long as a block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _failed(process: Process) -> errors.TrocarError:
    code = process.child.poll() if process.child is not None else None
    where = f"; {str(process.output)!r} says why" if process.output is not None else ""
    ended = "did not come up in time" if code is None else f"ended with exit code {code}"
    return errors.refuse("start_failed", process.name, f"the {process.name} process {ended}{where}")

"""Real processes that use one ledger: this file, run as a program under `python -O`.

`start` runs one of them; a `Nest` is a process that has imported everything, opened the ledger once and forks
them, for tests that need many: a start is then milliseconds.

storm   reserve, settle, then append the emitted bits to an fsynced side file, until told to stop
race    fifty threads reserve and settle 10 bits at a time until the budget is gone
full    let the disk fill up between reserve and settle; SQLite only
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from gate_places import Place

import trocar
from trocar.errors import TrocarError
from trocar.gate.database import Database
from trocar.gate.keys import Keys
from trocar.gate.ledger import Ledger, Reservation
from trocar.gate.limits import Limits, Payer
from trocar.gate.policy import Lineage, Tier

LINE = 9
THREADS = 50
LIMIT = 1000
LINEAGE = Lineage("base", 1_000_000, Tier.trusted)
OPEN = Lineage("open", 1_000_000, None)


@contextmanager
def start(mode: str, place: Place, secret: str) -> Iterator[subprocess.Popen[str]]:
    """A process on the ledger at a place, killed at the end; it prints one line when it has begun."""
    path = os.pathsep.join((str(Path(trocar.__file__).parents[1]), *sys.path))
    command = [sys.executable, "-O", __file__, mode, place.url, str(place.folder), secret]
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@dataclass
class Nest:
    """Forks processes on the ledger at a place; all of them end with the block."""

    folder: Path
    process: subprocess.Popen[str]
    living: set[int] = field(default_factory=set)

    def start(self, mode: str) -> int:
        """The process id of a new one."""
        pid = int(self._ask(mode))
        self.living.add(pid)
        return pid

    def begun(self, pid: int) -> None:
        """Waits until it has opened the ledger."""
        end = time.monotonic() + 60
        while not self.said(pid):
            assert time.monotonic() < end, (self.folder / f"{pid}.err").read_text()
            time.sleep(0.002)

    def said(self, pid: int) -> list[str]:
        out = self.folder / f"{pid}.out"
        return out.read_text().splitlines() if out.exists() else []

    def end(self, pid: int, *, kill: bool) -> tuple[int, str]:
        """Its return code and what it complained about."""
        if kill:
            os.kill(pid, signal.SIGKILL)
        code = int(self._ask(str(pid)))
        self.living.discard(pid)
        return code, (self.folder / f"{pid}.err").read_text()

    def _ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


@contextmanager
def nest(place: Place, secret: str) -> Iterator[Nest]:
    """A nest whose processes use the ledger at a place."""
    with start("nest", place, secret) as process:
        made = Nest(place.folder, process)
        try:
            yield made
        finally:
            for pid in made.living:
                os.kill(pid, signal.SIGKILL)


def stop_file(folder: Path) -> Path:
    """Where it is, a storm ends."""
    return folder / "stop"


def go_file(folder: Path) -> Path:
    """Where it is, a race begins."""
    return folder / "go"


def emitted_bits(folder: Path) -> int:
    """Sum of the side file; a line cut off by a kill was not emitted."""
    raw = (folder / "emitted").read_bytes()
    return sum(int(raw[i : i + LINE]) for i in range(0, len(raw) - LINE + 1, LINE))


def _reserve(ledger: Ledger, who: Any, lineage: Lineage, bits: int) -> Reservation:
    limit = None if lineage is OPEN else LIMIT
    held = ledger.reserve(
        who,
        lineage,
        bits,
        payers=(Payer(f"key:{who.key_id}", Limits(limit)), Payer("project:p", Limits(limit))),
        limits=Limits(None if lineage is OPEN else 10_000),
        request_digest="0" * 64,
    )
    if not isinstance(held, Reservation):
        raise TypeError(held)
    return held


def _storm(folder: Path, ledger: Ledger, who: Any) -> None:
    rng = random.Random()
    side = os.open(folder / "emitted", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    print("begun", flush=True)
    while not stop_file(folder).exists():
        bits = rng.randint(1, 10_000)
        held = _reserve(ledger, who, OPEN, bits)
        time.sleep(0.005)  # the forward pass
        spent = rng.randint(1, bits)
        ledger.settle(held, spent, b"p" * rng.randint(0, 2000))
        os.write(side, b"%08d\n" % spent)
        os.fsync(side)


def _race(folder: Path, ledger: Ledger, who: Any) -> None:
    print("begun", flush=True)
    while not go_file(folder).exists():
        time.sleep(0.001)
    lock, codes, total = Lock(), [], 0

    def take() -> None:
        nonlocal total
        try:
            while True:
                held = _reserve(ledger, who, LINEAGE, 10)
                time.sleep(0.005)  # the forward pass; without it one process takes everything in one turn
                bits = ledger.settle(held, 10, b"").spent_bits
                with lock:
                    total += bits
        except TrocarError as e:
            with lock:
                codes.append(e.code)

    threads = [Thread(target=take) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"codes": codes, "total": total}))


def _full(folder: Path, ledger: Ledger, who: Any) -> None:
    held = _reserve(ledger, who, LINEAGE, 100)
    before, codes = ledger.head(), []
    size = (folder / "ledger.db-wal").stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, hard))
    for act in (lambda: ledger.settle(held, 7, b""), lambda: _reserve(ledger, who, LINEAGE, 5)):
        try:
            act()
        except TrocarError as e:
            codes.append(e.code)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    told = {"codes": codes, "head_moved": ledger.head() != before, "check": ledger.check()}
    told["settled_when_there_is_room"] = ledger.settle(held, 7, b"").spent_bits
    print(json.dumps(told))


MODES = {"storm": _storm, "race": _race, "full": _full}


def _run(mode: str, url: str, folder: str, secret: str) -> None:
    database = Database(url)
    ledger = Ledger(database, overhead_bits=1, anchors=Path(folder) / "anchors" if mode == "storm" else None)
    MODES[mode](Path(folder), ledger, Keys(database).authenticate(secret))
    ledger.close()
    database.close()


def _warm_up(url: str) -> None:
    """The driver and the compiler of statements are loaded by the first opening, not by an import."""
    database = Database(url)
    Ledger(database, overhead_bits=1).close()
    database.close()


def _nest(url: str, folder: str, secret: str) -> None:
    """A line with a mode starts a process; a line with its number waits for its end."""
    _warm_up(url)
    for line in sys.stdin:
        word = line.strip()
        if word in MODES:
            pid = os.fork()
            if pid == 0:
                for stream, name in ((1, "out"), (2, "err")):
                    file = os.open(f"{folder}/{os.getpid()}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                    os.dup2(file, stream)
                _run(word, url, folder, secret)
                sys.stdout.flush()
                os._exit(0)
            print(pid, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(int(word), 0)[1]), flush=True)


def main() -> None:
    mode, url, folder, secret = sys.argv[1:]
    if mode == "nest":
        _nest(url, folder, secret)
    else:
        _run(mode, url, folder, secret)


if __name__ == "__main__":
    main()

"""Real processes that use one ledger: `start` runs this file as a program, under `python -O`.

storm   reserve, settle, then append the emitted bits to an fsynced side file, until told to stop
race    fifty threads reserve and settle 10 bits at a time until the budget is gone
full    let the disk fill up between reserve and settle; SQLite only
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def emitted_bits(folder: Path) -> int:
    """Sum of the side file; a line cut off by a kill was not emitted."""
    raw = (folder / "emitted").read_bytes()
    return sum(int(raw[i : i + LINE]) for i in range(0, len(raw) - LINE + 1, LINE))


def stop_file(folder: Path) -> Path:
    return folder / "stop"


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


def _race(_folder: Path, ledger: Ledger, who: Any) -> None:
    print("begun", flush=True)
    sys.stdin.readline()
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


def main() -> None:
    mode, url, folder, secret = sys.argv[1:]
    database = Database(url)
    ledger = Ledger(database, overhead_bits=1)
    act = {"storm": _storm, "race": _race, "full": _full}[mode]
    act(Path(folder), ledger, Keys(database).authenticate(secret))
    database.close()


if __name__ == "__main__":
    main()

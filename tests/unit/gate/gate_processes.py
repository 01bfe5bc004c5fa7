"""Real processes that use one ledger: `start` runs this file as a program, under `python -O`.

storm   reserve, settle, then append the emitted bits to an fsynced side file, until told to stop
race    reserve and settle 10 bits at a time until the budget is gone
full    let the disk fill up between reserve and settle
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
from typing import Any

import trocar
from trocar.errors import TrocarError
from trocar.gate.database import Database
from trocar.gate.keys import Keys
from trocar.gate.ledger import Ledger, Reservation
from trocar.gate.policy import Lineage, Policy, Tier

LINE = 9
LINEAGE = Lineage("base", 1_000_000, Tier.trusted)
OPEN = Lineage("open", 1_000_000, None)


@contextmanager
def start(mode: str, path: Path, secret: str) -> Iterator[subprocess.Popen[str]]:
    """A process on the ledger at `path`, killed at the end; it prints one line when it has begun."""
    env = {**os.environ, "PYTHONPATH": str(Path(trocar.__file__).parents[1])}
    command = [sys.executable, "-O", __file__, mode, str(path), secret]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def emitted_bits(path: Path) -> int:
    """Sum of the side file; a line cut off by a kill was not emitted."""
    raw = _side(path).read_bytes()
    return sum(int(raw[i : i + LINE]) for i in range(0, len(raw) - LINE + 1, LINE))


def _side(path: Path) -> Path:
    return path.with_name("emitted")


def stop_file(path: Path) -> Path:
    return path.with_name("stop")


def _reserve(ledger: Ledger, who: Any, lineage: Lineage, bits: int) -> Reservation:
    held = ledger.reserve(who, lineage, bits, request_digest="0" * 64)
    if not isinstance(held, Reservation):
        raise TypeError(held)
    return held


def _storm(path: Path, ledger: Ledger, who: Any) -> None:
    rng = random.Random()
    side = os.open(_side(path), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    print("begun", flush=True)
    while not stop_file(path).exists():
        bits = rng.randint(1, 10_000)
        held = _reserve(ledger, who, OPEN, bits)
        time.sleep(0.005)  # the forward pass
        spent = rng.randint(1, bits)
        ledger.settle(held, spent, b"p" * rng.randint(0, 2000))
        os.write(side, b"%08d\n" % spent)
        os.fsync(side)


def _race(_path: Path, ledger: Ledger, who: Any) -> None:
    print("begun", flush=True)
    sys.stdin.readline()
    total = 0
    while True:
        try:
            held = _reserve(ledger, who, LINEAGE, 10)
        except TrocarError as e:
            print(json.dumps({"code": e.code, "total": total}))
            return
        time.sleep(0.005)  # the forward pass; without it one process takes everything in one turn
        total += ledger.settle(held, 10, b"").spent_bits


def _full(path: Path, ledger: Ledger, who: Any) -> None:
    held = _reserve(ledger, who, LINEAGE, 100)
    before, codes = ledger.head(), []
    size = path.with_name(path.name + "-wal").stat().st_size
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
    mode, path, secret = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    database = Database(f"sqlite:///{path}")
    ledger = Ledger(database, Policy(overhead_bits=1))
    {"storm": _storm, "race": _race, "full": _full}[mode](path, ledger, Keys(database).authenticate(secret))
    database.close()


if __name__ == "__main__":
    main()

"""A real process that lets approved requests out until it is killed; run as a program, under `python -O`.

After each release it appends the request's id and the file's hash to an fsynced side file: that is emitted.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trocar
from trocar.gate.airlock import Airlock, Paying
from trocar.gate.database import Database
from trocar.gate.keys import Keys, Principal
from trocar.gate.ledger import Ledger
from trocar.gate.limits import Limits, Payer
from trocar.gate.manifest import SigningKey
from trocar.gate.policy import Lineage


@contextmanager
def start(url: str, side: Path, secret: str, requests: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, killed at the end; it prints one line when it has begun."""
    env = {**os.environ, "PYTHONPATH": str(Path(trocar.__file__).parents[1])}
    command = [sys.executable, "-O", __file__, url, str(side), secret, *requests]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def paying(who: Principal, _: Lineage) -> Paying:
    return Paying((Payer(f"key:{who.key_id}", Limits(100_000_000)),), Limits(None))


def main() -> None:
    url, side, secret, *requests = sys.argv[1:]
    database = Database(url)
    who = Keys(database).authenticate(secret)
    airlock = Airlock(database, Ledger(database), SigningKey(bytes(range(32))), paying)
    file = os.open(side, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    print("begun", flush=True)
    while True:
        for request in requests:
            payload = airlock.release(who, request).payload
            os.write(file, f"{request} {hashlib.sha256(payload).hexdigest()}\n".encode())
            os.fsync(file)


if __name__ == "__main__":
    main()

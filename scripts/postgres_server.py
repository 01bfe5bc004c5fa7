"""A PostgreSQL server for tests and benchmarks: new, empty, on a unix socket, gone when the block ends.

It needs the server's programs (Debian: `apt-get install postgresql`), in PATH or where Debian puts them.
PostgreSQL refuses to run as root, so root runs it as the user `postgres`. Commits go to the disk as in earnest.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

USER = "trocar"
START_S = 30
ADMIN = "postgres"


@dataclass
class PostgresServer:
    """A running server; a ledger gets a schema of its own.

    Attributes:
        socket: folder of its unix socket.
        process: the server; `restart` replaces it.
    """

    socket: Path
    process: subprocess.Popen[bytes] = field(repr=False)
    _count: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def connect(self, schema: str = "public") -> psycopg.Connection:
        """A plain connection, with commits of its own, as the server's administrator."""
        options = f"-c search_path={schema}"
        return psycopg.connect(
            host=str(self.socket), user=USER, dbname="postgres", autocommit=True, options=options
        )

    def new_schema(self) -> str:
        """The name of a schema that is empty."""
        name = f"ledger_{next(self._count)}"
        with self.connect() as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return name

    def url(self, schema: str) -> str:
        return f"postgresql+psycopg://{USER}@/postgres?host={self.socket}&options=-csearch_path%3D{schema}"

    def restart(self) -> None:
        """Stops the server at once, as a power cut would, and starts it again on what is on the disk."""
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + START_S
        while True:
            self.process = _start(self.socket)
            try:
                return _wait(self)
            except psycopg.OperationalError:  # what the killed one had started keeps its memory for a moment
                if time.monotonic() > end:
                    raise


@contextmanager
def running() -> Iterator[PostgresServer]:
    """Starts a server; stops it and removes its files at the end."""
    folder = Path(tempfile.mkdtemp(prefix="trocar-pg"))  # short: a socket's path has 107 characters at most
    try:
        if os.getuid() == 0:
            shutil.chown(folder, ADMIN, ADMIN)
        command = [*_as_nobody_special(), _program("initdb"), "-D", str(folder / "data"), "-U", USER,
                   "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]  # fmt: skip
        subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603 - our own words
        server = PostgresServer(folder, _start(folder))
        try:
            _wait(server)
            yield server
        finally:
            # SIGINT: it hangs up on whoever is still connected; SIGTERM would wait for them
            server.process.send_signal(signal.SIGINT)
            server.process.wait(START_S)
    finally:
        shutil.rmtree(folder)


def _start(folder: Path) -> subprocess.Popen[bytes]:
    command = [*_as_nobody_special(), _program("postgres"), "-D", str(folder / "data"), "-k", str(folder),
               "-c", "listen_addresses=", "-c", "max_connections=200"]  # fmt: skip
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)  # noqa: S603 - our own words


def _wait(server: PostgresServer) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            server.connect().close()
        except psycopg.OperationalError:
            if time.monotonic() > end or server.process.poll() is not None:
                raise
            time.sleep(0.02)
        else:
            return


def _as_nobody_special() -> list[str]:
    """Words before a command, which keep it from running as root. The process stays our own child."""
    if os.getuid() != 0:
        return []
    # pdeathsig: a test run that is killed takes its server along
    return ["setpriv", f"--reuid={ADMIN}", f"--regid={ADMIN}", "--init-groups", "--pdeathsig=INT", "--"]


def _program(name: str) -> str:
    found = shutil.which(name)
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    if found is None:
        found = str(max(versions, key=lambda p: float(p.parents[1].name), default=""))
    if not found:
        raise FileNotFoundError(
            f"no {name}: install the PostgreSQL server (Debian: apt-get install postgresql)"
        )
    return found

"""The gate's database and the only two ways to touch it: `read()` and `write()`.

`write()` is one `BEGIN IMMEDIATE` transaction: it takes SQLite's write lock before the first look, so nothing
it read can change before it commits, and with WAL and `synchronous=FULL` it is on disk when it returns. Any
failure of the database becomes `ledger_unavailable` and rolls back: no commit, no emission. `read()` is one
snapshot. Files are made with mode 0600: they hold results of tenants.

A PostgreSQL backend replaces this file and `presence.py` only: `write()` would lock the row of `head` first
(`SELECT ... FOR UPDATE`), and presence would be a session-level advisory lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from trocar import errors
from trocar.gate import chain
from trocar.gate.presence import Presence, turn
from trocar.gate.tables import METADATA, SCHEMA

_BEGIN: Final = "trocar_begin"


class Database:
    """One open ledger file; make one per process and share it between threads.

    Args:
        url: `sqlite:///relative.db` or `sqlite:////absolute.db`.
        busy_s: how long a write waits for the writers of other processes, in seconds.

    Raises:
        ServerFault: `ledger_unavailable` when it cannot be opened, is of another version, or the URL is not
            a file of SQLite.
    """

    def __init__(self, url: str, *, busy_s: float = 30.0) -> None:
        path = _file_of(url)
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._engine = _engine(url, busy_s)
        self._writer = self._engine.execution_options(**{_BEGIN: "IMMEDIATE"})
        with ExitStack() as undo:
            undo.callback(self._engine.dispose)
            self.presence = self._open(path)
            undo.pop_all()

    def _open(self, path: Path) -> Presence:
        try:
            locks = path.with_name(path.name + ".locks")
            locks.mkdir(mode=0o700, exist_ok=True)
            with turn(locks / "opening"):
                _make_file(path)
                self._make_tables()
                presence = Presence(locks)
                presence.sweep()
        except OSError as e:
            raise unavailable("its files cannot be opened for writing") from e
        return presence

    def _make_tables(self) -> None:
        with self.write() as connection:
            METADATA.create_all(connection)
            found = chain.start(connection)
            if found != SCHEMA:
                raise unavailable(f"it has schema {found}; this version of trocar reads schema {SCHEMA}")

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that is durable when the block ends, or that never happened.

        Raises:
            ServerFault: `ledger_unavailable`.
        """
        # our own threads queue here: SQLite waits by sleep and retry, which doubled the slowest of 50 writers
        with self._turn, self._begin(self._writer) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent snapshot; never waits for a writer.

        Raises:
            ServerFault: `ledger_unavailable`.
        """
        with self._begin(self._engine) as connection:
            yield connection

    @contextmanager
    def _begin(self, engine: Engine) -> Iterator[Connection]:
        if os.getpid() != self._pid:
            raise unavailable("it was opened before a fork; each process opens its own")
        try:
            with engine.begin() as connection:
                yield connection
        except SQLAlchemyError as e:
            # the driver's words stay in __cause__, for the operator's log: they may hold paths and values
            raise unavailable(f"the database answered {type(e).__name__}") from e

    def close(self) -> None:
        """Lets go of the file; reservations still open are charged in full by the next process."""
        self._engine.dispose()
        self.presence.close()


def unavailable(why: str) -> errors.TrocarError:
    """The refusal for a ledger that cannot be trusted with a charge now."""
    return errors.refuse("ledger_unavailable", "", f"the ledger cannot be used: {why}")


def _file_of(url: str) -> Path:
    try:
        parsed = make_url(url)
    except ArgumentError as e:
        raise unavailable("its URL cannot be read") from e
    name = parsed.database or ""
    if parsed.drivername != "sqlite" or parsed.query or name in ("", ":memory:") or name.startswith("file:"):
        raise unavailable("its URL is not sqlite:///FILE, the only kind this version serves")
    return Path(name)


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    # a power cut must not lose the file's name: a missing ledger would be a full budget
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _engine(url: str, busy_s: float) -> Engine:
    # isolation_level=None: the driver starts no transaction of its own; `_on_begin` does
    engine = create_engine(
        url, connect_args={"isolation_level": None, "timeout": busy_s}, pool_size=4, max_overflow=60
    )
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(raw: Any, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        raw.execute(f"PRAGMA {pragma}").close()
    found = tuple(raw.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))
    if found != ("wal", 2):  # SQLite reports, and does not raise, when a file system cannot do WAL
        raise unavailable(f"its file system gave journal mode and durability {found}, not ('wal', 2)")


def _on_begin(connection: Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get(_BEGIN, 'DEFERRED')}")

"""The gate's database and the only two ways to touch it: `read()` and `write()`.

`write()` is one transaction that no other writer, of any process, can enter: what it read cannot change before
it commits, and it is on disk when it returns. Any failure of the database becomes `ledger_unavailable` and
rolls back: no commit, no emission. `read()` is one snapshot.

What differs between a file of SQLite (`sqlite.py`) and a server of PostgreSQL (`postgres.py`) is behind
`Backend`; nothing else in the gate knows which of them it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from trocar import errors
from trocar.gate import chain
from trocar.gate.postgres import DRIVER, Postgres
from trocar.gate.presence import InstanceId
from trocar.gate.refusals import unavailable
from trocar.gate.sqlite import SQLite
from trocar.gate.tables import METADATA, SCHEMA

__all__ = ["Database", "unavailable"]


class Alive(Protocol):
    """What says that this process is alive, and which others are."""

    instance: InstanceId

    def renew(self) -> None: ...

    def is_dead(self, instance: str) -> bool: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """What a kind of database must bring."""

    @property
    def engine(self) -> Engine:
        """Owns the connections."""
        ...

    @property
    def writer(self) -> Engine:
        """Begins transactions that write."""
        ...

    @property
    def reader(self) -> Engine:
        """Begins transactions that are one snapshot."""
        ...

    def opening(self) -> AbstractContextManager[None]:
        """One process at a time inside, while tables are made."""
        ...

    def appear(self) -> Alive:
        """Declares this process alive, inside `opening`."""
        ...

    def lock(self, connection: Connection) -> None:
        """Waits for the other writers, as the first step of a write."""
        ...


class Database:
    """One open ledger; make one per process and share it between threads.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql+psycopg://USER@HOST/DATABASE`.
        busy_s: how long a write waits for the writers of other processes, in seconds.

    Raises:
        ServerFault: `ledger_unavailable` when it cannot be opened, is of another version, or the URL is of
            another kind.
        ClientError: `missing_extra` when the driver of PostgreSQL is not installed.
    """

    def __init__(self, url: str, *, busy_s: float = 30.0) -> None:
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._backend = _backend(url, busy_s)
        with ExitStack() as undo:
            undo.callback(self._backend.engine.dispose)
            self.presence = self._open()
            undo.pop_all()

    def _open(self) -> Alive:
        try:
            with self._backend.opening():
                self._make_tables()
                return self._backend.appear()
        except OSError as e:
            raise unavailable("its files cannot be opened for writing") from e
        except SQLAlchemyError as e:
            raise _answered(e) from e

    def _make_tables(self) -> None:
        with self._begin(self._backend.writer) as connection:
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
        # our own threads queue here: waiting in the database doubled the slowest of 50 writers
        with self._turn, self._begin(self._backend.writer) as connection:
            self._backend.lock(connection)
            self.presence.renew()
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent snapshot; never waits for a writer.

        Raises:
            ServerFault: `ledger_unavailable`.
        """
        with self._begin(self._backend.reader) as connection:
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
            raise _answered(e) from e

    def close(self) -> None:
        """Lets go of the database; reservations still open are charged in full by the next process."""
        # a forked child must not say goodbye on the connections of its parent
        self._backend.engine.dispose(close=os.getpid() == self._pid)
        self.presence.close()


def _answered(error: SQLAlchemyError) -> errors.TrocarError:
    return unavailable(f"the database answered {type(error).__name__}")


def _backend(url: str, busy_s: float) -> Backend:
    try:
        parsed: URL = make_url(url)
    except ArgumentError as e:
        raise unavailable("its URL cannot be read") from e
    if parsed.drivername == "sqlite":
        return SQLite(parsed, busy_s)
    if parsed.drivername == DRIVER:
        return _postgres(parsed, busy_s)
    raise unavailable(f"its URL is neither sqlite:///FILE nor {DRIVER}://USER@HOST/DATABASE")


def _postgres(url: URL, busy_s: float) -> Postgres:
    try:
        return Postgres(url, busy_s)
    except ModuleNotFoundError as e:
        step = "Run `pip install 'trocar[server,postgres]'`."
        reason = f"the package {e.name!r} is not installed"
        raise errors.refuse("missing_extra", "", reason, next_step=step) from None

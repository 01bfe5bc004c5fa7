"""A ledger in one file: SQLite with WAL, and a folder of locked files beside it that says who is alive.

A write is `BEGIN IMMEDIATE`: it takes the write lock before the first look, so nothing it read can change
before it commits, and with `synchronous=FULL` it is on disk when it returns. All processes are on one host,
because WAL is. Files are made with mode 0600: they hold results of tenants.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event

from trocar.gate.presence import Presence, turn
from trocar.gate.refusals import unavailable

_BEGIN: Final = "trocar_begin"


class SQLite:
    """The file, its connections and its folder of locks."""

    def __init__(self, url: URL, busy_s: float) -> None:
        self._path = _file_of(url)
        self.engine = _engine(url, busy_s)
        self.writer = self.engine.execution_options(**{_BEGIN: "IMMEDIATE"})
        self.reader: Engine = self.engine

    @contextmanager
    def opening(self) -> Iterator[None]:
        """One process at a time inside; the file exists.

        Raises:
            OSError: the place cannot be written.
        """
        self._locks.mkdir(mode=0o700, exist_ok=True)
        with turn(self._locks / "opening"):
            _make_file(self._path)
            yield

    def appear(self) -> Presence:
        """Declares this process alive. Call it inside `opening`."""
        presence = Presence(self._locks)
        presence.sweep()
        return presence

    def lock(self, connection: Connection) -> None:
        """The transaction has the write lock since it began."""

    @property
    def _locks(self) -> Path:
        return self._path.with_name(self._path.name + ".locks")


def _file_of(url: URL) -> Path:
    name = url.database or ""
    if url.query or name in ("", ":memory:") or name.startswith("file:"):
        raise unavailable("its URL is not sqlite:///FILE")
    return Path(name)


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    # a power cut must not lose the file's name: a missing ledger would be a full budget
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _engine(url: URL, busy_s: float) -> Engine:
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

"""A ledger in PostgreSQL: the row of `head` is the lock of all writers, an advisory lock says who is alive.

A write locks that row before its first look, so writers of all processes and hosts take turns; a read is one
snapshot. Each process holds a session-level advisory lock on a connection of its own: when the process dies,
or the server loses the connection, the server lets go of it. So "is it dead?" is "can its lock be taken?".

A commit must be on disk when it returns: a server or a session without that is refused. A pooler that hands
one session to several clients breaks the advisory lock; connect to the server itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import select as polling
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError

from trocar.gate.presence import InstanceId
from trocar.gate.refusals import unavailable
from trocar.gate.tables import HEAD

DRIVER: Final = "postgresql+psycopg"
CONNECT_S: Final = 10
_OPENING: Final = int.from_bytes(b"trocar", "big")
_INSTANCE: Final = re.compile(r"[0-9a-f]{32}")
_DURABLE: Final = {"fsync": ("on",), "synchronous_commit": ("on", "remote_apply")}


class Postgres:
    """Connections to one database of a server."""

    def __init__(self, url: URL, busy_s: float) -> None:
        wait_ms = max(1, int(busy_s * 1000))
        arguments = {"connect_timeout": CONNECT_S, "tcp_user_timeout": wait_ms}
        self._options: dict[str, Any] = {"connect_args": arguments}
        self._url = url
        self._wait_ms = wait_ms
        self.engine = self._make(pool_size=4, max_overflow=12, pool_timeout=busy_s)
        self.writer = self.engine.execution_options(isolation_level="READ COMMITTED")
        self.reader = self.engine.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    @contextmanager
    def opening(self) -> Iterator[None]:
        """One process at a time inside."""
        with self.engine.connect() as connection, connection.begin():
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _OPENING})
            yield

    def appear(self) -> Session:
        """Declares this process alive."""
        return Session(self._make(poolclass=NullPool), self.engine)

    def lock(self, connection: Connection) -> None:
        """Waits for the writers of other processes; nothing that is read afterwards can change."""
        connection.execute(select(HEAD.c.id).with_for_update())

    def _make(self, **pool: Any) -> Engine:
        engine = create_engine(self._url, **self._options, **pool)
        wait_ms = self._wait_ms

        def on_connect(raw: Any, _record: object) -> None:
            _prepare(raw, wait_ms)

        event.listen(engine, "connect", on_connect)
        return engine


class Session:
    """The connection whose advisory lock says that this process is alive.

    Args:
        engine: makes the connection; has no pool.
        others: asks about other processes.
    """

    def __init__(self, engine: Engine, others: Engine) -> None:
        self._engine = engine
        self._others = others
        self._pid = os.getpid()
        self._open()

    def _open(self) -> None:
        # a new name each time: what ran under a lost lock counts as dead, for us as for everybody else
        self.instance = InstanceId(secrets.token_hex(16))
        self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        key = {"key": _key(self.instance)}
        self._connection.execute(text("SELECT pg_advisory_lock(:key)"), key)

    def renew(self) -> None:
        """Takes a new lock when the server has closed the connection that held the last one."""
        raw: Any = self._connection.connection.dbapi_connection
        poll = polling.poll()
        poll.register(raw.fileno(), polling.POLLIN)
        if not poll.poll(0):
            return  # nothing to read: the server has not hung up
        try:
            self._connection.execute(text("SELECT 1"))
        except DBAPIError:
            self._connection.close()
            self._open()

    def is_dead(self, instance: str) -> bool:
        """Whether nobody holds the lock of `instance`."""
        if not _INSTANCE.fullmatch(instance):
            return True
        if instance == self.instance:
            return False
        # shared, so that two processes asking at once do not take each other for the owner
        query = text("SELECT pg_try_advisory_xact_lock_shared(:key)")
        with self._others.begin() as connection:
            return bool(connection.execute(query, {"key": _key(instance)}).scalar_one())

    def close(self) -> None:
        """Declares this process dead; idempotent. In a forked child it says nothing about the parent."""
        if os.getpid() == self._pid:
            self._connection.close()
            self._engine.dispose()


def _key(instance: str) -> int:
    return int.from_bytes(hashlib.sha256(instance.encode("ascii")).digest()[:8], "big", signed=True)


def _prepare(raw: Any, wait_ms: int) -> None:
    """Bounds how long a session waits for a lock, and refuses one whose commits may be lost."""
    raw.execute(f"SET lock_timeout = {wait_ms}")
    found = {name: raw.execute(f"SHOW {name}").fetchone()[0] for name in _DURABLE}
    raw.commit()
    lax = [f"{name} = {value}" for name, value in found.items() if value not in _DURABLE[name]]
    if lax:
        raise unavailable(f"its server has {lax[0]}, so a commit may be lost")

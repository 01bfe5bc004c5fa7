"""Where a ledger of a test lives: a file of SQLite, or a schema of a real PostgreSQL server.

`raw` is a connection of another program, behind the ledger's back, which may also break what the database
itself would forbid by foreign keys.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgres_server import PostgresServer

KINDS = ("sqlite", "postgres")


@dataclass(frozen=True)
class Place:
    """A place for one ledger, and a folder for what a test writes beside it."""

    kind: str
    folder: Path
    url: str
    server: PostgresServer | None = None
    schema: str = ""

    @property
    def path(self) -> Path:
        """The file of SQLite."""
        return self.folder / "ledger.db"

    @contextmanager
    def raw(self) -> Iterator[Any]:
        """Something with `execute(sql)`, whose rows are dictionaries; commits at the end."""
        if self.server is None:
            with closing(sqlite3.connect(self.path)) as connection, connection:
                connection.row_factory = sqlite3.Row
                yield connection
            return
        from psycopg.rows import dict_row

        with self.server.connect(self.schema) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.row_factory = dict_row
            with connection.transaction():
                yield connection

    def sql(self, *statements: str) -> list[dict[str, Any]]:
        """Runs statements; the rows of the last one."""
        with self.raw() as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return [dict(row) for row in cursor.fetchall()] if cursor.description else []

    def backup(self) -> Any:
        """A copy of the whole ledger, for `restore`; nothing may have it open."""
        if self.server is None:
            return {p.name: p.read_bytes() for p in self.folder.glob("ledger.db*") if p.is_file()}
        with self.raw() as connection:
            return {t: connection.execute(f"SELECT * FROM {t}").fetchall() for t in _present(connection)}

    def restore(self, copy: Any) -> None:
        """Puts an older copy in the place of the ledger; nothing may have it open."""
        if self.server is None:
            for path in self.folder.glob("ledger.db*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for name, content in copy.items():
                (self.folder / name).write_bytes(content)
            return
        with self.raw() as connection:
            for table, rows in copy.items():
                connection.execute(f"DELETE FROM {table}")
                for row in rows:
                    names = ", ".join(f'"{name}"' for name in row)
                    marks = ", ".join(["%s"] * len(row))
                    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))


def _present(connection: Any) -> list[str]:
    query = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
    return [row["tablename"] for row in connection.execute(query).fetchall()]


def place(kind: str, folder: Path, server: PostgresServer | None = None) -> Place:
    """A new place of a kind."""
    folder.mkdir(exist_ok=True)
    if kind == "sqlite":
        return Place(kind, folder, f"sqlite:///{folder / 'ledger.db'}")
    if server is None:
        raise ValueError("PostgreSQL needs a server")
    schema = server.new_schema()
    return Place(kind, folder, server.url(schema), server, schema)

"""The catalog: which entries (handles, artifacts) exist, whose they are, and which files belong to them.

SQLite in WAL mode with full synchronisation. A file that is not in `files` does not exist for anybody, so the
one transaction that lists a shard's files is the moment at which the shard appears. Writing transactions take
the lock at their start (BEGIN IMMEDIATE), so what they read is what they change. This module never opens a
data file and knows nothing of what the files hold.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from trocar import errors
from trocar.store.dtypes import Dtype

State = Literal["open", "complete", "failed"]
ACTIVATIONS: Final = "activations"
WHOLE: Final = -1
_FORMAT: Final = 2
_BUSY_MS: Final = 30_000
_META: Final = sa.MetaData()
_ENTRIES: Final = sa.Table(
    "entries",
    _META,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("owner", sa.String, nullable=False, index=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("program_hash", sa.String, nullable=False),
    sa.Column("layout", sa.Text, nullable=False),
    sa.Column("info", sa.Text, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("expires_s", sa.Float, index=True),
    sa.Column("dtype", sa.String, nullable=False, server_default="float32"),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
)
_FILES: Final = sa.Table(
    "files",
    _META,
    sa.Column("path", sa.String, primary_key=True),
    sa.Column("entry", sa.ForeignKey("entries.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("site", sa.String, nullable=False),
    sa.Column("n_rows", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False, server_default=""),
    sa.Column("first_key", sa.BigInteger),
    sa.Column("last_key", sa.BigInteger),
)
# What format 2 added to tables of format 1; rows of format 1 have the defaults.
_ADDED: Final = (
    "ALTER TABLE entries ADD COLUMN dtype VARCHAR DEFAULT 'float32' NOT NULL",
    "ALTER TABLE entries ADD COLUMN pinned BOOLEAN DEFAULT 0 NOT NULL",
    "ALTER TABLE files ADD COLUMN label VARCHAR DEFAULT '' NOT NULL",
    "ALTER TABLE files ADD COLUMN first_key BIGINT",
    "ALTER TABLE files ADD COLUMN last_key BIGINT",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One handle or artifact.

    Attributes:
        kind: `ACTIVATIONS`, or the kind of the artifact.
        layout: JSON; widths by site for activations, shapes by site and name for artifacts.
        info: JSON; what the maker of an artifact wants to remember.
        created_s, expires_s: Unix time in seconds; expires_s is None for an entry that stays.
        dtype: of the stored vectors.
        pinned: an entry that outlives `expires_s`.
    """

    id: str
    owner: str
    kind: str
    fingerprint: str
    layout: str
    created_s: float
    expires_s: float | None
    model: str = ""
    program_hash: str = ""
    info: str = "null"
    state: State = "open"
    dtype: Dtype = "float32"
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class File:
    """One immutable file; `path` is relative to the data folder.

    Attributes:
        shard: its number in the order of arrival; `WHOLE` for a file about all rows of the handle.
        site: of its vectors; empty for a sidecar.
        label: the column that a sidecar of labels holds; empty for any other file.
        first_key, last_key: `RowTable.keys` of the first and the last row of a shard, in its sidecar's line; None
            where nobody wrote them down.
    """

    path: str
    entry: str
    shard: int
    site: str
    n_rows: int
    size_bytes: int
    sha256: str
    label: str = ""
    first_key: int | None = None
    last_key: int | None = None


class Catalog:
    """Owns the database file `path`; safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{path}")
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._prepare()
            undo.pop_all()

    def _prepare(self) -> None:
        """Makes the tables of a new store, extends those of an older one, refuses one of a newer version."""
        with self.write() as c:
            found = c.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found not in range(_FORMAT + 1):
                raise errors.refuse("store_damaged", "", f"the store has format {found}, not {_FORMAT}")
            if found == 1:
                for statement in _ADDED:
                    c.exec_driver_sql(statement)
            _META.create_all(c)
            c.exec_driver_sql(f"PRAGMA user_version = {_FORMAT}")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One writing transaction, committed at the end or rolled back whole."""
        try:
            with self._engine.connect().execution_options(writing=True) as c, c.begin():
                yield c
        except OperationalError as e:
            if isinstance(e.orig, sqlite3.Error) and e.orig.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise errors.refuse("disk_full", "", "the disk that holds the catalog is full") from e
            raise

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One reading transaction: everything read in it belongs to the same moment."""
        with self._engine.connect() as c:
            yield c


def add_entry(c: sa.Connection, entry: Entry) -> None:
    c.execute(sa.insert(_ENTRIES).values(asdict(entry)))


def add_files(c: sa.Connection, files: Sequence[File]) -> None:
    c.execute(sa.insert(_FILES), [asdict(f) for f in files])


def find(c: sa.Connection, entry_id: str) -> Entry | None:
    row = c.execute(sa.select(_ENTRIES).where(_ENTRIES.c.id == entry_id)).one_or_none()
    return None if row is None else _entry(row)


def find_owned(c: sa.Connection, owner: str, entry_id: str, now_s: float) -> Entry | None:
    """The entry if it is there, is the owner's and has not expired."""
    where = (_ENTRIES.c.id == entry_id, _ENTRIES.c.owner == owner, _alive(now_s))
    row = c.execute(sa.select(_ENTRIES).where(*where)).one_or_none()
    return None if row is None else _entry(row)


def entries(c: sa.Connection) -> list[Entry]:
    return [_entry(row) for row in c.execute(sa.select(_ENTRIES))]


def owned(c: sa.Connection, owner: str, now_s: float) -> list[Entry]:
    """The owner's entries that have not expired, oldest first."""
    query = sa.select(_ENTRIES).where(_ENTRIES.c.owner == owner, _alive(now_s))
    return [_entry(row) for row in c.execute(query.order_by(_ENTRIES.c.created_s, _ENTRIES.c.id))]


def expired(c: sa.Connection, now_s: float) -> list[str]:
    return list(c.execute(sa.select(_ENTRIES.c.id).where(~_alive(now_s))).scalars())


def files(c: sa.Connection, entry_id: str | None = None) -> list[File]:
    """Files of one entry, or of all, by entry, shard and site."""
    query = sa.select(_FILES).order_by(_FILES.c.entry, _FILES.c.shard, _FILES.c.site)
    if entry_id is not None:
        query = query.where(_FILES.c.entry == entry_id)
    return [File(**_fields(row)) for row in c.execute(query)]


def totals(c: sa.Connection, ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(rows, bytes) by entry id; an entry without files is absent."""
    rows_here = (_FILES.c.site == "") & (_FILES.c.shard != WHOLE)
    n_rows = sa.func.sum(sa.case((rows_here, _FILES.c.n_rows), else_=0))
    query = sa.select(_FILES.c.entry, n_rows, sa.func.sum(_FILES.c.size_bytes)).group_by(_FILES.c.entry)
    return {row[0]: (row[1], row[2]) for row in c.execute(query.where(_FILES.c.entry.in_(ids)))}


def usage_bytes(c: sa.Connection, owner: str) -> int:
    """Bytes on disk of everything the owner has, expired entries that are not swept yet included."""
    query = sa.select(sa.func.sum(_FILES.c.size_bytes)).join(_ENTRIES).where(_ENTRIES.c.owner == owner)
    return int(c.execute(query).scalar() or 0)


def set_state(c: sa.Connection, entry_id: str, state: State) -> None:
    c.execute(sa.update(_ENTRIES).where(_ENTRIES.c.id == entry_id).values(state=state))


def set_pinned(c: sa.Connection, entry_id: str, pinned: bool) -> None:
    c.execute(sa.update(_ENTRIES).where(_ENTRIES.c.id == entry_id).values(pinned=pinned))


def fail_open(c: sa.Connection) -> None:
    """Marks every entry whose writer is gone; what it committed stays readable."""
    c.execute(sa.update(_ENTRIES).where(_ENTRIES.c.state == "open").values(state="failed"))


def fail(c: sa.Connection, entry_id: str) -> list[File]:
    """Marks an entry as failed and removes its files; returns these."""
    gone = files(c, entry_id)
    c.execute(sa.delete(_FILES).where(_FILES.c.entry == entry_id))
    set_state(c, entry_id, "failed")
    return gone


def remove(c: sa.Connection, entry_id: str) -> list[File]:
    """Removes an entry and, by cascade, its files; returns these."""
    gone = files(c, entry_id)
    c.execute(sa.delete(_ENTRIES).where(_ENTRIES.c.id == entry_id))
    return gone


def remove_files(c: sa.Connection, gone: Sequence[File]) -> None:
    c.execute(sa.delete(_FILES).where(_FILES.c.path.in_([f.path for f in gone])))


def _alive(now_s: float) -> sa.ColumnElement[bool]:
    return _ENTRIES.c.expires_s.is_(None) | (_ENTRIES.c.expires_s > now_s) | _ENTRIES.c.pinned


def _fields(row: sa.Row[Any]) -> dict[str, Any]:
    return dict(row._mapping)


def _entry(row: sa.Row[Any]) -> Entry:
    return Entry(**_fields(row))


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event opens transactions, not sqlite3
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: sa.Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

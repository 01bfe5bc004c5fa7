"""The airlock's tables: requests, their frozen content, and the steps that people took. No behaviour.

A step is also an entry of the log, in the same transaction; `seq` names it. That one person takes a step of a
kind once is held by the database too. Nothing here is specific to one database.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    Table,
    UniqueConstraint,
)

from trocar.gate.tables import METADATA

REQUESTS: Final = Table(
    "airlock_requests",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("holder", String(254), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("project", String(64), nullable=False),
    Column("lineage", String(200), nullable=False),
    Column("submitted_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("document", String, nullable=False),
    Column("digest", String(64), nullable=False),
    Index("airlock_by_state", "state", "expires_ms"),
    Index("airlock_by_lineage", "lineage", "state"),
    Index("airlock_by_project", "tenant", "project"),
)

CONTENTS: Final = Table(
    "airlock_contents",
    METADATA,
    Column("request", String(32), ForeignKey("airlock_requests.id"), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

STEPS: Final = Table(
    "airlock_steps",
    METADATA,
    Column("request", String(32), ForeignKey("airlock_requests.id"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("action", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("holder", String(254), nullable=False),
    Column("role", String(16), nullable=False),
    Column("words", String(2000), nullable=False),
    Column("time_ms", BigInteger, nullable=False),
    UniqueConstraint("request", "action", "holder", name="once_each"),
)


def make(connection: Connection) -> None:
    """Makes the tables where they are missing."""
    METADATA.create_all(connection, tables=[REQUESTS, CONTENTS, STEPS])

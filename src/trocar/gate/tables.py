"""The gate's tables: what kinds of row there are, no behaviour.

`log` is the truth; the other tables are what it adds up to, kept so that a budget can be checked in one
look-up. The CHECK constraints repeat what the code enforces: a second line, held by the database itself.
Nothing here is specific to one database.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

SCHEMA: Final = 4
METADATA: Final = MetaData()
_Whole: Final = BigInteger().with_variant(Integer, "sqlite")  # makes `seq` SQLite's row id

KEYS: Final = Table(
    "keys",
    METADATA,
    Column("key_id", String(16), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("tier", String(16), nullable=False),
    Column("role", String(16), nullable=False),
    Column("project", String(64), nullable=False),
    Column("holder", String(254), nullable=False),
    Column("scope", String, nullable=False),
    Column("made_by", String(16), nullable=False),
    Column("note", String(200), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("created_ms", _Whole, nullable=False),
    Column("revoked_ms", _Whole),
)

TOKEN_ROOTS: Final = Table(
    "token_roots",
    METADATA,
    Column("public_key", String(64), primary_key=True),
    Column("made_ms", _Whole, nullable=False),
)

REVOKED_TOKENS: Final = Table(
    "revoked_tokens",
    METADATA,
    Column("token_id", String(32), primary_key=True),
    Column("revoked_ms", _Whole, nullable=False),
)

LINEAGES: Final = Table(
    "lineages",
    METADATA,
    Column("name", String(200), primary_key=True),
    Column("secret_bits", _Whole, nullable=False),
    Column("cap", String(16), nullable=False),
    Column("frozen", String(200), nullable=False),
)

ACCOUNTS: Final = Table(
    "accounts",
    METADATA,
    Column("owner", String(200), primary_key=True),
    Column("lineage", String(200), ForeignKey("lineages.name"), primary_key=True),
    Column("charged_bits", _Whole, nullable=False),
    Column("held_bits", _Whole, nullable=False),
    Column("limit_bits", _Whole),
    Column("asked_bits", _Whole),
    Column("grace_bits", _Whole, nullable=False),
    Column("day", _Whole, nullable=False),
    Column("day_bits", _Whole, nullable=False),
    Column("day_limit_bits", _Whole),
    Column("day_asked_bits", _Whole),
    Column("day_grace_bits", _Whole, nullable=False),
    CheckConstraint("charged_bits >= 0 AND held_bits >= 0 AND day_bits >= held_bits", name="not_negative"),
    CheckConstraint(
        "limit_bits IS NULL OR charged_bits + held_bits <= limit_bits + grace_bits", name="within_limit"
    ),
    CheckConstraint(
        "day_limit_bits IS NULL OR day_bits <= day_limit_bits + day_grace_bits", name="within_day"
    ),
)

RESERVATIONS: Final = Table(
    "reservations",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("instance", String(32), nullable=False),
    Column("key_id", String(16), ForeignKey("keys.key_id"), nullable=False),
    Column("lineage", String(200), ForeignKey("lineages.name"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reserved_bits", _Whole, nullable=False),
    Column("spent_bits", _Whole, nullable=False),
    Column("idempotency_key", String(200)),
    Column("named_by", String(64), nullable=False),
    Column("request_digest", String(64), nullable=False),
    Column("payload_digest", String(64), nullable=False),
    Column("owners", String, nullable=False),
    Column("tokens", String, nullable=False),
    Column("request_id", String(64), nullable=False),
    UniqueConstraint("key_id", "named_by", "idempotency_key"),
    CheckConstraint("spent_bits >= 0 AND spent_bits <= reserved_bits", name="within_reservation"),
    Index("by_state", "state"),
)

PAYLOADS: Final = Table(
    "payloads",
    METADATA,
    Column("reservation", String(32), ForeignKey("reservations.id"), primary_key=True),
    Column("kept_ms", BigInteger, nullable=False, index=True),
    Column("payload", LargeBinary, nullable=False),
)

LOG: Final = Table(
    "log",
    METADATA,
    Column("seq", _Whole, primary_key=True, autoincrement=False),
    Column("time_ms", _Whole, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("lineage", String(200), nullable=False),
    Column("reservation", String(32), nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("held_bits", _Whole, nullable=False),
    Column("charged_bits", _Whole, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("detail", String, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Index("by_reservation", "reservation"),
    Index("by_request", "request_id"),
    Index("by_key", "key_id", "seq"),
)

DIRECTIONS: Final = Table(
    "directions",
    METADATA,
    Column("owner", String(200), primary_key=True),
    Column("lineage", String(200), ForeignKey("lineages.name"), primary_key=True),
    Column("site", String(200), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("rank", _Whole, nullable=False),
    CheckConstraint("rank >= 1", name="some_rank"),
)

EXPORTED: Final = Table(
    "exported",
    METADATA,
    Column("lineage", String(200), ForeignKey("lineages.name"), primary_key=True),
    Column("site", String(200), primary_key=True),
    Column("first", _Whole, primary_key=True, autoincrement=False),
    CheckConstraint("first IN (0, 1)", name="first_or_not"),
)

HEAD: Final = Table(
    "head",
    METADATA,
    Column("id", _Whole, primary_key=True, autoincrement=False),
    Column("schema", _Whole, nullable=False),
    Column("seq", _Whole, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("ledger", String(32), nullable=False),
    Column("anchored", _Whole, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

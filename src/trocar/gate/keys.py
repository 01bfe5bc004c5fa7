"""API keys: who is calling, how far they are trusted, and nothing about what they have spent.

A secret is `trk_<key id>_<256 random bits>`. It is shown once, by `create`; the database keeps its SHA-256,
which is enough for a secret that cannot be guessed. Unknown, malformed and revoked keys get one and the same
answer. Creation and revocation are entries of the log, in the transaction that makes them true.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Final, NewType

from sqlalchemy import Connection, Row, insert, select, update

from trocar import errors
from trocar.gate import chain
from trocar.gate.chain import Kind
from trocar.gate.database import Database
from trocar.gate.policy import Role, Tier
from trocar.gate.tables import KEYS

KeyId = NewType("KeyId", str)
TenantId = NewType("TenantId", str)

_SECRET: Final = re.compile(r"trk_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NOBODY: Final = "0" * 64
"""Compared with when no such key exists, so that both answers take the same steps."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request is made by; what `authenticate` returns and the ledger charges."""

    key_id: KeyId
    tenant: TenantId
    tier: Tier
    role: Role


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made; the only value that ever holds the secret, and its repr does not."""

    principal: Principal
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as the operator sees it; times in milliseconds since 1970."""

    principal: Principal
    note: str
    created_ms: int
    revoked_ms: int | None


class Keys:
    """Mints, checks and revokes the keys of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant: str, tier: Tier, role: Role, note: str = "") -> NewKey:
        """Makes a key. Its secret cannot be read again.

        Args:
            tenant: who owns what the key makes; `[a-z0-9._-]`, at most 64 characters.
            tier: fixes the key's budgets, for life.
            role: what else it may do.
            note: for the operator; printable, at most 200 characters.

        Raises:
            ProgramError: `bad_value`.
            ServerFault: `ledger_unavailable`.
        """
        _check_words(tenant, note)
        principal = Principal(KeyId(secrets.token_hex(8)), TenantId(tenant), Tier(tier), Role(role))
        secret = f"trk_{principal.key_id}_{secrets.token_urlsafe(32)}"
        row = {
            "key_id": principal.key_id,
            "tenant": tenant,
            "tier": str(principal.tier),
            "role": str(principal.role),
            "note": note,
            "secret_sha256": _digest(secret),
        }
        with self._database.write() as connection:
            connection.execute(insert(KEYS).values(**row, created_ms=_now_ms()))
            chain.append(
                connection,
                Kind.key_created,
                key_id=principal.key_id,
                digest=row["secret_sha256"],
                detail={name: row[name] for name in ("tenant", "tier", "role", "note")},
            )
        return NewKey(principal, secret)

    def authenticate(self, secret: str | None) -> Principal:
        """Names the caller.

        Args:
            secret: what the client sent; None when it sent nothing.

        Raises:
            AuthError: `no_key`, or `bad_key` for unknown, malformed and revoked alike.
            ServerFault: `ledger_unavailable`.
        """
        if secret is None:
            raise errors.refuse("no_key", "authorization", "the request carries no API key")
        match = _SECRET.fullmatch(secret)
        if match is None:
            raise _bad_key()
        with self._database.read() as connection:
            row = connection.execute(select(KEYS).where(KEYS.c.key_id == match[1])).one_or_none()
        same = hmac.compare_digest(_digest(secret), _NOBODY if row is None else row.secret_sha256)
        if row is None or not same or row.revoked_ms is not None:
            raise _bad_key()
        return _principal(row)

    def revoke(self, key_id: str) -> None:
        """Ends a key: nothing is admitted, settled or replayed for it after this returns. Twice is once.

        Raises:
            NotFound: `key_not_found`.
            ServerFault: `ledger_unavailable`.
        """
        with self._database.write() as connection:
            row = connection.execute(select(KEYS).where(KEYS.c.key_id == key_id)).one_or_none()
            if row is None:
                raise errors.refuse("key_not_found", "key_id", f"there is no key {key_id[:40]!r}")
            if row.revoked_ms is None:
                connection.execute(update(KEYS).where(KEYS.c.key_id == key_id).values(revoked_ms=_now_ms()))
                chain.append(connection, Kind.key_revoked, key_id=key_id)

    def list(self) -> tuple[KeyRecord, ...]:
        """All keys, oldest first, revoked ones included."""
        with self._database.read() as connection:
            rows = connection.execute(select(KEYS).order_by(KEYS.c.created_ms, KEYS.c.key_id)).all()
        return tuple(KeyRecord(_principal(row), row.note, row.created_ms, row.revoked_ms) for row in rows)


def require_current(connection: Connection, principal: Principal) -> None:
    """Refuses a principal that is not, in this transaction, exactly a key that is not revoked.

    Raises:
        AuthError: `bad_key`.
    """
    row = connection.execute(select(KEYS).where(KEYS.c.key_id == principal.key_id)).one_or_none()
    if row is None or row.revoked_ms is not None or _principal(row) != principal:
        raise _bad_key()


def require_not_revoked(connection: Connection, key_id: str) -> None:
    """Refuses a key revoked since its reservation was made.

    Raises:
        AuthError: `bad_key`.
    """
    query = select(KEYS.c.key_id).where(KEYS.c.key_id == key_id, KEYS.c.revoked_ms.is_(None))
    if connection.execute(query).one_or_none() is None:
        raise _bad_key()


def _principal(row: Row[tuple[object, ...]]) -> Principal:
    return Principal(KeyId(row.key_id), TenantId(row.tenant), Tier(row.tier), Role(row.role))


def _bad_key() -> errors.TrocarError:
    return errors.refuse("bad_key", "authorization", "the API key is unknown or revoked")


def _check_words(tenant: str, note: str) -> None:
    if not _TENANT.fullmatch(tenant):
        raise errors.refuse(
            "bad_value", "tenant", f"{tenant[:80]!r} is not a tenant: a-z, 0-9, '.', '_', '-'"
        )
    if len(note) > 200 or not note.isprintable():
        raise errors.refuse("bad_value", "note", "a note is at most 200 printable characters")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

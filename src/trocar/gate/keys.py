"""API keys and tokens: who is calling, how far they are trusted, and nothing about what they have spent.

A secret is `trk_<key id>_<256 random bits>`. It is shown once, by `create`; the database keeps its SHA-256,
which is enough for a secret that cannot be guessed. A token (`trt_...`) is made by `mint` for a key, or from
another token by anybody who has one; it stands for the key with less: a narrower scope, no role above
researcher, accounts of its own. Everything that is not good gets one and the same answer, be it unknown,
malformed, expired, revoked or forged. Creation, minting and revocation are entries of the log, in the
transaction that makes them true.

An expiry is looked at when a request is admitted; what was admitted before may end after it. A revocation also
stops what runs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, NewType

from sqlalchemy import Connection, Row, insert, select, update

from trocar import errors
from trocar.gate import chain, roles, scopes, tokens
from trocar.gate.chain import Kind
from trocar.gate.database import Database
from trocar.gate.policy import Role, Tier
from trocar.gate.scopes import EVERYTHING, Scope, SubAccount, bad_key
from trocar.gate.tables import KEYS
from trocar.grants import tokens as texts

KeyId = NewType("KeyId", str)
TenantId = NewType("TenantId", str)

_SECRET: Final = re.compile(r"trk_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# lower case only, and no "+": reviewers are told apart by it, so nobody may have two spellings
_HOLDER: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(@[a-z0-9][a-z0-9.-]{0,188})?")
_NOBODY: Final = "0" * 64
"""Compared with when no such key exists, so that both answers take the same steps."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request is made by; what `authenticate` returns and the ledger charges.

    Attributes:
        key_id: the key, also when a token stands for it.
        tenant: who owns what is made.
        tier: how far the key is trusted.
        role: what it may do.
        project: what it works for; keys of one project share an account.
        holder: the person behind the key.
        scope: what it may be used for, every link of a token taken together.
        subaccounts: accounts with limits of their own that every operation is charged to as well.
        token_ids: the blocks of the token, first one first; empty for a key itself.
    """

    key_id: KeyId
    tenant: TenantId
    tier: Tier
    role: Role
    project: str
    holder: str
    scope: Scope
    subaccounts: tuple[SubAccount, ...]
    token_ids: tuple[str, ...] = ()

    @property
    def credential(self) -> tuple[str, ...]:
        """The key, and the blocks of the token that stands for it."""
        return (self.key_id, *self.token_ids)

    def owns(self, tenant: str, maker: tuple[str, ...]) -> bool:
        """Whether what `maker`, a credential of `tenant`, made may be ended by this one.

        A whole key has everything of its tenant; a token, and a key with a scope, have what they or tokens made from
        them asked for.
        """
        narrow = bool(self.token_ids) or self.scope != EVERYTHING
        mine = self.credential
        return tenant == self.tenant and (not narrow or maker[: len(mine)] == mine)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made; the only value that ever holds the secret, and its repr does not."""

    principal: Principal
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token just made, and the id by which it can be revoked."""

    token_id: str
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as the operator sees it; times in milliseconds since 1970; `made_by` is a key id, or empty."""

    principal: Principal
    made_by: str
    note: str
    created_ms: int
    revoked_ms: int | None


class Keys:
    """Mints, checks and revokes the keys of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant: str,
        tier: Tier,
        role: Role,
        note: str = "",
        *,
        project: str | None = None,
        holder: str | None = None,
        scope: Scope = EVERYTHING,
        by: Principal | None = None,
    ) -> NewKey:
        """Makes a key. Its secret cannot be read again.

        Args:
            tenant: who owns what the key makes; `[a-z0-9._-]`, at most 64 characters.
            tier: fixes the key's budgets, for life.
            role: what else it may do.
            note: for the operator; printable, at most 200 characters.
            project: what it works for, in the grammar of a tenant; None for the tenant's name.
            holder: the person behind it, a name or a mail address in lower case; None for the tenant's name.
            scope: what it may be used for, and until when.
            by: who asks; None for whoever has the data folder in hand.

        Raises:
            ProgramError: `bad_value`.
            PolicyRefusal: `not_allowed` when `by` may not make such a key, `out_of_scope` when the scope is
                wider than that of `by`.
            AuthError: `bad_key` when `by` is no longer good.
            ServerFault: `ledger_unavailable`.
        """
        row = {
            "tenant": tenant,
            "tier": str(Tier(tier)),
            "role": str(Role(role)),
            "project": tenant if project is None else project,
            "holder": tenant if holder is None else holder,
            "scope": scope.as_json(),
            "made_by": "" if by is None else by.key_id,
            "note": note,
        }
        _check_words(row)
        scope.require_short()
        key_id = KeyId(secrets.token_hex(8))
        secret = f"trk_{key_id}_{secrets.token_urlsafe(32)}"
        with self._database.write() as connection:
            if by is not None:
                _require_mint(connection, by, Role(role), scope)
            values = {**row, "key_id": key_id, "secret_sha256": _digest(secret), "created_ms": _now_ms()}
            connection.execute(insert(KEYS).values(**values))
            chain.append(connection, Kind.key_created, key_id=key_id, digest=_digest(secret), detail=row)
            made = connection.execute(select(KEYS).where(KEYS.c.key_id == key_id)).one()
        return NewKey(_principal(made), secret)

    def mint(
        self,
        principal: Principal,
        scope: Scope = EVERYTHING,
        role: Literal["agent"] | None = None,
        *,
        root: Path,
    ) -> NewToken:
        """Makes the first token of a key: the same key with the role researcher (or agent) and less scope.

        Whoever has the token makes weaker ones with `trocar.grants.tokens.attenuate`, without a server.

        Args:
            principal: the key, from `authenticate`.
            scope: what is left of the key's own scope.
            role: `agent` to hand it to one.
            root: the file with the secret that signs; made when the first token is.

        Raises:
            PolicyRefusal: `not_allowed` for a token, or for a key that may not run programs.
            AuthError: `bad_key` when the key is no longer good.
            ProgramError: `bad_value` for another role, or a scope with an empty part.
            ServerFault: `ledger_unavailable`.
        """
        texts.require_role(role)
        if principal.token_ids:
            # a fresh token of the key would have more than the token that asks for it
            raise errors.refuse("not_allowed", "", "a token is not minted from a token: attenuate it instead")
        given = roles.delegated(principal.role, agent=role is not None)
        with self._database.write() as connection:
            require_current(connection, principal)
            signer = tokens.root(connection, root, _now_ms())
            text = texts.sign(signer, principal.key_id, scope, agent=given is Role.agent)
            [token_id] = texts.ids(text)
            detail = {"token_id": token_id, "scope": scope.as_json(), "role": str(given)}
            chain.append(
                connection, Kind.minted, key_id=principal.key_id, digest=_digest(text), detail=detail
            )
        return NewToken(token_id, text)

    def authenticate(self, secret: str | None) -> Principal:
        """Names the caller.

        Args:
            secret: what the client sent, a key's secret or a token; None when it sent nothing.

        Raises:
            AuthError: `no_key`, or `bad_key` for everything that is not good.
            ServerFault: `ledger_unavailable`.
        """
        if secret is None:
            raise errors.refuse("no_key", "authorization", "the request carries no API key")
        with self._database.read() as connection:
            read = _of_token if secret.startswith(texts.PREFIX) else _of_secret
            found = read(connection, secret)
        _require_unexpired(found)
        return found

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

    def revoke_token(self, token_id: str) -> None:
        """Ends every token that contains the block `token_id`, like `revoke`. Twice is once.

        Raises:
            ProgramError: `bad_value` for anything but 32 hex digits.
            ServerFault: `ledger_unavailable`.
        """
        with self._database.write() as connection:
            tokens.revoke(connection, token_id, _now_ms())

    def list(self) -> tuple[KeyRecord, ...]:
        """All keys, oldest first, revoked ones included."""
        with self._database.read() as connection:
            rows = connection.execute(select(KEYS).order_by(KEYS.c.created_ms, KEYS.c.key_id)).all()
        return tuple(
            KeyRecord(_principal(row), row.made_by, row.note, row.created_ms, row.revoked_ms) for row in rows
        )


def require_current(connection: Connection, principal: Principal) -> None:
    """Refuses a principal that is not, in this transaction, exactly a key or less than one, and still good.

    Raises:
        AuthError: `bad_key`.
    """
    row = _row(connection, principal.key_id)
    if row is None or row.revoked_ms is not None or not _follows(_principal(row), principal):
        raise bad_key()
    tokens.require_not_revoked(connection, principal.token_ids)
    _require_unexpired(principal)


def require_not_revoked(connection: Connection, key_id: str, token_ids: Iterable[str] = ()) -> None:
    """Refuses a key, or a token with one of these blocks, that was revoked since its reservation was made.

    Raises:
        AuthError: `bad_key`.
    """
    row = _row(connection, key_id)
    if row is None or row.revoked_ms is not None:
        raise bad_key()
    tokens.require_not_revoked(connection, token_ids)


def _follows(key: Principal, principal: Principal) -> bool:
    """Whether a principal is the key itself, or what a token can make of it."""
    if not principal.token_ids:
        return key == principal
    same = all(
        getattr(key, n) == getattr(principal, n) for n in ("key_id", "tenant", "tier", "project", "holder")
    )
    role = roles.may(key.role, roles.Power.run) and principal.role in (
        roles.delegated(key.role, agent=False),
        Role.agent,
    )
    accounts = principal.subaccounts[: len(key.subaccounts)] == key.subaccounts
    return same and role and accounts and principal.scope.within(key.scope)


def _of_secret(connection: Connection, secret: str) -> Principal:
    match = _SECRET.fullmatch(secret)
    if match is None:
        raise bad_key()
    row = _row(connection, match[1])
    same = hmac.compare_digest(_digest(secret), _NOBODY if row is None else row.secret_sha256)
    if row is None or not same or row.revoked_ms is not None:
        raise bad_key()
    return _principal(row)


def _of_token(connection: Connection, token: str) -> Principal:
    grant = tokens.verify(connection, token)
    row = _row(connection, grant.key_id)
    if row is None or row.revoked_ms is not None or not roles.may(Role(row.role), roles.Power.run):
        raise bad_key()
    key = _principal(row)
    return replace(
        key,
        role=roles.delegated(key.role, agent=grant.agent),
        scope=key.scope.narrower(grant.scope),
        subaccounts=scopes.subaccounts(key.key_id, key.scope, grant.links),
        token_ids=tuple(link.id for link in grant.links),
    )


def _row(connection: Connection, key_id: str) -> Row[Any] | None:
    return connection.execute(select(KEYS).where(KEYS.c.key_id == key_id)).one_or_none()


def _principal(row: Row[Any]) -> Principal:
    scope = scopes.stored(row.scope)
    return Principal(
        KeyId(row.key_id),
        TenantId(row.tenant),
        Tier(row.tier),
        Role(row.role),
        row.project,
        row.holder,
        scope,
        scopes.subaccounts(row.key_id, scope),
    )


def _require_unexpired(principal: Principal) -> None:
    if principal.scope.expires_ms is not None and _now_ms() >= principal.scope.expires_ms:
        raise bad_key()


def _require_mint(connection: Connection, by: Principal, made: Role, scope: Scope) -> None:
    require_current(connection, by)
    roles.require_mint(by.role, made)
    if not scope.within(by.scope):
        reason = "the scope of the new key is wider than that of the key that makes it"
        raise errors.refuse("out_of_scope", "scope", reason, closest=by.scope.as_json())


def _check_words(row: Mapping[str, str]) -> None:
    for name in ("tenant", "project"):
        if not _TENANT.fullmatch(row[name]):
            reason = f"{row[name][:80]!r} is not a {name}: a-z, 0-9, '.', '_', '-'"
            raise errors.refuse("bad_value", name, reason)
    if not _HOLDER.fullmatch(row["holder"]):
        reason = f"{row['holder'][:80]!r} is not a holder: a name or a mail address, in lower case"
        raise errors.refuse("bad_value", "holder", reason)
    if len(row["note"]) > 200 or not row["note"].isprintable():
        raise errors.refuse("bad_value", "note", "a note is at most 200 printable characters")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

"""The gate's side of tokens: the root that signs first blocks, and the list of revoked blocks.

The root is an Ed25519 pair, made once, when the first token is. Its public half is in the database: that is
all that checking a token needs, and every process that opens the ledger finds the same one. Its secret half is
a file beside the database, mode 0600, read only to mint. So the database still holds nothing that opens a
door: who reads a backup of it learns hashes and a public key, and cannot sign. The price: a server that lost
the file still honours old tokens and mints no new ones, and a ledger on another host needs the file copied.

Revoking needs no list of tokens: a block's id is enough, and ends every token that contains the block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, insert, select

from trocar import errors
from trocar.gate import chain
from trocar.gate.chain import Kind
from trocar.gate.database import unavailable
from trocar.gate.tables import REVOKED_TOKENS, TOKEN_ROOTS
from trocar.grants import biscuits, tokens
from trocar.grants.biscuits import Root
from trocar.grants.scope import bad_key
from trocar.grants.tokens import Grant

TOKEN_ID: Final = re.compile(r"[0-9a-f]{32}")


def verify(connection: Connection, token: str) -> Grant:
    """Checks signatures, statements and revocations; the key and its expiry are for the caller.

    Raises:
        AuthError: `bad_key`, whatever is wrong with it.
    """
    public = connection.execute(select(TOKEN_ROOTS.c.public_key)).scalar_one_or_none()
    if public is None:
        raise bad_key()
    grant = tokens.verify(token, bytes.fromhex(public))
    require_not_revoked(connection, [link.id for link in grant.links])
    return grant


def require_not_revoked(connection: Connection, token_ids: Iterable[str]) -> None:
    """Refuses when one of the blocks was revoked.

    Raises:
        AuthError: `bad_key`.
    """
    query = select(REVOKED_TOKENS.c.token_id).where(REVOKED_TOKENS.c.token_id.in_(list(token_ids)))
    if connection.execute(query).first() is not None:
        raise bad_key()


def revoke(connection: Connection, token_id: str, now_ms: int) -> None:
    """Ends every token that contains the block `token_id`. Twice is once.

    An id that was never seen is taken too: blocks are appended where no server looks.

    Raises:
        ProgramError: `bad_value`.
    """
    if not TOKEN_ID.fullmatch(token_id):
        raise errors.refuse(
            "bad_value", "token_id", f"{token_id[:80]!r} is not an id of a token: 32 hex digits"
        )
    known = connection.execute(select(REVOKED_TOKENS).where(REVOKED_TOKENS.c.token_id == token_id))
    if known.first() is None:
        connection.execute(insert(REVOKED_TOKENS).values(token_id=token_id, revoked_ms=now_ms))
        chain.append(connection, Kind.block_revoked, detail={"token_id": token_id})


def root(connection: Connection, path: Path, now_ms: int) -> Root:
    """The pair that signs first blocks, from its file; made when there is none, in this transaction.

    Raises:
        ServerFault: `ledger_unavailable` when the file is not there, cannot be read, or is another ledger's.
    """
    public = connection.execute(select(TOKEN_ROOTS.c.public_key)).scalar_one_or_none()
    try:
        # a file without a row is what a crash between the two leaves: nothing was signed with it yet
        found = _written(path) if public is None and not path.exists() else _read(path)
    except (OSError, biscuits.Broken) as e:
        raise unavailable("the secret that signs tokens cannot be read or made") from e
    if public is None:
        connection.execute(insert(TOKEN_ROOTS).values(public_key=found.public.hex(), made_ms=now_ms))
        chain.append(connection, Kind.root_made, digest=found.public.hex())
    elif public != found.public.hex():
        raise unavailable("the secret that signs tokens is not this ledger's")
    return found


def _read(path: Path) -> Root:
    if path.stat().st_mode & 0o077:
        raise unavailable("the secret that signs tokens can be read by others; its mode is to be 0600")
    return Root.of(path.read_bytes())


def _written(path: Path) -> Root:
    made = Root.make()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, made.secret)
        os.fsync(file)
    finally:
        os.close(file)
    partial.replace(path)
    _sync(path.parent)
    return made


def _sync(folder: Path) -> None:
    # a power cut must not lose the file's name after the row that needs it
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)

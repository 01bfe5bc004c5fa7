"""Asking a server for a token: what a caller says of it, and the verb that both clients share."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Literal

from trocar import errors, strict
from trocar.client.transport import Transport
from trocar.wire.tokens import ScopeWords, TokenRequest, TokenView

Words = str | Iterable[str] | None
Until = datetime | timedelta | None


class AsyncTokens:
    """The part of an async client that asks for tokens."""

    transport: Transport

    async def token(
        self,
        *,
        models: Words = None,
        ops: Words = None,
        sites: Words = None,
        bits: int | None = None,
        expires: Until = None,
        role: Literal["agent"] | None = "agent",
    ) -> str:
        """A token that stands for the calling key with less; it is shown this once. See docs/keys.md.

        Args:
            bits: for life, on each lineage; an account of its own.
            expires: a moment with a time zone, or how long from now.
            role: `agent`, or None for a researcher.

        Raises:
            PolicyRefusal: `not_allowed` when the caller is itself a token: attenuate that one.
        """
        request = asked(models, ops, sites, bits, expires, role)
        return (await self.transport.post("/v1/tokens", request)).view(TokenView).token


def asked(
    models: Words, ops: Words, sites: Words, bits: int | None, expires: Until, role: Literal["agent"] | None
) -> TokenRequest:
    """The request for a token.

    Raises:
        ProgramError: `bad_value`.
        ClientError: `bad_argument` for a time without a time zone.
    """
    scope = strict.make(
        ScopeWords,
        models=_words(models),
        ops=_words(ops),
        sites=_words(sites),
        most_bits=bits,
        expires_ms=_moment_ms(expires),
    )
    return strict.make(TokenRequest, scope=scope, role=role)


def _words(given: Words) -> tuple[str, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, str) else tuple(given)


def _moment_ms(until: Until) -> int | None:
    if until is None:
        return None
    if isinstance(until, timedelta):
        return time.time_ns() // 1_000_000 + round(until.total_seconds() * 1000)
    if until.tzinfo is None:
        step = "Use datetime.now(timezone.utc) + timedelta(hours=2), or the timedelta alone."
        raise errors.refuse("bad_argument", "expires", f"{until} has no time zone", next_step=step)
    return int(until.timestamp() * 1000)

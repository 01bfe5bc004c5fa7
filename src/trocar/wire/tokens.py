"""A request for a token, and the one answer that shows it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trocar.strict import Strict
from trocar.wire.results import Public

Word = Annotated[str, Field(min_length=1, max_length=200)]
Words = Annotated[tuple[Word, ...], Field(min_length=1, max_length=64, fail_fast=True)]
Whole = Annotated[int, Field(ge=0, le=2**62)]


class ScopeWords(Strict):
    """What the token is for; an absent part restricts nothing.

    Attributes:
        models: names of served models.
        ops: ops, families of them (`edit`), and `fit`.
        sites: places (`resid_post.12`) and families (`resid_post`).
        most_bits: for life, on each lineage.
        expires_ms: first moment at which it is worth nothing, in milliseconds since 1970.
    """

    models: Words | None = None
    ops: Words | None = None
    sites: Words | None = None
    most_bits: Whole | None = None
    expires_ms: Whole | None = None


class TokenRequest(Strict):
    """A token that stands for the calling key with less.

    Attributes:
        role: `agent` to hand it to one; absent for a researcher.
    """

    scope: ScopeWords = ScopeWords()
    role: Literal["agent"] | None = None


class TokenView(Public):
    """A token, which cannot be shown again, and the id by which it is revoked."""

    token: str
    token_id: str

"""Tokens: what a person who holds a key hands to an agent, and how anybody makes a token weaker, offline.

A token is `trt_` and, in base64url, the public key of the gate that signed its first block and the chain of
blocks. The first block names the key it stands for. Each block may say, once each:

    bits(N);                                            most bits, for life: an account of its own
    role("agent");                                      no more than an agent
    check if now_ms($now), $now < N;                    worth nothing from that moment
    check all model($word), {"a", "b"}.contains($word); models; `op` and `site` in the same way

and nothing else: a block with any other statement makes the whole token worthless. What a token allows is
what all its blocks allow, so a block can take away and never give. The public key inside is a convenience for
whoever appends a block without a server; the gate compares it with its own.

Pure: it opens no database, knows no revocation, and holds no secret but the one that travels in the token.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from trocar import errors
from trocar.grants import envelope
from trocar.grants.scope import EVERYTHING, Scope, bad_key

if TYPE_CHECKING:
    from trocar.grants.biscuits import Block, Root

PREFIX: Final = "trt_"
AGENT: Final = "agent"
MAX_TEXT: Final = 16_384
"""Longest token, in characters; with it a request's head still fits what HTTP servers read."""

_TEXT: Final = re.compile(r"trt_[A-Za-z0-9_-]{44,}")
_WHOLE: Final = r"(0|[1-9][0-9]{0,18})"
_WORD: Final = r'"[A-Za-z0-9._/:@+-]{1,200}"'
_STATEMENT: Final = re.compile(
    r'key\("(?P<key>[0-9a-f]{16})"\);'
    rf"|bits\((?P<most_bits>{_WHOLE})\);"
    r'|role\("(?P<role>agent)"\);'
    rf"|check if now_ms\(\$now\), \$now < (?P<expires_ms>{_WHOLE});"
    rf"|check all (?P<part>model|op|site)\(\$word\), \{{(?P<words>{_WORD}(, {_WORD})*)\}}\.contains\(\$word\);"
)


@dataclass(frozen=True, slots=True)
class Link:
    """What one block says.

    Attributes:
        id: 32 hex digits; a token can be revoked by the id of any of its blocks.
        scope: what the block allows.
        agent: whether it makes the holder an agent.
    """

    id: str
    scope: Scope
    agent: bool


@dataclass(frozen=True, slots=True)
class Grant:
    """A token whose signatures and statements were all checked; whether it was revoked is not known here."""

    key_id: str
    links: tuple[Link, ...]

    @property
    def scope(self) -> Scope:
        """What all blocks allow."""
        return functools.reduce(Scope.narrower, (link.scope for link in self.links), EVERYTHING)

    @property
    def agent(self) -> bool:
        return any(link.agent for link in self.links)


def sign(root: Root, key_id: str, scope: Scope = EVERYTHING, *, agent: bool = False) -> str:
    """The first token of a key; needs the secret of a gate.

    Raises:
        ProgramError: `bad_value` for a scope with a part that is empty or too long.
    """
    from trocar.grants import biscuits

    return _text(root.public, biscuits.sign(root, f'key("{key_id}");\n' + _source(scope, agent=agent)))


def attenuate(token: str, scope: Scope, role: Literal["agent"] | None = None) -> str:
    """A token that allows what `token` and `scope` both allow. Needs no server and no secret.

    Without any restriction it is a token that can be revoked alone.

    Args:
        token: `trt_...`.
        scope: what is left; its bits are an account of their own, beside those of `token`.
        role: `agent` to hand it to one; there is no way back.

    Raises:
        ProgramError: `bad_value` for another role, or a scope with a part that is empty or too long.
        ClientError: `bad_argument` for a text that is no whole token, or a chain grown too long;
            `missing_extra` without the package `biscuit-python`.
    """
    require_role(role)
    source = _source(scope, agent=role is not None)
    biscuits = _biscuits()
    try:
        public, raw = _split(token)
        if envelope.count(raw) == envelope.MAX_BLOCKS:
            reason = f"the token has {envelope.MAX_BLOCKS} blocks, the most there can be"
            raise errors.refuse("bad_argument", "token", reason)
        longer = biscuits.append(raw, public, source)
    except (biscuits.Broken, ValueError):
        raise errors.refuse("bad_argument", "token", "the text is not a whole token") from None
    return _text(public, longer)


def ids(token: str) -> tuple[str, ...]:
    """The ids of a token's blocks, first one first; revoking one ends every token that has it.

    Raises:
        ClientError: `bad_argument`, `missing_extra`.
    """
    biscuits = _biscuits()
    try:
        public, raw = _split(token)
        return tuple(block.id for block in biscuits.blocks(raw, public))
    except (biscuits.Broken, ValueError):
        raise errors.refuse("bad_argument", "token", "the text is not a whole token") from None


def verify(token: str, public: bytes) -> Grant:
    """Reads a token of the gate whose public key is `public`.

    Raises:
        AuthError: `bad_key`, whatever is wrong with it.
    """
    from trocar.grants import biscuits

    try:
        signer, raw = _split(token)
        if signer != public:
            raise bad_key()
        names, links = zip(*map(_read, biscuits.blocks(raw, public)), strict=True)
    except (biscuits.Broken, ValueError, errors.ProgramError):
        raise bad_key() from None
    # the first block names the key, and no other may
    if names[0] is None or any(name is not None for name in names[1:]):
        raise bad_key()
    return Grant(names[0], links)


def require_role(role: str | None) -> None:
    """Refuses every role but the one that a token can be given.

    Raises:
        ProgramError: `bad_value`.
    """
    if role not in (None, AGENT):
        raise errors.refuse(
            "bad_value", "role", f"{role[:80]!r} is not a role for a token: {AGENT!r} or none"
        )


def _biscuits() -> Any:
    try:
        from trocar.grants import biscuits
    except ModuleNotFoundError:
        step = "Run `pip install 'trocar[tokens]'`."
        reason = "tokens need the package 'biscuit-python'"
        raise errors.refuse("missing_extra", "", reason, next_step=step) from None
    return biscuits


def _text(public: bytes, raw: bytes) -> str:
    text = PREFIX + base64.urlsafe_b64encode(public + raw).rstrip(b"=").decode("ascii")
    if len(text) > MAX_TEXT:
        reason = f"the token would have {len(text)} characters; {MAX_TEXT} are the most"
        raise errors.refuse("bad_argument", "token", reason)
    return text


def _split(token: str) -> tuple[bytes, bytes]:
    """The public key and the chain; ValueError for a text that is not exactly one spelling of them."""
    if len(token) > MAX_TEXT or not _TEXT.fullmatch(token):
        raise ValueError("not a token")
    body = token.removeprefix(PREFIX)
    data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii") != body:
        raise ValueError("not the one spelling of its bytes")
    return data[:32], data[32:]


def _source(scope: Scope, *, agent: bool) -> str:
    """A scope and a role as the statements of one block."""
    scope.require_short()
    lines = [f"check all {part}($word), {{{_quoted(words)}}}.contains($word);" for part, words in
             (("model", scope.models), ("op", scope.ops), ("site", scope.sites)) if words is not None]  # fmt: skip
    if scope.expires_ms is not None:
        lines.append(f"check if now_ms($now), $now < {scope.expires_ms};")
    if scope.most_bits is not None:
        lines.append(f"bits({scope.most_bits});")
    return "\n".join([*lines, *(['role("agent");'] if agent else [])])


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f'"{word}"' for word in sorted(words))


def _read(block: Block) -> tuple[str | None, Link]:
    """The key that a block names, and what else it says; ValueError for any other statement, or one twice."""
    said: dict[str, Any] = {}
    for line in block.source.removesuffix("\n").split("\n") if block.source else ():
        match = _STATEMENT.fullmatch(line)
        if match is None:
            raise ValueError("a statement that is not ours")
        name, value = _meaning(match)
        if name in said:
            raise ValueError("a statement twice")
        said[name] = value
    key_id, role = said.pop("key", None), said.pop("role", None)
    scope = Scope(**said)
    scope.require_short()
    return key_id, Link(block.id, scope, role == AGENT)


def _meaning(match: re.Match[str]) -> tuple[str, Any]:
    if match["part"]:
        return f"{match['part']}s", frozenset(word.strip('"') for word in match["words"].split(", "))
    for name in ("most_bits", "expires_ms"):
        if match[name]:
            return name, int(match[name])
    name = "key" if match["key"] else "role"
    return name, match[name]

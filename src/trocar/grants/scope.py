"""Scopes: which models, ops and sites a credential reaches, for how many bits, until when.

A scope only ever narrows. Each part is either absent (no restriction) or a closed set of words; `narrower`
keeps what both scopes allow, so a chain of scopes allows what every link allows, in whatever order. An op or
a site covers itself and everything below it: the family `resid_post` covers `resid_post.12`, and `edit` covers
`edit.add`. The name of a model covers that name alone.

Pure: it knows no key, no token and no database, and not what has been spent. `most_bits` is compared with one
request here; that it holds for life is the business of an account.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trocar import errors
from trocar.graph.spec import SPEC
from trocar.sites import SITES, parse

MAX_WORDS: Final = 64
"""Most words in one part of a scope that somebody writes; what many scopes have in common may have more."""
MAX_WHOLE: Final = 2**62
"""Largest amount of bits and latest moment; both fit a signed 64-bit column."""
FIT: Final = "fit"
"""What a scope calls a fit on stored rows, which is a request of its own and no node of a program."""
EXPORT: Final = "export"
"""And the airlock: asking for an export or for larger limits, following such a request, fetching its file."""

_OPS: Final = frozenset({*SPEC, FIT, EXPORT, *(op.partition(".")[0] for op in SPEC if "." in op)})
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,199}")
_PARTS: Final = ("models", "ops", "sites")


@dataclass(frozen=True, slots=True)
class Scope:
    """What a credential may be used for; `Scope()` restricts nothing.

    Attributes:
        models: names of served models.
        ops: ops of programs, families of them (`edit`), `fit` and `export`.
        sites: places (`resid_post.12`) and families (`resid_post`).
        most_bits: most bits, for life, on each lineage.
        expires_ms: first moment at which it is worth nothing, in milliseconds since 1970.

    Raises:
        ProgramError: `bad_value` for anything outside these vocabularies.
    """

    models: frozenset[str] | None = None
    ops: frozenset[str] | None = None
    sites: frozenset[str] | None = None
    most_bits: int | None = None
    expires_ms: int | None = None

    def __post_init__(self) -> None:
        for part in _PARTS:
            _check_words(part, getattr(self, part))
        for part in ("most_bits", "expires_ms"):
            _check_whole(part, getattr(self, part))

    def narrower(self, other: Scope) -> Scope:
        """What both scopes allow.

        >>> Scope(sites=frozenset({"resid_post"})).narrower(Scope(sites=frozenset({"resid_post.3", "z"}))).sites
        frozenset({'resid_post.3'})
        """
        models, ops, sites = (_meet(part, getattr(self, part), getattr(other, part)) for part in _PARTS)
        return Scope(
            models=models,
            ops=ops,
            sites=sites,
            most_bits=_least(self.most_bits, other.most_bits),
            expires_ms=_least(self.expires_ms, other.expires_ms),
        )

    def within(self, other: Scope) -> bool:
        """Whether everything that this scope allows is allowed by `other` too."""
        return (
            all(_inside(part, getattr(self, part), getattr(other, part)) for part in _PARTS)
            and _least(self.most_bits, other.most_bits) == self.most_bits
            and _least(self.expires_ms, other.expires_ms) == self.expires_ms
        )

    def require(
        self,
        *,
        model: str,
        ops: Sequence[str] | Mapping[str, str],
        sites: Sequence[str] | Mapping[str, str],
        bits: int,
        now_ms: int,
    ) -> None:
        """Refuses a request that is not wholly inside; names the first thing that is outside.

        Args:
            model: the model asked.
            ops: every op used; a mapping gives the JSON path of each.
            sites: every place touched, written out (`resid_post.12`); a mapping gives the JSON path of each.
            bits: the most that the request may release.
            now_ms: the time, in milliseconds since 1970.

        Raises:
            AuthError: `bad_key` when it has expired: the answer that an unknown key gets.
            PolicyRefusal: `out_of_scope`.
        """
        self.require_alive(now_ms)
        asked = {"models": {"model": model}, "ops": _at(ops, "ops"), "sites": _at(sites, "sites")}
        for part in _PARTS:
            _require_words(part, asked[part], getattr(self, part))
        if self.most_bits is not None and bits > self.most_bits:
            reason = f"the request may release {bits} bits; the credential's scope allows {self.most_bits}"
            raise errors.refuse("out_of_scope", "bits", reason, closest=str(self.most_bits))

    def require_alive(self, now_ms: int) -> None:
        """Refuses a scope that has expired.

        Raises:
            AuthError: `bad_key`: the answer that an unknown key gets.
        """
        if self.expires_ms is not None and now_ms >= self.expires_ms:
            raise bad_key()

    def require_short(self) -> None:
        """Refuses a scope that nobody should write down: a part with more than `MAX_WORDS` words, or with none.

        Raises:
            ProgramError: `bad_value`.
        """
        for part in _PARTS:
            words = getattr(self, part)
            if words is not None and not 1 <= len(words) <= MAX_WORDS:
                raise errors.refuse("bad_value", part, f"{part} has {len(words)} words, not 1 to {MAX_WORDS}")

    def as_json(self) -> str:
        """The one spelling as JSON: sorted, no spaces, restrictions only."""
        parts: dict[str, Any] = {
            part: sorted(words) for part in _PARTS if (words := getattr(self, part)) is not None
        }
        wholes = {"most_bits": self.most_bits, "expires_ms": self.expires_ms}
        parts |= {part: value for part, value in wholes.items() if value is not None}
        return json.dumps(parts, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scope:
        """Reads what `as_json` wrote, and nothing else.

        Raises:
            ProgramError: `bad_value`.
        """
        try:
            parts = json.loads(text)
            fields: dict[str, Any] = {k: frozenset(v) if k in _PARTS else v for k, v in parts.items()}
            scope = cls(**fields)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise errors.refuse("bad_value", "scope", "the text is not a scope") from None
        if scope.as_json() != text:
            raise errors.refuse("bad_value", "scope", "the scope is not in its one spelling")
        return scope


def bad_key() -> errors.TrocarError:
    """The one answer to every credential that is not good: unknown, malformed, expired, revoked, forged."""
    return errors.refuse("bad_key", "authorization", "the API key is unknown, expired or revoked")


def _covers(part: str, allowed: str, word: str) -> bool:
    return word == allowed or (part != "models" and word.startswith(f"{allowed}."))


def _covered(part: str, word: str, allowed: Iterable[str]) -> bool:
    return any(_covers(part, one, word) for one in allowed)


def _meet(part: str, one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return other if one is None else one
    return frozenset(
        {word for word in one if _covered(part, word, other)}
        | {word for word in other if _covered(part, word, one)}
    )


def _inside(part: str, words: frozenset[str] | None, others: frozenset[str] | None) -> bool:
    return others is None or (words is not None and all(_covered(part, word, others) for word in words))


def _least(one: int | None, other: int | None) -> int | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _at(words: Sequence[str] | Mapping[str, str], name: str) -> Mapping[str, str]:
    return words if isinstance(words, Mapping) else {f"{name}[{i}]": word for i, word in enumerate(words)}


def _require_words(part: str, asked: Mapping[str, str], allowed: frozenset[str] | None) -> None:
    if allowed is None:
        return
    for path, word in asked.items():
        if not _covered(part, word, allowed):
            listed = ", ".join(sorted(allowed)[:8]) or "none"
            reason = f"{word[:80]!r} is not among the {part} of the credential's scope: {listed}"
            raise errors.refuse("out_of_scope", path, reason, closest=errors.closest(word, sorted(allowed)))


def _check_words(part: str, words: object) -> None:
    if words is None:
        return
    if type(words) is not frozenset:
        raise errors.refuse("bad_value", part, f"{part} is a frozenset of words, or None")
    for word in words:
        if type(word) is not str:
            raise errors.refuse("bad_value", part, f"{part} holds a {type(word).__name__}, not a word")
        _CHECK[part](word)


def _check_model(word: str) -> None:
    if not _MODEL.fullmatch(word):
        raise errors.refuse("bad_value", "models", f"{word[:80]!r} is not the name of a model")


def _check_op(word: str) -> None:
    if word not in _OPS:
        near = errors.closest(word, sorted(_OPS))
        raise errors.refuse("bad_value", "ops", f"{word[:80]!r} is not an op", closest=near)


def _check_site(word: str) -> None:
    if word not in SITES:
        parse(word, "sites")


_CHECK: Final = {"models": _check_model, "ops": _check_op, "sites": _check_site}


def _check_whole(part: str, value: object) -> None:
    if value is not None and not (type(value) is int and 0 <= value <= MAX_WHOLE):
        raise errors.refuse("bad_value", part, f"{part} is a whole number in [0, 2**62], or None")


EVERYTHING: Final = Scope()
"""The scope that restricts nothing."""

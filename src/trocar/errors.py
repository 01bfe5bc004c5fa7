"""The one error tree: every way Trocar says no, with a code, a path, a reason and a next step.

The closed table of codes is `trocar.codes`. A `Refusal` is a value that travels (JSON over HTTP, a row in a
plan); a `TrocarError` is the exception that carries one or more of them. The tree:

    TrocarError
      BadRequest        the bytes could not be read as a request            400
      AuthError         no key, or not a valid one                          401
      PolicyRefusal     understood, and not allowed (budget, role, label)   403
      NotFound          absent, expired or somebody else's: the same answer 404
      Conflict          the same idempotency key with another body          409
      ProgramError      a program that the checker does not accept          422
      RunFailed         an accepted program failed while it ran             422
      Overloaded        try again later                                     503
      ServerFault       ours; only a request id leaves                      500
      ClientError       found by the SDK before anything was sent           -

This module knows nothing about HTTP, models or programs. Every code has a page in `docs/errors/`.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from trocar.codes import CODES

Category = Literal["user", "policy", "capacity", "server"]
DOCS_BASE: Final = "docs/errors"
MAX_OPTIONS: Final = 256
MAX_WORD: Final = 80


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason why something was refused.

    Attributes:
        code: stable name, a key of `CODES`.
        path: where, as a JSON path into the request (`nodes[3].site`) or an argument name.
        reason: one sentence with the offending value in it.
        next_step: what to do now.
        closest: the nearest legal spelling, if there is one.
    """

    code: str
    path: str
    reason: str
    next_step: str
    closest: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "path": self.path,
            "reason": self.reason,
            "next_step": self.next_step,
            "closest": self.closest,
            "docs": f"{DOCS_BASE}/{self.code}.md",
        }

    def __str__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        nearest = f"\n  closest: {self.closest!r}" if self.closest else ""
        return f"[{self.code}]{where}\n  {self.reason}{nearest}\n  next: {self.next_step}\n  {DOCS_BASE}/{self.code}.md"


class TrocarError(Exception):
    """Base of everything Trocar raises on purpose; carries at least one `Refusal`.

    Raised by the SDK as the subclass that the server's answer names, so
    `except trocar.ProgramError as e: e.refusals` is all a caller needs.
    """

    status: int = 500
    category: Category = "server"
    retry_after_s: int | None = None
    """Seconds after which it may go through, where that is known."""

    def __init__(self, refusals: Sequence[Refusal], request_id: str | None = None) -> None:
        if not refusals:
            raise ValueError("a TrocarError needs at least one refusal")
        self.refusals: tuple[Refusal, ...] = tuple(refusals)
        self.request_id = request_id
        super().__init__(self._text())

    def _text(self) -> str:
        head = f"{type(self).__name__}" + "".join(
            str(r) if i == 0 else f"\n{r}" for i, r in enumerate(self.refusals)
        )
        return head + (f"\n  request {self.request_id}" if self.request_id else "")

    @property
    def code(self) -> str:
        return self.refusals[0].code

    @property
    def path(self) -> str:
        return self.refusals[0].path

    @property
    def reason(self) -> str:
        return self.refusals[0].reason

    @property
    def next_step(self) -> str:
        return self.refusals[0].next_step

    @property
    def closest(self) -> str | None:
        return self.refusals[0].closest

    @property
    def retryable(self) -> bool:
        return CODES[self.code].retryable

    def as_json(self) -> dict[str, Any]:
        return {
            "error": {
                "kind": type(self).__name__,
                "category": self.category,
                "retryable": self.retryable,
                "retry_after_s": self.retry_after_s,
                "request_id": self.request_id,
                "refusals": [r.as_json() for r in self.refusals],
            }
        }


class BadRequest(TrocarError):
    """The bytes could not be read as a request."""

    status, category = 400, "user"


class AuthError(TrocarError):
    """No key, an unknown key, or a revoked one."""

    status, category = 401, "user"


class PolicyRefusal(TrocarError):
    """The request was understood and is not allowed; nothing was spent."""

    status, category = 403, "policy"


class NotFound(TrocarError):
    """Absent, expired, deleted or owned by somebody else: one answer for all four."""

    status, category = 404, "user"


class Conflict(TrocarError):
    """An idempotency key was used before with another body."""

    status, category = 409, "user"


class ProgramError(TrocarError):
    """The checker did not accept the program; no forward pass ran and nothing was charged."""

    status, category = 422, "user"


class RunFailed(TrocarError):
    """An accepted program failed while it ran; neighbours in the batch were not touched."""

    status, category = 422, "user"


class Overloaded(TrocarError):
    """The server is full; try again after the time it names."""

    status, category = 503, "capacity"


class ServerFault(TrocarError):
    """A fault of ours. Nothing but the request id leaves the server."""

    status, category = 500, "server"


class ClientError(TrocarError):
    """Refused by the SDK before anything was sent."""

    status, category = 0, "user"


_KINDS: Final[dict[str, type[TrocarError]]] = {
    k.__name__: k
    for k in (
        BadRequest,
        AuthError,
        PolicyRefusal,
        NotFound,
        Conflict,
        ProgramError,
        RunFailed,
        Overloaded,
        ServerFault,
        ClientError,
    )
}


def kind_of(code: str) -> type[TrocarError]:
    """The class of exception that a code belongs to."""
    return _KINDS[CODES[code].kind]


def refusal(
    code: str, path: str, reason: str, *, closest: str | None = None, next_step: str | None = None
) -> Refusal:
    """Makes a `Refusal`; the next step defaults to the code's own."""
    return Refusal(code, path, reason, next_step or CODES[code].next_step, closest)


def refuse(
    code: str, path: str, reason: str, *, closest: str | None = None, next_step: str | None = None
) -> TrocarError:
    """Makes the exception of the class that `code` belongs to, for `raise refuse(...)`."""
    return kind_of(code)([refusal(code, path, reason, closest=closest, next_step=next_step)])


def full(reason: str, after_s: float) -> TrocarError:
    """`queue_full`, with the time after which a place should be free: whole seconds, at least 1."""
    error = refuse("queue_full", "", reason)
    error.retry_after_s = max(1, math.ceil(after_s))
    return error


def slow_down(after_s: float) -> TrocarError:
    """`too_many_refusals`, with the time after which the next one is answered."""
    error = refuse("too_many_refusals", "", "too many requests of this key were refused within a minute")
    error.retry_after_s = max(1, math.ceil(after_s))
    return error


def closest(word: str, options: Iterable[str]) -> str | None:
    """The nearest of the first `MAX_OPTIONS` options to `word`, or None when nothing is near."""
    near = list(itertools.islice(options, MAX_OPTIONS))
    found = difflib.get_close_matches(word[:MAX_WORD], near, n=1, cutoff=0.6)
    return found[0] if found else None


def from_json(body: dict[str, Any], request_id: str | None = None) -> TrocarError:
    """Rebuilds the exception that a server described with `TrocarError.as_json`."""
    error = body["error"]
    kind = _KINDS.get(error["kind"], ServerFault)
    refusals = [
        Refusal(
            r["code"] if r["code"] in CODES else "internal",
            r["path"],
            r["reason"],
            r["next_step"],
            r["closest"],
        )
        for r in error["refusals"]
    ]
    made = kind(refusals, error.get("request_id") or request_id)
    made.retry_after_s = error.get("retry_after_s")
    return made

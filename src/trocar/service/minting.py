"""The token use case: a key's caller asks for a weaker credential, which leaves once and is kept nowhere."""

from __future__ import annotations

from typing import Final

from trocar import errors
from trocar.gate import release
from trocar.gate.gate import Gate
from trocar.gate.keys import Principal
from trocar.gate.release import Released
from trocar.gate.scopes import Scope
from trocar.service.pace import Pace
from trocar.wire.tokens import ScopeWords, TokenRequest, TokenView

MOST_PER_MINUTE: Final = 60
"""Each token is an entry of the log, and costs no bits."""


def mint(gate: Gate, pace: Pace, principal: Principal, request: TokenRequest) -> Released:
    """Signs a token of the calling key.

    Raises:
        ProgramError: `bad_value` for words that name no model, op or site.
        PolicyRefusal: `not_allowed` for a token, for a key that runs nothing, and for a server that signs none.
        Overloaded: `queue_full`.
    """
    scope = _scope(request.scope)
    wait_s = pace.wait_s(f"mint {principal.key_id}", MOST_PER_MINUTE)
    if wait_s > 0:
        raise errors.full(f"{MOST_PER_MINUTE} tokens of this key were made within a minute", wait_s)
    made = gate.mint(principal, scope, request.role)
    return release.public(TokenView(token=made.text, token_id=made.token_id))


def _scope(said: ScopeWords) -> Scope:
    words = {part: getattr(said, part) for part in ("models", "ops", "sites")}
    try:
        return Scope(
            **{part: None if given is None else frozenset(given) for part, given in words.items()},
            most_bits=said.most_bits,
            expires_ms=said.expires_ms,
        )
    except errors.ProgramError as e:
        raise errors.ProgramError([_within(refusal) for refusal in e.refusals]) from None


def _within(refusal: errors.Refusal) -> errors.Refusal:
    path = f"scope.{refusal.path}"
    return errors.Refusal(refusal.code, path, refusal.reason, refusal.next_step, refusal.closest)

"""Scopes as the gate stores them, and the accounts that their bits become.

What a scope is stands in `trocar.grants.scope`, which a client may import too; `Scope` is the same class here.
This module knows no database: a key's row gives it a text, a token gives it links.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trocar import errors
from trocar.gate.database import unavailable
from trocar.grants.scope import EVERYTHING, Scope, bad_key
from trocar.grants.tokens import Link

__all__ = ["EVERYTHING", "Scope", "SubAccount", "bad_key", "stored", "subaccounts"]


@dataclass(frozen=True, slots=True)
class SubAccount:
    """Bits that one link of a credential allows, for life, on each lineage.

    Attributes:
        owner: `token:<id of the block>`; for the bits of a key's own scope `token:<key id>`.
        most_bits: the limit.
    """

    owner: str
    most_bits: int


def stored(text: str) -> Scope:
    """The scope in a key's row.

    Raises:
        ServerFault: `ledger_unavailable` when it is not one that was written here: never "no restriction".
    """
    try:
        return Scope.from_json(text)
    except errors.ProgramError as e:
        raise unavailable("the scope of a key cannot be read") from e


def subaccounts(key_id: str, scope: Scope, links: Iterable[Link] = ()) -> tuple[SubAccount, ...]:
    """One account for each link that has a limit of its own, the key's first."""
    limits = [(key_id, scope.most_bits), *((link.id, link.scope.most_bits) for link in links)]
    return tuple(SubAccount(f"token:{name}", bits) for name, bits in limits if bits is not None)

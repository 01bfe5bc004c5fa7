"""Who may learn how much: tiers, roles, lineages and the arithmetic of their limits.

A limit is a fraction of the secret's size in bits, for life; it never refills. Fractions are whole parts per
million and the arithmetic is exact integers, so the same limit comes out everywhere. The reasons for the
default fractions are in `docs/security.md`: lossy copies of a model exist at 1 % of its bits.

This module is pure: it knows nothing about keys, databases or what has been spent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from trocar import errors
from trocar.gate.limits import MAX_BITS, whole_bits

__all__ = ["MAX_BITS", "Lineage", "Policy", "Role", "Tier", "whole_bits"]
_PPM: Final = 1_000_000
_LINEAGE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,199}")


class Tier(StrEnum):
    """How far a key is trusted with the secret; fixes the key's limit on every lineage."""

    open = "open"
    trusted = "trusted"
    external = "external"
    agent = "agent"


class Role(StrEnum):
    """What a key may do; the table is in `roles.py`."""

    owner = "owner"
    """Answers for the server: everything an operator and a checker may, and the policy."""
    checker = "checker"
    """Reviews what waits in the airlock; runs nothing."""
    operator = "operator"
    """Runs the server: makes and ends keys, sees the engine's counters and the log."""
    auditor = "auditor"
    """Reads the log and nothing else."""
    researcher = "researcher"
    """Runs programs."""
    agent = "agent"
    """Runs programs, unattended."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """One secret: a base model and all its fine-tunes share a lineage, and so one budget.

    Attributes:
        name: stable name, `[A-Za-z0-9._/:@+-]`, at most 200 characters.
        secret_bits: size of the secret, in bits.
        cap: tier whose fraction limits all keys together; None when the weights are open.

    Raises:
        ProgramError: `bad_value` for a name outside the grammar, or a cap of `Tier.open` (say None).
        ServerFault: `bad_bits`.
    """

    name: str
    secret_bits: int
    cap: Tier | None

    def __post_init__(self) -> None:
        whole_bits(self.secret_bits, "secret_bits", least=1)
        if not _LINEAGE_NAME.fullmatch(self.name):
            raise errors.refuse("bad_value", "lineage.name", f"{self.name[:80]!r} is not a lineage name")
        if self.cap is Tier.open:
            raise errors.refuse("bad_value", "lineage.cap", "open weights have no cap: use None, not 'open'")


@dataclass(frozen=True, slots=True)
class Policy:
    """Prices and fractions; one frozen value per server.

    Attributes:
        scalar_bits: price of one released number, in bits.
        overhead_bits: price of being admitted at all (status, length, timing), in bits. The ledger accepts
            no charge below it.
        trusted_ppm: limit of a trusted key, in parts per million of the lineage's bits.
        external_ppm: limit of an external key.
        agent_ppm: limit of an agent's key.

    Raises:
        ServerFault: `bad_bits` for anything that is not an int in range.
    """

    scalar_bits: int = 32
    overhead_bits: int = 256
    trusted_ppm: int = 10_000
    external_ppm: int = 1_000
    agent_ppm: int = 100

    def __post_init__(self) -> None:
        whole_bits(self.scalar_bits, "scalar_bits", least=1)
        whole_bits(self.overhead_bits, "overhead_bits")
        for name in ("trusted_ppm", "external_ppm", "agent_ppm"):
            if whole_bits(getattr(self, name), name) > _PPM:
                raise errors.refuse("bad_bits", name, f"{name} is more than the whole secret ({_PPM})")

    def cap_bits(self, tier: Tier, weight_bits: int) -> int | None:
        """The lifetime limit of `tier` on a secret of `weight_bits`, rounded down; None: counted, not capped.

        >>> Policy().cap_bits(Tier.external, 70_000_000_000 * 16)
        1120000000

        Raises:
            ServerFault: `bad_bits`.
        """
        whole_bits(weight_bits, "weight_bits", least=1)
        if tier is Tier.open:
            return None
        ppm = {Tier.trusted: self.trusted_ppm, Tier.external: self.external_ppm, Tier.agent: self.agent_ppm}
        return weight_bits * ppm[tier] // _PPM  # a word that is no tier is a KeyError, never "not capped"

    def lineage_limit_bits(self, lineage: Lineage) -> int | None:
        """The lifetime limit of all keys together on `lineage`; None when the weights are open."""
        return None if lineage.cap is None else self.cap_bits(lineage.cap, lineage.secret_bits)

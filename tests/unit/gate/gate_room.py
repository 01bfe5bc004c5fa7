"""One open gate per test, with a short hand for what most tests do to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gate_places import Place

from trocar.errors import TrocarError
from trocar.gate.accounts import Account
from trocar.gate.database import Database
from trocar.gate.keys import Keys, Principal
from trocar.gate.ledger import Ledger, Replay, Reservation
from trocar.gate.limits import Limits, Payer
from trocar.gate.policy import Lineage, Role, Tier

DAY_MS = 86_400_000
MIDNIGHT_MS = 20_000 * DAY_MS  # 2024-10-04 00:00 UTC
PPM = {Tier.trusted: 10_000, Tier.external: 1_000, Tier.agent: 100}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Clock:
    """A clock that moves when it is told to."""

    now_ms: int = MIDNIGHT_MS

    def __call__(self) -> int:
        return self.now_ms

    def pass_days(self, days: float) -> None:
        self.now_ms += int(days * DAY_MS)


@dataclass
class Room:
    """A ledger, its keys and a clock; 1 000 000 secret bits: external 1000, agent 100, all together 10 000.

    `more` are payers beside the key, `day_bits` is a daily window of the key.
    """

    place: Place
    lineage: Lineage = field(default_factory=lambda: Lineage("base", 1_000_000, Tier.trusted))
    clock: Clock = field(default_factory=Clock)
    overhead_bits: int = 1
    tiers: dict[str, Tier] = field(default_factory=dict)
    more: tuple[Payer, ...] = ()
    day_bits: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open()

    @property
    def path(self) -> Path:
        """The file of SQLite."""
        return self.place.path

    def open(self, busy_s: float = 30.0) -> None:
        self.database = Database(self.place.url, busy_s=busy_s)
        self.keys = Keys(self.database)
        try:
            self.ledger = Ledger(
                self.database, overhead_bits=self.overhead_bits, clock=self.clock, **self.options
            )
        except TrocarError:
            self.database.close()
            raise

    def close(self) -> None:
        """What a server does when it stops."""
        self.database.close()

    def crash(self) -> None:
        """What the next process sees after a death: nobody alive, nothing settled."""
        self.close()
        self.open()

    def key(self, tier: Tier = Tier.external) -> Principal:
        made = self.keys.create("lab", tier, Role.researcher).principal
        self.tiers[made.key_id] = tier
        return made

    def payers(self, who: Principal) -> tuple[Payer, ...]:
        tier = self.tiers.get(who.key_id, who.tier)
        life = self.share(tier)
        return (Payer(f"key:{who.key_id}", Limits(life, self.day_bits)), *self.more)

    def share(self, tier: Tier | None) -> int | None:
        return None if tier in (None, Tier.open) else self.lineage.secret_bits * PPM[tier] // 1_000_000

    @property
    def limits(self) -> Limits:
        return Limits(self.share(self.lineage.cap))

    def declare(self, lineage: Lineage | None = None) -> None:
        self.ledger.declare(lineage or self.lineage, self.limits)

    def ask(
        self, who: Principal, bits: int, body: str = "r", idem: str | None = None, **more: Any
    ) -> Reservation | Replay:
        words = {"payers": self.payers(who), "limits": self.limits, "request_digest": digest(body)}
        return self.ledger.reserve(who, self.lineage, bits, idempotency_key=idem, **{**words, **more})

    def reserve(
        self, who: Principal, bits: int, body: str = "r", idem: str | None = None, **more: Any
    ) -> Reservation:
        held = self.ask(who, bits, body, idem, **more)
        assert isinstance(held, Reservation)
        return held

    def spend(self, who: Principal, bits: int, **more: Any) -> None:
        self.ledger.settle(self.reserve(who, bits, **more), bits, b"")

    def account(self, owner: str, lineage: str = "base") -> Account:
        (found,) = (a for a in self.ledger.balances() if (a.owner, a.lineage) == (owner, lineage))
        return found

    def of(self, who: Principal) -> Account:
        """The account of a key, as a reservation made now would find it."""
        return self.ledger.balance(self.lineage.name, self.payers(who), self.limits).payers[0]

    def used(self, who: Principal) -> tuple[int, int]:
        """Charged and held bits of the key's account."""
        account = self.of(who)
        return account.charged_bits, account.held_bits

    def kinds(self, after_seq: int = 0) -> Sequence[str]:
        return [e.kind for e in self.ledger.entries(after_seq=after_seq)]


def code_of(error: pytest.ExceptionInfo[TrocarError]) -> str:
    return error.value.code


def refused(code: str, act: Any) -> TrocarError:
    """The refusal of `act`, which must carry `code`."""
    with pytest.raises(TrocarError) as e:
        act()
    assert e.value.code == code
    return e.value

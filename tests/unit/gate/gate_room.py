"""One open gate per test, with a short hand for what most tests do to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trocar.errors import TrocarError
from trocar.gate.database import Database
from trocar.gate.keys import Keys, Principal
from trocar.gate.ledger import Ledger, Replay, Reservation
from trocar.gate.policy import Lineage, Policy, Role, Tier


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Room:
    """A database in a file, its keys and its ledger; 1 000 000 secret bits: external 1000, agent 100."""

    path: Path
    policy: Policy = field(default_factory=lambda: Policy(overhead_bits=1))
    lineage: Lineage = field(default_factory=lambda: Lineage("base", 1_000_000, Tier.trusted))

    def __post_init__(self) -> None:
        self.open()

    def open(self, busy_s: float = 30.0) -> None:
        self.database = Database(f"sqlite:///{self.path}", busy_s=busy_s)
        self.keys = Keys(self.database)
        self.ledger = Ledger(self.database, self.policy)

    def crash(self) -> None:
        """What the next process sees after a death: the file unlocked, nothing settled."""
        self.database.close()
        self.open()

    def key(self, tier: Tier = Tier.external) -> Principal:
        return self.keys.create("lab", tier, Role.researcher).principal

    def ask(
        self, who: Principal, bits: int, body: str = "r", idem: str | None = None
    ) -> Reservation | Replay:
        return self.ledger.reserve(who, self.lineage, bits, request_digest=digest(body), idempotency_key=idem)

    def reserve(self, who: Principal, bits: int, body: str = "r", idem: str | None = None) -> Reservation:
        held = self.ask(who, bits, body, idem)
        assert isinstance(held, Reservation)
        return held

    def used(self, who: Principal) -> tuple[int, int]:
        """Charged and held bits of the key's account."""
        account = self.ledger.balance(who, self.lineage).key
        return account.charged_bits, account.held_bits


def code_of(error: pytest.ExceptionInfo[TrocarError]) -> str:
    return error.value.code

"""The rooms that attacks are made in: one server with the same model many times, open and as a secret.

Each attack meets the open model with a key that nothing limits, then a secret of its own, with a lineage and
fresh keys of tier `external`. What it did is judged by the ledger and by the weights in the model's folder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from trocar.api.app import create_app
from trocar.attacks.loot import TOLERANCE, Loot, Score, score
from trocar.attacks.purse import Purse, Raid
from trocar.attacks.table import Attack
from trocar.cli.attack_models import Subject, subject
from trocar.cli.attack_offline import OFFLINE
from trocar.client.sync import Client
from trocar.engine.hf.engine import HFEngine
from trocar.gate.gate import Gate
from trocar.gate.limits import Limits
from trocar.gate.policy import Lineage, Policy, Role, Tier
from trocar.graph.facts import ModelFacts
from trocar.service.local import LocalWorker
from trocar.service.service import Service
from trocar.service.worker import Model
from trocar.store import Store

OPEN: Final = "open"
FLOAT_BITS: Final = 32
ADDRESS: Final = "http://attacks"


@dataclass(frozen=True, slots=True)
class Side:
    """What one attempt cost and gave.

    Attributes:
        charged_bits: by the ledger, over all keys.
        received_bits: by the attacker's own count.
        limit_bits: of the lineage; None when it is not capped.
        attacked_weights: that were aimed at; `recovered` of them are known to a tenth of the root mean square.
        error: relative error over them, and the least that the charged bits allow.
        matrix_error: over the whole matrices.
        refusals: codes met.
    """

    charged_bits: int
    received_bits: int
    limit_bits: int | None
    attacked_weights: int
    matrix_weights: int
    model_weights: int
    recovered: int
    error: float
    least_error: float
    matrix_error: float
    least_matrix_error: float
    refusals: tuple[str, ...]
    took_s: float

    @property
    def bytes_out(self) -> int:
        return -(-self.charged_bits // 8)


@dataclass(frozen=True, slots=True)
class Row:
    """One attack, made twice.

    Attributes:
        offline: whether the open side was measured on the model itself, not through the server.
        problems: what must not be; empty when the gate held.
    """

    attack: str
    offline: bool
    open: Side
    secret: Side
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Played:
    """Attacks that were made on one model.

    Attributes:
        weight_bits: of the model, as its secret side counts them; what all keys together may ever have of them, and
            in one day, follows.
        patient: whether the day was as long as a life.
    """

    model: str
    fingerprint: str
    weights: int
    weight_bits: int
    limits: Limits
    patient: bool
    rows: tuple[Row, ...]

    @property
    def problems(self) -> list[str]:
        return [f"{row.attack}: {text}" for row in self.rows for text in row.problems]


@dataclass(frozen=True, slots=True)
class Room:
    """A running server around one subject."""

    subject: Subject
    service: Service
    app: Any

    def purse(self, model: str, tenant: str, tier: Tier) -> Purse:
        """A new key's."""
        made = self.service.gate.keys.create(tenant, tier, Role.researcher)
        client = Client(ADDRESS, made.secret, transport=httpx.ASGITransport(self.app), quiet=True)
        return Purse.of(client, model)


def play(model: str, attacks: Sequence[Attack], *, patient: bool = False) -> Played:
    """Makes the attacks on a model, each on both sides, under the default policy.

    Args:
        patient: whether the windows of a day are as wide as those for life, as if days went by.
    """
    policy = without_days() if patient else Policy()
    with tempfile.TemporaryDirectory() as folder, room(model, attacks, Path(folder), policy) as made:
        rows = tuple(_row(made, attack) for attack in attacks)
        facts = made.subject.loaded.facts
        secret = Lineage("attacked", facts.weight_bits, Tier(policy.data.lineage_tier))
        return Played(
            facts.name, facts.fingerprint, facts.parameters, facts.weight_bits, policy.lineage_limits(secret),
            patient, rows,
        )  # fmt: skip


@contextmanager
def room(model: str, attacks: Sequence[Attack], folder: Path, policy: Policy) -> Iterator[Room]:
    """A server in this process, closed afterwards."""
    found = subject(model, folder / "model")
    gate = Gate(f"sqlite:///{folder / 'ledger.db'}", policy)
    engine = HFEngine(found.loaded)
    names = {OPEN: True, **{attack.name: False for attack in attacks}}
    store = Store(folder / "store")
    worker = LocalWorker(found.loaded, engine, store)
    models = [
        Model(_facts(engine.facts, n, free), found.loaded.text, worker, engine.name)
        for n, free in names.items()
    ]
    service = Service(models, gate, (store,))
    try:
        yield Room(found, service, create_app(service))
    finally:
        service.close()


def without_days() -> Policy:
    """The default policy of somebody who waits."""
    usual = Policy()
    tiers = usual.people.tiers
    external = tiers.external.model_copy(update={"day_ppm": tiers.external.life_ppm})
    people = usual.people.model_copy(update={"tiers": tiers.model_copy(update={"external": external})})
    data = usual.data.model_copy(update={"lineage_day_ppm": tiers.external.life_ppm})
    return usual.model_copy(update={"people": people, "data": data})


def _facts(facts: ModelFacts, name: str, free: bool) -> ModelFacts:
    return facts.model_copy(update={"name": name, "lineage": f"attacked/{name}", "open_weights": free})


def _row(made: Room, attack: Attack) -> Row:
    on = _attempt(made, attack, attack.name, Tier.external)
    off = _offline(made, attack) if attack.offline else _attempt(made, attack, OPEN, Tier.open)
    return Row(attack.name, attack.offline, off, on, tuple(problems(attack, on)))


def _attempt(made: Room, attack: Attack, model: str, tier: Tier) -> Side:
    purses = [made.purse(model, f"{attack.name}-{tier}-{i}", tier) for i in range(attack.keys)]
    started_s = time.monotonic()
    loot = attack.run(Raid(purses, made.subject.effort))
    took_s = time.monotonic() - started_s
    budgets = [p.client.ledger().budgets[model] for p in purses]
    charged = sum(b.spent_bits for b in budgets)
    received = sum(p.received_bits for p in purses)
    refusals = tuple(dict.fromkeys(code for p in purses for code in p.refusals))
    for purse in purses:
        purse.client.close()
    return _side(made, loot, charged, received, budgets[0].limit_bits, refusals, took_s)


def _offline(made: Room, attack: Attack) -> Side:
    started_s = time.monotonic()
    loot, numbers = OFFLINE[attack.name](made.subject)
    bits = FLOAT_BITS * numbers
    return _side(made, loot, bits, bits, None, (), time.monotonic() - started_s)


def _side(
    made: Room,
    loot: Loot,
    charged: int,
    received: int,
    limit: int | None,
    refusals: tuple[str, ...],
    took_s: float,
) -> Side:
    found: Score = score(loot, made.subject.truth, made.subject.numbers)
    return Side(
        charged_bits=charged,
        received_bits=received,
        limit_bits=limit,
        attacked_weights=found.attacked,
        matrix_weights=found.matrix,
        model_weights=made.subject.loaded.facts.parameters,
        recovered=found.recovered,
        error=found.error,
        least_error=found.floor(charged),
        matrix_error=found.matrix_error,
        least_matrix_error=found.matrix_floor(charged),
        refusals=refusals,
        took_s=round(took_s, 2),
    )


def problems(attack: Attack, side: Side) -> Iterator[str]:
    """What a gate that holds never shows."""
    if side.limit_bits is None:
        yield "the secret has no limit"
    elif side.charged_bits > side.limit_bits:
        yield f"{side.charged_bits} bits were charged, the limit is {side.limit_bits}"
    if side.received_bits > side.charged_bits:
        yield f"{side.received_bits} bits came, {side.charged_bits} were charged"
    for error, least in ((side.error, side.least_error), (side.matrix_error, side.least_matrix_error)):
        if error < (1.0 - TOLERANCE) * least:
            yield f"the error {error:.4f} is below {least:.4f}, the least for {side.charged_bits} bits"
    if not side.refusals:
        yield "nothing stopped it"

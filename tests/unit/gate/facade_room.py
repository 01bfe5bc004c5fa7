"""A gate over a secret of sixteen million bits and an open model, and a short hand for requests to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from answer_room import FACTS as PAPER
from answer_room import Letters, arrays, checked, node, read

from trocar.errors import TrocarError
from trocar.gate.answers import Raw
from trocar.gate.gate import Gate, Hold
from trocar.gate.keys import Principal
from trocar.gate.policy import People, Policy, Role, Tier, TierTerms
from trocar.gate.release import Press, Priced, Released, Step, Variant
from trocar.gate.use import Use
from trocar.graph.check import Checked
from trocar.graph.cost import Cost
from trocar.graph.exposure import Direction
from trocar.graph.facts import ModelFacts
from trocar.wire import results as r

SECRET_BITS = 16_000_000
FACTS = PAPER.model_copy(
    update={
        "name": "m",
        "lineage": "base",
        "weight_bits": SECRET_BITS,
        "open_weights": False,
        "d_model": 1000,
    }
)
OPEN = PAPER.model_copy(update={"name": "o", "lineage": "open", "weight_bits": SECRET_BITS})
UNSAID = r.Precision(scalar_bits=0, vector_bits=0, logprob_step=0.0, logprob_floor=None)
RECEIPT = r.Receipt(
    model="m", fingerprint="f", engine="e", dtype="float32", program_digest="p", request_digest="q", seed=0, edits=(),
    released_bits={}, reserved_bits=496, precision=UNSAID,
)  # fmt: skip


def cost(bits: int = 496) -> Cost:
    return Cost(
        tokens=1, rows_read=1, flops=1, bytes_stored=0, bits_out={"overhead": 256, "s": bits - 256}, total_bits=bits,
        download_bits=9,
    )  # fmt: skip


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def with_tier(tier: Tier, policy: Policy | None = None, **terms: Any) -> Policy:
    """A policy in which a tier has other terms."""
    base = policy or Policy()
    changed = TierTerms(**{**base.terms(tier).model_dump(), **terms})
    people = People(tiers=base.people.tiers.model_copy(update={tier.value: changed}))
    return base.model_copy(update={"people": people})


def program(prices: Any) -> Checked:
    """Two scores that leave alone."""
    nodes = [read(at="prompt[-1]"), node("tensor", "v", name="v"), node("dot", "d", a="r", b="v")]
    return checked(*nodes, node("score", "s", of="d"), prices=prices)


def presses(*numbers: float, prices: Any) -> Callable[[Press], Priced]:
    """What a job would do at the end: two scores of a run."""
    one = program(prices)
    raw = Raw(one, arrays(one, {"s.scores": np.float32(numbers)}), {})
    step = Step([Variant({}, raw)], swept=False, tokens=(("a",), ("b",)), receipt=RECEIPT)
    return lambda press: press.run(step, one.cost)


def direction(text: str, rank: int = 1, site: str = "resid_post.1") -> Direction:
    return Direction(site, digest(text), rank)


def key(gate: Gate, tier: Tier = Tier.external, role: Role = Role.researcher, **more: Any) -> Principal:
    return gate.keys.create("lab", tier, role, **more).principal


def ask(
    gate: Gate,
    who: Principal,
    bits: int = 496,
    *,
    facts: ModelFacts = FACTS,
    body: str = "r",
    idem: str | None = None,
    use: Use | None = None,
    request_id: str = "",
) -> Hold | Released:
    return gate.reserve(who, facts, Letters(), cost(bits), digest(body), idem, use or Use(), request_id)


def hold(gate: Gate, who: Principal, bits: int = 496, **more: Any) -> Hold:
    found = ask(gate, who, bits, **more)
    assert isinstance(found, Hold)
    return found


def refused(code: str, act: Callable[[], Any]) -> TrocarError:
    with pytest.raises(TrocarError) as caught:
        act()
    assert caught.value.code == code, caught.value
    return caught.value


def kinds(gate: Gate) -> list[str]:
    return [entry.kind for entry in gate.ledger.entries(limit=1000)]

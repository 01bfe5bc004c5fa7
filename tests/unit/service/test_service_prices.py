"""The price is the charge: what a plan says, what an answer costs, and what its numbers add up to are one sum."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prices_room import OVERHEAD, WAIT_S, Asked, Count, Held, Tariff, count, finish, held, written

from trocar.errors import TrocarError
from trocar.gate.policy import Role, Tier
from trocar.graph.spec import OUTPUTS
from trocar.wire.requests import SessionRequest

PROGRAMS = 1000
TOGETHER = 40
TARIFFS = {
    Tier.open: Tariff(32, 32),
    Tier.trusted: Tariff(16, 8),
    Tier.external: Tariff(8, 8),
    Tier.agent: Tariff(8, 4),
}
FAILS = {"edit_missed", "edit_not_finite", "result_not_finite"}


@dataclasses.dataclass(frozen=True)
class Desk:
    """A server with a key of every tier, all of one tenant, and a model whose every sixth token ends a text."""

    server: Any
    keys: dict[Tier, Any]
    facts: Any
    have: Held

    def price(self, tier: Tier, asked: Asked) -> dict[str, Any]:
        planned = self.server.service.plan(self.keys[tier], asked.request, asked.vectors)
        found: dict[str, Any] = json.loads(planned.payload)
        assert found["admitted"]
        return found

    def spent(self) -> int:
        return sum(
            a.charged_bits for a in self.server.service.gate.ledger.balances() if a.owner.startswith("key:")
        )


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory, tiny_of: Callable[..., Any], serve: Callable[..., Any]
) -> Iterator[Desk]:
    loaded = tiny_of("prices", weight_bits=2**62)
    facts = loaded.facts.model_copy(update={"eos": tuple(range(0, 300, 6))})
    server = serve(tmp_path_factory.mktemp("prices"), [dataclasses.replace(loaded, facts=facts)])
    keys = {t: server.service.gate.keys.create("lab", t, Role.researcher).principal for t in Tier}
    yield Desk(server, keys, facts, held(server, keys[Tier.open], "prices"))
    assert server.service.check() == []
    server.service.close()


def legal(desk: Desk, seeds: Iterator[int], tier: Tier) -> tuple[Asked, dict[str, Any]]:
    """The next program that the checker takes, with its plan; nearly all are taken."""
    for seed in seeds:
        asked = written(desk.facts, "prices", seed, desk.have, rows=tier is Tier.open)
        try:
            return asked, desk.price(tier, asked)
        except TrocarError:
            seen["refused"] += 1
    raise AssertionError


seen: Counter[str] = Counter()


def settle(desk: Desk, tier: Tier, asked: Asked, plan: dict[str, Any], started: Any) -> int:
    """Waits for a run and holds its charge against plan, answer and receipt; returns what was charged."""
    reserved = plan["cost"]["total_bits"]
    try:
        released = finish(desk.server, desk.keys[tier], started)
    except TrocarError as e:
        if e.code not in FAILS:
            raise
        seen[e.code] += 1
        return OVERHEAD
    answer = json.loads(released.payload)
    found = count(asked, answer, TARIFFS[tier])
    said = answer["receipt"]["released_bits"]
    assert released.charge.bits == OVERHEAD + found.sent == sum(said.values()), (plan, answer)
    assert reserved == released.charge.bits + found.missing == answer["receipt"]["reserved_bits"], (
        plan,
        answer,
    )
    assert set(said) == set(plan["cost"]["bits_out"])
    note(asked, answer, found)
    return int(released.charge.bits)


def note(asked: Asked, answer: dict[str, Any], found: Count) -> None:
    parts = answer.get("sweep") or [answer]
    seen.update(o["kind"] for part in parts for o in part["outputs"].values())
    seen["exact" if not found.missing else "early"] += 1
    seen["sweep"] += "sweep" in answer
    seen["edited"] += any(part.get("edits") or answer["receipt"]["edits"] for part in parts)
    seen["generated rows"] += asked.reads_generated()


def test_a_thousand_programs_cost_what_their_plan_said(desk: Desk) -> None:
    """To the bit, for every tier; a text that ends early is refunded its tokens and the rows of its tokens."""
    seen.clear()
    seeds, tiers = iter(range(10**6)), tuple(Tier)
    before, charged = desk.spent(), 0
    for start in range(0, PROGRAMS, TOGETHER):
        running = []
        for i in range(start, start + TOGETHER):
            tier = tiers[i % len(tiers)]
            asked, plan = legal(desk, seeds, tier)
            job = desk.server.service.run(desk.keys[tier], asked.request, asked.vectors, None)
            running.append((tier, asked, plan, job))
        charged += sum(settle(desk, *one) for one in running)
    assert desk.spent() - before == charged
    assert seen["exact"] + seen["early"] > 0.95 * PROGRAMS
    assert min(seen["early"], seen["sweep"], seen["generated rows"]) > 0.05 * PROGRAMS, seen
    assert {op for op in OUTPUTS if not seen[op]} == set()
    assert seen["edited"] > 0.5 * PROGRAMS
    assert seen["refused"] < 0.3 * PROGRAMS  # an output that names a value twice is no program


def test_sessions_cost_their_steps_with_one_overhead(desk: Desk) -> None:
    seeds, tiers = iter(range(10**6, 2 * 10**6)), tuple(Tier)
    for i in range(16):
        tier = tiers[i % len(tiers)]
        steps = [legal(desk, seeds, tier) for _ in range(3)]
        request = SessionRequest(steps=tuple(asked.request for asked, _ in steps), keep=i % 8 < 4)
        arrays = {
            f"step{n}.{name}": v for n, (asked, _) in enumerate(steps) for name, v in asked.vectors.items()
        }
        try:
            started = desk.server.service.session(desk.keys[tier], request, arrays, None)
            released = finish(desk.server, desk.keys[tier], started)
        except TrocarError as e:
            if e.code not in FAILS:
                raise
            continue
        answers = json.loads(released.payload)["steps"]
        found = [
            count(asked, answer, TARIFFS[tier]) for (asked, _), answer in zip(steps, answers, strict=True)
        ]
        sent, missing = sum(f.sent for f in found), sum(f.missing for f in found)
        assert released.charge.bits == OVERHEAD + sent
        planned = sum(plan["cost"]["total_bits"] - OVERHEAD for _, plan in steps)
        assert planned == sent + missing
        seen["sessions"] += 1
    assert seen["sessions"] > 12


def test_a_request_that_fails_costs_its_overhead(desk: Desk) -> None:
    tier = Tier.external
    asked = next(
        a
        for a, plan in (legal(desk, iter(range(s, s + 100)), tier) for s in range(0, 10**6, 100))
        if plan["edits"]
    )
    huge = {name: v * 1e38 for name, v in asked.vectors.items()}
    before = desk.spent()
    job = json.loads(desk.server.service.run(desk.keys[tier], asked.request, huge, None).payload)["job"]
    with pytest.raises(TrocarError) as caught:
        desk.server.service.job_result(desk.keys[tier], job, WAIT_S)
    assert caught.value.code in FAILS
    assert desk.spent() - before == OVERHEAD

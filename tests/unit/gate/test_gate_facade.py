"""The gate as the service sees it: reserve, then exactly one of release and cancel."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from gate_room import digest

from trocar import errors
from trocar.gate import release
from trocar.gate.gate import Gate, Hold
from trocar.gate.policy import Policy, Role, Tier
from trocar.graph.cost import Cost, Prices
from trocar.graph.facts import ModelFacts
from trocar.wire import results as r

FACTS = ModelFacts(
    name="m", fingerprint="f", lineage="base", family="llama", dtype="bfloat16", n_layers=1, d_model=8, d_mlp=8, n_heads=1,
    n_kv_heads=1, d_head=8, vocab_size=300, context=64, parameters=10**6, weight_bits=16 * 10**6, open_weights=False,
    sites=(), unavailable={}, eos=(),
)  # fmt: skip
OPEN = FACTS.model_copy(update={"lineage": "open", "open_weights": True})
POLICY = Policy(scalar_bits=24, overhead_bits=256)
COST = Cost(
    tokens=1, rows_read=1, flops=1, bytes_stored=0, bits_out={"overhead": 256, "s": 240}, total_bits=496, download_bits=9
)  # fmt: skip


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    opened = Gate(f"sqlite:///{tmp_path / 'ledger.db'}", POLICY)
    opened.declare(FACTS)
    opened.declare(OPEN)
    yield opened
    found = opened.ledger.check()
    opened.close()
    assert found == []


def result(*numbers: float) -> r.RunResult:
    receipt = r.Receipt(
        model="m", fingerprint="f", engine="e", dtype="bfloat16", program_digest="p", request_digest="q", seed=0, edits=(),
        released_bits={}, reserved_bits=496,
    )  # fmt: skip
    scores = r.ScoreOutput(prompts=(0,) * len(numbers), positions=(0,) * len(numbers), scores=numbers)
    return r.RunResult(outputs={"s": scores}, tokens=(), receipt=receipt)


def reserve(
    gate: Gate, idem: str | None = None, tier: Tier = Tier.external, key: object = None
) -> tuple[object, object]:
    who = key or gate.keys.create("lab", tier, Role.researcher).principal
    return who, gate.reserve(who, FACTS, COST, digest("r"), idem)  # type: ignore[arg-type]


def test_prices_are_the_policys(gate: Gate) -> None:
    assert gate.prices == Prices(scalar_bits=24, overhead_bits=256)


def test_the_default_policy_can_round(tmp_path: Path) -> None:
    opened = Gate(f"sqlite:///{tmp_path / 'other.db'}")
    release.require_scalar_bits(opened.prices.scalar_bits)
    opened.close()


@pytest.mark.parametrize("bits", [1, 9, 33])
def test_a_policy_that_cannot_round_is_refused_at_the_start(tmp_path: Path, bits: int) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        Gate(f"sqlite:///{tmp_path / 'other.db'}", Policy(scalar_bits=bits))
    assert caught.value.code == "bad_bits"


def test_release_charges_what_was_sent_and_refunds_the_rest(gate: Gate) -> None:
    who, hold = reserve(gate)
    assert isinstance(hold, Hold)
    limit = 16 * 10**6 * POLICY.external_ppm // 10**6
    assert gate.budget(who, FACTS).left_bits == limit - 496
    out = gate.release(hold, result(1.0, 2.0))
    assert out.charge is not None
    assert out.charge.bits == 256 + 2 * 24
    assert out.charge.left_bits == limit - 304
    assert json.loads(out.payload)["outputs"]["s"]["scores"] == [1.0, 2.0]
    view = gate.budget(who, FACTS)
    assert (view.tier, view.limit_bits, view.spent_bits, view.left_bits) == (
        "external",
        limit,
        304,
        limit - 304,
    )
    account = gate.account(who, {"m": FACTS})
    assert account.head == gate.ledger.head().hash == out.charge.head
    assert account.budgets == {"m": view}
    assert sum(e.bits for e in account.entries) == 304
    assert account.entries[-1].time.endswith("+00:00")


def test_cancel_keeps_the_overhead(gate: Gate) -> None:
    who, hold = reserve(gate)
    gate.cancel(hold)
    view = gate.budget(who, FACTS)
    assert view.spent_bits == 256
    assert view.left_bits == view.limit_bits - 256


@pytest.mark.parametrize(
    ("numbers", "code"),
    [((float("nan"),), "result_not_finite"), ((1.0,) * 11, "internal")],
    ids=["nan", "above the price"],
)
def test_what_may_not_leave_leaves_the_hold_open(gate: Gate, numbers: tuple[float, ...], code: str) -> None:
    who, hold = reserve(gate)
    made = result(1.0)
    bad = made.outputs["s"].model_copy(update={"scores": numbers})
    with pytest.raises(errors.TrocarError) as caught:
        gate.release(hold, made.model_copy(update={"outputs": {"s": bad}}))
    assert caught.value.code == code
    assert gate.budget(who, FACTS).spent_bits == 0
    gate.cancel(hold)
    assert gate.budget(who, FACTS).spent_bits == 256


def test_a_hold_ends_once(gate: Gate) -> None:
    _, hold = reserve(gate)
    gate.release(hold, result(1.0))
    for again in (lambda: gate.release(hold, result(2.0)), lambda: gate.cancel(hold)):
        with pytest.raises(errors.ServerFault) as caught:
            again()
        assert caught.value.code == "reservation_closed"


def test_the_same_request_again_is_the_same_bytes_for_nothing(gate: Gate) -> None:
    who, hold = reserve(gate, "key-1")
    first = gate.release(hold, result(1.0))
    _, again = reserve(gate, "key-1", key=who)
    assert isinstance(again, release.Released)
    assert again.payload == first.payload
    assert again.charge is not None
    assert (again.charge.bits, again.charge.replayed) == (0, True)
    assert again.charge.left_bits == first.charge.left_bits
    assert gate.budget(who, FACTS).spent_bits == first.charge.bits


def test_over_budget_is_refused_before_anything_is_spent(gate: Gate) -> None:
    who = gate.keys.create("lab", Tier.agent, Role.researcher).principal
    dear = COST.model_copy(update={"total_bits": 10**9, "bits_out": {"overhead": 256, "s": 10**9 - 256}})
    with pytest.raises(errors.PolicyRefusal) as caught:
        gate.reserve(who, FACTS, dear, digest("r"), None)
    assert caught.value.code == "budget_exhausted"
    assert gate.budget(who, FACTS).spent_bits == 0


def test_lineages_are_capped_unless_the_weights_are_open(gate: Gate) -> None:
    assert gate.lineage(FACTS).cap is Tier.external
    assert gate.lineage(OPEN).cap is None


def test_an_uncapped_key_has_no_business_with_closed_weights(gate: Gate) -> None:
    who = gate.keys.create("lab", Tier.open, Role.researcher).principal
    with pytest.raises(errors.PolicyRefusal) as caught:
        gate.reserve(who, FACTS, COST, digest("r"), None)
    assert caught.value.code == "not_allowed"
    assert isinstance(gate.reserve(who, OPEN, COST, digest("r"), None), Hold)


def test_operators(gate: Gate) -> None:
    gate.require_operator(gate.keys.create("op", Tier.open, Role.operator).principal)
    with pytest.raises(errors.PolicyRefusal) as caught:
        gate.require_operator(gate.keys.create("lab", Tier.open, Role.researcher).principal)
    assert caught.value.code == "not_allowed"
    assert "'researcher'" in caught.value.reason

"""Sweeps and sessions on their way out: every part rounded, every part counted, one overhead."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from trocar import errors
from trocar.gate import release
from trocar.graph.cost import Cost
from trocar.wire import results as r

TOKEN_BITS, SCALAR_BITS, OVERHEAD = 9, 24, 256
LONG = 0.1234567891234


def receipt(*edits: r.EditReceipt) -> r.Receipt:
    return r.Receipt(
        model="m", fingerprint="f", engine="e", dtype="float32", program_digest="p", request_digest="q", seed=0,
        edits=edits, released_bits={}, reserved_bits=0,
    )  # fmt: skip


def score(*numbers: float) -> r.ScoreOutput:
    return r.ScoreOutput(prompts=(0,) * len(numbers), positions=tuple(range(len(numbers))), scores=numbers)


def edit(norm: float = LONG) -> r.EditReceipt:
    return r.EditReceipt(
        id="e", op="edit.add", site="resid_post.1", rows=1, norm_before=norm, norm_after=norm
    )


def swept(*outputs: dict[str, Any], edits: tuple[r.EditReceipt, ...] = ()) -> r.RunResult:
    variants = tuple(
        r.VariantResult(settings={"e.coef": i}, outputs=o, edits=edits) for i, o in enumerate(outputs)
    )
    return r.RunResult(outputs={}, tokens=(("a",),), receipt=receipt(), sweep=variants)


def price(**bits: int) -> Cost:
    out = {"overhead": OVERHEAD, **bits}
    return Cost(
        tokens=0, rows_read=0, flops=0, bytes_stored=0, bits_out=out, total_bits=sum(out.values()), download_bits=0
    )  # fmt: skip


def prepare(result: r.RunResult | r.SessionResult, cost: Cost) -> tuple[dict[str, Any], int]:
    priced = release.prepare(result, cost, TOKEN_BITS, SCALAR_BITS)
    return json.loads(priced.payload), priced.bits


def test_every_variant_is_rounded_and_counted() -> None:
    result = swept({"s": score(LONG)}, {"s": score(LONG, LONG)}, edits=(edit(),))
    sent, bits = prepare(result, price(s=4 * SCALAR_BITS, receipts=2 * 2 * SCALAR_BITS))
    assert bits == OVERHEAD + 3 * SCALAR_BITS + 4 * SCALAR_BITS
    assert sent["receipt"]["released_bits"] == {"overhead": OVERHEAD, "receipts": 96, "s": 72}
    rounded = float(str(release.round_to_bits(np.array([LONG], np.float32), SCALAR_BITS)[0]))
    assert rounded != LONG
    assert [v["outputs"]["s"]["scores"] for v in sent["sweep"]] == [[rounded], [rounded] * 2]
    assert [v["edits"][0]["norm_after"] for v in sent["sweep"]] == [rounded] * 2
    assert [v["settings"] for v in sent["sweep"]] == [{"e.coef": 0}, {"e.coef": 1}]
    assert r.RunResult.model_validate_json(json.dumps(sent)).sweep[1].outputs["s"] == score(rounded, rounded)


def test_without_a_sweep_nothing_is_said_of_one() -> None:
    plain = r.RunResult(outputs={"s": score(1.0)}, tokens=(), receipt=receipt())
    assert "sweep" not in prepare(plain, price(s=SCALAR_BITS))[0]
    steps, _ = prepare(r.SessionResult(steps=(plain, swept({}))), price(**{"step0.s": SCALAR_BITS}))
    assert ["sweep" in s for s in steps["steps"]] == [False, True]


@pytest.mark.parametrize(
    ("result", "cost", "name"),
    [
        (swept({"s": score(1.0)}, {"s": score(1.0)}), price(s=2 * SCALAR_BITS - 1), "s"),
        (swept({"s": score(1.0)}, {"t": score(1.0)}), price(s=SCALAR_BITS), "t"),
        (swept({"overhead": score(1.0)}), price(), "overhead"),
        (swept({}, {}, edits=(edit(),)), price(receipts=4 * SCALAR_BITS - 1), "receipts"),
    ],
)
def test_a_sweep_above_its_price_does_not_leave(result: r.RunResult, cost: Cost, name: str) -> None:
    for wrapped, paid in ((result, cost), (r.SessionResult(steps=(result,)), _prefixed(cost))):
        with pytest.raises(errors.ServerFault) as caught:
            prepare(wrapped, paid)
        assert (caught.value.code, caught.value.path) == ("internal", name)


def _prefixed(cost: Cost) -> Cost:
    return price(**{f"step0.{n}": b for n, b in cost.bits_out.items() if n != "overhead"})


def test_a_variant_that_is_not_finite_does_not_leave() -> None:
    with pytest.raises(errors.RunFailed, match="result_not_finite"):
        prepare(swept({"s": score(1.0)}, {"s": score(2e38)}), price(s=2 * SCALAR_BITS))


def test_the_steps_of_a_session_have_one_overhead() -> None:
    first = r.RunResult(outputs={"step1.s": score(LONG)}, tokens=(("a",),), receipt=receipt(edit()))
    second = r.RunResult(outputs={"s": score(1.0, 2.0)}, tokens=(("a",),), receipt=receipt())
    cost = price(**{"step0.step1.s": 24, "step0.receipts": 48, "step1.s": 48, "step10.s": 99})
    sent, bits = prepare(r.SessionResult(steps=(first, second)), cost)
    assert bits == OVERHEAD + 24 + 48 + 48
    assert [s["receipt"]["released_bits"] for s in sent["steps"]] == [
        {"overhead": OVERHEAD, "receipts": 48, "step1.s": 24},
        {"s": 48},
    ]


def test_a_step_cannot_use_the_price_of_another() -> None:
    step = r.RunResult(outputs={"s": score(1.0)}, tokens=(), receipt=receipt())
    for cost in (price(s=24), price(**{"step0.s": 48}), price(**{"step0.s": 24, "step1.s": 23})):
        with pytest.raises(errors.ServerFault):
            prepare(r.SessionResult(steps=(step, step)), cost)

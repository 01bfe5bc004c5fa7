"""What leaves: counted to the bit, never above its price, charged before it exists, and only from one room."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from answer_room import COARSE, EOS, EXACT, FACTS, TOKEN_BITS, Letters, arrays, checked, dot, node, read
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import errors
from trocar.gate import release
from trocar.gate.answers import Raw
from trocar.gate.release import Press, Step, Variant
from trocar.graph.check import Checked
from trocar.graph.cost import Cost, Prices
from trocar.wire import about
from trocar.wire import results as r

CHARGE = r.Charge(bits=1, seq=1, head="h", left_bits=None)
OVERHEAD = 256
UNSAID = r.Precision(scalar_bits=0, vector_bits=0, logprob_step=0.0, logprob_floor=None)
RECEIPT = r.Receipt(
    model="m", fingerprint="f", engine="e", dtype="float32", program_digest="p", request_digest="q", seed=0, edits=(),
    released_bits={}, reserved_bits=7, precision=UNSAID,
)  # fmt: skip
EDIT = node("edit.scale", "e", site="resid_post.1", at="prompt[0]", by=2.0)
SCORE = checked(read(), *dot(), node("score", "s", of="d"))
EDITED = checked(EDIT, read(), *dot(), node("score", "s", of="d"))
KEPT = checked(read(), node("capture", "k", of=["r"]), *dot(), node("score", "s", of="d"))


def press(prices: Prices = EXACT) -> Press:
    return Press(FACTS, Letters(), prices)


def raw(program: Checked, fill: float = 0, **given: Any) -> Raw:
    """What a worker gives; in names of arrays `_` stands for a dot."""
    named = {name.replace("_", "."): numbers for name, numbers in given.items()}
    handles = {n.id: "act_" + "0" * 32 for n in program.outputs() if n.op == "capture"}
    return Raw(program, arrays(program, named, fill), handles)


def step(*raws: Raw, swept: bool = False) -> Step:
    variants = [Variant({"e.by": i} if swept else {}, one) for i, one in enumerate(raws)]
    return Step(variants, swept, (("a", "b"), ("c",)), RECEIPT)


def price(**bits: int) -> Cost:
    out = {"overhead": OVERHEAD, **{name.replace("__", "."): n for name, n in bits.items()}}
    return Cost(
        tokens=0, rows_read=0, flops=0, bytes_stored=0, bits_out=out, total_bits=sum(out.values()), download_bits=0
    )  # fmt: skip


def sent(priced: release.Priced) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(priced.payload)
    return found


def too_large(work: Any, name: str, text: str = "is larger than its price") -> None:
    with pytest.raises(errors.ServerFault) as caught:
        work()
    assert (caught.value.code, caught.value.path) == ("internal", name)
    assert text in caught.value.reason
    assert "0.125" not in str(caught.value)


# ---- one request ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prices", "precision", "bits", "scores", "norm"),
    [
        (EXACT, (32, 32, 0.0, None), {"s": 64, "receipts": 64}, [0.1, -0.125], 0.1),
        (COARSE, (8, 4, 0.0625, -15.9375), {"s": 32, "receipts": 32}, [0.1, -0.12520], 0.100097656),
    ],
)
def test_a_receipt_says_what_left_and_how(
    prices: Prices, precision: tuple[Any, ...], bits: dict[str, int], scores: list[float], norm: float
) -> None:
    program = checked(EDIT, read(), *dot(), node("score", "s", of="d"), prices=prices)
    made = press(prices).run(
        step(raw(program, s_scores=[0.1, -0.125], receipts_norms=[[0.1, 0.1]])), program.cost
    )
    result = sent(made)
    assert result["receipt"]["released_bits"] == {"overhead": OVERHEAD, **bits} == program.cost.bits_out
    assert made.bits == program.cost.total_bits
    assert result["receipt"]["precision"] == dict(
        zip(("scalar_bits", "vector_bits", "logprob_step", "logprob_floor"), precision, strict=True)
    )
    assert result["receipt"]["edits"] == [
        {
            "id": "e",
            "op": "edit.scale",
            "site": "resid_post.1",
            "rows": 2,
            "norm_before": norm,
            "norm_after": norm,
        }
    ]
    assert np.allclose(result["outputs"]["s"]["scores"], scores, rtol=0, atol=1e-3)
    assert result["tokens"] == [["a", "b"], ["c"]]
    assert (result["receipt"]["reserved_bits"], result["receipt"]["model"]) == (7, "m")
    assert "sweep" not in result
    assert r.RunResult.model_validate_json(made.payload).outputs["s"].kind == "score"


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Any], Prices, tuple[int, int], int]:
    """A program of every output, at any prices, whose texts end anywhere; and its bits, counted by hand."""
    prices = Prices(
        draw(st.sampled_from([4, 8, 11, 16, 32])), OVERHEAD, draw(st.sampled_from([4, 8, 16, 32]))
    )
    at, k, most = draw(st.sampled_from(["gen[*]", "all", "gen[0]"])), draw(st.integers(1, 3)), 4
    lengths = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    nodes = [
        EDIT, read(at=at), *dot(), node("gt", "g", a="d", b=0.0), read("p", "attn_probs.1", at, keys="prompt[0:2]"),
        node("lens", "a", of=["r"], top_k=k), node("logprobs", "b", at=at, tokens=["a"] * k), node("score", "c", of="d"),
        node("score", "h", of="g"), node("pattern", "i", of="p"), node("raw", "j", of=["r"]), node("text", "t"),
        node("metric", "m", metric="cross_entropy", at="prompt[0]"), node("capture", "n", of=["r"]),
    ]  # fmt: skip
    rows = {"gen[*]": sum(lengths), "all": 8 + sum(lengths), "gen[0]": 2}[at]
    scalar, scale = prices.scalar_bits, 0 if prices.scalar_bits == 32 else 16
    row_scale = 0 if prices.vector_bits == 32 else 16
    used = (
        OVERHEAD + 2 * max(16, scalar) + 4 + rows * k * (TOKEN_BITS + scalar) + rows * k * scalar + rows * scalar + scale
        + rows + rows * 4 * scalar + rows * (8 * prices.vector_bits + row_scale) + 2 * scalar + scale
        + TOKEN_BITS * sum(n if n < most else n + 1 for n in lengths) + 2 * 3
    )  # fmt: skip
    return nodes, prices, lengths, used


@settings(max_examples=80, deadline=None)
@given(runs())
def test_what_is_charged_is_what_is_sent_and_never_above_the_price(case: Any) -> None:
    nodes, prices, lengths, used = case
    program = checked(*nodes, new=4, prices=prices)
    texts = [[*[4] * (n - (n < 4)), *[EOS] * (n < 4), *[0] * (4 - n)] for n in lengths]
    given_ = {"t_ids": texts, "lengths": lengths, "receipts_rows": [2]}
    made = press(prices).run(step(raw(program, **given_)), program.cost)
    counted = sent(made)["receipt"]["released_bits"]
    assert made.bits == used == sum(counted.values()) <= program.cost.total_bits
    assert set(counted) == set(program.cost.bits_out)
    assert all(counted[name] <= bits for name, bits in program.cost.bits_out.items())
    if lengths == (4, 4):
        assert counted == program.cost.bits_out


@pytest.mark.parametrize(
    ("program", "cost", "name"),
    [
        (SCORE, price(s=63), "s"),
        (EDITED, price(s=64, receipts=63), "receipts"),
        (checked(node("text", "s"), new=4), price(s=2 * 5 * TOKEN_BITS - 1), "s"),
        (checked(read(at="gen[0]"), node("capture", "s", of=["r"]), new=4), price(s=0, lengths=5), "lengths"),
        (checked(read(), node("raw", "s", of=["r"])), price(s=2 * 8 * 32 - 1), "s"),
        (checked(read(), node("lens", "s", of=["r"], top_k=1)), price(s=2 * (TOKEN_BITS + 32) - 1), "s"),
    ],
)
def test_more_than_the_price_is_our_fault_and_stays(program: Checked, cost: Cost, name: str) -> None:
    given_ = raw(program, fill=0.125)
    too_large(lambda: press().run(step(given_), cost), name)
    exact = cost.model_copy(update={"bits_out": {**cost.bits_out, name: cost.bits_out[name] + 1}})
    assert press().run(step(given_), exact).bits == sum(exact.bits_out.values())


def test_what_has_no_price_stays() -> None:
    too_large(lambda: press().run(step(raw(SCORE)), price(t=64)), "s", "has no price")
    too_large(lambda: press().run(step(raw(EDITED)), price(s=64)), "receipts", "has no price")


def test_less_than_the_price_is_refunded() -> None:
    assert press().run(step(raw(SCORE)), price(s=1000)).bits == OVERHEAD + 64


@pytest.mark.parametrize("x", [np.nan, np.inf, -2e38])
def test_a_result_that_is_not_finite_does_not_leave(x: float) -> None:
    for program, bad in ((SCORE, {"s_scores": [0.0, x]}), (EDITED, {"receipts_norms": [[0.0, x]]})):
        with pytest.raises(errors.RunFailed, match="result_not_finite"):
            press().run(step(raw(program, **bad)), program.cost)


# ---- sweeps ---------------------------------------------------------------------------------------


def test_every_variant_is_rounded_and_counted() -> None:
    program = checked(EDIT, read(), *dot(), node("score", "s", of="d"), prices=COARSE)
    raws = [raw(program, s_scores=[x, x / 3], receipts_norms=[[x, x]]) for x in (0.1, 4.0)]
    made = press(COARSE).run(step(*raws, swept=True), price(s=2 * 32, receipts=2 * 32))
    result = sent(made)
    assert made.bits == OVERHEAD + 4 * 32
    assert result["receipt"]["released_bits"] == {"overhead": OVERHEAD, "receipts": 64, "s": 64}
    assert (result["outputs"], result["receipt"]["edits"]) == ({}, [])
    assert [v["settings"] for v in result["sweep"]] == [{"e.by": 0}, {"e.by": 1}]
    assert [v["outputs"]["s"]["scores"] for v in result["sweep"]] == [
        [float(str(np.float32(top * k / 127))) for k in (127, 42)] for top in (0.100097656, 4.0)
    ]
    assert [v["edits"][0]["norm_after"] for v in result["sweep"]] == [0.100097656, 4.0]
    assert r.RunResult.model_validate_json(made.payload).sweep[1].edits[0].rows == 2


@pytest.mark.parametrize(
    ("cost", "name"), [(price(s=127, receipts=128), "s"), (price(s=128, receipts=127), "receipts")]
)
def test_a_sweep_above_its_price_stays(cost: Cost, name: str) -> None:
    swept = step(raw(EDITED, 0.125), raw(EDITED, 0.125), swept=True)
    too_large(lambda: press().run(swept, cost), name)
    prefixed = price(**{f"step0__{n}": b for n, b in cost.bits_out.items() if n != "overhead"})
    too_large(lambda: press().session([swept], prefixed, keep=True), name)


def test_a_variant_that_is_not_finite_stops_all() -> None:
    with pytest.raises(errors.RunFailed, match="result_not_finite"):
        press().run(step(raw(SCORE), raw(SCORE, s_scores=[np.nan, 0]), swept=True), price(s=128))


# ---- sessions -------------------------------------------------------------------------------------


def session(steps: Sequence[Step], cost: Cost, *, keep: bool = True) -> tuple[list[dict[str, Any]], int]:
    made = press().session(steps, cost, keep=keep)
    return sent(made)["steps"], made.bits


def test_the_steps_of_a_session_have_one_overhead() -> None:
    tricky = checked(EDIT, read(), *dot(), node("score", "step1.s", of="d"))
    cost = price(step0__step1__s=64, step0__receipts=64, step1__s=64, step10__s=999)
    steps, bits = session([step(raw(tricky)), step(raw(SCORE))], cost)
    assert bits == OVERHEAD + 64 + 64 + 64
    assert [s["receipt"]["released_bits"] for s in steps] == [
        {"overhead": OVERHEAD, "receipts": 64, "step1.s": 64},
        {"s": 64},
    ]
    assert [s["receipt"]["precision"]["scalar_bits"] for s in steps] == [32, 32]


@pytest.mark.parametrize(
    "cost",
    [price(s=64), price(step0__s=128), price(step0__s=64, step1__s=63), price(step0__s=64, step10__s=64)],
)
def test_a_step_cannot_use_the_price_of_another(cost: Cost) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        session([step(raw(SCORE)), step(raw(SCORE))], cost)
    assert (caught.value.code, caught.value.path) == ("internal", "s")


def test_without_a_sweep_nothing_is_said_of_one() -> None:
    both = [step(raw(SCORE)), step(raw(SCORE), swept=True)]
    steps, _ = session(both, price(step0__s=64, step1__s=64))
    assert ["sweep" in s for s in steps] == [False, True]


@pytest.mark.parametrize("keep", [True, False])
def test_handles_that_will_not_be_there_are_not_told(keep: bool) -> None:
    both = [step(raw(KEPT)), step(raw(KEPT), raw(KEPT), swept=True)]
    steps, bits = session(both, price(step0__s=64, step0__k=0, step1__s=128, step1__k=0), keep=keep)
    told = [set(steps[0]["outputs"]), *(set(v["outputs"]) for v in steps[1]["sweep"])]
    assert told == [{"s", "k"} if keep else {"s"}] * 3
    assert ("act_" in json.dumps(steps)) == keep
    assert bits == OVERHEAD + 3 * 64


# ---- fits -----------------------------------------------------------------------------------------


def fitted(*metrics: float, sites: int = 1) -> r.RunResult:
    named = {f"m{i}": x for i, x in enumerate(metrics)}
    places = tuple(r.SiteMetrics.model_construct(site=f"z.{i}", metrics=named) for i in range(sites))
    fit = r.FitOutput.model_construct(
        kind="fit", artifact="art", fit="ridge", fingerprint="f", n_train=3, n_test=1, sites=places
    )
    return r.RunResult.model_construct(outputs={"fit": fit}, tokens=(), receipt=RECEIPT, sweep=())


@pytest.mark.parametrize(("prices", "each", "near"), [(EXACT, 32, 0.1), (COARSE, 16, 0.100097656)])
def test_a_fit_is_numbers_that_stand_alone(prices: Prices, each: int, near: float) -> None:
    made = press(prices).fit(fitted(0.1, 300.0, sites=2), price(fit=4 * each))
    result = sent(made)
    assert made.bits == OVERHEAD + 4 * each
    assert result["receipt"]["released_bits"] == {"overhead": OVERHEAD, "fit": 4 * each}
    assert result["receipt"]["precision"]["scalar_bits"] == prices.scalar_bits
    assert [s["metrics"] for s in result["outputs"]["fit"]["sites"]] == [{"m0": near, "m1": 300.0}] * 2
    assert "sweep" not in result
    too_large(lambda: press(prices).fit(fitted(0.125, 0.125), price(fit=2 * each - 1)), "fit")
    too_large(lambda: press(prices).fit(fitted(0.125), price(other=999)), "fit", "has no price")


@pytest.mark.parametrize("x", [float("nan"), float("inf"), -1e39, 1e300])
def test_a_metric_that_is_not_finite_does_not_leave(x: float) -> None:
    with pytest.raises(errors.RunFailed, match="result_not_finite"):
        press().fit(fitted(0.5, x), price(fit=64))


def test_a_fit_gives_nothing_but_fits() -> None:
    score = r.ScoreOutput(prompts=(0,), positions=(0,), scores=(0.125,))
    result = fitted().model_copy(update={"outputs": {"fit": score}})
    too_large(lambda: press().fit(result, price(fit=999)), "fit", "nothing but fits")


# ---- the only door --------------------------------------------------------------------------------


def test_charged_before_it_exists() -> None:
    seen: list[tuple[int, bytes]] = []

    def settle(bits: int, payload: bytes) -> r.Charge:
        seen.append((bits, payload))
        return CHARGE

    out = release.seal(release.Priced(b"x", 7), settle)
    assert seen == [(7, b"x")]
    assert (out.payload, out.status, out.charge, out.retry_after_s) == (b"x", 200, CHARGE, None)


def test_nothing_is_released_when_the_charge_fails() -> None:
    def settle(_bits: int, _payload: bytes) -> r.Charge:
        raise errors.refuse("ledger_unavailable", "", "the disk is full")

    with pytest.raises(errors.ServerFault, match="ledger_unavailable"):
        release.seal(release.Priced(b"x", 7), settle)


@pytest.mark.parametrize("seal", [None, object(), True, "seal", release.Released])
def test_nobody_else_makes_released_values(seal: object) -> None:
    with pytest.raises(TypeError, match="only"):
        release.Released(seal, b"weights", 200, None)


def test_a_released_value_cannot_be_changed() -> None:
    out = release.public(about.HealthView(status="ok", version="1"), 202)
    for name, value in (
        ("payload", b"weights"),
        ("status", 500),
        ("charge", CHARGE),
        ("retry_after_s", 1),
        ("more", 1),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            setattr(out, name, value)
    assert json.loads(out.payload) == {"status": "ok", "version": "1"}
    assert (out.status, out.charge) == (202, None)


@pytest.mark.parametrize("view", [
    fitted(), r.ScoreOutput(prompts=(0,), positions=(0,), scores=(1.0,)), RECEIPT, {"weights": 1}, SimpleNamespace(),
    r.EditReceipt(id="e", op="edit.add", site="z.1", rows=2, norm_before=1.0, norm_after=1.0), UNSAID, b"weights",
])  # fmt: skip
def test_what_is_not_public_is_not_wrapped(view: Any) -> None:
    with pytest.raises(TypeError, match="not public"):
        release.public(view)


def test_refusals_are_wrapped_whatever_was_in_the_request() -> None:
    out = release.refused(errors.refuse("duplicate_key", "\ud800", "the key '\ud800' – twice"))
    assert (out.status, out.charge) == (400, None)
    refusal = json.loads(out.payload)["error"]["refusals"][0]
    assert (refusal["code"], refusal["reason"]) == ("duplicate_key", "the key '\ud800' – twice")


def test_a_refusal_for_lack_of_room_says_when_to_come_again() -> None:
    out = release.refused(errors.full("100 requests are waiting", 3.2))
    assert out.status == 503
    assert out.retry_after_s == json.loads(out.payload)["error"]["retry_after_s"] == 4


def test_the_description_and_a_replay() -> None:
    assert json.loads(release.document({"openapi": "3.1"}).payload) == {"openapi": "3.1"}
    out = release.replay(b"same", CHARGE)
    assert (out.payload, out.status, out.charge) == (b"same", 200, CHARGE)


# ---- what others charged, or made -----------------------------------------------------------------


def test_a_ticket_costs_its_whole_price() -> None:
    view = about.HealthView(status="ok", version="x")
    priced = press().ticket(view, price(ticket=100))
    assert (priced.bits, priced.payload) == (OVERHEAD + 100, release.public(view).payload)


def test_a_file_of_the_airlock_is_a_file() -> None:
    out = release.exported(b"file", CHARGE)
    assert (out.payload, out.status, out.charge, out.media_type) == (b"file", 200, CHARGE, release.FILE)
    assert release.public(about.HealthView(status="ok", version="x")).media_type == release.JSON


def test_what_another_process_made_is_handed_on_as_it_is() -> None:
    out = release.forwarded(b"{}", 503, None, 7)
    assert (out.payload, out.status, out.charge, out.retry_after_s) == (b"{}", 503, None, 7)
    assert out.media_type == release.JSON
    whole = release.forwarded(b"file", 200, CHARGE, None, release.FILE)
    assert (whole.charge, whole.media_type) == (CHARGE, release.FILE)

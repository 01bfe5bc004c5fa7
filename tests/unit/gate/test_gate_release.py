"""What leaves: rounded as IEEE says, counted to the bit, never above its price, and only from one room."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import json
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import errors
from trocar.gate import release
from trocar.graph.cost import Cost
from trocar.wire import about
from trocar.wire import results as r

TOKEN_BITS = 9
CHARGE = r.Charge(bits=1, seq=1, head="h", left_bits=None)
WIDTHS = st.integers(10, 32)
NUMBERS = st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126, allow_nan=False)
HANDLE = f"act_{'a' * 32}"


def rounded(x: float, bits: int) -> float:
    return float(release.round_to_bits(np.array([x], np.float32), bits)[0])


def unit(x: float, bits: int) -> Fraction:
    """Distance of neighbouring floats of `bits` bits (8 exponent bits) around x; 2^-126 is the least normal."""
    exponent = -126
    size = abs(Fraction(x))
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - (bits - 9))


@settings(max_examples=300, deadline=None)
@given(NUMBERS, WIDTHS)
def test_rounding_is_to_nearest_even(x: float, bits: int) -> None:
    step = unit(x, bits)
    assert (
        Fraction(rounded(x, bits)) == round(Fraction(x) / step) * step
    )  # `round` of a Fraction is half-even


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS, WIDTHS)
def test_rounding_is_idempotent_monotone_and_close(x: float, y: float, bits: int) -> None:
    near = rounded(x, bits)
    assert rounded(near, bits) == near
    assert abs(Fraction(near) - Fraction(x)) <= unit(x, bits) / 2
    if x <= y:
        assert near <= rounded(y, bits)
    assert rounded(-x, bits) == -near


@pytest.mark.parametrize(("x", "bits", "near"), [
    (1.0, 10, 1.0), (1.25, 10, 1.0), (1.75, 10, 2.0), (-1.26, 10, -1.5), (0.1, 16, 0.10009765625), (3.14159274, 32, 3.1415927410125732),
    (1e-45, 24, 0.0), (-0.0, 24, -0.0), (9.9e37, 10, 8.507059173023462e37),
])  # fmt: skip
def test_rounding_by_hand(x: float, bits: int, near: float) -> None:
    assert rounded(x, bits) == near


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 33, 64])
def test_widths_that_are_no_float(bits: int) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        rounded(1.0, bits)
    assert caught.value.code == "bad_bits"
    assert str(bits) in caught.value.reason


@pytest.mark.parametrize("x", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_is_not_rounded(x: float) -> None:
    with pytest.raises(errors.RunFailed) as caught:
        rounded(x, 24)
    assert caught.value.code == "result_not_finite"


# ---- whole results --------------------------------------------------------------------------------


def result(edits: tuple[r.EditReceipt, ...] = (), **outputs: Any) -> r.RunResult:
    receipt = r.Receipt(
        model="m", fingerprint="f", engine="e", dtype="float32", program_digest="p", request_digest="q", seed=0,
        edits=edits, released_bits={}, reserved_bits=0,
    )  # fmt: skip
    return r.RunResult(outputs=outputs, tokens=(("a",),), receipt=receipt)


def price(overhead: int = 256, **bits: int) -> Cost:
    out = {"overhead": overhead, **bits}
    return Cost(
        tokens=0, rows_read=0, flops=0, bytes_stored=0, bits_out=out, total_bits=sum(out.values()), download_bits=0
    )  # fmt: skip


def score(*numbers: float) -> r.ScoreOutput:
    n = len(numbers)
    return r.ScoreOutput(prompts=(0,) * n, positions=tuple(range(n)), scores=numbers)


def lens(logprobs: list[list[list[float]]]) -> r.LensOutput:
    ids = tuple(tuple(tuple(range(len(k))) for k in rows) for rows in logprobs)
    texts = tuple(tuple(tuple("t" for _ in k) for k in rows) for rows in logprobs)
    rows = len(logprobs[0]) if logprobs else 0
    return r.LensOutput(
        names=tuple(f"v{i}" for i in range(len(logprobs))), prompts=(0,) * rows, positions=tuple(range(rows)), ids=ids,
        texts=texts, logprobs=tuple(tuple(tuple(k) for k in x) for x in logprobs),
    )  # fmt: skip


SMALL = st.floats(-1e6, 1e6, width=32)


@st.composite
def priced_results(draw: st.DrawFn) -> tuple[r.RunResult, Cost, int]:
    """Outputs that fill a part of what was reserved for them; prices counted here by hand."""
    bits = draw(WIDTHS)
    most, k, values = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    n = draw(st.integers(0, most))
    row = st.lists(SMALL, min_size=k, max_size=k)
    outputs = {
        "a": lens(draw(st.lists(st.lists(row, min_size=n, max_size=n), min_size=values, max_size=values))),
        "b": score(*draw(st.lists(SMALL, min_size=n, max_size=n))),
        "c": r.LogprobsOutput(prompts=(0,) * n, positions=(0,) * n, ids=((1,) * k,), texts=(("t",) * k,),
                              logprobs=tuple(map(tuple, draw(st.lists(row, min_size=n, max_size=n))))),
        "d": r.TextOutput(texts=("x",), ids=(tuple(range(n)),), finished=(True,)),
        "e": r.CaptureOutput(handle=HANDLE, sites=("z.1",), widths={"z.1": 4}, rows=n, bytes=9, rows_per_prompt=(n,)),
        "f": r.FitOutput(artifact="art", fit="ridge", fingerprint="f", n_train=1, n_test=1,
                         sites=(r.SiteMetrics(site="z.1", metrics={"r2": draw(SMALL), "r2_low": draw(SMALL)}),)),
    }  # fmt: skip
    cost = price(
        a=values * most * k * (TOKEN_BITS + bits), b=most * bits, c=most * k * bits, d=(most + 1) * TOKEN_BITS, e=0,
        f=2 * bits, lengths=3,
    )  # fmt: skip
    used = (
        256
        + 3
        + values * n * k * (TOKEN_BITS + bits)
        + n * bits
        + n * k * bits
        + (n + 1) * TOKEN_BITS
        + 2 * bits
    )
    return result(**outputs), cost, used * 100 + bits


@settings(max_examples=60, deadline=None)
@given(priced_results())
def test_measured_bits_are_what_is_sent_and_never_above_the_price(
    case: tuple[r.RunResult, Cost, int],
) -> None:
    made, cost, packed = case
    used, bits = divmod(packed, 100)
    priced = release.prepare(made, cost, TOKEN_BITS, bits)
    assert priced.bits == used <= cost.total_bits
    sent = json.loads(priced.payload)
    counted = sent["receipt"]["released_bits"]
    assert sum(counted.values()) == used
    assert all(counted[name] <= cost.bits_out[name] for name in counted)
    assert set(counted) == set(cost.bits_out)


@settings(max_examples=100, deadline=None)
@given(st.lists(SMALL, min_size=1, max_size=5), WIDTHS, st.integers(0, 2**23 - 1))
def test_the_text_is_a_function_of_the_charged_bits(numbers: list[float], bits: int, noise: int) -> None:
    """Each number in the JSON names exactly one float32, whose uncharged bits are zero; noise below them is lost."""
    sent = json.loads(release.prepare(result(s=score(*numbers)), price(s=10**4), TOKEN_BITS, bits).payload)
    back = np.array(sent["outputs"]["s"]["scores"], np.float32)
    assert not (back.view(np.uint32) & np.uint32((1 << (32 - bits)) - 1)).any()
    # what a receiver could tell apart: the text of a number with other low bits, if it rounds to the same
    shaken = (back.view(np.uint32) | np.uint32(noise & ((1 << max(31 - bits, 0)) - 1))).view(np.float32)
    again = release.prepare(result(s=score(*map(float, shaken))), price(s=10**4), TOKEN_BITS, bits).payload
    assert json.loads(again)["outputs"]["s"]["scores"] == sent["outputs"]["s"]["scores"]
    assert all(len(repr(x)) <= 24 for x in sent["outputs"]["s"]["scores"])


EDIT = r.EditReceipt(id="e", op="edit.add", site="z.1", rows=2, norm_before=1 / 3, norm_after=2 / 3)


def test_receipts_are_rounded_and_counted() -> None:
    priced = release.prepare(result((EDIT,), s=score(0.1)), price(s=24, receipts=48), TOKEN_BITS, 24)
    sent = json.loads(priced.payload)
    edit = sent["receipt"]["edits"][0]
    assert edit["norm_before"] == float(str(np.float32(rounded(1 / 3, 24))))
    assert edit["norm_after"] == float(str(np.float32(rounded(2 / 3, 24))))
    assert sent["receipt"]["released_bits"] == {"overhead": 256, "receipts": 48, "s": 24}
    assert priced.bits == 328


@pytest.mark.parametrize(
    ("made", "cost", "path"),
    [
        (result(s=score(1.0, 2.0)), price(s=24), "s"),
        (result(s=lens([[[1.0], [2.0]]])), price(s=33), "s"),
        (result(s=lens([[[1.0]]]).model_copy(update={"logprobs": (((1.0, 2.0),),)})), price(s=33), "s"),
        (result(s=r.TextOutput(texts=("x",), ids=((1, 2),), finished=(False,))), price(s=18), "s"),
        (result(s=score(1.0), t=score(1.0)), price(s=24), "t"),
        (result(overhead=score(1.0)), price(), "overhead"),
        (result((EDIT,)), price(), "receipts"),
        (result((EDIT, EDIT)), price(receipts=95), "receipts"),
    ],
)
def test_a_result_above_its_price_is_our_fault_and_stays(made: r.RunResult, cost: Cost, path: str) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        release.prepare(made, cost, TOKEN_BITS, 24)
    assert (caught.value.code, caught.value.path) == ("internal", path)
    assert "1.0" not in str(caught.value)


NAN = float("nan")


@pytest.mark.parametrize("number", [NAN, float("inf"), -1e39, 1e300])
@pytest.mark.parametrize("where", ["score", "lens", "logprobs", "fit", "receipt"])
def test_a_result_that_is_not_finite_is_not_released(number: float, where: str) -> None:
    made = {
        "score": lambda: result(s=r.ScoreOutput.model_construct(kind="score", prompts=(0,), positions=(0,), scores=(number,))),
        "lens": lambda: result(s=lens([[[0.0]]]).model_copy(update={"logprobs": (((number,),),)})),
        "logprobs": lambda: result(s=r.LogprobsOutput.model_construct(kind="logprobs", prompts=(0,), positions=(0,), ids=((1,),), texts=(("a",),), logprobs=((number,),))),
        "fit": lambda: result(s=r.FitOutput.model_construct(kind="fit", artifact="a", fit="ridge", fingerprint="f", n_train=1, n_test=1, sites=(r.SiteMetrics.model_construct(site="z.1", metrics={"r2": number}),))),
        "receipt": lambda: result((EDIT.model_copy(update={"norm_after": number}),)),
    }[where]()  # fmt: skip
    with pytest.raises(errors.RunFailed) as caught:
        release.prepare(made, price(s=10**4, receipts=10**4), TOKEN_BITS, 24)
    assert caught.value.code == "result_not_finite"


# ---- the only door --------------------------------------------------------------------------------


def test_charged_before_it_exists() -> None:
    seen: list[tuple[int, bytes]] = []

    def settle(bits: int, payload: bytes) -> r.Charge:
        seen.append((bits, payload))
        return CHARGE

    out = release.seal(release.Priced(b"x", 7), settle)
    assert seen == [(7, b"x")]
    assert (out.payload, out.status, out.charge) == (b"x", 200, CHARGE)


def test_nothing_is_released_when_the_charge_fails() -> None:
    def settle(_bits: int, _payload: bytes) -> r.Charge:
        raise errors.refuse("ledger_unavailable", "", "the disk is full")

    with pytest.raises(errors.ServerFault):
        release.seal(release.Priced(b"x", 7), settle)


@pytest.mark.parametrize("seal", [None, object(), True, "seal"])
def test_nobody_else_makes_released_values(seal: object) -> None:
    with pytest.raises(TypeError, match="only"):
        release.Released(seal, b"weights", 200, None)


def test_a_released_value_cannot_be_changed() -> None:
    out = release.public(about.HealthView(status="ok", version="1"), 202)
    for name, value in (("payload", b"weights"), ("status", 500), ("charge", CHARGE), ("more", 1)):
        with pytest.raises(TypeError, match="cannot be changed"):
            setattr(out, name, value)
    assert json.loads(out.payload) == {"status": "ok", "version": "1"}
    assert (out.status, out.charge) == (202, None)


@pytest.mark.parametrize("view", [result(), score(1.0), EDIT, {"weights": 1}, SimpleNamespace()])
def test_what_is_not_public_is_not_wrapped(view: Any) -> None:
    with pytest.raises(TypeError, match="not public"):
        release.public(view)


def test_refusals_are_wrapped_whatever_was_in_the_request() -> None:
    out = release.refused(errors.refuse("duplicate_key", "\ud800", "the key '\ud800' – twice"))
    assert out.status == 400
    refusal = json.loads(out.payload)["error"]["refusals"][0]
    assert (refusal["code"], refusal["reason"]) == ("duplicate_key", "the key '\ud800' – twice")


def test_the_description_and_a_replay() -> None:
    assert json.loads(release.document({"openapi": "3.1"}).payload) == {"openapi": "3.1"}
    out = release.replay(b"same", CHARGE)
    assert (out.payload, out.status, out.charge) == (b"same", 200, CHARGE)


def test_metrics_patterns_and_masks_are_rounded_and_counted() -> None:
    metric = r.MetricOutput(metric="kl", values=(0.1, 0.3))
    pattern = r.PatternOutput(
        prompts=(0,), positions=(1,), heads=(0, 1), keys=((0, 1, 2),), probs=(((0.1, 0.2, 0.7), (1.0, 0.0, 0.0)),)
    )  # fmt: skip
    mask = r.ScoreOutput(prompts=(0, 0, 0), positions=(0, 1, 2), scores=(1.0, 0.0, 0.1), truth=True)
    made = result(m=metric, p=pattern, t=mask)
    priced = release.prepare(made, price(m=2 * 16, p=6 * 16, t=3), TOKEN_BITS, 16)
    sent = json.loads(priced.payload)["outputs"]
    assert priced.bits == 256 + 8 * 16 + 3
    assert np.float32(sent["m"]["values"][0]) == rounded(0.1, 16)
    assert np.float32(sent["p"]["probs"][0][0][2]) == rounded(0.7, 16)
    assert sent["t"]["scores"] == [1.0, 0.0, 1.0]  # a bit each: nothing between 0 and 1 leaves
    for short in ({"m": 31}, {"p": 95}, {"t": 2}):
        with pytest.raises(errors.ServerFault):
            release.prepare(made, price(**({"m": 32, "p": 96, "t": 3} | short)), TOKEN_BITS, 16)

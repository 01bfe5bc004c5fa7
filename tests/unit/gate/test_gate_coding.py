"""Numbers as they leave: near, in order, never clipped, and a function of nothing but the charged bits."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trocar import errors
from trocar.gate.coding import COARSE, Coder, require_finite, round_to_bits
from trocar.graph.cost import Prices

FLOATS = st.integers(10, 32)
STEPS = st.sampled_from(COARSE)
LARGE = float(np.nextafter(np.float32(1e38), np.float32(0)))  # the largest number that may leave
NUMBERS = st.floats(width=32, min_value=-LARGE, max_value=LARGE)
USUAL = st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40)
MANY = hnp.arrays(np.float32, st.integers(1, 6), elements=USUAL)


def coder(bits: int) -> Coder:
    return Coder(Prices(scalar_bits=bits, overhead_bits=256, vector_bits=8))


def array(*numbers: float) -> Any:
    return np.array(numbers, np.float32)


def whole(x: float, step: Fraction) -> bool:
    """Whether x is the float32 of a whole multiple of a step."""
    return x == float(np.float32(float(round(Fraction(x) / step) * step)))


# ---- floats of fewer bits -------------------------------------------------------------------------


def rounded(x: float, bits: int) -> float:
    return float(round_to_bits(array(x), bits)[0])


def unit(x: float, bits: int) -> Fraction:
    """Distance of neighbouring floats of `bits` bits (8 exponent bits) around x; 2^-126 is the least normal."""
    exponent = max(math.frexp(x)[1] - 1, -126)
    return Fraction(2) ** (exponent - (bits - 9))


@settings(max_examples=200, deadline=None)
@given(NUMBERS, FLOATS)
def test_a_float_is_rounded_to_nearest_even(x: float, bits: int) -> None:
    step = unit(x, bits)
    assert (
        Fraction(rounded(x, bits)) == round(Fraction(x) / step) * step
    )  # `round` of a Fraction is half-even


@settings(max_examples=150, deadline=None)
@given(NUMBERS, NUMBERS, FLOATS)
def test_rounding_floats_is_idempotent_monotone_and_close(x: float, y: float, bits: int) -> None:
    near = rounded(x, bits)
    assert abs(Fraction(near) - Fraction(x)) <= unit(x, bits) / 2
    assert rounded(-x, bits) == -near
    if abs(near) < 1e38:
        assert rounded(near, bits) == near
    if x <= y:
        assert near <= rounded(y, bits)


@settings(max_examples=150, deadline=None)
@given(NUMBERS, FLOATS, st.integers(0, 2**22 - 1))
def test_no_bit_below_the_charged_ones_is_seen(x: float, bits: int, noise: int) -> None:
    raw = round_to_bits(array(x), bits).view(np.uint32)
    below = np.uint32((1 << (32 - bits)) - 1)
    assert not (raw & below).any()
    shaken = (raw | (np.uint32(noise) & (below >> np.uint32(1)))).view(np.float32)  # less than half a step
    if np.abs(shaken[0]) < 1e38:
        assert (round_to_bits(shaken, bits).view(np.uint32) == raw).all()


@pytest.mark.parametrize(("x", "bits", "near"), [
    (1.0, 10, 1.0), (1.25, 10, 1.0), (1.75, 10, 2.0), (-1.26, 10, -1.5), (0.1, 16, 0.10009765625),
    (3.14159274, 32, 3.1415927410125732), (1e-45, 24, 0.0), (9.9e37, 10, 8.507059173023462e37), (1e-45, 32, 1.401298464324817e-45),
])  # fmt: skip
def test_floats_by_hand(x: float, bits: int, near: float) -> None:
    assert rounded(x, bits) == near


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 33, 64])
def test_widths_that_are_no_float(bits: int) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        rounded(1.0, bits)
    assert caught.value.code == "bad_bits"
    assert str(bits) in caught.value.reason


# ---- numbers of one output ------------------------------------------------------------------------


def steps_of(values: Any, bits: int) -> tuple[Any, Fraction]:
    """What leaves, and the step: the scale is the least number of nine binary digits above all."""
    made, most = coder(bits).numbers(values), float(np.abs(values).max())
    if most < 2.0**-100:
        return made, Fraction(0)
    digits = Fraction(2) ** (math.frexp(most)[1] - 9)
    return made, -(-Fraction(most) // digits) * digits / (2 ** (bits - 1) - 1)


@settings(max_examples=200, deadline=None)
@given(MANY, STEPS)
def test_numbers_are_whole_steps_within_half_a_step(values: Any, bits: int) -> None:
    made, step = steps_of(values, bits)
    for x, y in zip(values, made, strict=True):
        if not step:
            assert (y, np.signbit(y)) == (0, False)
            continue
        assert whole(float(y), step)
        assert abs(round(Fraction(float(y)) / step)) < 2 ** (bits - 1)
        assert abs(Fraction(float(x)) - round(Fraction(float(y)) / step) * step) <= step / 2 * (
            1 + Fraction(1, 10**9)
        )


@settings(max_examples=150, deadline=None)
@given(MANY, STEPS)
def test_rounding_numbers_keeps_order_sign_and_zero(values: Any, bits: int) -> None:
    made = coder(bits).numbers(values)
    order = np.argsort(values, kind="stable")
    assert (np.diff(made[order]) >= 0).all()
    assert (made * values >= 0).all()
    assert (coder(bits).numbers(-values) == -made).all()
    assert not np.signbit(made[made == 0]).any()  # there is one zero


@settings(max_examples=150, deadline=None)
@given(MANY, STEPS)
def test_rounding_numbers_again_changes_nothing(values: Any, bits: int) -> None:
    """Above 8 bits the largest number may fall below a coarser scale: then numbers move by a step at most."""
    made, step = steps_of(values, bits)
    again = coder(bits).numbers(made)
    if bits <= 8:
        assert (again == made).all()
    else:
        assert (np.abs(again - made) <= float(step) * 0.51).all()


@settings(max_examples=100, deadline=None)
@given(MANY, STEPS, st.lists(st.floats(-0.49, 0.49), min_size=6, max_size=6))
def test_numbers_of_the_same_steps_have_the_same_text(values: Any, bits: int, noise: list[float]) -> None:
    """Whatever the engine gave, if scale and steps are equal then so is every byte."""
    made, step = steps_of(values, bits)
    if not step:
        return
    shaken = (made.astype(np.float64) + np.array(noise[: len(made)]) * float(step)).astype(np.float32)
    most = np.argmax(np.abs(values))
    shaken[most] = values[most]  # the scale is charged too, and hangs on the largest
    if (np.abs(shaken) <= np.abs(values[most])).all():
        assert coder(bits).numbers(shaken).tobytes() == made.tobytes()


@pytest.mark.parametrize(("bits", "values", "made"), [
    (8, [1.0, 0.5, -0.25], [1.0, 64 / 127, -32 / 127]),  # 63.5 is a tie, -31.75 is none
    (4, [7.0, 3.5, 2.5, -0.5, 0.4], [7.0, 4.0, 2.0, 0.0, 0.0]),  # ties go to the even step
    (8, [0.0, -0.0], [0.0, 0.0]),
    (8, [2.0**-101, -1e-45], [0.0, 0.0]),
    (8, [1.0, 1e-45], [1.0, 0.0]),
    (8, [513.0], [514.0]),
    (16, [LARGE, -LARGE], [LARGE, -LARGE]),  # the scale is above, the number is not clipped
])  # fmt: skip
def test_numbers_by_hand(bits: int, values: list[float], made: list[float]) -> None:
    found = coder(bits).numbers(array(*values))
    assert found.tolist() == [float(np.float32(x)) for x in made]
    assert found.dtype == np.float32


def test_numbers_keep_their_shape_and_none_are_none() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert coder(8).numbers(values).shape == (2, 3)
    assert coder(8).numbers(values)[1, 2] == 5  # one scale for all
    assert coder(8).numbers(np.zeros((0, 3), np.float32)).shape == (0, 3)


# ---- log-probabilities and probabilities ----------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.floats(-50, 0.5, width=32), st.floats(-50, 0.5, width=32), STEPS)
def test_logprobs_are_steps_from_zero_down(x: float, y: float, bits: int) -> None:
    c = coder(bits)
    near, other = (float(v) for v in c.logprobs(array(x, y)))
    assert c.floor is not None
    assert (c.logprobs(array(near)) == near).all()
    assert Fraction(near) % Fraction(c.step) == 0
    assert c.floor <= near <= 0
    assert not (near == 0 and np.signbit(near))
    assert abs(near - min(max(x, c.floor), 0.0)) <= c.step / 2
    if x <= y:
        assert near <= other


@pytest.mark.parametrize(("bits", "step", "floor"), [
    (4, 1.0, -15.0), (7, 0.125, -15.875), (8, 0.0625, -15.9375), (9, 0.0625, -31.9375), (16, 2.0**-11, -32 + 2.0**-11),
])  # fmt: skip
def test_steps_of_logprobs(bits: int, step: float, floor: float) -> None:
    c = coder(bits)
    assert (c.step, c.floor) == (step, floor)
    assert c.logprobs(array(-1e30, floor, -step, -step / 2, -step * 1.5)).tolist() == [
        floor,
        floor,
        -step,
        0.0,
        -2 * step,
    ]


@settings(max_examples=200, deadline=None)
@given(st.floats(-0.5, 1.5, width=32), st.floats(-0.5, 1.5, width=32), STEPS)
def test_probabilities_are_equal_steps(x: float, y: float, bits: int) -> None:
    near, other = (float(v) for v in coder(bits).probabilities(array(x, y)))
    step = Fraction(1, 2**bits - 1)
    assert whole(near, step)
    assert abs(Fraction(near) - Fraction(min(max(x, 0.0), 1.0))) <= step / 2 + Fraction(1, 2**24)
    assert coder(bits).probabilities(array(near)) == array(near)
    if x <= y:
        assert near <= other


@pytest.mark.parametrize("bits", COARSE)
def test_of_so_many_bits_there_are_so_many_numbers(bits: int) -> None:
    """Counted over everything that could leave: never more than the bits can name."""
    c = coder(bits)
    fine = np.linspace(0, 1, 2**18, dtype=np.float32)
    fine[:3] = (-0.0, -1e-9, 1e-45)
    for made in (c.probabilities(fine), c.logprobs(-40 * fine)):
        assert len(np.unique(made.view(np.uint32))) == 2**bits  # a zero below zero would be one more
    numbers = c.numbers(np.concatenate([fine, -fine]))
    assert len(np.unique(numbers.view(np.uint32))) == 2**bits - 1


# ---- what holds for all ---------------------------------------------------------------------------

KINDS: list[tuple[str, Callable[[Coder, Any], Any]]] = [
    ("numbers", Coder.numbers),
    ("logprobs", Coder.logprobs),
    ("probabilities", Coder.probabilities),
    ("alone", Coder.alone),
]


@pytest.mark.parametrize(("name", "encode"), KINDS)
@pytest.mark.parametrize("x", [np.nan, np.inf, -np.inf, 1e38, -3e38])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_what_is_not_finite_never_leaves(name: str, encode: Any, x: float, bits: int) -> None:
    with pytest.raises(errors.RunFailed) as caught:
        encode(coder(bits), array(0.5, x))
    assert caught.value.code == "result_not_finite", name


@pytest.mark.parametrize(("name", "encode"), KINDS)
def test_at_32_bits_a_float_is_itself(name: str, encode: Any) -> None:
    values = array(0.1, -0.0, 1e-45, LARGE, -1.5)
    assert encode(coder(32), values).tobytes() == values.tobytes(), name


def test_what_numbers_cost() -> None:
    coarse, exact = coder(8), coder(32)
    assert (coarse.bits_numbers(3), coarse.bits_each(3), coarse.bits_alone(3)) == (3 * 8 + 16, 24, 48)
    assert (exact.bits_numbers(3), exact.bits_each(3), exact.bits_alone(3)) == (96, 96, 96)
    assert (coarse.bits_numbers(0), exact.bits_numbers(0)) == (16, 0)
    assert (exact.step, exact.floor, exact.exact, coarse.exact) == (0.0, None, True, False)
    assert coarse.alone(array(0.1)).tolist() == [0.10009765625]


def test_no_numbers_are_finite() -> None:
    require_finite(np.zeros(0, np.float32))
    require_finite(array(LARGE, -LARGE))

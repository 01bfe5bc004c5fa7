"""How loot is judged: errors against known matrices, and a floor that good codes approach and none goes below."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.attacks.layer import INJECTED, unfolded
from trocar.attacks.loot import TOLERANCE, Fact, Loot, Piece, Score, floor, score
from trocar.attacks.unembedding import rank


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def test_nothing_known_is_an_error_of_one() -> None:
    truth = {"m": gaussian(40, 8)}
    found = score(Loot((Piece.of("m", range(10), np.full((10, 8), np.nan)),)), truth, {})
    assert (found.error, found.recovered, found.attacked, found.matrix) == (1.0, 0, 80, 320)
    assert found.matrix_error == pytest.approx(1.0)


def test_a_part_known_exactly() -> None:
    truth = {"m": gaussian(40, 8)}
    found = score(Loot((Piece.of("m", range(10), truth["m"][:10]),)), truth, {})
    left = float(np.sum(truth["m"][10:] ** 2) / np.sum(truth["m"] ** 2))
    assert (found.error, found.recovered) == (0.0, 80)
    assert found.matrix_error == pytest.approx(math.sqrt(left))


def test_two_pieces_of_one_matrix_count_it_once() -> None:
    truth = {"m": gaussian(40, 8)}
    pieces = tuple(Piece.of("m", rows, truth["m"][list(rows)]) for rows in (range(10), range(10, 40)))
    found = score(Loot(pieces), truth, {})
    assert (found.matrix, found.matrix_error) == (320, pytest.approx(0.0, abs=1e-7))


def test_a_mean_may_stay_open() -> None:
    truth = {"m": gaussian(40, 8) + 5.0}
    centred = truth["m"] - truth["m"].mean(axis=0)
    found = score(Loot((Piece.of("m", range(40), centred, "mean"),)), truth, {})
    assert found.error == pytest.approx(0.0, abs=1e-12)


def test_a_rotation_may_stay_open_and_is_counted_as_free() -> None:
    truth = {"m": gaussian(40, 8)}
    basis = np.linalg.qr(truth["m"] @ gaussian(8, 8, seed=1))[0]
    known = np.ones_like(basis, dtype=np.bool_)
    found = score(Loot((Piece("m", np.arange(40), basis, known, "rotation"),)), truth, {})
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert found.free == 64


def test_a_basis_of_nothing_explains_what_luck_explains() -> None:
    """A span that was not bought fits r of V dimensions, and the floor of no bits at all is just that."""
    truth, basis = {"m": gaussian(400, 50)}, np.linalg.qr(gaussian(400, 100, seed=1))[0]
    known = np.ones_like(basis, dtype=np.bool_)
    found = score(Loot((Piece("m", np.arange(400), basis, known, "rotation"),)), truth, {})
    assert found.error == pytest.approx(found.floor(0), rel=0.02)
    assert not found.breaks(0)


def test_facts_are_judged_by_their_distance() -> None:
    assert score(Loot(facts=(Fact("d", 48.0),)), {}, {"d": 64.0}).error == 0.25
    assert score(Loot(), {}, {}).error == 1.0


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_quantised_matrix_stays_above_the_floor(bits: int) -> None:
    """A uniform code of b bits per weight is within a factor of four of the bound, and never below it."""
    truth = gaussian(200, 100)
    step = 8.0 / 2**bits
    guess = np.clip(np.floor(truth / step) + 0.5, -(2**bits) / 2 + 0.5, 2**bits / 2 - 0.5) * step
    found = score(Loot((Piece.of("m", range(200), guess),)), {"m": truth}, {})
    least = found.floor(bits * truth.size)
    assert least <= found.error
    assert found.error <= 4.2 * least or bits == 1


def test_signs_alone_stay_above_the_floor() -> None:
    truth = gaussian(200, 100)
    found = score(
        Loot((Piece.of("m", range(200), np.sign(truth) * math.sqrt(2 / math.pi)),)), {"m": truth}, {}
    )
    assert found.error == pytest.approx(math.sqrt(1 - 2 / math.pi), rel=0.02)
    assert not found.breaks(truth.size)
    assert found.breaks(truth.size // 10)


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.floats(0.0, 0.99))
def test_the_floor_falls_with_bits_and_lies_in_zero_to_one(bits: int, weights: int, share: float) -> None:
    free = int(share * weights)
    assert 0.0 <= floor(bits, weights, free) <= floor(0, weights, free) <= 1.0
    assert floor(2 * bits, weights, free) <= floor(bits, weights, free)


def test_the_floor_is_shannons() -> None:
    assert floor(1000, 1000) == 0.5
    assert floor(0, 1000) == 1.0
    assert floor(10, 0) == floor(10, 5, 5) == 0.0


def test_a_loot_better_than_its_bits_is_noticed() -> None:
    good = Score(1000, 1000, 0, error=0.5, matrix_error=0.5)
    assert not good.breaks(1000)
    assert good.breaks(int(1000 * (1 - 2 * TOLERANCE)))
    assert Score(10, 1000, 0, error=1.0, matrix_error=0.1).breaks(1)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
def test_the_width_is_where_the_numbers_drop(noise: float) -> None:
    """Not where they are 0 because every row was centred."""
    rng = np.random.default_rng(2)
    table = gaussian(30, 12) @ rng.normal(size=(12, 40)) + noise * rng.normal(size=(30, 40))
    assert rank(table - table.mean(axis=1, keepdims=True)) == 12
    turned = table.T
    assert rank(turned - turned.mean(axis=1, keepdims=True)) == 12


def answers(gate: np.ndarray, up: np.ndarray, size: float) -> np.ndarray:
    """What a gated MLP's neurons say to basis vectors of this size."""
    return size * gate / (1.0 + np.exp(-size * gate)) * size * up


@pytest.mark.parametrize("bits", [32, 8])
def test_two_answers_give_both_weights_where_they_are_larger_than_their_rounding(bits: int) -> None:
    gate, up = 0.05 * gaussian(20, 30), 0.05 * gaussian(20, 30, seed=1)
    plus, minus = (answers(gate, up, s) for s in (INJECTED, -INJECTED))
    if bits < 32:
        step = np.abs([plus, minus]).max(axis=(0, 2))[:, None] * 2.0 ** (1 - bits)
        plus, minus = (np.round(x / step) * step for x in (plus, minus))
    found = unfolded(plus, minus, bits)
    for mine, true in zip(found, (gate, up), strict=True):
        off = np.nan_to_num(mine) - true
        assert np.linalg.norm(off) < (1e-3 if bits == 32 else 0.9) * np.linalg.norm(true)

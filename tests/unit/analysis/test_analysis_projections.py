"""Projections, tracks and histograms against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trocar import errors
from trocar.analysis.histograms import histogram
from trocar.analysis.numbers import ARRAYS, NUMBERS
from trocar.analysis.projections import project, track
from trocar.analysis.source import ArraySource

Rows = npt.NDArray[np.float32]


def rows(n: int = 1100, width: int = 6) -> Rows:
    return (np.random.default_rng(0).standard_normal((n, width)) + 1000).astype(np.float32)


def test_scores_are_products_with_the_directions() -> None:
    x, d = rows(), np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    biases = -1000.0 * d.sum(axis=1)
    exact = x.astype(np.float64) @ d.T.astype(np.float64) + biases.astype(np.float64)
    found = project(ArraySource(x), d, biases=biases)
    np.testing.assert_allclose(found.scores, exact, rtol=1e-5, atol=1e-5)
    plain = x.astype(np.float64) @ (d / np.linalg.norm(d, axis=1, keepdims=True)).T.astype(np.float64)
    np.testing.assert_allclose(project(ArraySource(x), 5 * d, normalise=True).scores, plain, rtol=1e-6)
    assert found.scores.dtype == ARRAYS["projection"]["scores"].dtype


def test_numbers_of_a_projection_are_those_of_its_scores() -> None:
    x, d = rows(), np.eye(2, 6)
    numbers = project(ArraySource(x), d).numbers()
    assert [tuple(of) for of in numbers] == [NUMBERS["projection"]] * 2
    for i in (0, 1):
        column = x[:, i].astype(np.float64)
        expected = (column.mean(), column.std(), column.min(), column.max())
        np.testing.assert_allclose(list(numbers[i].values()), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"directions": np.ones((2, 4))}, "width_mismatch", "directions"),
        ({"directions": np.ones(3)}, "width_mismatch", "directions"),
        ({"directions": np.ones((0, 3))}, "bad_value", "directions"),
        ({"directions": np.full((1, 3), np.nan)}, "not_finite", "directions"),
        ({"directions": np.zeros((1, 3)), "normalise": True}, "bad_value", "directions[0]"),
        ({"biases": np.ones(3)}, "width_mismatch", "biases"),
        ({"source": ArraySource(np.ones((0, 3)))}, "too_few_rows", "rows"),
        ({"source": ArraySource(np.full((2, 3), np.inf))}, "rows_not_finite", "rows"),
    ],
)
def test_refused_projections(change: dict[str, Any], code: str, path: str) -> None:
    given: dict[str, Any] = {"source": ArraySource(np.eye(10, 3)), "directions": np.ones((2, 3))}
    with pytest.raises(errors.TrocarError) as caught:
        project(**{**given, **change})
    assert (caught.value.code, caught.value.path) == (code, path)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_track_is_ordered_and_smoothed_within_prompts(window: int) -> None:
    rng = np.random.default_rng(0)
    places = rng.permutation([(p, at) for p, n in ((7, 12), (2, 1), (4, 5)) for at in range(3, 3 + n)])
    prompt, position = places.T
    scores = rng.standard_normal((18, 2)).astype(np.float32)
    found = track(scores, prompt, position, window=window)
    assert found.prompts.tolist() == [2, 4, 7]
    assert found.starts.tolist() == [0, 1, 6, 18]
    np.testing.assert_array_equal(found.scores, scores[found.order])
    for i, p in enumerate(found.prompts):
        mine = scores[prompt == p][np.argsort(position[prompt == p])]
        here = slice(found.starts[i], found.starts[i + 1])
        np.testing.assert_array_equal(found.scores[here], mine)
        expected = [mine[max(0, t + 1 - window) : t + 1].mean(axis=0) for t in range(len(mine))]
        np.testing.assert_allclose(found.running[here], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.prompt_mean[i], mine.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.prompt_max[i], mine.max(axis=0))
    for name, declared in ARRAYS["track"].items():
        assert getattr(found, name).dtype == declared.dtype


def test_a_concept_planted_in_the_middle_of_a_transcript_shows_there() -> None:
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(6)
    direction /= np.linalg.norm(direction)
    x = rng.standard_normal((300, 6))
    x[120:180] += 3 * direction
    shuffle = rng.permutation(300)
    scores = project(ArraySource(x[shuffle]), direction[None], normalise=True).scores
    found = track(scores, np.zeros(300, dtype=np.int64), shuffle, window=20)
    assert 130 <= found.running[:, 0].argmax() <= 185
    assert found.running[139:180, 0].min() > found.running[:115, 0].max()


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"prompt": np.zeros(3)}, "rows_mismatch", "prompt"),
        ({"position": np.zeros(3)}, "rows_mismatch", "position"),
        ({"position": np.zeros(4)}, "bad_value", "position"),
        ({"window": 0}, "bad_value", "window"),
        ({"scores": np.ones((0, 1)), "prompt": np.zeros(0), "position": np.zeros(0)}, "too_few_rows", "rows"),
    ],
)
def test_refused_tracks(change: dict[str, Any], code: str, path: str) -> None:
    given: dict[str, Any] = {"scores": np.ones((4, 1)), "prompt": np.zeros(4), "position": np.arange(4)}
    with pytest.raises(errors.TrocarError) as caught:
        track(**{**given, **change})
    assert (caught.value.code, caught.value.path) == (code, path)


@pytest.mark.parametrize(
    ("low", "spread"), [(0.0, 1.0), (-5.0, 1e-3), (1e6, 3.0), (0.0, 1e-20), (-1e20, 1e20)]
)
@pytest.mark.parametrize("bins", [2, 10, 64])
def test_bins_are_the_finest_of_their_grid_that_hold_all_values(low: float, spread: float, bins: int) -> None:
    values = low + spread * np.random.default_rng(0).standard_normal(500)
    found = histogram(values, bins=bins)
    assert found.outside.sum() == 0
    assert found.counts.sum() == 500
    np.testing.assert_array_equal(found.counts[0], np.histogram(values, found.edges)[0])
    finer = 2.0 ** (found.exponent - 1)
    assert math.floor(values.max() / finer) - math.floor(values.min() / finer) >= bins
    assert (found.edges / 2.0**found.exponent == np.round(found.edges / 2.0**found.exponent)).all()


def test_a_value_on_an_edge_lies_in_the_bin_above() -> None:
    found = histogram(np.array([0.0, 1.0, 1.0, 2.0, 3.0]), bins=4)
    assert (found.exponent, found.first) == (0, 0)
    assert found.counts.tolist() == [[1, 2, 1, 1]]


def test_nearby_values_have_the_same_edges() -> None:
    """What the edges say of the extreme values is which bin they are in."""
    values = np.linspace(0.1, 10.1, 200)
    moved = values.copy()
    moved[-1] += 0.05
    one, other = histogram(values), histogram(moved)
    assert (one.exponent, one.first) == (other.exponent, other.first)


def test_tails_are_counted_outside_and_no_longer_decide_the_width() -> None:
    values = np.r_[np.random.default_rng(0).standard_normal(998), [-1e6, 1e25]]
    assert (histogram(values, bins=32).counts > 0).sum() == 3  # both sides of 0, and the outlier
    found = histogram(values, bins=32, tail=0.002)
    assert found.counts.max() < 300
    assert found.outside[0, 0] >= 1
    assert found.outside[0, 1] >= 1
    assert found.counts.sum() + found.outside.sum() == 1000


def test_counts_by_class_add_up() -> None:
    rng = np.random.default_rng(0)
    values, classes = rng.standard_normal(300), rng.choice([5, -2, 9], 300)
    found, every = histogram(values, classes=classes), histogram(values)
    assert found.classes.tolist() == [-2, 5, 9]
    np.testing.assert_array_equal(found.counts.sum(axis=0), every.counts[0])
    for i, name in enumerate(found.classes):
        expected = np.histogram(values[classes == name], found.edges)[0]
        np.testing.assert_array_equal(found.counts[i], expected)
    assert found.counts.dtype == ARRAYS["histogram"]["counts"].dtype


@pytest.mark.parametrize("value", [0.0, 3.7, -1e-300, 1e30])
def test_values_that_are_all_equal_fall_in_one_bin(value: float) -> None:
    assert sorted(histogram(np.full(20, value)).counts[0])[-2:] == [0, 20]


def test_far_values_around_a_middle_of_zeros() -> None:
    found = histogram(np.r_[np.zeros(98), [-1e30, 1e30]], tail=0.1)
    assert (found.counts.sum(), found.outside.tolist()) == (98, [[1, 1]])


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"values": np.zeros(0)}, "too_few_rows", "values"),
        ({"values": np.zeros((2, 2))}, "too_few_rows", "values"),
        ({"values": np.array([1.0, np.nan])}, "rows_not_finite", "values"),
        ({"bins": 1}, "bad_value", "bins"),
        ({"tail": 0.3}, "bad_value", "tail"),
        ({"classes": np.zeros(3)}, "rows_mismatch", "classes"),
        ({"values": np.arange(65), "classes": np.arange(65)}, "bad_value", "classes"),
    ],
)
def test_refused_histograms(change: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        histogram(**{"values": np.arange(4), **change})
    assert (caught.value.code, caught.value.path) == (code, path)

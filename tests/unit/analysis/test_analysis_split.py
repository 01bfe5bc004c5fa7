"""The split and the bootstrap by themselves, against definitions computed here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.analysis import auroc, metrics
from trocar.analysis.split import draw, shuffled, strata

SCORES = st.integers(min_value=-3, max_value=3)


@settings(deadline=None, max_examples=100)
@given(st.lists(SCORES, min_size=1, max_size=12), st.lists(SCORES, min_size=1, max_size=12))
def test_auroc_is_the_share_of_pairs_that_are_in_order(lower: list[int], upper: list[int]) -> None:
    wins = sum((b > a) + 0.5 * (a == b) for a in lower for b in upper)
    scores = np.array([*lower, *upper], dtype=float)
    y = np.array([0.0] * len(lower) + [1.0] * len(upper))
    assert auroc(scores, y) == pytest.approx(wins / len(lower) / len(upper), abs=1e-12)
    assert auroc(-scores, y) == pytest.approx(1 - wins / len(lower) / len(upper), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SCORES, st.booleans(), st.integers(0, 3)), min_size=2, max_size=15))
def test_weights_count_rows_several_times(rows: list[tuple[int, bool, int]]) -> None:
    rows = [*rows, (0, True, 1), (1, False, 2)]
    scores = np.array([s for s, _, _ in rows], dtype=float)
    y = np.array([label for _, label, _ in rows], dtype=float)
    times = np.array([t for _, _, t in rows])
    repeated = np.repeat(np.arange(len(rows)), times)
    weighted = metrics.weighted_auroc(scores, y)(times[None, :].astype(float))[0]
    assert weighted == pytest.approx(auroc(scores[repeated], y[repeated]), abs=1e-12)
    target = scores * 2 + y
    if np.ptp(target[repeated]) > 0:
        weighted = metrics.weighted_r2(scores, target)(times[None, :].astype(float))[0]
        assert weighted == pytest.approx(metrics.r2(scores[repeated], target[repeated]), abs=1e-9)


def test_a_95_percent_interval_covers_95_percent() -> None:
    """Scores of two unit Gaussians one deviation apart: the true AUROC is Phi(1 / sqrt 2) = 0.7602."""
    rng = np.random.default_rng(0)
    covered = 0
    y = np.repeat([0.0, 1.0], 60)
    for trial in range(200):
        score = metrics.weighted_auroc(rng.standard_normal(120) + y, y)
        low, high = metrics.interval(score, y.astype(np.int64), np.arange(120), trial)
        covered += low <= 0.7602 <= high
    assert 178 <= covered <= 198  # 190 expected; 178 is four deviations below


def test_blocks_of_resamples_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.repeat([0.0, 1.0], 30)
    score = metrics.weighted_auroc(np.random.default_rng(0).standard_normal(60) + y, y)
    whole = metrics.interval(score, y.astype(np.int64), np.arange(60), 0)
    monkeypatch.setattr(metrics, "_BLOCK_CELLS", 60 * 7)
    pieces = metrics.interval(score, y.astype(np.int64), np.arange(60), 0)
    assert pieces == pytest.approx(whole, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 2**32))
def test_each_class_is_split_by_the_fraction(n_low: int, n_high: int, fraction: float, seed: int) -> None:
    y = np.repeat([0.0, 1.0], [n_low, n_high])
    group = np.arange(len(y))
    split = draw(strata(y, group), group, fraction, seed)
    for value, n in ((0, n_low), (1, n_high)):
        held = int((y[split.test] == value).sum())
        assert 1 <= held <= n - 1
        assert abs(held - fraction * n) <= 1
    assert sorted([*split.train, *split.test]) == list(range(len(y)))


def test_strata_tell_pure_groups_from_mixed_ones() -> None:
    y = np.array([0, 0, 1, 1, 0, 1], dtype=float)
    assert strata(y, np.array([0, 0, 1, 1, 2, 2])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("whole", [True, False])
def test_shuffled_labels_stay_on_their_side(whole: bool) -> None:
    rng = np.random.default_rng(0)
    group = np.arange(200) // 5
    y = (rng.integers(0, 2, 40)[group] if whole else rng.integers(0, 2, 200)).astype(float)
    split = draw(strata(y, group), group, 0.25, 0)
    control = shuffled(y, group, split, 0)
    for side in (split.train, split.test):
        assert sorted(control[side]) == sorted(y[side])
        assert not np.array_equal(control[side], y[side])
    pure = all(len(set(control[group == g])) == 1 for g in range(40))
    assert pure == whole

"""Linear maps: what was linear is found, what was noise is not, and rows are refused that cannot be fitted."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from trocar import analysis
from trocar.errors import TrocarError

OPTIONS = {"test_fraction": 0.25, "seed": 3}


def rows(n: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width))


def test_a_linear_map_is_found() -> None:
    x, true = rows(200, 6), rows(6, 4, 1)
    fit = analysis.linear_map(x, x @ true + 2.0, l2=1e-9, **OPTIONS)
    assert np.abs(fit.map - true).max() < 1e-6
    assert np.abs(fit.bias - 2.0).max() < 1e-6
    assert min(fit.r2, fit.r2_train) > 1 - 1e-9


def test_noise_is_not() -> None:
    fit = analysis.linear_map(rows(80, 6), rows(80, 4, 1), l2=None, **OPTIONS)
    assert fit.r2 < 0.2 < 0.9 - fit.r2_train
    assert fit.r2 < fit.r2_train


def test_the_held_out_rows_are_not_fitted() -> None:
    """A target that is wrong on the held-out rows alone changes the score and not the map."""
    x, n_train = rows(40, 3), analysis.map_sizes(40, 0.25)[0]
    held = np.random.default_rng([3, 1]).permutation(40)[n_train:]
    y = x @ rows(3, 2, 1)
    wrong = y.copy()
    wrong[held] += 5.0
    fit, other = (analysis.linear_map(x, t, l2=1e-9, **OPTIONS) for t in (y, wrong))
    assert np.allclose(fit.map, other.map)
    assert other.r2 < 0.5 < fit.r2


@pytest.mark.parametrize(
    ("x", "y", "code"),
    [
        (rows(2, 3), rows(2, 3), "too_few_rows"),
        (rows(8, 3), rows(7, 3), "rows_mismatch"),
        (np.full((8, 3), np.nan), rows(8, 3), "rows_not_finite"),
        (rows(8, 3), np.full((8, 3), np.inf), "rows_not_finite"),
    ],
)
def test_what_cannot_be_fitted(x: np.ndarray, y: np.ndarray, code: str) -> None:
    with pytest.raises(TrocarError) as caught:
        analysis.linear_map(x, y, l2=None, **OPTIONS)
    assert caught.value.code == code


def test_a_target_that_does_not_vary_scores_zero() -> None:
    assert analysis.linear_map(rows(20, 3), np.ones((20, 2)), l2=None, **OPTIONS).r2 == 0.0


class Ragged(analysis.ArraySource):
    """A source whose blocks end where they like."""

    def __init__(self, array: np.ndarray, step: int) -> None:
        super().__init__(array)
        self.step = step

    def blocks(self, most: int = 512):
        return super().blocks(min(most, self.step))


def test_sources_give_the_map_of_scikit_learn() -> None:
    x, y = rows(300, 7).astype(np.float32), rows(300, 5, 1).astype(np.float32)
    y += x[:, :5]
    fit = analysis.linear_map(Ragged(x, 13), Ragged(y, 40), l2=2.0, **OPTIONS)
    order = np.random.default_rng([3, 1]).permutation(300)
    train, test = order[:225], order[225:]
    model = Ridge(alpha=2.0).fit(x[train].astype(float), y[train].astype(float))
    assert np.abs(fit.map - model.coef_.T).max() < 1e-9
    assert np.abs(fit.bias - model.intercept_).max() < 1e-9
    for side, found in ((train, fit.r2_train), (test, fit.r2)):
        missed = ((y[side] - model.predict(x[side])) ** 2).sum()
        assert found == pytest.approx(1 - missed / ((y[side] - y[side].mean(axis=0)) ** 2).sum(), abs=1e-6)


def test_features_that_are_copies_need_a_penalty() -> None:
    x = np.repeat(rows(40, 3), 2, axis=1)
    with pytest.raises(TrocarError) as caught:
        analysis.linear_map(x, rows(40, 2, 1), l2=0.0, **OPTIONS)
    assert caught.value.code == "fit_not_converged"
    assert np.isfinite(analysis.linear_map(x, rows(40, 2, 1), l2=None, **OPTIONS).map).all()

"""Closed forms from moments, against scikit-learn on all the rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from trocar import errors
from trocar.analysis import probes
from trocar.analysis.moments import Moments, moments
from trocar.analysis.source import ArraySource

Floats = npt.NDArray[np.float64]


def data(n: int = 400, d: int = 7, classes: int = 2) -> tuple[Floats, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal((classes, d))[y]
    x[:, 1] = 100 * x[:, 1] + 10_000
    return x.astype(np.float32).astype(np.float64), y


def of(x: Floats, targets: Floats) -> Moments:
    return moments(ArraySource(x), targets=targets)[0]


def test_mean_difference_has_its_bias_at_the_midpoint() -> None:
    x, y = data()
    probe = probes.mean_diff(of(x, np.stack([y, 1 - y], axis=1)))
    low, high = x[y == 0].mean(axis=0), x[y == 1].mean(axis=0)
    np.testing.assert_allclose(probe.weights, [high - low, low - high], rtol=1e-9, atol=1e-9)
    middle = probe.weights @ ((low + high) / 2) + probe.bias
    np.testing.assert_allclose(middle, 0, atol=1e-6)


@pytest.mark.parametrize("l2", [1e-3, 1.0, 1e3])
def test_ridge_is_that_of_scikit_learn(l2: float) -> None:
    x, _ = data()
    t = np.random.default_rng(1).standard_normal((len(x), 3)) + x[:, :3] / [1, 100, 1]
    scaler = StandardScaler().fit(x)
    model = Ridge(alpha=l2).fit(scaler.transform(x), t)
    probe = probes.ridge(of(x, t), l2)
    np.testing.assert_allclose(probe.weights * scaler.scale_, model.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(
        x @ probe.weights.T + probe.bias, model.predict(scaler.transform(x)), atol=1e-6
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_the_discriminant_is_that_of_scikit_learn(classes: int) -> None:
    x, y = data(classes=classes)
    model = LinearDiscriminantAnalysis(solver="lsqr").fit(StandardScaler().fit_transform(x), y)
    probe = probes.discriminant(of(x, np.eye(classes)[y]), l2=1e-9)
    logits = x @ probe.weights.T + probe.bias
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        shares, model.predict_proba(StandardScaler().fit_transform(x)), rtol=1e-5, atol=1e-9
    )


def test_the_discriminant_of_two_is_the_difference_of_both() -> None:
    x, y = data()
    both = probes.discriminant(of(x, np.eye(2)[y]), l2=2.0)
    (weights,), (bias,) = (lambda p: (p.weights, p.bias))(probes.discriminant_of_two(of(x, y), l2=2.0))
    np.testing.assert_allclose(weights, both.weights[1] - both.weights[0], rtol=1e-9)
    assert bias == pytest.approx(both.bias[1] - both.bias[0])


def test_a_penalty_shrinks_the_discriminant_towards_the_standardised_mean_difference() -> None:
    x, y = data()
    (weights,) = probes.discriminant_of_two(of(x, y), l2=1e9).weights
    step = (x[y == 1].mean(axis=0) - x[y == 0].mean(axis=0)) / x.var(axis=0)
    assert weights @ step / np.linalg.norm(weights) / np.linalg.norm(step) > 1 - 1e-6


def test_a_feature_that_does_not_vary_has_no_weight() -> None:
    x, y = data()
    x[:, 4] = 0.1
    for probe in (probes.ridge(of(x, y), 1e-3), probes.discriminant_of_two(of(x, y), 1e-3)):
        assert probe.weights[0, 4] == 0
        assert np.isfinite(probe.weights).all()


def test_features_that_depend_on_each_other_need_a_penalty() -> None:
    x, y = data()
    x = np.hstack([x, x, x])
    with pytest.raises(errors.RunFailed) as caught:
        probes.ridge(of(x, y), 0.0)
    assert (caught.value.code, caught.value.path) == ("fit_not_converged", "l2")
    assert np.isfinite(probes.ridge(of(x, y), 1e-3).weights).all()

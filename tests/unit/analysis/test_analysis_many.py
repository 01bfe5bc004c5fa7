"""Many probes in one scan, from signs to weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression

from trocar import errors
from trocar.analysis import many
from trocar.analysis.many import logistic_many
from trocar.analysis.moments import moments
from trocar.analysis.source import ArraySource


def data(n: int = 900, d: int = 6, k: int = 4) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], (k, n)).astype(np.int8)
    x = rng.standard_normal((n, d)) + 0.3 * signs.T.astype(float) @ rng.standard_normal((k, d)) + 1
    return x.astype(np.float32), signs


@pytest.mark.parametrize("known", [True, False])
def test_each_probe_is_that_of_scikit_learn(known: bool) -> None:
    x, signs = data()
    m = moments(ArraySource(x))[0] if known else None
    found = logistic_many(ArraySource(x), signs, l2=2.0, known=m)
    mean, deviation = x.mean(axis=0, dtype=float), x.std(axis=0, dtype=float)
    for one, sign in zip(found, signs, strict=True):
        model = LogisticRegression(C=0.5, tol=1e-12, max_iter=1000).fit((x - mean) / deviation, sign)
        np.testing.assert_allclose(one.weights[0] * deviation, model.coef_[0], rtol=1e-4, atol=1e-6)


def test_a_sample_is_enough_to_know_the_rows_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trocar.analysis.site.NEAR_PER_WIDTH", 1)
    x, signs = data(20_000)
    whole = logistic_many(ArraySource(x), signs, l2=1.0, known=moments(ArraySource(x))[0])
    some = logistic_many(ArraySource(x), signs, l2=1.0)
    assert many.sampled(20_000, 6).sum() < 10_000
    for a, b in zip(whole, some, strict=True):
        np.testing.assert_allclose(a.weights, b.weights, rtol=1e-4, atol=1e-6)


def test_what_the_sample_does_not_show_is_fitted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature that is zero in the sample, and a hundred times as large as any other where it is not."""
    monkeypatch.setattr("trocar.analysis.site.NEAR_PER_WIDTH", 1)
    x, signs = data(20_000)
    x[:, 0] = 0
    seldom = np.flatnonzero(many.sampled(20_000, 6) == 0)[::40]
    x[seldom, 0] = 100 * np.random.default_rng(4).standard_normal(len(seldom)) + 50 * signs[0, seldom]
    some = logistic_many(ArraySource(x), signs, l2=1.0)
    whole = logistic_many(ArraySource(x), signs, l2=1.0, known=moments(ArraySource(x))[0])
    assert max(f.passes for f in some) < 40
    assert [f.objective for f in some] == pytest.approx([f.objective for f in whole], rel=1e-6)


def test_rows_that_no_probe_uses_are_not_read() -> None:
    x, signs = data()
    signs[:, 500:] = 0
    x[600] = np.nan
    with np.errstate(invalid="ignore"):
        clean = logistic_many(ArraySource(x[:500]), signs[:, :500].copy(), l2=1.0)
    x[600] = 50.0
    found = logistic_many(ArraySource(x), signs, l2=1.0)
    np.testing.assert_allclose(found[0].weights, clean[0].weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        (lambda s: s[:, :-1], "bad_labels", "labels"),
        (lambda s: s[0], "bad_labels", "labels"),
        (np.abs, "too_few_rows", "labels[0]"),
        (lambda s: np.stack([s[0], 0 * s[0]]), "too_few_rows", "labels[1]"),
    ],
)
def test_signs_that_cannot_be_fitted_are_refused(change: Any, code: str, path: str) -> None:
    x, signs = data()
    with pytest.raises(errors.TrocarError) as caught:
        logistic_many(ArraySource(x), change(signs), l2=1.0)
    assert (caught.value.code, caught.value.path) == (code, path)

"""Components, whitening and erasure, against scikit-learn, plain linear algebra and what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from trocar import errors
from trocar.analysis import fit_leace, fit_pca, fit_whitening
from trocar.analysis.moments import Moments, moments
from trocar.analysis.source import ArraySource
from trocar.analysis.spectra import leace, pca, spectrum, whitening
from trocar.analysis.split import draw

Floats = npt.NDArray[np.float64]
SITE = "resid_post.3"


def data(n: int = 500, d: int = 10, classes: int = 2) -> tuple[Floats, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal((classes, d))[y]
    x[:, 1] = 40 * x[:, 1] + 4000
    return x.astype(np.float32).astype(np.float64), y


def of(x: Floats, targets: Any = None) -> Moments:
    return moments(ArraySource(x), targets=targets)[0]


def cosines(x: Floats) -> Floats:
    return np.cov(x.T, bias=True)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_components_are_those_of_scikit_learn(k: int) -> None:
    x, _ = data()
    made, model = pca(of(x), k), PCA(k, svd_solver="full").fit(x)
    np.testing.assert_allclose(np.abs((made.axes * model.components_).sum(axis=1)), 1, atol=1e-9)
    np.testing.assert_allclose(made.variance, model.explained_variance_ * (len(x) - 1) / len(x), rtol=1e-8)
    np.testing.assert_allclose(made.share, model.explained_variance_ratio_, rtol=1e-8)
    np.testing.assert_allclose(made.mean, model.mean_, rtol=1e-9)
    assert all(axis[np.abs(axis).argmax()] > 0 for axis in made.axes)


@pytest.mark.parametrize("method", ["zca", "pca"])
def test_whitened_rows_have_the_covariance_one(method: Any) -> None:
    x, _ = data()
    made = whitening(of(x), method)
    white = (x - made.mean) @ made.matrix.T
    np.testing.assert_allclose(cosines(white), np.eye(10), atol=1e-8)
    assert made.rank == 10


def test_zca_is_the_symmetric_root_of_the_correlation() -> None:
    x, _ = data()
    deviation = x.std(axis=0)
    root = np.linalg.inv(sqrtm(cosines(x) / np.outer(deviation, deviation)).real)
    np.testing.assert_allclose(whitening(of(x)).matrix * deviation, root, atol=1e-8)


@pytest.mark.parametrize("method", ["zca", "pca"])
def test_directions_that_do_not_vary_are_left_out(method: Any) -> None:
    x, _ = data()
    x = np.hstack([x, x[:, :4], np.full((len(x), 1), 0.1)])
    made = whitening(of(x), method)
    assert made.rank == 10
    white = (x - made.mean) @ made.matrix.T
    values = np.linalg.eigvalsh(cosines(white))
    np.testing.assert_allclose(values[-10:], 1, atol=1e-6)
    np.testing.assert_allclose(values[:-10], 0, atol=1e-6)
    assert spectrum(of(x[:6])).rank == 5


def oracle(x: Floats, z: Floats) -> Floats:
    """Theorem 4.3 as it is written: x - W^+ P W (x - mean), W the inverse root of the covariance."""
    values, vectors = np.linalg.eigh(cosines(x))
    w = vectors @ np.diag(values**-0.5) @ vectors.T
    crossed = w @ ((x - x.mean(axis=0)).T @ (z - z.mean(axis=0)) / len(x))
    p = crossed @ np.linalg.pinv(crossed, rcond=1e-9)
    return x - (x - x.mean(axis=0)) @ (np.linalg.inv(w) @ p @ w).T


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_eraser_is_that_of_the_theorem(classes: int) -> None:
    x, y = data(classes=classes)
    z = np.eye(classes)[y]
    eraser = leace(of(x, z))
    erased = x - (x - eraser.mean) @ eraser.right.T @ eraser.left.T
    np.testing.assert_allclose(erased / x.std(axis=0), oracle(x, z) / x.std(axis=0), atol=1e-6)
    assert len(eraser.right) == classes - 1
    np.testing.assert_allclose(eraser.right @ eraser.left, np.eye(classes - 1), atol=1e-9)
    means = np.stack([erased[y == c].mean(axis=0) for c in range(classes)]) / x.std(axis=0)
    np.testing.assert_allclose(means - means[0], 0, atol=1e-8)


def test_no_affine_erasure_moves_rows_less() -> None:
    """Among maps x - v u^T (x - mean) that leave no covariance, any other u moves rows further."""
    x, y = data()
    eraser = leace(of(x, y))
    moved = ((x - eraser.mean) @ eraser.right.T @ eraser.left.T / x.std(axis=0)) ** 2
    centred = x - x.mean(axis=0)
    crossed = centred.T @ (y - y.mean()) / len(x)
    rng = np.random.default_rng(3)
    for _ in range(20):
        u = eraser.right[0] + 0.1 * np.linalg.norm(eraser.right) * rng.standard_normal(10)
        other = np.outer(centred @ (u / (u @ crossed)), crossed) / x.std(axis=0)
        assert (other**2).sum() > moved.sum()


def test_a_linear_probe_finds_nothing_after_erasure() -> None:
    x, y = data(2000)
    eraser = leace(of(x, y))
    erased = (x - (x - eraser.mean) @ eraser.right.T @ eraser.left.T) / x.std(axis=0)
    assert roc_auc_score(y, LogisticRegression(max_iter=1000).fit(x / x.std(axis=0), y).decision_function(
        x / x.std(axis=0))) > 0.75  # fmt: skip
    coefficients = LogisticRegression(max_iter=1000, tol=1e-8).fit(erased, y).coef_
    assert np.abs(coefficients).max() < 1e-4


def test_what_has_no_covariance_cannot_be_erased() -> None:
    x, _ = data(200)
    with pytest.raises(errors.TrocarError) as caught:
        leace(of(np.repeat(x, 2, axis=0), np.tile([0.0, 1.0], 200)))
    assert caught.value.code == "bad_labels"


@pytest.mark.parametrize("k", [0, -1, 11])
def test_a_number_of_components_that_there_are_not_is_refused(k: int) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        pca(of(data()[0]), k)
    assert (caught.value.code, caught.value.path) == ("bad_value", "k")


def test_more_components_than_rows_are_refused() -> None:
    with pytest.raises(errors.TrocarError) as caught:
        pca(of(data(5)[0]), 5)
    assert caught.value.code == "too_few_rows"


def test_components_are_tested_on_held_out_rows() -> None:
    x, _ = data(60, 10)
    made = fit_pca({SITE: x}, 3, seed=1)[SITE]
    split = draw(np.zeros(60, np.int64), np.arange(60), 0.25, 1)
    train, test = x[split.train], x[split.test]
    model = PCA(3, svd_solver="full").fit(train)
    inside = ((test - test.mean(axis=0)) @ model.components_.T).var(axis=0).sum()
    assert made.numbers["share"] == pytest.approx(inside / test.var(axis=0).sum())
    assert made.numbers["share_train"] == pytest.approx(model.explained_variance_ratio_.sum())
    assert {k: (v.shape, v.dtype) for k, v in made.arrays.items()} == {
        "mean": ((10,), np.float32), "axes": ((3, 10), np.float32), "deviation": ((3,), np.float32),
    }  # fmt: skip


def test_a_whitening_of_few_rows_misses_on_others() -> None:
    few, many = (fit_whitening({SITE: data(n)[0]})[SITE].numbers for n in (60, 4000))
    assert few["rank"] == many["rank"] == 10
    assert many["error"] < 0.2
    assert few["error"] > 0.4
    same = fit_whitening({SITE: data(60)[0]}, method="pca")[SITE]
    assert same.numbers == pytest.approx(few)
    assert same.arrays["matrix"].shape == (10, 10)


@pytest.mark.parametrize("classes", [2, 3])
def test_an_erasure_is_tested_by_a_new_probe(classes: int) -> None:
    x, y = data(8000, classes=classes)
    made = fit_leace({SITE: x}, y)[SITE]
    numbers = made.numbers
    assert numbers["auroc_before"] > 0.75
    assert numbers["auroc"] <= 0.55
    assert numbers["auroc_low"] < numbers["auroc"] < numbers["auroc_high"]
    assert numbers["auroc_low"] < 0.52
    assert numbers["rank"] == classes - 1
    assert 0 < numbers["removed"] < 0.3
    assert made.arrays["left"].shape == (10, classes - 1)


def test_groups_stay_whole() -> None:
    x, _ = data(60)
    copies = np.repeat(np.arange(60), 4)
    grouped = fit_whitening({SITE: x[copies]}, copies)[SITE].numbers["error"]
    assert grouped > 1.5 * fit_whitening({SITE: x[copies]})[SITE].numbers["error"]


@pytest.mark.parametrize(
    ("call", "code", "path"),
    [
        (lambda x: fit_pca({}, 2), "bad_value", "sites"),
        (lambda x: fit_pca({SITE: x}, 2, test_fraction=1.0), "bad_value", "test_fraction"),
        (lambda x: fit_pca({SITE: x}, 2, np.zeros(len(x), int)), "too_few_rows", f"sites.{SITE}"),
        (lambda x: fit_pca({SITE: x * np.nan}, 2), "rows_not_finite", f"sites.{SITE}"),
        (lambda x: fit_pca({SITE: x[0]}, 2), "rows_mismatch", f"sites.{SITE}"),
        (lambda x: fit_whitening({SITE: x}, method="zcb"), "bad_value", "method"),
        (lambda x: fit_leace({SITE: x}, [0] * len(x)), "too_few_rows", "labels"),
        (lambda x: fit_leace({SITE: x}, [0, 1] * 50), "bad_labels", "labels"),
        (lambda x: fit_leace({SITE: x}, [0, 1] * 250, seed=-1), "bad_value", "seed"),
    ],
)
def test_what_cannot_be_fitted_is_refused(call: Any, code: str, path: str) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        call(data()[0])
    assert (caught.value.code, caught.value.path) == (code, path)

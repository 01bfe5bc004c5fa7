"""Streaming logistic regression against scikit-learn, at its optimum: objectives are computed here, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression

from trocar import errors
from trocar.analysis import logistic as module
from trocar.analysis.logistic import Fitted, Task, logistic
from trocar.analysis.moments import moments
from trocar.analysis.scan import Binary, Objective, Sharded, Softmax
from trocar.analysis.source import ArraySource
from trocar.analysis.standard import standard

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def data(n: int = 600, d: int = 12, classes: int = 2, gap: float = 0.7) -> tuple[Floats, Ints]:
    """Correlated rows with an outlier feature whose mean is a hundred deviations."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / 2
    x += gap * rng.standard_normal((classes, d))[y]
    x[:, 0] = 40 * x[:, 0] + 4000
    return x.astype(np.float32).astype(np.float64), y


def standardised(x: Floats) -> Floats:
    return (x - x.mean(axis=0)) / x.std(axis=0)


def tasks(x: Floats, labels: Sequence[Ints], l2: float, l1: float = 0.0) -> list[Task]:
    s = standard(moments(ArraySource(x))[0])
    return [Task(s, np.bincount(y).astype(float), l2, l1) for y in labels]


def signs(labels: Sequence[Ints]) -> npt.NDArray[np.int8]:
    return np.stack([2 * y - 1 for y in labels]).astype(np.int8)


def loss_of(found: Fitted, x: Floats, y: Ints, l2: float, l1: float = 0.0) -> float:
    """By the definition."""
    scores, w = x @ found.weights[0] + found.bias[0], found.weights[0] * x.std(axis=0)
    return float(np.logaddexp(0, -(2 * y - 1) * scores).sum() + l2 / 2 * w @ w + l1 * np.abs(w).sum())


def reference(x: Floats, y: Ints, l2: float, l1: float = 0.0) -> float:
    """The objective of scikit-learn at its own optimum."""
    z = standardised(x)
    if l1:
        model = LogisticRegression(
            C=1 / l1, l1_ratio=1, solver="saga", tol=1e-10, max_iter=100_000, random_state=0
        )
    else:
        model = LogisticRegression(C=1 / l2, tol=1e-12, max_iter=10_000)
    model.fit(z, y)
    w = model.coef_[0]
    scores = z @ w + model.intercept_[0]
    return float(np.logaddexp(0, -(2 * y - 1) * scores).sum() + l2 / 2 * w @ w + l1 * np.abs(w).sum())


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_optimum_is_that_of_scikit_learn(l2: float, near: bool, precision: str) -> None:
    x, y = data()
    (m,) = moments(ArraySource(x))
    far = standard(m).far
    assert far.columns.tolist() == [0]
    objective = Binary(ArraySource(x), signs([y]), precision, far=far)  # type: ignore[arg-type]
    (found,) = logistic(objective, tasks(x, [y], l2), m if near else None, precision)
    best = reference(x, y, l2)
    assert loss_of(found, x, y, l2) == pytest.approx(best, rel=1e-6 if precision == "float32" else 1e-10)
    assert found.objective == pytest.approx(best, rel=1e-6)
    assert found.passes <= 100


def test_the_covariance_saves_passes() -> None:
    x, y = data(2000, 40, gap=0.1)
    (m,) = moments(ArraySource(x))
    passes = [
        logistic(Binary(ArraySource(x), signs([y]), "float32"), tasks(x, [y], 1.0), near)[0].passes
        for near in (m, None)
    ]
    assert passes[0] <= 6
    assert passes[1] > 2 * passes[0]


@pytest.mark.parametrize("l2", [1e-2, 1.0])
def test_classes_that_separate_are_fitted_as_far_as_the_penalty_lets_them(l2: float) -> None:
    x, y = data(gap=4.0)
    (m,) = moments(ArraySource(x))
    (found,) = logistic(Binary(ArraySource(x), signs([y]), "float64"), tasks(x, [y], l2), m, "float64")
    assert loss_of(found, x, y, l2) == pytest.approx(reference(x, y, l2), rel=1e-6)


def test_a_rare_class_is_fitted_as_well() -> None:
    x, y = data(3000)
    y = (standardised(x)[:, 3] + np.random.default_rng(0).standard_normal(len(x)) > 3.3).astype(np.int64)
    assert 5 <= y.sum() <= 60
    (m,) = moments(ArraySource(x))
    (found,) = logistic(Binary(ArraySource(x), signs([y]), "float32"), tasks(x, [y], 1.0), m)
    assert loss_of(found, x, y, 1.0) == pytest.approx(reference(x, y, 1.0), rel=1e-6)


@pytest.mark.parametrize("l1", [1.0, 10.0, 60.0])
def test_l1_has_the_optimum_and_the_zeros_of_scikit_learn(l1: float) -> None:
    x, y = data(300, 10, gap=0.5)
    x[:, 0] = standardised(x)[:, 0]  # saga needs a hundred thousand passes as it is
    x = x.astype(np.float32).astype(np.float64)
    (m,) = moments(ArraySource(x))
    (found,) = logistic(Binary(ArraySource(x), signs([y]), "float64"), tasks(x, [y], 0.0, l1), m, "float64")
    assert loss_of(found, x, y, 0.0, l1) == pytest.approx(reference(x, y, 0.0, l1), rel=1e-8)
    assert found.passes < 40
    if l1 == 60.0:
        assert 0 < (found.weights == 0).sum() < 10


def test_l1_without_moments_is_an_error_of_the_caller() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="needs moments"):
        logistic(Binary(ArraySource(x), signs([y]), "float32"), tasks(x, [y], 0.0, 1.0))


def test_many_probes_in_one_scan_are_each_alone() -> None:
    x, y = data()
    rng = np.random.default_rng(1)
    labels = [y, 1 - y, *(np.where(rng.random(len(y)) < 0.2, 1 - y, y) for _ in range(5))]
    (m,) = moments(ArraySource(x))
    together = logistic(Binary(ArraySource(x), signs(labels), "float64"), tasks(x, labels, 1.0), m, "float64")
    for one, label in zip(together, labels, strict=True):
        (alone,) = logistic(
            Binary(ArraySource(x), signs([label]), "float64"), tasks(x, [label], 1.0), m, "float64"
        )
        np.testing.assert_allclose(one.weights, alone.weights, rtol=1e-5, atol=1e-9)
        assert one.objective == pytest.approx(reference(x, label, 1.0), rel=1e-9)
    np.testing.assert_allclose(together[1].weights, -together[0].weights, rtol=1e-4, atol=1e-8)


def test_rows_without_a_sign_are_not_there() -> None:
    x, y = data()
    used = np.arange(len(y)) % 3 > 0
    task = Task(standard(moments(ArraySource(x[used]))[0]), np.bincount(y[used]).astype(float), 1.0)
    partial = np.where(used, 2 * y - 1, 0)[None].astype(np.int8)
    (found,) = logistic(Binary(ArraySource(x), partial, "float64"), [task], None, "float64")
    assert found.objective == pytest.approx(reference(x[used], y[used], 1.0), rel=1e-9)


def test_class_weights_are_those_of_scikit_learn() -> None:
    x, y = data()
    y[: len(y) // 2] = 0
    z, counts = standardised(x), np.bincount(y)
    balance = counts.sum() / 2 / counts
    model = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000, class_weight="balanced").fit(z, y)
    (m,) = moments(ArraySource(x))
    task = Task(standard(m), counts * balance, 1.0)
    (found,) = logistic(Binary(ArraySource(x), signs([y]), "float64", balance[None]), [task], m, "float64")
    np.testing.assert_allclose(found.weights[0] * x.std(axis=0), model.coef_[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_many_classes_are_those_of_scikit_learn(balanced: bool, precision: str) -> None:
    x, y = data(classes=4)
    y[:200] = 3
    z, counts = standardised(x), np.bincount(y)
    weights = counts.sum() / 4 / counts if balanced else np.ones(4)
    model = LogisticRegression(
        C=1.0, tol=1e-12, max_iter=10_000, class_weight="balanced" if balanced else None
    ).fit(z, y)
    (m,) = moments(ArraySource(x))
    task = Task(standard(m), counts * weights, 1.0)
    softmax = Softmax(ArraySource(x), y[None].astype(np.int16), 4, precision, weights[None], standard(m).far)  # type: ignore[arg-type]
    (found,) = logistic(softmax, [task], m, precision)

    def objective(w: Floats, b: Floats) -> float:
        scores = z @ w.T + b
        own = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(y)), y]
        return float((weights[y] * own).sum() + (w * w).sum() / 2)

    ours = found.weights * x.std(axis=0)
    got = objective(ours, found.bias + found.weights @ x.mean(axis=0))
    assert got == pytest.approx(objective(model.coef_, model.intercept_), rel=1e-6)
    assert found.passes < 40


def test_shards_give_the_same_probe() -> None:
    x, y = data()
    parts: list[Objective] = [
        Binary(ArraySource(x[i : i + 170]), signs([y[i : i + 170]]), "float64") for i in range(0, len(x), 170)
    ]
    (m,) = moments(ArraySource(x))
    (whole,) = logistic(Binary(ArraySource(x), signs([y]), "float64"), tasks(x, [y], 1.0), m, "float64")
    (sharded,) = logistic(Sharded(parts), tasks(x, [y], 1.0), m, "float64")
    np.testing.assert_allclose(sharded.weights, whole.weights, rtol=1e-9)
    assert sharded.passes == whole.passes


@pytest.mark.parametrize("ratio", [100, 3000])
def test_outlier_features_lose_nothing_in_float32(ratio: float) -> None:
    """The feature that tells the classes apart has a mean of a hundred (three thousand) deviations."""
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 4000)
    x = rng.standard_normal((4000, 8)) + 0.5 * y[:, None]
    x[:, :2] = 40 * x[:, :2] + 40 * ratio
    x = x.astype(np.float32).astype(np.float64)
    (m,) = moments(ArraySource(x), precision="float32")
    objective = Binary(ArraySource(x), signs([y]), "float32", far=standard(m).far)
    (found,) = logistic(objective, tasks(x, [y], 1.0), m)
    best = reference(x, y, 1.0)
    assert loss_of(found, x, y, 1.0) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("ends", ["by count", "by step"])
def test_a_search_that_does_not_end_is_refused(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    objective: Objective = Binary(ArraySource(x), signs([y]), "float64")
    if ends == "by count":
        monkeypatch.setattr(module, "MAX_PASSES", 2)
    else:
        monkeypatch.setattr(
            Binary, "at", lambda self, *a, at=Binary.at: _uphill(at(self, *a))
        )  # a gradient that points the wrong way
    with pytest.raises(errors.RunFailed) as caught:
        logistic(objective, tasks(x, [y], 1.0), None, "float64")
    assert (caught.value.code, caught.value.path) == ("fit_not_converged", "l2")


def _uphill(slope: object) -> object:
    from dataclasses import replace

    return replace(slope, weights=-slope.weights)  # type: ignore[type-var, attr-defined]

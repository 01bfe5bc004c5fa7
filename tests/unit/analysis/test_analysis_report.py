"""What a report says: measures against their definitions, intervals against each other, and options of a fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from trocar import errors
from trocar.analysis import fit, measures, metrics, site
from trocar.analysis import moments as moments_module
from trocar.analysis.source import ArraySource, Block
from trocar.analysis.split import folds

Floats = npt.NDArray[np.float64]
SITE = "resid_post.3"


def rows(n: int = 600, d: int = 8, classes: int = 2, gap: float = 0.8, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    means = gap * rng.standard_normal((classes, d))
    return (rng.standard_normal((n, d)) + means[y] + 2.0).astype(np.float32), y


def predictions(n: int) -> tuple[Floats, Floats]:
    """Probabilities that are right on average, and outcomes."""
    rng = np.random.default_rng(1)
    p = rng.random(n)
    return p, (rng.random(n) < p).astype(np.float64)


def test_calibration_error_is_the_gap_in_each_bin() -> None:
    p, y = predictions(500)
    expected = 0.0
    for i in range(15):
        inside = (p >= i / 15) & (p < (i + 1) / 15)
        expected += inside.sum() / len(p) * abs(p[inside].mean() - y[inside].mean())
    assert measures.calibration_error(p, y).value == pytest.approx(expected)
    assert measures.calibration_error(np.ones(4), np.ones(4)).value == 0
    assert measures.calibration_error(np.ones(4), np.zeros(4)).value == 1


@pytest.mark.parametrize("name", ["auroc", "r2", "mean", "ece"])
def test_the_influence_of_a_row_is_what_its_weight_changes(name: str) -> None:
    p, y = predictions(60)
    made = {
        "auroc": measures.auroc(np.round(p, 1), y),
        "r2": measures.r2(p + 0.1, y),
        "mean": measures.mean((p - y) ** 2),
        "ece": measures.calibration_error(p, y),
    }[name]
    ones = np.ones((1, 60))
    assert made.weighted(ones)[0] == pytest.approx(made.value)
    for row in range(0, 60, 7):
        nudged = ones.copy()
        nudged[0, row] += 1e-6
        assert (made.weighted(nudged)[0] - made.value) / 1e-6 == pytest.approx(made.influence[row], abs=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_normal_interval_is_the_bootstrap_of_many_rows(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, y = predictions(3000)
    group = np.arange(3000) // (10 if grouped else 1)
    y = y[group * (10 if grouped else 1)] if grouped else y
    stratum = np.array([int(y[group == g][0]) for g in range(group.max() + 1)])
    wanted = [
        measures.auroc(p, y), measures.mean((p > 0.5) == (y == 1)), measures.mean((p - y) ** 2), measures.r2(p, y)
    ]  # fmt: skip
    drawn = measures.intervals(wanted, stratum, group, 0)
    monkeypatch.setattr(measures, "BOOTSTRAP_ROWS", 100)
    normal = measures.intervals(wanted, stratum, group, 0)
    for a, b in zip(drawn, normal, strict=True):
        assert np.ptp(a) == pytest.approx(np.ptp(b), rel=0.12)
        assert a == pytest.approx(b, abs=0.15 * np.ptp(b))


def test_intervals_stay_where_a_score_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "BOOTSTRAP_ROWS", 1)
    y = np.repeat([0.0, 1.0], 10)
    perfect = measures.auroc(y * 2 + np.arange(20), y)
    hits = measures.mean(np.r_[np.zeros(1), np.ones(19)])
    ends = measures.intervals([perfect, hits], y.astype(np.int64), np.arange(20), 0)
    assert ends[0] == (1.0, 1.0)
    assert ends[1][1] == 1.0
    assert ends[1][0] < 0.95


def test_a_logistic_report_agrees_with_scikit_learn_on_the_same_rows() -> None:
    x, y = rows()
    result = fit("logistic", {SITE: x}, y, l2=1.0)
    train, test = result.train, result.test
    mean, deviation = x[train].mean(axis=0, dtype=float), x[train].std(axis=0, dtype=float)
    z = (x - mean) / deviation
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(z[train], y[train])
    p = model.predict_proba(z[test])[:, 1]
    m = result.sites[SITE].metrics
    assert m.test_auroc == pytest.approx(roc_auc_score(y[test], p), abs=1e-9)
    assert m.test_accuracy == model.score(z[test], y[test])
    assert m.accuracy_interval[0] < m.test_accuracy < m.accuracy_interval[1]
    assert m.calibration.brier == pytest.approx(brier_score_loss(y[test], p), abs=1e-6)
    assert m.calibration.brier_interval[0] < m.calibration.brier < m.calibration.brier_interval[1]
    assert 0 < m.calibration.ece < 0.15
    np.testing.assert_allclose(result.sites[SITE].weights, model.coef_[0] / deviation, rtol=1e-4, atol=1e-6)


def test_probabilities_are_reported_where_there_are_any() -> None:
    x, y = rows()
    known = {
        kind: fit(kind, {SITE: x}, y).sites[SITE].metrics.calibration is not None
        for kind in ("logistic", "lda", "multinomial", "mean_diff")
    }
    assert known == {"logistic": True, "lda": True, "multinomial": True, "mean_diff": False}


def test_a_probe_that_is_too_sure_is_badly_calibrated() -> None:
    """Few rows, many features, hardly a penalty: right half of the time and always certain."""
    x, y = rows(200, 150, gap=0.05)
    sure, modest = (fit("logistic", {SITE: x}, y, l2=l2).sites[SITE].metrics for l2 in (1e-3, 1e3))
    assert sure.calibration.ece > 0.25 > modest.calibration.ece
    assert sure.calibration.brier > modest.calibration.brier + 0.1


def test_lda_is_nearly_logistic_where_classes_are_gaussian() -> None:
    x, y = rows(3000)
    lda, logistic = (fit(kind, {SITE: x}, y).sites[SITE] for kind in ("lda", "logistic"))
    cosine = lda.weights @ logistic.weights / np.linalg.norm(lda.weights) / np.linalg.norm(logistic.weights)
    assert cosine > 0.99
    assert lda.metrics.test_auroc == pytest.approx(logistic.metrics.test_auroc, abs=0.01)
    gap = x[y == 1].mean(axis=0) - x[y == 0].mean(axis=0)
    step = np.linalg.norm(lda.direction)
    assert lda.direction @ gap / step == pytest.approx(step, rel=0.1)


def test_many_classes_have_a_direction_each() -> None:
    x, y = rows(1500, 8, classes=4, gap=1.5)
    result = fit("multinomial", {SITE: x}, 10 * y + 3)
    found, m = result.sites[SITE], result.sites[SITE].metrics
    assert result.classes == (3, 13, 23, 33)
    assert found.direction.shape == found.weights.shape == (4, 8)
    test = result.test
    logits = x[test] @ found.weights.T.astype(float) + found.bias
    assert m.test_accuracy == pytest.approx((logits.argmax(axis=1) == y[test]).mean())
    each = [roc_auc_score(y[test] == c, logits[:, c]) for c in range(4)]
    assert m.test_auroc == pytest.approx(np.mean(each))
    assert m.interval[0] < m.test_auroc < m.interval[1] <= 1
    assert abs(m.control_auroc - 0.5) < 0.1
    assert sum(m.test_counts) == m.n_test
    train, labels = x[result.train].astype(float), y[result.train]
    for c in range(4):
        gap = train[labels == c].mean(axis=0) - train[labels != c].mean(axis=0)
        step = np.linalg.norm(found.direction[c])
        assert found.direction[c] @ gap / step == pytest.approx(step, rel=1e-4)


@pytest.mark.parametrize("kind", ["logistic", "lda", "mean_diff", "ridge", "multinomial"])
def test_cross_validation_fits_each_fold_to_the_others(kind: Any) -> None:
    x, y = rows(240, 5)
    result = fit(kind, {SITE: x}, y, folds=4, seed=2)
    m = result.sites[SITE].metrics
    assert len(m.folds) == 4
    dealt = folds(
        np.unique(y, return_inverse=True)[1] if kind != "ridge" else np.zeros(240, int), np.arange(240), 4, 2
    )
    plain = fit(kind, {SITE: x}, y, seed=2).sites[SITE].metrics
    assert plain.folds == ()
    assert plain.headline == pytest.approx(m.headline, abs=1e-9)
    if kind == "mean_diff":
        for fold in range(4):
            others, own = dealt != fold, dealt == fold
            step = x[others & (y == 1)].mean(axis=0) - x[others & (y == 0)].mean(axis=0)
            assert m.folds[fold] == pytest.approx(roc_auc_score(y[own], x[own] @ step), abs=1e-3)
    assert np.std(m.folds) < 0.2


def test_folds_keep_groups_whole_and_classes_even() -> None:
    group = np.arange(300) // 3
    stratum = (np.arange(100) % 5 == 0).astype(np.int64)
    dealt = folds(stratum, group, 5, 0)
    assert all(len(set(dealt[group == g])) == 1 for g in range(100))
    for value in (0, 1):
        sizes = np.bincount(dealt[::3][stratum == value], minlength=5)
        assert np.ptp(sizes) <= 1


def test_balanced_classes_move_the_threshold() -> None:
    x, y = rows(2000, 6, gap=0.5)
    y = np.where((y == 1) & (np.arange(2000) % 10 > 0), 0, y)
    plain, even = (
        fit("logistic", {SITE: x}, y, class_weight=w).sites[SITE]
        for w in (None, "balanced")  # type: ignore[arg-type]
    )
    called = [(x @ f.weights + f.bias > 0).mean() for f in (plain, even)]
    assert called[0] < 0.05
    assert called[1] > 0.2


def test_l1_leaves_features_out() -> None:
    x, y = rows(800, 30, gap=0.0)
    x[:, 4] += y * 1.5
    found = fit("logistic", {SITE: x}, y, l1=40.0).sites[SITE]
    assert np.flatnonzero(found.weights).tolist() == [4]
    assert fit("logistic", {SITE: x}, y, l1=40.0).l2 == {SITE: 0.0}


class Counted(ArraySource):
    """Counts passes and the largest block."""

    passes = most = 0

    def blocks(self, most: int = 512) -> Any:
        self.passes += 1
        for block in super().blocks(most):
            self.most = max(self.most, len(block))
            yield block


def test_large_data_takes_the_streaming_way_and_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products, a sample of the correlation: the same numbers as the exact way."""
    x, y = rows(30_000, 10, gap=0.3)
    exact = fit("logistic", {SITE: x}, y, folds=2).sites[SITE]
    monkeypatch.setattr(moments_module, "EXACT_CELLS", 0)
    source = Counted(x)
    streamed = fit("logistic", {SITE: source}, y, folds=2).sites[SITE]
    np.testing.assert_allclose(streamed.weights, exact.weights, rtol=2e-3, atol=2e-4)
    assert streamed.metrics.test_auroc == pytest.approx(exact.metrics.test_auroc, abs=1e-5)
    assert streamed.metrics.folds == pytest.approx(exact.metrics.folds, abs=1e-5)
    assert source.passes <= 10  # one for the sums, one for the scores
    assert source.most <= moments_module.CHUNK_ROWS


def test_the_sample_of_the_correlation_is_spread_over_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = moments_module._Sums.add

    def add(self: Any, block: Block, t: Floats) -> None:
        if self._gram is not None:
            seen.append(len(block))
        plain(self, block, t)

    monkeypatch.setattr(moments_module._Sums, "add", add)
    monkeypatch.setattr(site, "NEAR_PER_WIDTH", 1)
    x, y = rows(40_000, 4, gap=0.3)
    fit("logistic", {SITE: x}, y)
    assert 4000 < sum(seen) < 9000
    assert len(seen) > 70  # of the 79 blocks that are read, nearly all have some


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"kind": "ridgee"}, "kind"),
        ({"kind": "ridge", "l1": 1.0}, "l1"),
        ({"l1": 0.0}, "l1"),
        ({"l1": float("nan")}, "l1"),
        ({"kind": "lda", "class_weight": "balanced"}, "class_weight"),
        ({"class_weight": "even"}, "class_weight"),
        ({"folds": 1}, "folds"),
        ({"folds": 51}, "folds"),
        ({"folds": -2}, "folds"),
    ],
)
def test_options_out_of_range_are_refused(arguments: dict[str, Any], path: str) -> None:
    x, y = rows(60)
    with pytest.raises(errors.TrocarError) as caught:
        fit(**{"kind": "logistic", "rows_by_site": {SITE: x}, "labels": y, **arguments})
    assert (caught.value.code, caught.value.path) == ("bad_value", path)


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_more_folds_than_groups_of_a_class_are_refused(kind: Any) -> None:
    x, y = rows(60)
    with pytest.raises(errors.TrocarError) as caught:
        fit(kind, {SITE: x}, y, np.arange(60) % 4 + 10 * y, folds=12)
    assert caught.value.code == "too_few_rows"


def test_more_classes_than_a_fit_takes_are_refused() -> None:
    with pytest.raises(errors.TrocarError) as caught:
        fit("multinomial", {SITE: np.zeros((600, 2), np.float32)}, np.arange(600))
    assert (caught.value.code, "257" in caught.value.reason) == ("bad_labels", False)
    with pytest.raises(errors.TrocarError) as caught:
        fit("multinomial", {SITE: np.zeros((9, 2), np.float32)}, [0, 1, 2] * 2 + [0, 1, 3])
    assert (caught.value.code, "class" in caught.value.reason) == ("too_few_rows", True)


@pytest.mark.parametrize("row", ["train", "test"])
@pytest.mark.parametrize("kind", ["logistic", "mean_diff", "ridge", "lda"])
def test_a_row_that_is_not_finite_is_refused_at_its_site(kind: Any, row: str) -> None:
    x, y = rows(60)
    where = fit(kind, {SITE: x}, y)
    x[getattr(where, row)[3], 2] = np.nan
    with pytest.raises(errors.TrocarError) as caught:
        fit(kind, {SITE: x}, y)
    assert (caught.value.code, caught.value.path) == ("rows_not_finite", f"sites.{SITE}")


def test_shared_resamples_are_those_of_one_score() -> None:
    p, y = predictions(80)
    scores = [measures.auroc(p, y).weighted, measures.mean(p).weighted]
    stratum, group = y.astype(np.int64), np.arange(80)
    both = metrics.intervals(scores, stratum, group, 3)
    assert both == [metrics.interval(s, stratum, group, 3) for s in scores]

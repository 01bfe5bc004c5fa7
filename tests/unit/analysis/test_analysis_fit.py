"""Fits on planted data: the direction is found, the scores are honest, and the definitions hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trocar import errors
from trocar.analysis import ClassMetrics, FitResult, Kind, RidgeMetrics, fit, leans_on

Floats = npt.NDArray[np.float64]
SITE = "resid_post.3"


def cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def planted(n: int, width: int, gap: float, seed: int = 0) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
    """Gaussian rows, two classes `gap` deviations apart along a unit direction, off centre."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    u = rng.standard_normal(width)
    u /= np.linalg.norm(u)
    return rng.standard_normal((n, width)) + 3.0 + np.outer(y * gap, u), y, u


def reference_auroc(scores: npt.NDArray[Any], y: npt.NDArray[np.int64]) -> float:
    """By its definition: every pair of an upper and a lower row is compared."""
    upper, lower = scores[y == 1], scores[y == 0]
    wins = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in upper for b in lower]
    return sum(wins) / len(wins)


@pytest.mark.parametrize(
    ("kind", "labels", "rows"),
    [
        ("mean_diff", [0, 1] * 20, 20),
        ("logistic", [1, 1] + [0] * 98, 1),
        ("multinomial", [0, 1] * 40 + [2] * 4, 2),
        ("ridge", [0.0, 0.0, 0.0, 0.0, 1e6, 1e6] + [float(i) for i in range(30)], 2),
    ],
)
def test_rows_that_a_fit_leans_on(kind: Kind, labels: list[Any], rows: int) -> None:
    assert abs(leans_on(kind, labels, None, 0.5, 0) - rows) <= (kind == "ridge")


def only(result: FitResult) -> Any:
    return result.sites[SITE].metrics


def refusal(**arguments: Any) -> tuple[str, str]:
    given: dict[str, Any] = {"kind": "logistic", "rows_by_site": {SITE: np.eye(8, 4)}, "labels": [0, 1] * 4}
    with pytest.raises(errors.TrocarError) as caught:
        fit(**{**given, **arguments})
    return caught.value.code, caught.value.path


@pytest.mark.parametrize("kind", ["logistic", "mean_diff"])
def test_a_planted_direction_is_recovered(kind: Kind) -> None:
    x, y, u = planted(
        3000, 32, gap=2.5
    )  # classes overlap: separable ones leave few rows that inform logistic
    result = fit(kind, {SITE: x.astype(np.float32)}, y.tolist())
    found = result.sites[SITE]
    assert cosine(found.direction, u) > 0.95
    assert found.direction.dtype == found.weights.dtype == np.float32
    assert np.linalg.norm(found.direction) == pytest.approx(2.5, rel=0.1)  # one step is the planted gap
    assert only(result).test_auroc == pytest.approx(0.9615, abs=0.02)  # Phi(2.5 / sqrt 2)
    assert only(result).test_accuracy == pytest.approx(0.8944, abs=0.03)  # Phi(2.5 / 2)


def test_ridge_recovers_a_planted_target() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 32)) + 5.0
    u = np.zeros(32)
    u[3] = 1.0
    y = 7.0 * (x @ u) - 100.0 + 0.7 * rng.standard_normal(600)
    result = fit("ridge", {SITE: x}, y, l2=1.0)
    found, m = result.sites[SITE], only(result)
    assert cosine(found.direction, u) > 0.95
    assert np.linalg.norm(found.weights) == pytest.approx(7.0, rel=0.05)
    predicted = x @ found.weights.astype(float) + found.bias
    test = result.test
    expected = 1 - ((y - predicted)[test] ** 2).sum() / ((y[test] - y[test].mean()) ** 2).sum()
    assert m.test_r2 == pytest.approx(expected, abs=1e-6)
    assert m.test_r2 > 0.97
    assert m.interval[0] < m.test_r2 < m.interval[1]
    assert m.control_r2 < 0.1


@pytest.mark.parametrize("kind", ["logistic", "mean_diff"])
def test_one_step_along_the_direction_is_the_distance_of_the_class_means(kind: Kind) -> None:
    x, y, _ = planted(400, 20, gap=2.0)
    result = fit(kind, {SITE: x}, y)
    d = result.sites[SITE].direction.astype(float)
    rows, labels = x[result.train], y[result.train]
    gap = (rows[labels == 1].mean(axis=0) - rows[labels == 0].mean(axis=0)) @ d / np.linalg.norm(d)
    assert gap == pytest.approx(np.linalg.norm(d), rel=1e-5)
    if kind == "logistic":
        assert cosine(d, result.sites[SITE].weights) == pytest.approx(1.0, abs=1e-6)


def test_one_step_of_ridge_is_one_deviation_of_its_predictions() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 10)) * np.arange(1, 11)
    result = fit("ridge", {SITE: x}, x[:, 2] + rng.standard_normal(300))
    found = result.sites[SITE]
    w, d = found.weights.astype(float), found.direction.astype(float)
    assert w @ d == pytest.approx((x[result.train] @ w).std(), rel=1e-5)
    assert cosine(w, d) == pytest.approx(1.0, abs=1e-6)


def test_mean_diff_is_what_it_says() -> None:
    x, y, _ = planted(200, 6, gap=1.0)
    result = fit("mean_diff", {SITE: x}, y)
    rows, labels = x[result.train], y[result.train]
    low, high = rows[labels == 0].mean(axis=0), rows[labels == 1].mean(axis=0)
    found = result.sites[SITE]
    np.testing.assert_allclose(found.direction, high - low, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.direction, found.weights)
    assert found.weights.astype(float) @ ((low + high) / 2) + found.bias == pytest.approx(0.0, abs=1e-5)


def test_logistic_is_at_the_optimum_of_its_objective() -> None:
    """The gradient is computed here, from the definition: sum of log losses plus l2/2 |w|^2, standardised."""
    x, y, _ = planted(300, 12, gap=1.0)
    x[:, 0] *= 100.0
    result = fit("logistic", {SITE: x}, y, l2=3.0)
    rows, labels = x[result.train], y[result.train]
    z = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    w = result.sites[SITE].weights.astype(float) * rows.std(axis=0)
    scores = rows @ result.sites[SITE].weights.astype(float) + result.sites[SITE].bias
    residual = 1 / (1 + np.exp(-scores)) - labels
    assert np.abs(z.T @ residual + 3.0 * w).max() < 1e-3 * np.abs(z.T @ (labels - 0.5)).max()
    assert abs(residual.sum()) < 0.1


@pytest.mark.parametrize("kind", ["logistic", "mean_diff"])
def test_scores_agree_with_an_independent_auroc(kind: Kind) -> None:
    x, y, _ = planted(240, 8, gap=1.0)
    result = fit(kind, {SITE: np.round(x)}, y)  # rounding makes ties
    found, m = result.sites[SITE], only(result)
    scores = np.round(x) @ found.weights.astype(np.float64) + found.bias
    for side, auroc, accuracy in (
        (result.train, m.train_auroc, m.train_accuracy),
        (result.test, m.test_auroc, m.test_accuracy),
    ):
        assert auroc == pytest.approx(reference_auroc(scores[side], y[side]), abs=1e-12)
        assert accuracy == np.mean((scores[side] > 0) == (y[side] == 1))
    assert (m.n_train, m.n_test) == (180, 60)
    assert (m.train_counts, m.test_counts) == ((90, 90), (30, 30))
    assert m.interval[0] < m.test_auroc < m.interval[1]


@pytest.mark.parametrize("kind", ["logistic", "mean_diff"])
def test_random_labels_score_about_one_half(kind: Kind) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((600, 576)).astype(np.float32)
    m = only(fit(kind, {SITE: x}, rng.integers(0, 2, 600)))
    assert m.train_auroc > 0.9  # it does memorise
    assert abs(m.test_auroc - 0.5) < 0.15
    assert m.interval[0] < 0.5 < m.interval[1]


@pytest.mark.parametrize("kind", ["logistic", "mean_diff"])
def test_the_control_is_at_one_half_where_the_fit_is_perfect(kind: Kind) -> None:
    x, y, _ = planted(800, 30, gap=12.0)
    m = only(fit(kind, {SITE: x}, y))
    assert m.test_auroc == 1.0
    assert m.interval == (1.0, 1.0)
    assert abs(m.control_auroc - 0.5) < 0.12


def one_hot_groups() -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """60 groups of 10 equal rows that name their group, whose label is a coin: nothing else to learn."""
    group = np.arange(600) // 10
    coin = np.random.default_rng(2).permutation(np.arange(60) % 2)
    return np.eye(60)[group], coin[group], group


def test_a_group_split_leaks_nothing() -> None:
    x, y, group = one_hot_groups()
    leaking = fit("logistic", {SITE: x}, y)
    assert only(leaking).test_auroc == 1.0  # the mistake that groups are there to prevent
    honest = fit("logistic", {SITE: x}, y, group)
    assert only(honest).test_auroc == pytest.approx(0.5)
    assert set(group[honest.train]) & set(group[honest.test]) == set()
    assert only(honest).train_auroc == 1.0


def test_the_control_keeps_groups_whole() -> None:
    """Without groups, a shuffle over rows breaks up what leaks; over groups of equal labels it does not."""
    x, y, group = one_hot_groups()
    assert only(fit("logistic", {SITE: x}, y, group)).control_auroc == pytest.approx(0.5)
    noisy = x + 0.01 * np.random.default_rng(0).standard_normal(x.shape)
    assert abs(only(fit("logistic", {SITE: noisy}, y, group)).control_auroc - 0.5) < 0.35


def test_intervals_grow_when_rows_of_a_group_are_copies() -> None:
    x, y, _ = planted(120, 5, gap=1.0)
    copies = np.repeat(np.arange(120), 9)
    grouped = only(fit("mean_diff", {SITE: x[copies]}, y[copies], copies))
    loose = only(fit("mean_diff", {SITE: x[copies]}, y[copies]))
    assert np.ptp(grouped.interval) > 2 * np.ptp(loose.interval)


@pytest.mark.parametrize("kind", ["logistic", "mean_diff", "ridge"])
def test_every_site_has_the_same_split_and_the_seed_decides_it(kind: Kind) -> None:
    x, y, _ = planted(200, 8, gap=1.0)
    labels = y.astype(float) if kind == "ridge" else y
    sites = {"resid_post.0": x, "resid_post.1": lambda: x, "mlp_act.0": x[:, :3]}
    result, again = (fit(kind, sites, labels, seed=4) for _ in range(2))
    first, second = result.sites["resid_post.0"], result.sites["resid_post.1"]
    np.testing.assert_array_equal(first.direction, second.direction)
    assert first.metrics == second.metrics == again.sites["resid_post.0"].metrics
    assert list(result.sites) == list(sites)
    np.testing.assert_array_equal(np.sort(np.r_[result.train, result.test]), np.arange(200))
    other = fit(kind, sites, labels, seed=5)
    assert not np.array_equal(result.test, other.test)
    assert isinstance(first.metrics, RidgeMetrics if kind == "ridge" else ClassMetrics)


def test_the_best_site_is_the_one_with_the_highest_test_score() -> None:
    x, y, _ = planted(200, 8, gap=1.5)
    noise = np.random.default_rng(1).standard_normal((200, 8))
    result = fit("mean_diff", {"resid_post.0": noise, "resid_post.1": x, "resid_post.2": x}, y)
    assert result.best == "resid_post.1"


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scores_do_not_depend_on_the_units_of_a_feature(kind: Kind, scale: float) -> None:
    x, y, _ = planted(300, 10, gap=1.0)
    units = np.where(np.arange(10) % 2, scale, 1.0)
    labels = y.astype(float) if kind == "ridge" else y
    plain, scaled = (fit(kind, {SITE: rows}, labels).sites[SITE] for rows in (x, x * units))
    np.testing.assert_allclose(scaled.weights * units, plain.weights, rtol=1e-3, atol=1e-5)
    assert scaled.metrics.headline == pytest.approx(plain.metrics.headline, abs=1e-3)


def test_swapping_the_classes_flips_the_direction() -> None:
    x, y, _ = planted(200, 8, gap=1.0)
    for kind in ("logistic", "mean_diff"):
        a, b = fit(kind, {SITE: x}, y), fit(kind, {SITE: x}, 1 - y)
        assert cosine(a.sites[SITE].direction, b.sites[SITE].direction) < -0.9


@pytest.mark.parametrize("labels", [[False, True] * 20, [3, 7] * 20, np.array([-1, 1] * 20, np.int8)])
def test_any_two_values_are_classes_and_the_larger_is_the_upper(labels: Any) -> None:
    x = np.outer(np.arange(40) % 2, [1.0, 0.0, 0.0]) + np.random.default_rng(0).normal(0, 0.1, (40, 3))
    result = fit("mean_diff", {SITE: x}, labels)
    assert result.classes == (int(labels[0]), int(labels[1]))
    assert result.sites[SITE].direction[0] > 0.8


@pytest.mark.parametrize("kind", ["logistic", "mean_diff", "ridge"])
def test_a_site_that_says_nothing_gets_no_direction(kind: Kind) -> None:
    x = np.full((40, 4), 0.1, np.float32)
    found = fit(kind, {SITE: x}, [0, 1] * 20 if kind != "ridge" else list(range(40))).sites[SITE]
    assert np.linalg.norm(found.direction) < 1e-6
    if isinstance(found.metrics, ClassMetrics):
        assert found.metrics.test_auroc == found.metrics.control_auroc == 0.5


@pytest.mark.parametrize("l2", [1e-3, None, 1e9])
def test_outliers_collinear_and_constant_features_raise_no_warning(l2: float | None) -> None:
    """What residual streams look like: a few huge dimensions, more features than rows, copies."""
    x, y, _ = planted(120, 300, gap=8.0)
    x[:, :3] = x[:, :3] * 1000.0 + 5000.0
    x[:, 100:200] = x[:, :100]
    x[:, 200] = 7.0
    for kind, labels in (("logistic", y), ("ridge", y * 2.5)):
        found = fit(kind, {SITE: x.astype(np.float32)}, labels, l2=l2).sites[SITE]
        assert np.isfinite(found.weights).all()
        assert found.weights[200] == 0
        assert found.metrics.headline > 0.5 or l2 == 1e9


def test_a_fit_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trocar.analysis.logistic.MAX_PASSES", 2)
    x, y, _ = planted(100, 20, gap=1.0)
    with pytest.raises(errors.RunFailed) as caught:
        fit("logistic", {SITE: x}, y)
    assert caught.value.code == "fit_not_converged"


LABELS = [
    ([0, 1] * 3, "bad_labels", "labels"),  # wrong count
    ([0, 1, 2, 0, 1, 2, 0, 1], "bad_labels", "labels"),
    ([0.0, 1.0] * 4, "bad_labels", "labels"),
    (["a", "b"] * 4, "bad_labels", "labels"),
    ([True, 0] * 4, "bad_labels", "labels"),
    ([None, 1] * 4, "bad_labels", "labels"),
    ([[0], [1]] * 4, "bad_labels", "labels"),
    (np.zeros((8, 1), int), "bad_labels", "labels"),
    ([0, 2**70] * 4, "bad_labels", "labels"),
    ([1] * 8, "too_few_rows", "labels"),
    ([], "too_few_rows", "labels"),
    ([0] * 7 + [1], "too_few_rows", "labels"),  # nothing of class 1 to test on
]


@pytest.mark.parametrize(("labels", "code", "path"), LABELS)
@pytest.mark.parametrize("kind", ["logistic", "mean_diff"])
def test_class_labels_that_do_not_fit_are_refused(kind: str, labels: Any, code: str, path: str) -> None:
    assert refusal(kind=kind, labels=labels) == (code, path)


TARGETS = [
    ([0.5] * 7, "bad_labels"),
    ([0.5, float("nan")] * 4, "bad_labels"),
    ([0.5, float("inf")] * 4, "bad_labels"),
    ([0.5, 1e13] * 4, "bad_labels"),
    ([0.0, 5e-324] * 4, "bad_labels"),
    ([True, False] * 4, "bad_labels"),
    ([2.5] * 8, "bad_labels"),
    ([1.0, "2"] * 4, "bad_labels"),
    ([1.0] * 7 + [2.0], "too_few_rows"),
    ([], "too_few_rows"),
]


@pytest.mark.parametrize(("labels", "code"), TARGETS)
def test_targets_that_do_not_fit_are_refused(labels: Any, code: str) -> None:
    assert refusal(kind="ridge", labels=labels) == (code, "labels")


def test_ridge_takes_integers() -> None:
    assert fit("ridge", {SITE: np.eye(8, 4)}, [1, 2, 3, 4.5, 5, 6, 7, 8]).classes is None


@pytest.mark.parametrize(
    ("groups", "code", "path"),
    [
        ([0, 1], "bad_labels", "groups"),
        ([0.5] * 8, "bad_labels", "groups"),
        ([0, "a"] * 4, "bad_labels", "groups"),
        ([0] * 8, "too_few_rows", "labels"),  # one group: nothing to test on
        ([0, 1] * 4, "too_few_rows", "labels"),  # one group per class
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: Any, code: str, path: str) -> None:
    assert refusal(groups=groups) == (code, path)


@pytest.mark.parametrize(
    ("arguments", "code", "path"),
    [
        ({"kind": "logistik"}, "bad_value", "kind"),
        ({"rows_by_site": {}}, "bad_value", "sites"),
        ({"test_fraction": 0.0}, "bad_value", "test_fraction"),
        ({"test_fraction": float("nan")}, "bad_value", "test_fraction"),
        ({"seed": -1}, "bad_value", "seed"),
        ({"l2": 0.0}, "bad_value", "l2"),
        ({"l2": float("inf")}, "bad_value", "l2"),
        ({"kind": "mean_diff", "l2": 1.0}, "bad_value", "l2"),
        ({"rows_by_site": {SITE: np.zeros(8)}}, "rows_mismatch", f"sites.{SITE}"),
        ({"rows_by_site": {SITE: np.zeros((8, 2), int)}}, "rows_mismatch", f"sites.{SITE}"),
        ({"rows_by_site": {SITE: np.full((8, 2), np.nan)}}, "rows_not_finite", f"sites.{SITE}"),
    ],
)
def test_options_and_rows_are_checked(arguments: dict[str, Any], code: str, path: str) -> None:
    assert refusal(**arguments) == (code, path)


def test_labels_are_checked_before_any_row_is_loaded() -> None:
    def load() -> Floats:
        raise AssertionError("rows were loaded for labels that cannot be fitted")

    assert refusal(rows_by_site={SITE: load}, labels=[1] * 8) == ("too_few_rows", "labels")

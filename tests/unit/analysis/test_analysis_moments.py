"""Moments against sums over all rows at once, in any division of the rows, and what float32 must not lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import errors
from trocar.analysis import moments as module
from trocar.analysis.moments import Moments, merge, moments, precision_of
from trocar.analysis.source import ArraySource

Floats = npt.NDArray[np.float64]


def rows(n: int, d: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Correlated, off centre, and one feature whose mean is a hundred deviations."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3 * rng.standard_normal(d)
    x[:, 0] = 40 * rng.standard_normal(n) + 4000
    return x.astype(np.float32)


def agree(m: Moments, x: npt.NDArray[Any], t: Floats, tolerance: float = 1e-10) -> None:
    x = x.astype(np.float64)
    deviation = x.std(axis=0)
    np.testing.assert_allclose((m.mean - x.mean(axis=0)) / deviation, 0, atol=tolerance)
    np.testing.assert_allclose(m.variance, x.var(axis=0), rtol=tolerance)
    scale = np.outer(deviation, deviation)
    np.testing.assert_allclose((m.covariance - np.cov(x.T, bias=True)) / scale, 0, atol=tolerance)
    crossed = (x - x.mean(axis=0)).T @ t / len(x)
    np.testing.assert_allclose((m.cross_covariance - crossed) / deviation[:, None], 0, atol=tolerance)
    np.testing.assert_allclose(m.target_total, t.sum(axis=0), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(m.target_square, (t**2).sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize("chunk", [7, 64, 2048])
def test_moments_are_what_they_say(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    x, t = rows(300, 9), np.random.default_rng(1).standard_normal((300, 2))
    (m,) = moments(ArraySource(x), targets=t)
    assert m.n == 300
    agree(m, x, t)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-1, 3), min_size=40, max_size=90), st.integers(0, 5))
def test_any_division_merges_to_the_same_moments(part: list[int], seed: int) -> None:
    """Parts of one pass, and passes over shards with pilots of their own."""
    number = np.array(part)
    x, t = rows(len(part), 3, seed), np.random.default_rng(seed).standard_normal(len(part))
    divided = moments(ArraySource(x), targets=t, part=number, parts=4)
    assert [m.n for m in divided] == [int((number == p).sum()) for p in range(4)]
    used = number >= 0
    if used.sum() > 3:
        agree(merge(divided), x[used], t[used][:, None], 1e-9)
    shards = [moments(ArraySource(x[i : i + 13]), targets=t[i : i + 13])[0] for i in range(0, len(x), 13)]
    agree(merge(shards), x, t[:, None], 1e-9)


def test_taking_a_part_away_is_never_having_had_it() -> None:
    x, t = rows(200, 5), np.arange(200.0)[:, None]
    (whole,) = moments(ArraySource(x), targets=t)
    (part,) = moments(ArraySource(x[150:]), targets=t[150:])
    agree(whole.without(part), x[:150], t[:150], 1e-9)


def test_the_pilot_changes_nothing() -> None:
    x, t = rows(120, 4), np.zeros((120, 1))
    (m,) = moments(ArraySource(x), targets=t)
    agree(m.about(np.array([3000.0, 5.0, -5.0, 0.0])), x, t, 1e-9)
    (own,) = moments(ArraySource(x), targets=t, pilot=x.mean(axis=0).astype(np.float64))
    agree(own, x, t)


def test_float32_products_keep_outlier_features() -> None:
    """A mean of a hundred deviations: products of the raw rows would lose four digits of a correlation."""
    x = rows(6000, 8)
    (m,) = moments(ArraySource(x), precision="float32")
    agree(m, x, np.zeros((6000, 0)), 3e-6)
    naive = (x.T @ x / len(x)).astype(np.float64) - np.outer(x.mean(axis=0), x.mean(axis=0))
    assert abs(naive[0, 0] / x[:, 0].astype(np.float64).var() - 1) > 1e-5


def test_targets_far_from_zero_keep_their_digits() -> None:
    """Times in seconds since 1970: float32 knows them to two minutes."""
    x = rows(3000, 4)
    t = 1.7e9 + 1e4 * np.random.default_rng(3).standard_normal((3000, 1)) + 1e3 * x[:, 1:2]
    (m,) = moments(ArraySource(x), targets=t, precision="float32")
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean(axis=0)).T @ (t - t.mean()) / len(x)
    np.testing.assert_allclose(
        m.cross_covariance[:, 0] / x64.std(axis=0) / t.std(),
        expected[:, 0] / x64.std(axis=0) / t.std(),
        atol=3e-6,
    )
    assert np.sqrt(m.target_square[0] / 3000 - (m.target_total[0] / 3000) ** 2) == pytest.approx(
        t.std(), rel=1e-3
    )


def test_sums_alone_cost_no_gram_matrix() -> None:
    x = rows(100, 6)
    (m,) = moments(ArraySource(x), gram=False)
    assert m.gram is None
    np.testing.assert_allclose(m.variance, x.astype(np.float64).var(axis=0), rtol=1e-9)
    with pytest.raises(ValueError, match="no Gram matrix"):
        _ = m.covariance
    some = moments(ArraySource(x), part=np.arange(100) % 2, parts=2, gram=[True, False])
    assert (some[0].gram is None, some[1].gram is None) == (False, True)
    with pytest.raises(ValueError, match="do not go together"):
        merge(some)
    assert merge([s.plain() for s in some]).n == 100


def test_small_data_is_multiplied_in_float64() -> None:
    assert precision_of(1000, 576) == "float64"
    assert precision_of(10**6, 576) == "float32"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1, 29])
def test_rows_that_are_not_finite_are_refused(bad: float, row: int) -> None:
    x = rows(30, 4)
    x[row, 2] = bad
    with pytest.raises(errors.TrocarError) as caught:
        moments(ArraySource(x))
    assert caught.value.code == "rows_not_finite"


def test_squares_beyond_float32_are_refused_and_float64_takes_them() -> None:
    x = rows(30, 2) * np.float32(1e20)
    with pytest.raises(errors.TrocarError) as caught:
        moments(ArraySource(x), precision="float32")
    assert (caught.value.code, "range" in caught.value.reason) == ("rows_not_finite", True)
    (m,) = moments(ArraySource(x), precision="float64")
    np.testing.assert_allclose(m.variance, x.astype(np.float64).var(axis=0), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [({"targets": np.zeros(5)}, "bad_labels"), ({"part": np.zeros(5, np.int64)}, "bad_labels")],
)
def test_what_does_not_fit_the_rows_is_refused(arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        moments(ArraySource(rows(6, 2)), **arguments)
    assert caught.value.code == code


def test_no_rows_have_no_moments() -> None:
    with pytest.raises(errors.TrocarError) as caught:
        moments(ArraySource(np.zeros((0, 3))))
    assert caught.value.code == "too_few_rows"

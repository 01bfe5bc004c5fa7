"""Neighbours and cosines against all pairs at once, with ties, zeros and rows that end blocks anywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from trocar import errors
from trocar.analysis.cosines import cosines
from trocar.analysis.neighbours import nearest, nearest_to_rows
from trocar.analysis.numbers import ARRAYS
from trocar.analysis.source import ArraySource

Rows = npt.NDArray[np.float32]


def rows(n: int = 1300, width: int = 7, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, width)) * rng.lognormal(size=(n, 1)) + 0.5).astype(np.float32)


def test_cosine_neighbours_are_those_of_an_exhaustive_search() -> None:
    x, queries = rows(), rows(20, seed=1)
    found = nearest(ArraySource(x), queries, 9)
    distance, expected = (
        NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute").fit(x).kneighbors(queries)
    )
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_allclose(found.scores, 1 - distance, atol=1e-5)


def test_dot_neighbours_are_those_of_all_products() -> None:
    x, queries = rows(), rows(20, seed=1)
    found = nearest(ArraySource(x), queries, 600, metric="dot")  # more than a block
    products = queries.astype(np.float64) @ x.T.astype(np.float64)
    expected = np.argsort(-products, axis=1)[:, :600]
    assert (found.rows == expected).mean() > 0.99  # float32 may swap rows whose products agree to 1e-7
    np.testing.assert_allclose(
        found.scores, np.take_along_axis(products, expected, axis=1), rtol=1e-4, atol=1e-4
    )


def test_the_two_metrics_differ_by_the_length_of_rows() -> None:
    x = np.array([[1.0, 0.0], [50.0, 50.0], [0.9, 0.1]])
    query = np.array([[1.0, 0.0]])
    assert nearest(ArraySource(x), query, 3).rows.tolist() == [[0, 2, 1]]
    assert nearest(ArraySource(x), query, 3, metric="dot").rows.tolist() == [[1, 0, 2]]


def test_a_row_is_not_its_own_neighbour_but_a_copy_of_it_is() -> None:
    x = rows(700)
    x[600] = x[3]
    index = np.array([3, 550])
    found = nearest_to_rows(ArraySource(x), index, 5)
    assert found.rows[0, 0] == 600
    assert found.scores[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert not (found.rows == index[:, None]).any()
    every = nearest(ArraySource(x), x[index], 1)
    assert every.rows[:, 0].tolist() == [3, 550]


def test_among_equal_scores_the_first_rows_win_across_blocks() -> None:
    x = np.ones((1500, 3))
    assert nearest(ArraySource(x), np.ones((2, 3)), 4).rows.tolist() == [[0, 1, 2, 3]] * 2


def test_rows_of_zeros_have_cosine_0() -> None:
    x = np.array([[0.0, 0.0], [-1.0, 0.0]])
    found = nearest(ArraySource(x), np.array([[1.0, 0.0]]), 2)
    assert (found.rows.tolist(), found.scores.tolist()) == ([[0, 1]], [[0.0, -1.0]])


def test_arrays_have_their_declared_types() -> None:
    found = nearest(ArraySource(rows()), rows(4, seed=2), 3)
    for name, declared in ARRAYS["neighbours"].items():
        assert declared.shape == ("queries", "k")
        assert (getattr(found, name).dtype, getattr(found, name).shape) == (declared.dtype, (4, 3))


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"queries": np.ones((2, 4))}, "width_mismatch", "queries"),
        ({"queries": np.ones(3)}, "width_mismatch", "queries"),
        ({"queries": np.ones((0, 3))}, "bad_value", "queries"),
        ({"queries": np.array([[1.0, 0, 0], [0, 0, 0]])}, "bad_value", "queries[1]"),
        ({"queries": np.array([[1.0, 0, np.nan]])}, "not_finite", "queries"),
        ({"queries": np.array([[1.0, 0, np.inf]]), "metric": "dot"}, "not_finite", "queries"),
        ({"k": 0}, "bad_value", "k"),
        ({"k": 11}, "too_few_rows", "k"),
        ({"k": 10, "leave_out": np.array([0, 1])}, "too_few_rows", "k"),
        ({"leave_out": np.array([0])}, "bad_value", "leave_out"),
        ({"metric": "cosin"}, "bad_value", "metric"),
        ({"source": ArraySource(np.full((10, 3), np.nan))}, "rows_not_finite", "rows"),
    ],
)
def test_refusals(change: dict[str, Any], code: str, path: str) -> None:
    given: dict[str, Any] = {"source": ArraySource(np.eye(10, 3)), "queries": np.ones((2, 3)), "k": 2}
    with pytest.raises(errors.TrocarError) as caught:
        nearest(**{**given, **change})
    assert (caught.value.code, caught.value.path) == (code, path)


def test_cosines_are_those_of_scikit_learn() -> None:
    a, b = rows(5, seed=3), rows(8, seed=4) * 1e6
    found = cosines(a, b)
    np.testing.assert_allclose(found, cosine_similarity(a, b), atol=1e-6)
    own = cosines(a)
    np.testing.assert_array_equal(own, own.T)
    np.testing.assert_allclose(np.diag(own), 1, atol=1e-6)
    assert found.dtype == ARRAYS["cosines"]["cosines"].dtype
    assert np.abs(cosines(np.repeat(a, 2, axis=0))).max() <= 1


@pytest.mark.parametrize(
    ("a", "b", "code", "path"),
    [
        (np.ones(3), None, "width_mismatch", "directions"),
        (np.ones((0, 3)), None, "bad_value", "directions"),
        (np.zeros((1, 3)), None, "bad_value", "directions[0]"),
        (np.ones((1, 3)), np.ones((1, 2)), "width_mismatch", "others"),
        (np.ones((1, 3)), np.full((1, 3), np.inf), "not_finite", "others"),
    ],
)
def test_refused_directions(a: Any, b: Any, code: str, path: str) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        cosines(a, b)
    assert (caught.value.code, caught.value.path) == (code, path)

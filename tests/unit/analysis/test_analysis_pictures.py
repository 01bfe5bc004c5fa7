"""Maps: clouds stay apart, places are those of an independent PCA, and nothing leaves but the grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.decomposition import PCA

from trocar import errors
from trocar.analysis.numbers import ARRAYS, NUMBERS
from trocar.analysis.pictures import counts, picture
from trocar.analysis.source import ArraySource

Rows = npt.NDArray[np.float32]


def clouds(n: int = 400, width: int = 8) -> tuple[Rows, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    which = rng.integers(0, 3, n)
    return (12 * rng.standard_normal((3, width))[which] + rng.standard_normal((n, width)) + 200).astype(
        np.float32
    ), which


def apart(cells: Any, which: npt.NDArray[np.int64]) -> float:
    """The share of points whose nearest cloud, by the means of the cells, is their own."""
    places = cells.astype(np.float64)
    means = np.array([places[which == c].mean(axis=0) for c in range(3)])
    nearest = ((places[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    return float((nearest == which).mean())


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_clouds_stay_apart(method: Any) -> None:
    x, which = clouds()
    found = picture(ArraySource(x), method)
    assert apart(found.cells, which[found.rows]) > 0.98
    assert len(found.rows) == 400
    assert np.ptp(found.cells, axis=0).tolist() == [255, 255]


def test_places_are_those_of_the_principal_components() -> None:
    x, _ = clouds()
    found, pca = picture(ArraySource(x)), PCA(2).fit(x.astype(np.float64))
    places = pca.transform(x.astype(np.float64))
    for axis in (0, 1):
        r = np.corrcoef(places[:, axis], found.cells[:, axis])[0, 1]
        assert abs(r) > 0.999
    np.testing.assert_allclose(found.explained, pca.explained_variance_ratio_, rtol=1e-4)


def test_one_enormous_row_does_not_squeeze_the_others() -> None:
    """Without the margin all clouds would share a few cells."""
    x, which = clouds()
    x[7] = 1e4
    found = picture(ArraySource(x))
    assert found.outside >= 1
    others = np.arange(400) != 7
    assert len(np.unique(found.cells[others, 1])) > 50
    assert apart(found.cells[others], which[others]) > 0.6


def test_only_a_sample_of_the_rows_is_drawn() -> None:
    x, _ = clouds()
    found = picture(ArraySource(x), points=50, seed=1)
    assert len(found.rows) == len(set(found.rows.tolist())) == 50
    every = picture(ArraySource(x))
    assert found.explained == every.explained  # the components are those of all rows
    r = np.corrcoef(found.cells[:, 0], every.cells[found.rows, 0])[0, 1]
    assert r > 0.99


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_one_seed_gives_the_same_cells(method: Any) -> None:
    x, _ = clouds(60)
    first, second = (picture(ArraySource(x), method, perplexity=5, seed=2) for _ in range(2))
    np.testing.assert_array_equal(first.cells, second.cells)


def test_what_leaves_has_its_declared_names_and_types() -> None:
    found = picture(ArraySource(clouds(60)[0]), points=20)
    assert tuple(found.numbers()) == NUMBERS["map"]
    for name, declared in ARRAYS["map"].items():
        assert getattr(found, name).dtype == declared.dtype
    assert found.cells.shape == (20, 2)


def test_counts_are_of_points_per_cell() -> None:
    cells = np.array([[0, 0], [255, 3], [255, 3]], dtype=np.uint8)
    table = counts(cells)
    assert table.shape == (256, 256)
    assert (table[0, 0], table[3, 255], table.sum()) == (1, 2, 3)
    assert counts(cells, np.array([1, 0, 1]))[3, 255] == 1


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"method": "umap"}, "bad_value", "method"),
        ({"points": 2}, "bad_value", "points"),
        ({"points": 5001, "method": "tsne"}, "bad_value", "points"),
        ({"perplexity": 30.0, "method": "tsne"}, "bad_value", "perplexity"),
        ({"seed": -1}, "bad_value", "seed"),
        ({"source": ArraySource(np.eye(2))}, "too_few_rows", "rows"),
        ({"source": ArraySource(np.ones((9, 3)))}, "too_few_rows", "rows"),
        ({"source": ArraySource(np.ones((9, 1)))}, "width_mismatch", "rows"),
        ({"source": ArraySource(np.full((9, 3), np.nan))}, "rows_not_finite", "rows"),
    ],
)
def test_refusals(change: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        picture(**{"source": ArraySource(np.eye(20, 4)), **change})
    assert (caught.value.code, caught.value.path) == (code, path)

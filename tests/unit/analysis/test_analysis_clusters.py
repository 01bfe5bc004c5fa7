"""k-means: planted clouds are found, and the passes are those of Lloyd's algorithm on all rows at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from trocar import errors
from trocar.analysis import clusters as module
from trocar.analysis.clusters import kmeans
from trocar.analysis.numbers import ARRAYS, NUMBERS
from trocar.analysis.source import ArraySource

Rows = npt.NDArray[np.float32]


def clouds(
    n: int = 900, k: int = 5, width: int = 6, apart: float = 8.0
) -> tuple[Rows, npt.NDArray[np.int64]]:
    """Clouds of unequal sizes, sorted, far from the origin."""
    rng = np.random.default_rng(0)
    which = np.sort(rng.choice(k, n, p=np.arange(1, k + 1) / (k * (k + 1) / 2)))
    centres = apart * rng.standard_normal((k, width)) + 500
    return (centres[which] + rng.standard_normal((n, width))).astype(np.float32), which


def test_planted_clouds_are_found() -> None:
    x, which = clouds()
    found = kmeans(ArraySource(x), 5)
    assert adjusted_rand_score(which, found.assign(ArraySource(x))) > 0.99
    assert found.sizes.sum() == 900
    assert (np.diff(found.sizes) <= 0).all()
    assert found.settled
    for centroid in found.centroids:
        near = np.abs([x[which == c].mean(axis=0) - centroid for c in range(5)]).max(axis=1)
        assert near.min() < 0.05


def test_what_it_reports_is_so_by_all_distances() -> None:
    x, _ = clouds()
    found = kmeans(ArraySource(x), 7)
    distance = cdist(x.astype(np.float64), found.centroids.astype(np.float64)) ** 2
    np.testing.assert_array_equal(found.assign(ArraySource(x)), distance.argmin(axis=1))
    np.testing.assert_array_equal(found.sizes, np.bincount(distance.argmin(axis=1), minlength=7))
    assert found.inertia == pytest.approx(distance.min(axis=1).sum(), rel=1e-5)
    total = ((x - x.mean(axis=0, dtype=np.float64)) ** 2).sum()
    assert found.explained == pytest.approx(1 - found.inertia / total, rel=1e-6)


def test_a_sample_of_a_few_rows_is_followed_by_exact_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the centroids would be those of 60 rows, three tenths of a deviation off."""
    x, _ = clouds(2000, k=3)
    monkeypatch.setattr(module, "SAMPLE_ROWS", 60)
    found = kmeans(ArraySource(x), 3)
    exact = KMeans(3, n_init=10, random_state=1).fit(x)
    assert found.inertia == pytest.approx(exact.inertia_, rel=1e-4)
    expected = exact.cluster_centers_[np.argsort(-np.bincount(exact.labels_))]
    np.testing.assert_allclose(found.centroids, expected, atol=1e-2)
    assert found.passes >= 2


def test_each_pass_lowers_the_inertia(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((800, 5)).astype(np.float32)
    monkeypatch.setattr(module, "SAMPLE_ROWS", 30)
    inertias = [kmeans(ArraySource(x), 8, passes=p).inertia for p in range(1, 6)]
    assert (np.diff(inertias) < 0).all()
    assert not kmeans(ArraySource(x), 8, passes=2).settled


def test_one_cluster_is_the_mean() -> None:
    x, _ = clouds()
    found = kmeans(ArraySource(x), 1)
    np.testing.assert_allclose(found.centroids[0], x.mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert found.explained == pytest.approx(0.0, abs=1e-6)


def test_one_seed_gives_the_same_bits_and_another_does_not() -> None:
    x = np.random.default_rng(0).standard_normal((300, 4))
    first, second, other = (kmeans(ArraySource(x), 12, restarts=1, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert not np.array_equal(first.centroids, other.centroids)


def test_numbers_have_their_declared_names() -> None:
    found = kmeans(ArraySource(clouds()[0]), 3)
    assert tuple(found.numbers()) == NUMBERS["kmeans"]
    sizes = ARRAYS["kmeans"]["sizes"]
    assert (sizes.dtype, sizes.shape, found.sizes.dtype, found.sizes.shape) == (
        "int64",
        ("clusters",),
        "int64",
        (3,),
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"clusters": 0}, "bad_value"),
        ({"clusters": 5000}, "bad_value"),
        ({"restarts": 0}, "bad_value"),
        ({"passes": 0}, "bad_value"),
        ({"seed": -1}, "bad_value"),
        ({"clusters": 21}, "too_few_rows"),
        ({"source": ArraySource(np.ones((20, 3))), "clusters": 2}, "too_few_rows"),
        ({"source": ArraySource(np.ones((0, 3))), "clusters": 1}, "too_few_rows"),
        ({"source": ArraySource(np.full((20, 3), np.nan)), "clusters": 1}, "rows_not_finite"),
    ],
)
def test_refusals(change: dict[str, Any], code: str) -> None:
    given: dict[str, Any] = {"source": ArraySource(np.eye(20, 20)), "clusters": 3}
    with pytest.raises(errors.TrocarError) as caught:
        kmeans(**{**given, **change})
    assert caught.value.code == code


def test_clusters_refuse_rows_of_another_width() -> None:
    found = kmeans(ArraySource(clouds()[0]), 2)
    with pytest.raises(errors.ProgramError) as caught:
        found.assign(ArraySource(np.eye(3)))
    assert caught.value.code == "width_mismatch"

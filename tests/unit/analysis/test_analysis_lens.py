"""Tuned lens: a planted map is recovered, the closed form is the ridge it says, and the divergence is the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import Ridge

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.lens import TunedLens, Unembedding, tuned_lens
from trocar.analysis.numbers import NUMBERS
from trocar.analysis.source import ArraySource
from trocar.analysis.training import Pace

Rows = npt.NDArray[np.float32]
WIDTH = 10


def planted(n: int = 1500, noise: float = 0.3, seed: int = 0) -> tuple[Rows, Rows, Any, Any]:
    """Rows in units that differ by feature, and their rotation, shifted and with noise."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(0.1, 30, WIDTH)
    x = (rng.standard_normal((n, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH)) + 4) * scales
    q = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    a, b = q / scales[:, None], rng.standard_normal(WIDTH)
    y = x @ a + b + noise * rng.standard_normal((n, WIDTH))
    return x.astype(np.float32), y.astype(np.float32), a, b


def unembedding(norm: Any = "rms", vocabulary: int = 17) -> Unembedding:
    rng = np.random.default_rng(9)
    matrix, gain, bias = (rng.standard_normal(shape) for shape in ((vocabulary, WIDTH), WIDTH, WIDTH))
    parts = (matrix.astype(np.float32), (1 + 0.2 * gain).astype(np.float32))
    return Unembedding(*parts, bias.astype(np.float32) if norm == "layer" else None, norm=norm)


def run(x: Rows, y: Rows, **options: Any) -> TunedLens:
    return tuned_lens(ArraySource(x), ArraySource(y), **options)


def expected_log_probabilities(u: Unembedding, h: Rows) -> npt.NDArray[np.float64]:
    """The norm and the softmax from their formulas, in float64."""
    z = h.astype(np.float64)
    if u.norm == "layer":
        z = z - z.mean(axis=1, keepdims=True)
    z = z / np.sqrt((z**2).mean(axis=1, keepdims=True) + u.eps) * u.gain
    z = z if u.bias is None else z + u.bias
    found: npt.NDArray[np.float64] = log_softmax(z @ u.matrix.T.astype(np.float64), axis=1)
    return found


def test_a_planted_map_is_recovered() -> None:
    x, y, a, b = planted(noise=0.0)
    found = run(x, y, l2=1e-8)
    np.testing.assert_allclose(x @ found.map + found.bias, x @ a + b, atol=0.02)
    assert found.fvu < 1e-4
    assert found.fvu_identity > 1


def test_the_closed_form_is_a_ridge_on_what_is_missing() -> None:
    x, y, _, _ = planted(400)
    found = run(x, y, l2=0.5)
    t = x[found.train].astype(np.float64)
    z = (t - t.mean(axis=0)) / t.std(axis=0)
    ridge = Ridge(alpha=0.5 * len(t), solver="cholesky").fit(z, y[found.train] - t)
    every = x.astype(np.float64)
    expected = every + ridge.predict((every - t.mean(axis=0)) / t.std(axis=0))
    np.testing.assert_allclose(found.translate(x), expected, rtol=1e-3, atol=1e-3)


def test_unexplained_shares_are_those_of_the_held_out_rows() -> None:
    x, y, _, _ = planted(400)
    found = run(x, y)
    held, out = y[found.test].astype(np.float64), found.translate(x)
    spread = ((held - held.mean(axis=0)) ** 2).sum()
    assert found.fvu == pytest.approx(((out[found.test] - held) ** 2).sum() / spread, rel=1e-4)
    assert found.fvu_identity == pytest.approx(((x[found.test] - held) ** 2).sum() / spread, rel=1e-4)
    assert found.fvu_train < found.fvu * 1.1
    assert 0.01 < found.fvu < 0.3


def test_a_heavy_penalty_leaves_the_identity_and_a_bias() -> None:
    x, _, _, _ = planted()
    noise = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    found = run(x, x + 0.1 * noise + 2, l2=1e4)
    np.testing.assert_allclose(found.map, np.eye(WIDTH), atol=1e-3)
    np.testing.assert_allclose(found.translate(x) - x, 2, atol=0.05)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_divergence_is_that_of_the_distributions(norm: Any) -> None:
    x, y, _, _ = planted(400)
    u = unembedding(norm)
    found = run(x, y, unembedding=u)
    p = expected_log_probabilities(u, y[found.test])
    for name, rows in (("", found.translate(x)), ("_identity", x)):
        q = expected_log_probabilities(u, rows[found.test])
        kl = (np.exp(p) * (p - q)).sum(axis=1).mean()
        assert found.divergence["kl" + name] == pytest.approx(kl, rel=1e-3)
        same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
        assert found.divergence["top1" + name] == pytest.approx(same, abs=0.011)
    assert found.divergence["kl"] < found.divergence["kl_identity"]


def test_an_unembedding_without_a_norm_is_a_product() -> None:
    x, y, _, _ = planted(100)
    u = Unembedding(np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32), norm="none")
    found = run(x, y, unembedding=u)
    p, q = (log_softmax(h[found.test].astype(np.float64) @ u.matrix.T, axis=1) for h in (y, x))
    assert found.divergence["kl_identity"] == pytest.approx(
        (np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-3
    )


def test_training_by_divergence_finds_what_least_squares_sacrifices() -> None:
    """No affine map is exact here: the one with the least squared error is not that with the least divergence."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1200, WIDTH)).astype(np.float32)
    y = np.tanh(2 * x @ rng.standard_normal((WIDTH, WIDTH)))
    u = Unembedding((3 * rng.standard_normal((12, WIDTH))).astype(np.float32), norm="rms")
    squares = run(x, y.astype(np.float32), unembedding=u)
    further = run(x, y.astype(np.float32), unembedding=u, method="kl", pace=Pace(steps=150, rate=3e-3))
    assert further.divergence["kl"] < 0.95 * squares.divergence["kl"]
    assert further.steps > 0
    assert squares.steps == 0
    assert further.fvu > squares.fvu  # it gives up squared error for it


def test_one_seed_gives_the_same_bits() -> None:
    x, y, _, _ = planted(200)
    options: dict[str, Any] = {"unembedding": unembedding(), "method": "kl", "pace": Pace(steps=5, every=1)}
    first, second = run(x, y, **options), run(x, y, **options)
    assert first.steps > 0
    np.testing.assert_array_equal(first.map, second.map)


def test_groups_stay_on_one_side() -> None:
    x, y, _, _ = planted(200)
    group = np.arange(200) // 10
    found = run(x, y, groups=group)
    assert not set(group[found.train]) & set(group[found.test])


def test_numbers_have_their_declared_names() -> None:
    x, y, _, _ = planted(100)
    assert tuple(run(x, y).numbers()) == NUMBERS["tuned_lens"]
    assert tuple(run(x, y, unembedding=unembedding()).numbers()) == NUMBERS["tuned_lens_kl"]
    assert {name: a.shape for name, a in run(x, y).arrays().items()} == {
        "map": (WIDTH, WIDTH),
        "bias": (WIDTH,),
    }


def test_moments_of_residuals_are_those_of_the_arrays() -> None:
    x, y, _, _ = planted(700)
    found = streams.residuals(ArraySource(x), ArraySource(y))
    a, r = x.astype(np.float64), y.astype(np.float64) - x
    np.testing.assert_allclose(found.mean, a.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.gap, r.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.own, np.cov(a.T, bias=True), rtol=1e-4, atol=1e-4)
    both = np.cov(np.hstack([a, r]).T, bias=True)
    np.testing.assert_allclose(found.cross, both[:WIDTH, WIDTH:], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found.variance, r.var(axis=0), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"last": np.eye(39, 3)}, "rows_mismatch", "rows"),
        ({"last": np.eye(40, 4)}, "width_mismatch", "rows"),
        ({"last": np.full((40, 3), np.nan)}, "rows_not_finite", "rows"),
        ({"last": np.ones((40, 3))}, "too_few_rows", "rows"),
        ({"groups": [1] * 40}, "too_few_rows", "rows"),
        ({"method": "kl"}, "missing_field", "unembedding"),
        ({"method": "kld"}, "bad_value", "method"),
        ({"unembedding": Unembedding(np.ones((5, 4), dtype=np.float32))}, "width_mismatch", "unembedding"),
        ({"l2": 0.0}, "bad_value", "l2"),
        ({"pace": Pace(steps=0)}, "bad_value", "steps"),
        ({"test_fraction": 1.0}, "bad_value", "test_fraction"),
    ],
)
def test_refusals(change: dict[str, Any], code: str, path: str) -> None:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {"last": rng.standard_normal((40, 3)), **change}
    with pytest.raises(errors.TrocarError) as caught:
        tuned_lens(ArraySource(rng.standard_normal((40, 3))), ArraySource(given.pop("last")), **given)
    assert (caught.value.code, caught.value.path) == (code, path)


def test_training_needs_two_groups_on_its_side() -> None:
    x, y, _, _ = planted(40)
    with pytest.raises(errors.ProgramError) as caught:
        run(x, y, groups=[0] * 20 + [1] * 20, method="kl", unembedding=unembedding())
    assert (caught.value.code, caught.value.path) == ("too_few_rows", "groups")

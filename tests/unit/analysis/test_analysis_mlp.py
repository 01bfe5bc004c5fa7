"""MLP probe: it learns what no linear probe can, stops in time, and its arrays give the same scores again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from trocar import errors
from trocar.analysis import fit
from trocar.analysis.mlp import Mlp, mlp
from trocar.analysis.numbers import NUMBERS
from trocar.analysis.source import ArraySource
from trocar.analysis.training import Pace

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def parity(n: int = 900, width: int = 8, seed: int = 0) -> tuple[Rows, Ints]:
    """Four clouds at the corners of a square, in units that differ by column; the class is the diagonal."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 2, size=(n, 2))
    x = 0.5 * rng.standard_normal((n, width))
    x[:, :2] += 2.0 * corners - 1
    scales = np.geomspace(0.01, 1000, width)
    return (x * scales + 5 * scales).astype(np.float32), corners[:, 0] ^ corners[:, 1]


def test_it_learns_parity_which_a_linear_probe_cannot() -> None:
    x, y = parity()
    found = mlp(ArraySource(x), y, hidden=16, pace=Pace(steps=500))
    linear = fit("logistic", {"resid_post.0": x}, y)
    assert linear.sites["resid_post.0"].metrics.headline < 0.65
    assert found.metrics.test_auroc > 0.93
    assert found.metrics.test_accuracy > 0.85
    assert abs(found.metrics.control_auroc - 0.5) < 0.2
    assert found.metrics.interval[0] < found.metrics.test_auroc < found.metrics.interval[1]


def test_its_scores_are_those_of_the_network_it_describes() -> None:
    x, y = parity(300)
    found = mlp(ArraySource(x), y, hidden=5, pace=Pace(steps=3))
    parts = {name: torch.from_numpy(value).double() for name, value in found.probe.arrays().items()}
    net = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(parts["first"].T)
        net[0].bias.copy_(parts["first_bias"])
        net[2].weight.copy_(parts["second"][None])
        net[2].bias.copy_(parts["bias"])
        expected = net((torch.from_numpy(x).double() - parts["mean"]) * parts["inverse"])[:, 0].numpy()
    again = Mlp.from_arrays(found.probe.arrays())
    np.testing.assert_allclose(found.probe.scores(ArraySource(x)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(again.scores(ArraySource(x)), found.probe.scores(ArraySource(x)))


def test_the_metrics_are_those_of_the_scores_on_the_split() -> None:
    x, y = parity(400)
    found = mlp(ArraySource(x), y, hidden=8, pace=Pace(steps=30))
    scores = found.probe.scores(ArraySource(x))
    upper, lower = scores[found.test][y[found.test] == 1], scores[found.test][y[found.test] == 0]
    assert found.metrics.test_auroc == pytest.approx((upper[:, None] > lower).mean())
    assert found.metrics.test_accuracy == ((scores > 0) == (y == 1))[found.test].mean()
    assert tuple(found.numbers()) == NUMBERS["mlp"]


def test_one_seed_gives_the_same_bits_and_another_does_not() -> None:
    x, y = parity(200)
    torch.manual_seed(1)
    first = mlp(ArraySource(x), y, hidden=4, pace=Pace(steps=2))
    torch.manual_seed(2)
    second = mlp(ArraySource(x), y, hidden=4, pace=Pace(steps=2))
    other = mlp(ArraySource(x), y, hidden=4, pace=Pace(steps=2), seed=1)
    np.testing.assert_array_equal(first.probe.first, second.probe.first)
    assert not np.array_equal(first.probe.first, other.probe.first)


def test_training_leaves_the_random_numbers_of_torch_alone() -> None:
    x, y = parity(100)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    mlp(ArraySource(x), y, hidden=4, pace=Pace(steps=1))
    assert torch.rand(1) == expected


def test_it_stops_when_held_out_rows_say_so() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 30)).astype(np.float32), rng.integers(0, 2, 200)
    found = mlp(ArraySource(x), y, hidden=64, pace=Pace(patience=100, every=10, rate=1e-2))
    assert found.steps < 100
    assert found.metrics.train_auroc < 0.95  # 64 units on 200 rows of noise reach 1.0 when nothing stops them


def test_groups_stay_on_one_side() -> None:
    x, y = parity(100)
    copies = np.repeat(np.arange(100), 6)
    found = mlp(ArraySource(x[copies]), y[copies], copies, hidden=4, pace=Pace(steps=2))
    assert not set(copies[found.train]) & set(copies[found.test])


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"labels": [0, 1] * 3}, "bad_labels", "labels"),
        ({"labels": [0] * 40}, "too_few_rows", "labels"),
        ({"labels": [1, 1, *[0] * 38]}, "too_few_rows", "labels"),
        ({"hidden": 0}, "bad_value", "hidden"),
        ({"batch": 1}, "bad_value", "batch"),
        ({"seed": -1}, "bad_value", "seed"),
        ({"test_fraction": 1.0}, "bad_value", "test_fraction"),
        ({"pace": Pace(steps=0)}, "bad_value", "steps"),
        ({"pace": Pace(patience=0)}, "bad_value", "patience"),
        ({"pace": Pace(decay=-1.0)}, "bad_value", "decay"),
        ({"pace": Pace(rate=0.0)}, "bad_value", "rate"),
        ({"source": ArraySource(np.full((40, 2), np.nan))}, "rows_not_finite", "rows"),
    ],
)
def test_refusals(change: dict[str, Any], code: str, path: str) -> None:
    given: dict[str, Any] = {"source": ArraySource(np.eye(40, 3)), "labels": [0, 1] * 20}
    with pytest.raises(errors.TrocarError) as caught:
        mlp(**{**given, **change})
    assert (caught.value.code, caught.value.path) == (code, path)


def test_a_probe_refuses_rows_of_another_width() -> None:
    x, y = parity(60)
    probe = mlp(ArraySource(x), y, hidden=2, pace=Pace(steps=1)).probe
    with pytest.raises(errors.ProgramError, match="width 8, not 3"):
        probe.scores(ArraySource(np.eye(4, 3)))

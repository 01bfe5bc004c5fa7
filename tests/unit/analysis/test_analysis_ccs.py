"""CCS and CRC on planted pairs: truth is found without labels, though the prompt's own word is far larger."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit
from sklearn.decomposition import PCA

from trocar import errors
from trocar.analysis.ccs import PairFit, ccs, crc
from trocar.analysis.numbers import NUMBERS
from trocar.analysis.source import ArraySource

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Fit = Any


def planted(n: int = 600, width: int = 12, gap: float = 4.0, seed: int = 0) -> tuple[Rows, Rows, Ints, Any]:
    """Pairs that share a topic, differ by a constant word, and lie `gap` apart along a truth direction."""
    rng = np.random.default_rng(seed)
    truth, word = rng.standard_normal((2, width))
    truth /= np.linalg.norm(truth)
    y = rng.integers(0, 2, n)
    topic = 3 * rng.standard_normal((n, width))
    topic -= np.outer(topic @ truth, truth)  # what a statement is about says nothing of its truth
    noise = 0.3 * rng.standard_normal((2, n, width))
    side = np.outer(2 * y - 1, gap / 2 * truth)
    yes, no = topic + side + 10 * word + noise[0] + 100, topic - side - 10 * word + noise[1] + 100
    return yes.astype(np.float32), no.astype(np.float32), y, truth


def cosine(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def run(method: Fit, yes: Rows, no: Rows, **options: Any) -> PairFit:
    found: PairFit = method(ArraySource(yes), ArraySource(no), **options)
    return found


@pytest.mark.parametrize("method", [ccs, crc])
def test_truth_is_found_without_labels(method: Fit) -> None:
    yes, no, y, truth = planted()
    found = run(partial(ccs, steps=400) if method is ccs else crc, yes, no)
    assert abs(cosine(found.direction, truth)) > 0.95
    right = ((found.scores(ArraySource(yes), ArraySource(no)) > 0) == (y == 1)).mean()
    assert max(right, 1 - right) > 0.97
    assert found.numbers()["loss"] < 0.1  # one that always says 1/2 has 0.25
    assert np.linalg.norm(found.direction) == pytest.approx(4.0, rel=0.1)  # one step changes the answer


@pytest.mark.parametrize("method", [ccs, crc])
def test_labels_choose_the_sign_and_score_but_not_the_direction(method: Fit) -> None:
    yes, no, y, truth = planted()
    method = partial(ccs, steps=300) if method is ccs else crc
    blind, seeing = run(method, yes, no, seed=3), run(method, yes, no, labels=y, seed=3)
    opposed = run(method, yes, no, labels=1 - y, seed=3)
    assert cosine(seeing.direction, truth) > 0.95
    np.testing.assert_array_equal(opposed.weights, -seeing.weights)
    np.testing.assert_array_equal(np.abs(blind.weights), np.abs(seeing.weights))
    assert seeing.numbers()["accuracy"] > 0.97
    assert seeing.numbers()["auroc"] > 0.99


def test_the_losses_are_those_of_the_paper_on_the_held_out_pairs() -> None:
    yes, no, y, _ = planted(300, gap=1.5)
    found = run(ccs, yes, no, labels=y, steps=60)
    w, flip = found.weights.astype(np.float64), found.verdict.sign
    p = expit(flip * (yes @ w + found.bias_yes))[found.test]
    q = expit(flip * (no @ w + found.bias_no))[found.test]
    assert found.numbers()["consistency"] == pytest.approx(((p - (1 - q)) ** 2).mean(), rel=1e-4)
    assert found.numbers()["confidence"] == pytest.approx((np.minimum(p, q) ** 2).mean(), rel=1e-4)
    assert found.numbers()["loss"] == pytest.approx(
        found.numbers()["consistency"] + found.numbers()["confidence"]
    )
    scores = found.scores(ArraySource(yes), ArraySource(no))
    assert found.numbers()["accuracy"] == ((scores > 0) == (y == 1))[found.test].mean()


def test_training_lowers_the_loss_and_the_best_start_is_kept() -> None:
    yes, no, _, _ = planted(300)
    short, long = (run(ccs, yes, no, steps=steps, restarts=6) for steps in (1, 300))
    assert long.losses[0] < short.losses[0] / 2
    assert len(long.losses) == 6
    assert (np.diff(long.losses) >= 0).all()
    assert long.numbers()["loss_train"] == long.losses[0]


def test_crc_is_the_first_component_of_the_standardised_differences() -> None:
    yes, no, _, _ = planted(400, gap=1.0)
    found = run(crc, yes, no)
    a, b = yes[found.train].astype(np.float64), no[found.train].astype(np.float64)
    scale = np.sqrt((a.var(axis=0) + b.var(axis=0)) / 2)
    pca = PCA(1).fit((a - b) / scale)
    expected = pca.components_[0] / scale
    assert abs(cosine(found.weights, expected)) == pytest.approx(1.0, abs=1e-5)
    assert found.explained == pytest.approx(pca.explained_variance_ratio_[0], rel=1e-4)


def test_the_word_that_sides_add_is_taken_away() -> None:
    """Scores stay the same when all "yes" rows move: only the means of both sides take it up."""
    yes, no, y, _ = planted(200)
    moved = yes + 64.0
    first, second = run(crc, yes, no, labels=y), run(crc, moved, no, labels=y)
    np.testing.assert_allclose(
        first.scores(ArraySource(yes), ArraySource(no)),
        second.scores(ArraySource(moved), ArraySource(no)),
        atol=1e-3,
    )


def test_untrained_directions_show_when_any_direction_will_do() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    hard_yes, hard_no, hard_y, _ = planted(300, width=40, gap=2.0)
    side = np.outer(2 * y - 1, np.full(2, 3.0))
    noise = 0.1 * rng.standard_normal((2, 300, 2))
    easy = run(
        ccs, (side + noise[0]).astype(np.float32), (noise[1] - side).astype(np.float32), labels=y, steps=50
    )
    hard = run(ccs, hard_yes, hard_no, labels=hard_y, steps=50)
    assert easy.numbers()["accuracy_random"] > 0.95
    assert hard.numbers()["accuracy_random"] < 0.8


def test_numbers_have_their_declared_names() -> None:
    yes, no, y, _ = planted(60)
    for method in (partial(ccs, steps=2), crc):
        name = "crc" if method is crc else "ccs"
        assert tuple(run(method, yes, no).numbers()) == NUMBERS[name]
        assert tuple(run(method, yes, no, labels=y).numbers()) == NUMBERS[name + "_labelled"]
        assert set(run(method, yes, no).arrays()) == {"direction", "weights", "bias"}


def test_one_seed_gives_the_same_bits() -> None:
    yes, no, _, _ = planted(100)
    first, second, other = (run(ccs, yes, no, steps=20, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert not np.array_equal(first.weights, other.weights)


def test_a_constant_feature_has_no_weight() -> None:
    yes, no, _, _ = planted(100)
    yes[:, 3] = no[:, 3] = 7.0
    for method in (partial(ccs, steps=20), crc):
        assert run(method, yes, no).weights[3] == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"no": np.eye(39, 3)}, "rows_mismatch"),
        ({"no": np.eye(40, 4)}, "width_mismatch"),
        ({"labels": [0, 1] * 3}, "bad_labels"),
        ({"labels": [1] * 40}, "too_few_rows"),
        ({"groups": [0] * 40}, "too_few_rows"),
        ({"yes": np.eye(2, 3), "no": np.eye(2, 3)}, "too_few_rows"),
        ({"yes": np.eye(0, 3), "no": np.eye(0, 3)}, "too_few_rows"),
        ({"no": np.full((40, 3), np.inf)}, "rows_not_finite"),
        ({"seed": -1}, "bad_value"),
        ({"test_fraction": 0.0}, "bad_value"),
    ],
)
@pytest.mark.parametrize("method", [ccs, crc])
def test_refusals(method: Fit, change: dict[str, Any], code: str) -> None:
    given: dict[str, Any] = {"yes": np.eye(40, 3), "no": np.eye(40, 3)[::-1], **change}
    with pytest.raises(errors.TrocarError) as caught:
        method(ArraySource(given.pop("yes")), ArraySource(given.pop("no")), **given)
    assert caught.value.code == code


@pytest.mark.parametrize("change", [{"restarts": 0}, {"restarts": 65}, {"steps": 0}, {"rate": -1.0}])
def test_refused_options(change: dict[str, Any]) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        ccs(ArraySource(np.eye(40, 3)), ArraySource(np.eye(40, 3)), **change)
    assert (caught.value.code, caught.value.path) == ("bad_value", next(iter(change)))


def test_pairs_without_any_difference_have_no_component() -> None:
    x = np.random.default_rng(0).standard_normal((20, 3))
    with pytest.raises(errors.ProgramError, match="all equal"):
        crc(ArraySource(x), ArraySource(x))

"""Dictionaries at work: features, measures and examples against numpy, and features as rows of other analyses."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from dictionaries_rows import ATOMS, WIDTH, random_dictionary

from trocar import errors
from trocar.analysis import fit
from trocar.analysis.source import ArraySource
from trocar.dictionaries import Dictionary, FeatureRows, encode, measure, top_examples
from trocar.dictionaries.measures import NUMBERS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the extra `sae`")

Array = npt.NDArray[Any]


def rows_of(n: int = 1500, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)


def weights(dictionary: Dictionary) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in dictionary.tensors().items()}


def expected(dictionary: Dictionary, x: Array) -> tuple[Array, Array]:
    """Activations and reconstructions, from the papers' formulas in float64."""
    w = weights(dictionary)
    transcoder = "transcoder" in dictionary.architecture
    before = (x if transcoder else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if dictionary.architecture == "topk":
        cut = np.sort(before, axis=1)[:, -3][:, None]
        acts = np.where(before >= cut, np.maximum(before, 0), 0)
    else:
        acts = np.where(before > np.maximum(w.get("threshold", np.zeros(ATOMS)), 0), before, 0)
    return acts, acts @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


@pytest.mark.parametrize(
    "architecture", ["topk", "jumprelu", "standard", "transcoder", "jumprelu_skip_transcoder"]
)
def test_features_and_reconstructions_are_those_of_the_formulas(architecture: str) -> None:
    dictionary, x = random_dictionary(architecture), rows_of(200)
    acts, out = dictionary.both(x)
    want_acts, want_out = expected(dictionary, x.astype(np.float64))
    np.testing.assert_allclose(acts, want_acts, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-4)
    assert acts.dtype == out.dtype == np.float32
    assert 0 < np.count_nonzero(acts) < acts.size


def test_measures_are_those_of_numpy() -> None:
    dictionary, x = random_dictionary("jumprelu"), rows_of() + 50
    dictionary._module.b_dec += 50
    dictionary._module.threshold[5] = 1e9
    found = measure(dictionary, ArraySource(x))
    acts, out = expected(dictionary, x.astype(np.float64))
    active = acts > 0
    fvu = np.square(out - x).sum() / np.square(x - x.mean(axis=0, dtype=np.float64)).sum()
    assert found.fvu == pytest.approx(fvu, rel=1e-4)
    assert found.l0 == pytest.approx(active.sum(axis=1).mean(), rel=1e-3)
    assert (found.dead, found.rows) == (1, 1500)
    np.testing.assert_allclose(found.density, active.mean(axis=0), atol=2e-3)
    strength = acts.sum(axis=0) / np.maximum(active.sum(axis=0), 1)
    np.testing.assert_allclose(found.mean, strength, rtol=1e-3)
    np.testing.assert_allclose(found.largest, acts.max(axis=0), rtol=1e-4)
    assert found.density[5] == found.mean[5] == found.largest[5] == 0
    assert tuple(found.numbers()) == NUMBERS


def test_the_mean_row_leaves_all_variance_() -> None:
    x, dictionary = rows_of(), random_dictionary("standard")
    dictionary._module.W_dec.zero_()
    dictionary._module.b_dec.copy_(dictionary._module.b_dec.new_tensor(x.mean(axis=0)))
    assert measure(dictionary, ArraySource(x)).fvu == pytest.approx(1, rel=1e-4)


def test_a_transcoder_is_measured_on_its_target() -> None:
    dictionary, x = random_dictionary("transcoder"), rows_of()
    y = expected(dictionary, x.astype(np.float64))[1].astype(np.float32)
    assert measure(dictionary, ArraySource(x), ArraySource(y)).fvu < 1e-6
    assert measure(dictionary, ArraySource(x), ArraySource(y[::-1].copy())).fvu > 0.5
    with pytest.raises(errors.ProgramError) as e:
        measure(dictionary, ArraySource(x))
    assert (e.value.code, e.value.path) == ("width_mismatch", "target")
    with pytest.raises(errors.ProgramError) as e:
        measure(dictionary, ArraySource(x), ArraySource(y[:-1]))
    assert e.value.code == "rows_mismatch"


@pytest.mark.parametrize("most", [512, 7])
def test_codes_are_the_activations(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trocar.dictionaries.dictionary.ACTS_BYTES", 4 * ATOMS * most)
    dictionary, x = random_dictionary(), rows_of(700)
    dense = np.zeros((700, ATOMS), dtype=np.float32)
    for codes in encode(dictionary, ArraySource(x)):
        assert len(codes.starts) - 1 == min(most, 700 - codes.first)
        assert codes.starts[0] == 0
        assert codes.starts[-1] == len(codes.features) == len(codes.values)
        for i in range(len(codes.starts) - 1):
            part = slice(codes.starts[i], codes.starts[i + 1])
            dense[codes.first + i, codes.features[part]] = codes.values[part]
    np.testing.assert_allclose(dense, expected(dictionary, x.astype(np.float64))[0], rtol=1e-4, atol=1e-5)


def test_examples_are_the_strongest_rows_of_each_feature() -> None:
    dictionary, x = random_dictionary(), rows_of()
    acts = dictionary.encode(x)
    found = top_examples(dictionary, ArraySource(x), k=5)
    assert (found.features == np.arange(ATOMS)).all()
    for feature in range(ATOMS):
        best = np.argsort(-acts[:, feature], kind="stable")[:5]
        best = best[acts[best, feature] > 0]
        assert found.rows[feature, : len(best)].tolist() == best.tolist()
        np.testing.assert_allclose(found.values[feature, : len(best)], acts[best, feature], rtol=1e-5)
        assert (found.rows[feature, len(best) :] == -1).all()
        assert (found.values[feature, len(best) :] == 0).all()


def test_the_earlier_of_equal_rows_stands_first_and_rare_features_have_fewer() -> None:
    dictionary = random_dictionary("jumprelu")
    x = np.tile(rows_of(40), (30, 1))  # every row thirty times, across blocks
    dictionary._module.threshold[2] = 1e9
    found = top_examples(dictionary, ArraySource(x), k=3, features=[2, 7, 7])
    assert found.rows[0].tolist() == [-1, -1, -1]
    first = int(found.rows[1, 0])
    assert found.rows[1].tolist() == [first, first + 40, first + 80]
    assert first < 40
    assert (found.rows[1] == found.rows[2]).all()


@pytest.mark.parametrize(
    ("asked", "path"),
    [({"k": 0}, "k"), ({"k": 257}, "k"), ({"features": [16]}, "features"), ({"features": [-1]}, "features")],
)
def test_examples_that_cannot_be(asked: dict[str, Any], path: str) -> None:
    with pytest.raises(errors.ProgramError) as e:
        top_examples(random_dictionary(), ArraySource(rows_of(9)), **asked)
    assert (e.value.code, e.value.path) == ("bad_value", path)


def test_features_are_rows_for_other_analyses() -> None:
    dictionary, x = random_dictionary(), rows_of(600)
    features = FeatureRows(dictionary, ArraySource(x))
    assert (features.width, len(features)) == (ATOMS, 600)
    labels = dictionary.encode(x)[:, 4] > 0
    probe = fit("logistic", {"resid_post.0": features}, labels)
    assert probe.sites["resid_post.0"].metrics.headline > 0.99
    assert int(np.abs(probe.sites["resid_post.0"].weights).argmax()) == 4


@pytest.mark.parametrize("verb", [measure, top_examples, FeatureRows, lambda d, s: list(encode(d, s))])
def test_rows_of_another_width_are_refused(verb: Any) -> None:
    with pytest.raises(errors.ProgramError) as e:
        verb(random_dictionary(), ArraySource(np.ones((9, 13), np.float32)))
    assert (e.value.code, e.value.path) == ("width_mismatch", "rows")


@pytest.mark.parametrize("verb", [measure, top_examples, lambda d, s: list(encode(d, s))])
def test_rows_that_are_not_finite_are_refused(verb: Any) -> None:
    x = rows_of(9)
    x[4, 4] = np.inf
    with pytest.raises(errors.ProgramError) as e:
        verb(random_dictionary(), ArraySource(x))
    assert e.value.code == "rows_not_finite"


def test_rows_without_variance_have_no_fvu() -> None:
    with pytest.raises(errors.ProgramError) as e:
        measure(random_dictionary(), ArraySource(np.ones((9, WIDTH), np.float32)))
    assert e.value.code == "too_few_rows"


def test_many_features_take_few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, x = random_dictionary("jumprelu"), rows_of(300)
    target = ArraySource(x[::-1].copy())
    before = measure(dictionary, ArraySource(x)), measure(dictionary, ArraySource(x), target)
    examples = top_examples(dictionary, ArraySource(x), k=4)
    assert dictionary.block_rows == 512
    monkeypatch.setattr("trocar.dictionaries.dictionary.ACTS_BYTES", 4 * ATOMS * 9)
    sizes: list[int] = []
    encoder = Dictionary.encode
    monkeypatch.setattr(Dictionary, "encode", lambda d, rows: sizes.append(len(rows)) or encoder(d, rows))
    after = measure(dictionary, ArraySource(x)), measure(dictionary, ArraySource(x), target)
    for one, other in zip(before, after, strict=True):
        assert other.numbers() == pytest.approx(one.numbers(), rel=1e-6)
    again = top_examples(dictionary, ArraySource(x), k=4)
    assert (again.rows == examples.rows).all()
    assert sum(len(block) for block in FeatureRows(dictionary, ArraySource(x)).blocks()) == 300
    assert max(sizes) == 9

"""Probes over prompts: needles are found in long prompts, and streamed scores are those of whole prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import softmax

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.aggregate import HOW, How, Running, starts_of
from trocar.analysis.numbers import NUMBERS
from trocar.analysis.sequence_training import Net, Prompts, whole_prompts
from trocar.analysis.sequences import SequenceProbe, sequence_probe
from trocar.analysis.source import ArraySource
from trocar.analysis.training import Pace

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def haystacks(n: int = 160, most: int = 60, width: int = 8, seed: int = 0) -> tuple[Rows, Ints, Ints]:
    """Prompts of 20 to `most` tokens; where y is 1, one token lies far along one direction.

    Another direction varies from prompt to prompt and says nothing, which is what a mean over rows sees most.
    """
    rng = np.random.default_rng(seed)
    y, lengths = rng.integers(0, 2, n), rng.integers(20, most, n)
    prompt = np.repeat(rng.permutation(n), lengths)
    x = rng.standard_normal((len(prompt), width))
    x[:, 1:4] += 2 * np.repeat(rng.standard_normal((n, 3)), lengths, axis=0)
    ends = np.cumsum(lengths)
    needles = ends - 1 - rng.integers(0, 20, n)
    x[needles[y == 1], 0] += 6.0
    return x.astype(np.float32), prompt, y


def run(how: How, x: Rows, prompt: Ints, y: Ints, **options: Any) -> Any:
    return sequence_probe(how, ArraySource(x), prompt, y, **options)


def random_probe(how: How, width: int, heads: int, hidden: int) -> SequenceProbe:
    rng = np.random.default_rng(5)
    features = hidden or width
    shapes = {
        "mean": (width,), "inverse": (width,), "first": (width, hidden), "first_bias": (hidden,),
        "values": (features, heads), "queries": (features, heads), "bias": (1,),
    }  # fmt: skip
    return SequenceProbe.from_arrays(
        how, {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    )


def by_definition(probe: SequenceProbe, x: Rows) -> float:
    """The score of one prompt, from the formula in the docstring, all rows at once."""
    p = {name: value.astype(np.float64) for name, value in probe.arrays().items()}
    y = (x - p["mean"]) * p["inverse"]
    if len(p["first_bias"]):
        y = np.maximum(y @ p["first"] + p["first_bias"], 0)
    values = y @ p["values"]
    weights = (
        softmax(y @ p["queries"], axis=0) if probe.how == "attention" else np.full(values.shape, 1 / len(x))
    )
    per_head = values.max(axis=0) if probe.how in ("max", "multimax") else (weights * values).sum(axis=0)
    return float(per_head.sum() + p["bias"][0])


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("how", HOW)
def test_streamed_scores_are_those_of_whole_prompts(how: How, hidden: int) -> None:
    x, prompt, _ = haystacks(60)  # 2400 rows: prompts are cut by the ends of blocks
    probe = random_probe(how, 8, 1 if how in ("mean", "max") else 3, hidden)
    order = prompt[np.sort(np.unique(prompt, return_index=True)[1])]
    expected = [by_definition(probe, x[prompt == p]) for p in order]
    np.testing.assert_allclose(probe.scores(ArraySource(x), prompt), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_token_by_token_gives_the_same_totals_as_all_at_once(how: How) -> None:
    rng = np.random.default_rng(0)
    values, logits = rng.standard_normal((2, 90, 2)).astype(np.float32)
    logits *= 300  # a plain exp would overflow
    number = np.repeat([0, 1, 2], [50, 1, 39])
    once, slow = Running(how, 3, 2), Running(how, 3, 2)
    once.add(number, values, logits)
    for i in range(90):
        slow.add(number[i : i + 1], values[i : i + 1], logits[i : i + 1])
    slow.add(number[:0], values[:0], logits[:0])
    np.testing.assert_allclose(slow.totals(), once.totals(), rtol=1e-12)
    assert np.isfinite(once.totals()).all()


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("how", HOW)
def test_what_is_trained_is_what_is_scored(how: How, hidden: int) -> None:
    net = Net(how, 4, (2, hidden), np.random.default_rng(1))
    rng = np.random.default_rng(2)
    with torch.no_grad():
        for part in net.parameters():
            part.copy_(torch.from_numpy(rng.standard_normal(part.shape).astype(np.float32)))
    x, lengths = rng.standard_normal((12, 4)).astype(np.float32), [3, 1, 8]
    segment = np.repeat(np.arange(3), lengths)
    with torch.no_grad():
        trained = net(Prompts(torch.from_numpy(x), torch.from_numpy(segment), torch.arange(3))).numpy()
    arrays = {name: value.detach().numpy() for name, value in net.named_parameters()}
    probe = SequenceProbe.from_arrays(how, {"mean": np.zeros(4), "inverse": np.ones(4), **arrays})
    np.testing.assert_allclose(probe.scores(ArraySource(x), segment), trained, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def fits() -> dict[How, Any]:
    """One linear head of each kind, on the same haystacks."""
    x, prompt, y = haystacks()
    pace = Pace(steps=400, rate=1e-2)
    return {how: run(how, x, prompt, y, pace=pace, heads=1, hidden=0) for how in HOW}


def test_a_needle_is_lost_in_the_mean_and_found_by_the_others(fits: dict[How, Any]) -> None:
    auroc = {how: found.metrics.test_auroc for how, found in fits.items()}
    assert auroc["mean"] < 0.85
    for how in ("max", "attention", "multimax"):
        assert auroc[how] > auroc["mean"] + 0.1, auroc
        assert abs(fits[how].metrics.control_auroc - 0.5) < 0.3
    assert auroc["max"] == auroc["multimax"] > 0.95  # one head, nothing before it: the same probe


def test_multimax_keeps_in_long_prompts_what_attention_trained_on_short_ones_loses(
    fits: dict[How, Any],
) -> None:
    """The shift that Kramar et al. 2026 are about: trained on up to 60 tokens, tested on 1500 more."""
    x, prompt, y = haystacks(60, seed=1)
    rng = np.random.default_rng(3)
    numbers = prompt[np.sort(np.unique(prompt, return_index=True)[1])]
    long = [np.vstack([rng.standard_normal((1500, 8)), x[prompt == p]]) for p in numbers]
    source = ArraySource(np.concatenate(long).astype(np.float32))
    of = np.repeat(np.arange(60), [len(rows) for rows in long])
    scores = {how: fits[how].probe.scores(source, of) for how in ("attention", "multimax")}
    auroc = {how: (s[y == 1][:, None] > s[y == 0]).mean() for how, s in scores.items()}
    assert auroc["multimax"] > 0.9
    assert auroc["multimax"] > auroc["attention"] + 0.05


@pytest.mark.parametrize("how", HOW)
def test_the_defaults_run_and_report(how: How) -> None:
    x, prompt, y = haystacks(40)
    found = run(how, x, prompt, y, pace=Pace(steps=2))
    scores = found.probe.scores(ArraySource(x), prompt)
    upper, lower = scores[found.test][y[found.test] == 1], scores[found.test][y[found.test] == 0]
    assert found.metrics.test_auroc == pytest.approx((upper[:, None] > lower).mean())
    assert tuple(found.numbers()) == NUMBERS["sequence"]
    again = SequenceProbe.from_arrays(how, found.probe.arrays())
    np.testing.assert_array_equal(again.scores(ArraySource(x), prompt), scores)
    assert found.probe.values.shape[1] == (10 if how == "multimax" else 1)


def test_one_seed_gives_the_same_bits_and_another_does_not() -> None:
    x, prompt, y = haystacks(40)
    first, second, other = (
        run("multimax", x, prompt, y, hidden=4, pace=Pace(steps=2), seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.probe.values, second.probe.values)
    assert not np.array_equal(first.probe.values, other.probe.values)


@pytest.mark.parametrize("room", [1000, 70, 40])
def test_each_prompt_comes_once_and_whole_in_random_order(room: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 25)
    prompt = np.repeat(np.arange(25), lengths)
    x = np.column_stack([prompt, np.arange(len(prompt))]).astype(np.float32)
    starts, chosen = starts_of(prompt, len(prompt)), np.arange(0, 25, 2)
    seen = []
    for rows, segment, index in whole_prompts(ArraySource(x), starts, chosen, 4, rng, room):
        assert len(index) <= 4
        for i, number in enumerate(index):
            np.testing.assert_array_equal(rows[segment == i], x[prompt == number])
        seen.extend(index.tolist())
    assert sorted(seen) == chosen.tolist() != seen


def test_groups_stay_on_one_side() -> None:
    x, prompt, y = haystacks(40)
    group = np.arange(40) // 4
    found = run("mean", x, prompt, y, groups=group, pace=Pace(steps=1))
    assert not set(group[found.train]) & set(group[found.test])


@pytest.mark.parametrize(
    ("change", "code", "path"),
    [
        ({"how": "multi_max"}, "bad_value", "how"),
        ({"heads": 2, "how": "mean"}, "bad_value", "heads"),
        ({"heads": 65}, "bad_value", "heads"),
        ({"hidden": -1}, "bad_value", "hidden"),
        ({"batch": 0}, "bad_value", "batch"),
        ({"seed": -1}, "bad_value", "seed"),
        ({"test_fraction": 0}, "bad_value", "test_fraction"),
        ({"labels": [0, 1] * 8}, "bad_labels", "labels"),
        ({"labels": [0] * 20}, "too_few_rows", "labels"),
        ({"prompt": np.zeros(39)}, "rows_mismatch", "prompt"),
        ({"prompt": np.arange(40) % 20}, "rows_mismatch", "prompt"),
        ({"source": ArraySource(np.full((40, 2), np.nan))}, "rows_not_finite", "rows"),
        ({"source": ArraySource(np.ones((0, 2))), "prompt": np.zeros(0)}, "too_few_rows", "rows"),
    ],
)
def test_refusals(change: dict[str, Any], code: str, path: str) -> None:
    given: dict[str, Any] = {
        "how": "attention", "source": ArraySource(np.eye(40, 3)), "prompt": np.arange(40) // 2, "labels": [0, 1] * 10,
    }  # fmt: skip
    with pytest.raises(errors.TrocarError) as caught:
        sequence_probe(**{**given, **change})
    assert (caught.value.code, caught.value.path) == (code, path)


def test_a_prompt_that_training_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, prompt, y = haystacks(40)
    monkeypatch.setattr(streams, "BUFFER_BYTES", 30 * 8 * 4)
    with pytest.raises(errors.ProgramError, match="training holds 30 rows"):
        run("max", x, prompt, y)


def test_a_probe_refuses_rows_of_another_width() -> None:
    with pytest.raises(errors.ProgramError) as caught:
        random_probe("max", 8, 1, 0).scores(ArraySource(np.eye(3)), np.zeros(3))
    assert caught.value.code == "width_mismatch"

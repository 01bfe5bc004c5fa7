"""Training: every kind learns, the fused step goes where the library's goes, a cut training ends in the same bits."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dictionaries_rows import WIDTH, Rows, made_of_atoms

from trocar import errors
from trocar.analysis.source import ArraySource
from trocar.dictionaries import Dictionary, Progress, Recipe, Training, measure, train

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the extra `sae`")

BASE = Recipe("topk", 32, rows=400 * 64, k=2, batch=64, rate=3e-3, dead_after=50)
KINDS = {
    "topk": BASE,
    "batch_topk": replace(BASE, kind="batch_topk"),
    "matryoshka": replace(BASE, kind="matryoshka", levels=(8, 16)),
    "jumprelu": replace(BASE, kind="jumprelu", k=4, penalty=0.1, penalty_warm_up=20),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def source(**how: Any) -> ArraySource:
    return ArraySource(made_of_atoms(**how)[0])


def same(a: Dictionary, b: Dictionary) -> bool:
    pairs = ((value, b.tensors()[name]) for name, value in a.tensors().items())
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str) -> None:
    rows = source()
    before = Training(rows, KINDS[kind]).dictionary()
    after = train(rows, KINDS[kind])
    assert measure(before, rows).fvu > 0.5
    found = measure(after, rows)
    assert found.fvu < 0.2
    assert 1 <= found.l0 < 12
    assert after.architecture == ("topk" if kind == "topk" else "jumprelu")
    assert (after.width, after.features) == (WIDTH, 32)


def found_atoms(dictionary: Dictionary, atoms: Rows) -> int:
    decoder = dictionary.tensors()["W_dec"].numpy()
    cosines = (decoder / np.linalg.norm(decoder, axis=1, keepdims=True)) @ atoms.T
    return int((cosines.max(axis=0) > 0.9).sum())


def test_topk_finds_the_atoms() -> None:
    rows, atoms = made_of_atoms(6000)
    training = Training(ArraySource(rows), replace(BASE, features=24, rows=1500 * 64))
    assert found_atoms(training.dictionary(), atoms) < 4
    training.run()
    assert found_atoms(training.dictionary(), atoms) > 12
    assert measure(training.dictionary(), ArraySource(rows)).l0 == 2


def test_the_fused_step_goes_where_the_librarys_goes() -> None:
    rows, recipe = source(), replace(BASE, rows=150 * 64)
    losses: dict[bool, list[Progress]] = {True: [], False: []}
    found = {}
    for fused, seen in losses.items():
        training = Training(rows, recipe, fused=fused)
        training.run(watch=seen.append)
        found[fused] = training.dictionary()
    assert [p.dead for p in losses[True]] == [p.dead for p in losses[False]]
    assert losses[True][-1].dead > 0  # so the auxiliary loss took part
    np.testing.assert_allclose([p.loss for p in losses[True]], [p.loss for p in losses[False]], rtol=1e-3)
    assert measure(found[True], rows).fvu == pytest.approx(measure(found[False], rows).fvu, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_was_cut_ends_in_the_same_bits(kind: str) -> None:
    rows, recipe = source(), replace(KINDS[kind], rows=120 * 64, warm_up=30, cool_down=30)
    whole = train(rows, recipe)
    first = Training(rows, recipe)
    first.run(most=70)
    state = {name: value.copy() for name, value in first.state().items()}
    first.run(most=5)  # what goes on after the state was taken does not change it
    second = Training(rows, recipe, state=state)
    assert (second.steps, second.done) == (70, False)
    second.run()
    assert second.done
    assert same(second.dictionary(), whole)
    assert not same(first.dictionary(), whole)


def test_a_state_before_the_first_step_is_the_start() -> None:
    rows, recipe = source(), replace(BASE, rows=20 * 64)
    again = Training(rows, recipe, state=Training(rows, recipe).state())
    again.run()
    assert same(again.dictionary(), train(rows, recipe))


def test_a_state_is_arrays_that_safetensors_takes() -> None:
    from safetensors.numpy import load, save

    training = Training(source(), replace(BASE, rows=20 * 64))
    training.run(most=3)
    state = training.state()
    again = load(save(state))
    assert state.keys() == again.keys()
    assert all(
        (again[name] == value).all() and again[name].dtype == value.dtype for name, value in state.items()
    )


def test_a_state_of_another_recipe_is_refused() -> None:
    state = Training(source(), BASE).state()
    for other in ({**state}, {k: v for k, v in state.items() if k != "recipe"}):
        with pytest.raises(errors.ProgramError) as e:
            Training(source(), replace(BASE, k=3), state=other)
        assert (e.value.code, e.value.path) == ("wrong_handle", "state")


def test_the_seed_decides_and_torchs_generator_is_left_alone() -> None:
    rows, recipe = source(), replace(BASE, rows=30 * 64)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = train(rows, recipe)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(train(rows, recipe), one)
    assert not same(train(rows, replace(recipe, seed=1)), one)


def test_the_scale_of_rows_does_not_matter() -> None:
    recipe = KINDS["jumprelu"]  # its thresholds begin at 0.01, in units of the scaled rows
    tiny, small = (measure(train(source(scale=x), recipe), source(scale=x)) for x in (1e-4, 1))
    assert tiny.fvu == pytest.approx(small.fvu, rel=0.05)
    as_they_are = measure(train(source(scale=1e-4), replace(recipe, normalise=False)), source(scale=1e-4))
    assert as_they_are.fvu > 0.5


def test_a_dictionary_can_be_taken_while_training_goes_on() -> None:
    rows, recipe = source(), replace(BASE, rows=40 * 64)
    training = Training(rows, recipe)
    training.run(most=20)
    early = training.dictionary()
    kept = early.tensors()
    training.run()
    assert same(training.dictionary(), train(rows, recipe))
    assert all(torch.equal(value, kept[name]) for name, value in early.tensors().items())


def test_whoever_watches_is_told_and_can_stop_it() -> None:
    seen: list[Progress] = []
    train(source(), replace(BASE, rows=120 * 64), watch=seen.append)
    assert [(p.steps, p.of) for p in seen] == [(50, 120), (100, 120), (120, 120)]
    assert seen[-1].loss < seen[0].loss

    def stop(_: Progress) -> None:
        raise errors.refuse("cancelled", "", "the job was cancelled")

    training = Training(source(), BASE)
    with pytest.raises(errors.RunFailed) as e:
        training.run(watch=stop)
    assert (e.value.code, training.steps) == ("cancelled", 50)
    training.run(most=1)
    assert training.steps == 51


def test_words_of_the_caller_are_kept() -> None:
    found = train(source(), replace(BASE, rows=64), metadata={"hook_name": "resid_post.3", "self": "x"})
    assert found.metadata["hook_name"] == "resid_post.3"
    assert found.metadata["self"] == "x"
    assert found.metadata["training_architecture"] == "topk"


def test_a_loss_that_is_not_finite_ends_it() -> None:
    training = Training(source(scale=1e14), replace(BASE, normalise=False, rows=20 * 64, k=20, features=512))
    with torch.no_grad():
        training._trainer.sae.W_enc.mul_(1e25)
        training._trainer.sae.W_dec.mul_(1e25)
    with pytest.raises(errors.RunFailed) as e:
        training.run()
    assert e.value.code == "fit_not_converged"


def test_rows_of_zeros_are_refused() -> None:
    with pytest.raises(errors.ProgramError) as e:
        Training(ArraySource(np.zeros((200, 4), np.float32)), BASE)
    assert e.value.code == "too_few_rows"

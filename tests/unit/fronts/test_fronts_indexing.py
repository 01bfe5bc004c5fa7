"""Indices of tensors and steps of generations as selectors, without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import trocar
from trocar.fronts.indexing import Steps, Window, shown

ROWS = Window(("batch", "token", "column"))
HEADS = Window(("batch", "token", "head", "column"))


@pytest.mark.parametrize(
    ("index", "tokens", "left"),
    [
        (np.s_[:], slice(None), ("batch", "token", "column")),
        (np.s_[...], slice(None), ("batch", "token", "column")),
        (np.s_[:, -1], -1, ("batch", "column")),
        (np.s_[:, -1, :], -1, ("batch", "column")),
        (np.s_[..., -1, :], -1, ("batch", "column")),
        (np.s_[:, np.int64(2)], 2, ("batch", "column")),
        (np.s_[:, 1:3], slice(1, 3), ("batch", "token", "column")),
        (np.s_[:, [1, 4]], "prompt[1,4]", ("batch", "token", "column")),
        (np.s_[0], slice(None), ("token", "column")),
        (np.s_[0, -1], -1, ("column",)),
    ],
)
def test_an_index_selects_positions(index: Any, tokens: Any, left: tuple[str, ...]) -> None:
    found = ROWS.at(index, 1)
    assert (found.tokens, found.dims) == (tokens, left)


def test_an_index_after_an_index_goes_on_where_it_ended() -> None:
    assert ROWS.at(0, 1).at(-1, 1).tokens == -1
    assert ROWS.at(np.s_[:, -1], 3).at(np.s_[:, :], 3).dims == ("batch", "column")


def test_heads_neurons_and_columns_that_are_heads() -> None:
    assert HEADS.at(np.s_[:, -1, 3], 2).picked == (3,)
    assert HEADS.at(np.s_[:, :, [0, 2], :], 2).picked == (0, 2)
    neurons = Window(("batch", "token", "neuron")).at(np.s_[:, :, 7], 2)
    assert (neurons.kind, neurons.picked) == ("neurons", (7,))
    flat = Window(("batch", "token", "flat"), d_head=8).at(np.s_[:, :, 8:24], 2)
    assert (flat.kind, flat.picked) == ("heads", (1, 2))


@pytest.mark.parametrize(
    ("window", "index", "prompts", "words"),
    [
        (ROWS, np.s_[1], 2, "the first index is the prompt, and the program runs on each of the 2 prompts"),
        (ROWS, np.s_[0, -1], 2, "runs on each of the 2 prompts"),
        (ROWS, np.s_[-1], 1, "there is one: 0"),
        (ROWS, np.s_[1:2], 1, "there is one: 0"),
        (ROWS, np.s_[:, ::2], 1, "a step is not supported"),
        (ROWS, np.s_[:, None], 1, "is not a position"),
        (ROWS, np.s_[:, True], 1, "is not a position"),
        (ROWS, np.s_[:, -1, 5], 1, "columns of this place are not addressed"),
        (ROWS, np.s_[:, -1, :, 0], 1, "4 indices, 3 are left"),
        (ROWS.at(np.s_[:, 1:3], 1), np.s_[:, 0], 1, "positions were chosen already"),
        (HEADS, np.s_[:, :, 0:2], 1, "a slice of the head dimension"),
        (Window(("batch", "token", "flat"), d_head=8), np.s_[:, :, 4:12], 1, "cuts through heads"),
    ],
)
def test_what_an_index_cannot_mean_is_refused(window: Window, index: Any, prompts: int, words: str) -> None:
    with pytest.raises(trocar.ClientError, match=words) as caught:
        window.at(index, prompts)
    assert caught.value.code == "bad_argument"


@pytest.mark.parametrize(
    ("index", "steps"),
    [
        (np.s_[:], Steps(True, ("gen[*]",))),
        (np.s_[1:], Steps(False, ("gen[*]",))),
        (np.s_[3:], Steps(False, ("gen[2:]",))),
        (np.s_[2:5], Steps(False, ("gen[1:4]",))),
        (np.s_[0:3], Steps(True, ("gen[0:2]",))),
        (np.s_[:1], Steps(True, ())),
        (0, Steps(True, ())),
        (2, Steps(False, ("gen[1]",))),
        ([0, 2, 4], Steps(True, ("gen[1]", "gen[3]"))),
    ],
)
def test_pass_s_reads_generated_token_s_minus_1(index: Any, steps: Steps) -> None:
    assert Steps.of(index) == steps


def test_positions_in_steps() -> None:
    everything = Steps.of(slice(None))
    assert everything.selectors(slice(None)) == ("all",)
    assert everything.selectors(-1) == ("prompt[-1]", "gen[*]")
    assert Steps.of(slice(1, 3)).selectors(0) == ("gen[0:2]",)
    with pytest.raises(trocar.ClientError, match=r"\[:, -1\] or \[:\]"):
        everything.selectors(2)


@pytest.mark.parametrize("index", [-1, np.s_[::2], np.s_[-2:], np.s_[3:3]])
def test_steps_that_cannot_be_named(index: Any) -> None:
    with pytest.raises(trocar.ClientError, match=r"iter\[") as caught:
        Steps.of(index)
    assert "tracer.all()" in caught.value.next_step


def test_an_index_is_shown_as_it_was_written() -> None:
    assert shown(np.s_[:, -1, 1:3]) == ":, -1, 1:3"
    assert shown(np.s_[..., ::2]) == "..., ::2"

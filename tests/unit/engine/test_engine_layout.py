"""Rows of a selector in a step: the task's own, whatever part of a prompt or text the step feeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.engine.layout import Layout, Member, selected
from trocar.graph import positions
from trocar.graph.scope import Selection

LENGTH, MOST = 9, 6


def selection(at: str, lengths: tuple[int, ...] = (LENGTH,)) -> Selection:
    selector = positions.parse(at, "at")
    rows = tuple(positions.resolve(selector, n, MOST, "at", i) for i, n in enumerate(lengths))
    return Selection(selector, rows, tuple(len(r.prompt) for r in rows), len(rows[0].gen))


def member(first: int, stop: int, start: int = 0, fresh: int = 0) -> Member:
    return Member(0, 0, LENGTH, first, tuple(range(100 + first, 100 + stop)), (start,), fresh)


def plain(at: str) -> list[int]:
    """Absolute positions, by Python's own slicing."""
    prompt, gen = list(range(LENGTH)), list(range(LENGTH, LENGTH + MOST))
    return {
        "prompt[*]": prompt, "prompt[-1]": [8], "prompt[2:5]": [2, 3, 4], "prompt[1,7,-2]": [1, 7],
        "gen[*]": gen, "gen[2]": [11], "gen[1:4]": [10, 11, 12], "all": prompt + gen,
    }[at]  # fmt: skip


SELECTORS = ["prompt[*]", "prompt[-1]", "prompt[2:5]", "prompt[1,7]", "gen[*]", "gen[2]", "gen[1:4]", "all"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SELECTORS), st.integers(0, LENGTH + MOST - 1), st.integers(1, LENGTH + MOST))
def test_any_piece_holds_the_selected_rows_of_that_piece(at: str, first: int, count: int) -> None:
    stop = min(first + count, LENGTH + MOST)
    expected = [p for p in plain("prompt[1,7,-2]" if at == "prompt[1,7]" else at) if first <= p < stop]
    assert selected(selection(at), member(first, stop)).tolist() == expected


@pytest.mark.parametrize("at", SELECTORS)
@pytest.mark.parametrize("cut", [1, 2, 4, 15])
def test_pieces_together_are_the_whole(at: str, cut: int) -> None:
    found: list[int] = []
    ranks: list[int] = []
    for first in range(0, LENGTH + MOST, cut):
        picked = Layout((member(first, min(first + cut, LENGTH + MOST)),)).pick(selection(at))
        found += picked.positions.tolist()
        ranks += picked.ranks.tolist()
    assert found == plain("prompt[1,7,-2]" if at == "prompt[1,7]" else at)
    if not at.startswith("gen"):
        assert ranks == list(range(len(found)))


def test_rows_lie_where_the_stage_says() -> None:
    members = (
        Member(0, 3, 4, 0, (9, 8, 7, 6), (10, 2)),
        Member(1, 1, 5, 5, (5,), (20, 0)),
    )
    lengths = (1, 5, 1, 4)
    layout = Layout(members)
    chosen = selection("all", lengths)
    assert layout.pick(chosen).index.tolist() == [10, 11, 12, 13, 20]
    assert layout.pick(chosen, 1).index.tolist() == [2, 3, 4, 5, 0]
    tags = layout.tags(layout.pick(chosen))
    assert tags.prompts.tolist() == [3, 3, 3, 3, 1]
    assert tags.positions.tolist() == [0, 1, 2, 3, 5]
    assert tags.token_ids.tolist() == [9, 8, 7, 6, 5]
    assert tags.phases == ("prompt",) * 4 + ("gen",)


def test_rows_that_were_collected_are_left_out() -> None:
    layout = Layout((member(0, 12, fresh=10),))
    picked = layout.pick(selection("all"))
    assert layout.stale
    assert picked.positions[layout.fresh(picked)].tolist() == [10, 11]
    assert Layout((member(10, 12, fresh=10),)).fresh(picked) is None


def test_nothing_selected_is_no_row() -> None:
    picked: Any = Layout((member(9, 10),)).pick(selection("prompt[*]"))
    assert (picked.rows, picked.index.dtype, picked.positions.dtype) == (0, torch.int64, np.int64)

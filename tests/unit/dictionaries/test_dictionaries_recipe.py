"""Recipes: what cannot be trained is refused with its name, and two recipes have two digests."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trocar import errors
from trocar.analysis.source import ArraySource
from trocar.dictionaries import Recipe, library, train
from trocar.dictionaries.recipe import require

GOOD = Recipe("topk", 64, rows=1000, k=4, batch=100)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"kind": "top_k"}, "kind"),
        ({"features": 1}, "features"),
        ({"features": 64.0}, "features"),
        ({"batch": 0}, "batch"),
        ({"batch": True}, "batch"),
        ({"rows": 99}, "rows"),
        ({"warm_up": 11}, "warm_up"),
        ({"warm_up": 6, "cool_down": 5}, "cool_down"),
        ({"dead_after": 0}, "dead_after"),
        ({"penalty_warm_up": -1}, "penalty_warm_up"),
        ({"seed": -1}, "seed"),
        ({"rate": 0.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"penalty": float("inf")}, "penalty"),
        ({"k": 0.5}, "k"),
        ({"k": 65}, "k"),
        ({"k": 4.5}, "k"),
        ({"levels": (8,)}, "levels"),
        ({"kind": "matryoshka"}, "levels"),
        ({"kind": "matryoshka", "levels": (16, 8)}, "levels"),
        ({"kind": "matryoshka", "levels": (8, 64)}, "levels"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, Any], path: str) -> None:
    require(GOOD)
    with pytest.raises(errors.ProgramError) as e:
        require(replace(GOOD, **change))
    assert (e.value.code, e.value.path) == ("bad_value", path)


def test_the_nearest_kind_is_named() -> None:
    with pytest.raises(errors.ProgramError) as e:
        require(replace(GOOD, kind="batchtopk"))  # type: ignore[arg-type]
    assert e.value.closest == "batch_topk"


def test_half_an_active_feature_is_fine_on_average() -> None:
    require(replace(GOOD, kind="batch_topk", k=4.5))
    require(replace(GOOD, kind="matryoshka", levels=(8, 16)))


def test_another_recipe_has_another_digest() -> None:
    changed = [replace(GOOD, seed=1), replace(GOOD, k=5), replace(GOOD, kind="batch_topk"), GOOD]
    assert len({r.digest() for r in changed}) == 4
    assert replace(GOOD).digest() == GOOD.digest()


def test_without_the_extra_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(errors.ClientError) as e:
        train(ArraySource(np.ones((2000, 4), np.float32)), GOOD)
    assert (e.value.code, e.value.path) == ("missing_extra", "dictionaries")
    assert "trocar[sae]" in e.value.next_step


def test_the_logger_of_the_library_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(errors.ClientError):
        library.saelens()
    import os

    assert os.environ["WANDB_MODE"] == "disabled"

"""Packing is believed only after it gave what the model gives on its own; otherwise the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trocar import errors
from trocar.engine.hf import attention
from trocar.engine.hf.engine import HFEngine


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "qwen2", "qwen3"])
def test_every_family_packs(tiny_of: Callable[..., Any], family: str) -> None:
    engine = HFEngine(tiny_of(f"{family}-packs", family=family))
    engine.close()
    assert "attn_probs" in engine.facts.sites
    assert "attn_probs" not in engine.facts.unavailable


def _break(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., Any]) -> None:
    plain = getattr(attention, name)
    monkeypatch.setattr(attention, name, lambda *args: wrong(plain, *args))


@pytest.mark.parametrize("room", ["_attend_decode", "_attend_chunk", "_explicit"])
def test_rows_that_see_too_little_are_noticed(
    tiny_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """One path of the attention forgets the first token."""
    plain = attention.causal

    def wrong(real: Callable[..., Any], *args: Any) -> None:
        def blind(positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
            mask = plain(positions, length, window)
            mask[positions > 0, 0] = -torch.inf
            return mask

        monkeypatch.setattr(attention, "causal", blind)
        for rows in args:
            if isinstance(rows, attention.Rows):
                rows._masks.clear()
            if isinstance(rows, attention.Decode):
                rows.masks.clear()
        real(*args)
        for rows in args:
            if isinstance(rows, attention.Rows):
                rows._masks.clear()
        monkeypatch.setattr(attention, "causal", plain)

    _break(monkeypatch, room, wrong)
    with pytest.raises(errors.RunFailed) as caught:
        HFEngine(tiny_of("broken"))
    assert caught.value.code == "model_unsupported"
    assert "differ" in caught.value.reason


def test_a_forgotten_window_is_noticed(tiny_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention.causal
    monkeypatch.setattr(
        attention, "causal", lambda positions, length, _window: plain(positions, length, None)
    )
    with pytest.raises(errors.RunFailed):
        HFEngine(tiny_of("broken", family="gemma3"))
    HFEngine(tiny_of("sound")).close()  # a family without windows does not notice

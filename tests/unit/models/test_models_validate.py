"""Sound models pass validation; each kind of sabotage is noticed and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trocar import errors
from trocar.models.adapters import SiteAdapter
from trocar.models.taps import tapped
from trocar.models.validate import validate
from trocar.sites import Site

VOCAB = 300


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_sound_model_passes(make_llama: Callable[..., Any], layers: int) -> None:
    assert validate(SiteAdapter.of(make_llama(layers)), VOCAB) == {}


def test_validation_leaves_no_hook(adapter: SiteAdapter) -> None:
    validate(adapter, VOCAB)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapter.model.modules())


def scaled_residual(layer: Any) -> Callable[..., torch.Tensor]:
    """A decoder layer that adds twice the stream where it should add it once."""

    def forward(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        mid = 2.0 * hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
        return mid + layer.mlp(layer.post_attention_layernorm(mid))

    return forward


def copied_residual(layer: Any) -> Callable[..., torch.Tensor]:
    """The same numbers, but the norm is given a copy: an in-place edit would miss the stream."""

    def forward(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        mid = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
        return mid + layer.mlp(layer.post_attention_layernorm(mid.clone()))

    return forward


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_scaled_residual_is_refused_by_name_and_never_returned(llama: Any, victim: int) -> None:
    llama.model.layers[victim].forward = scaled_residual(llama.model.layers[victim])
    adapter = SiteAdapter.of(llama)
    failed = validate(adapter, VOCAB)
    assert failed.keys() == {"attn_out", "resid_mid"}
    assert f"resid_mid.{victim} == resid_pre.{victim} + attn_out.{victim}" in failed["resid_mid"]
    checked = adapter.without(failed)
    assert "resid_mid" not in checked.sites
    with pytest.raises(errors.ProgramError) as e, tapped(checked, {Site("resid_mid", 0): lambda _t: None}):
        pytest.fail("the site was served")
    assert e.value.code == "site_unavailable"
    assert "load-time check failed" in e.value.reason


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_edit_that_would_miss_the_stream_is_noticed(llama: Any, victim: int) -> None:
    llama.model.layers[victim].forward = copied_residual(llama.model.layers[victim])
    failed = validate(SiteAdapter.of(llama), VOCAB)
    assert failed.keys() == {"resid_mid"}
    assert "an edit at resid_mid" in failed["resid_mid"]


def test_projected_keys_that_are_ignored_are_noticed(llama: Any) -> None:
    attention = llama.model.layers[1].self_attn
    whole, wrong = type(attention).forward, torch.nn.Linear(32, 16, bias=False).requires_grad_(False)

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        attention.k_proj(hidden_states)
        kept, attention.k_proj = attention.k_proj, wrong
        try:
            return whole(attention, hidden_states, **kwargs)
        finally:
            attention.k_proj = kept

    attention.forward = forward
    failed = validate(SiteAdapter.of(llama), VOCAB)
    assert failed.keys() == {"k"}
    assert "does not change the heads' outputs" in failed["k"]


def test_a_model_that_scales_its_logits_is_refused_whole(llama: Any) -> None:
    whole = type(llama).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = whole(llama, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    llama.forward = forward
    with pytest.raises(errors.RunFailed, match="unembed"):
        validate(SiteAdapter.of(llama), VOCAB)


def test_a_model_that_feels_padding_is_refused_whole(llama: Any) -> None:
    whole = llama.model.norm.forward
    llama.model.norm.forward = lambda hidden: whole(hidden) * (1 + hidden.shape[1] / 10)
    with pytest.raises(errors.RunFailed, match="padding"):
        validate(SiteAdapter.of(llama), VOCAB)


def test_not_a_number_is_a_failure(llama: Any) -> None:
    llama.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(errors.RunFailed, match="model_unsupported"):
        validate(SiteAdapter.of(llama), VOCAB)


def test_a_model_that_sees_the_future_is_noticed(llama: Any) -> None:
    attention = llama.model.layers[0].self_attn
    whole = type(attention).forward

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        kwargs["attention_mask"] = torch.zeros(1, 1, hidden_states.shape[1], hidden_states.shape[1])
        return whole(attention, hidden_states, **kwargs)

    attention.forward = forward
    with pytest.raises(errors.RunFailed, match="padding"):
        validate(SiteAdapter.of(llama), VOCAB)

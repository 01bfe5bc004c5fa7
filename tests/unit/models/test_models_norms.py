"""Mean norms against sums made by hand from plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trocar.models.adapters import SiteAdapter
from trocar.models.load import load
from trocar.models.norms import PARAGRAPH, mean_norms
from trocar.models.text import TextCodec
from trocar.sites import SITES

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")


def by_hand(model: Any, module: Any, ids: torch.Tensor) -> float:
    """Mean norm of what a module gives, without the first four tokens."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_hook(
        lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0])
    )
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    lengths = [float(sum(x * x for x in row) ** 0.5) for row in seen[0][0, 4:].double().tolist()]
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_plain_hooks(make_model: Callable[..., Any], tokenizer: Any, family: str) -> None:
    model = make_model(family, layers=3)
    norms = mean_norms(SiteAdapter.of(model), TextCodec(tokenizer))
    ids = torch.tensor([tokenizer(PARAGRAPH, add_special_tokens=False).input_ids[:160]])
    inner = model.base_model
    layers = inner.h if family == "gpt2" else inner.layers
    last = inner.ln_f if family == "gpt2" else inner.norm
    first = inner.drop if family == "gpt2" else inner.embed_tokens
    assert norms["final_norm"] == (pytest.approx(by_hand(model, last, ids), rel=1e-6),)
    assert norms["embeddings"] == (pytest.approx(by_hand(model, first, ids), rel=1e-6),)
    assert norms["mlp_out"] == tuple(pytest.approx(by_hand(model, b.mlp, ids), rel=1e-6) for b in layers)
    assert norms["resid_post"] == tuple(pytest.approx(by_hand(model, b, ids), rel=1e-6) for b in layers)
    if family == "gemma3":
        after = [b.post_attention_layernorm for b in layers]
        assert norms["attn_out_post"] == tuple(pytest.approx(by_hand(model, m, ids), rel=1e-6) for m in after)


def test_every_served_site_of_the_stream_has_a_number_per_layer(tiny_dir: Path) -> None:
    facts = load(tiny_dir).facts
    assert set(facts.norms) == {n for n in facts.sites if SITES[n].width == "d_model"}
    for name, values in facts.norms.items():
        assert len(values) == (3 if SITES[name].layered else 1)
        assert min(values) > 0
    assert facts.norms["resid_pre"][1:] == facts.norms["resid_post"][:-1]
    assert facts.norms["resid_pre"][0] == facts.norms["embeddings"][0]
    assert facts.norms == load(tiny_dir).facts.norms


def test_a_site_that_failed_has_no_norm(llama: Any, tokenizer: Any) -> None:
    adapter = SiteAdapter.of(llama).without({"resid_mid": "broken"})
    assert "resid_mid" not in mean_norms(adapter, TextCodec(tokenizer))

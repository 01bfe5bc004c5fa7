"""Loading a directory: what is refused, what the facts say, and what the model is like afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trocar import errors
from trocar.models.load import load
from trocar.sites import SITES


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_facts_are_those_of_the_model(tiny_dir: Path, llama: Any) -> None:
    loaded = load(tiny_dir, name="tiny")
    facts = loaded.facts
    assert (facts.name, facts.family, facts.dtype) == ("tiny", "llama", "float32")
    assert (facts.n_layers, facts.d_model, facts.d_mlp, facts.d_head) == (3, 32, 48, 8)
    assert (facts.n_heads, facts.n_kv_heads, facts.vocab_size, facts.context) == (4, 2, 300, 64)
    assert facts.eos == (257, 258)
    assert facts.lineage == facts.fingerprint
    assert set(facts.sites) | facts.unavailable.keys() == set(SITES)
    assert not set(facts.sites) & facts.unavailable.keys()
    for name in facts.sites:
        assert facts.width(name) > 0
    assert 0 < loaded.validation_s < 5


def test_the_served_name_defaults_to_the_folder(tiny_dir: Path) -> None:
    assert load(tiny_dir).facts.name == "tiny-llama"


def test_the_model_is_frozen_fused_and_bit_equal(tiny_dir: Path, llama: Any, tokens: torch.Tensor) -> None:
    loaded = load(tiny_dir, pack=False)
    model = loaded.model
    assert not loaded.packed
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=tokens).logits, llama(input_ids=tokens).logits)


def test_threads_are_set_only_when_asked(tiny_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        load(tiny_dir, threads=before + 1)
        assert torch.get_num_threads() == before + 1
        load(tiny_dir)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_failed_site_is_in_the_facts(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, make_llama: Callable[..., Any]
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        mid = hidden_states + 0.5 * attended
        return mid + layer.mlp(layer.post_attention_layernorm(mid))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    loaded = load(tiny_dir)
    assert "attn_out" not in loaded.facts.sites
    assert "load-time check failed" in loaded.facts.unavailable["attn_out"]
    assert loaded.adapter.unavailable["attn_out"] == loaded.facts.unavailable["attn_out"]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused(tiny_dir: Path, file: str) -> None:
    rewrite(tiny_dir / file, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(errors.RunFailed, match="auto_map"):
        load(tiny_dir)


def test_quantised_weights_are_refused(tiny_dir: Path) -> None:
    rewrite(tiny_dir / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(errors.RunFailed, match="quantised"):
        load(tiny_dir)


def test_another_architecture_is_refused_before_it_is_loaded(tiny_dir: Path) -> None:
    rewrite(tiny_dir / "config.json", architectures=["BloomForCausalLM"])
    with pytest.raises(errors.RunFailed, match="no site table"):
        load(tiny_dir)


def test_a_catalog_model_that_was_not_pulled_says_how(cache_root: Path) -> None:
    with pytest.raises(errors.NotFound) as e:
        load("smollm2-135m-instruct")
    assert e.value.code == "model_not_pulled"
    assert "trocar model pull smollm2-135m-instruct" in e.value.next_step

"""Tiny random models and a tiny byte-level tokenizer, made here so that unit tests need no download."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trocar.models.adapters import SiteAdapter

VOCAB = 300
TEMPLATE = (
    "{% for m in messages %}{{ '<|a|>' + m['role'] + '\\n' + m['content'] + '<|b|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>assistant\\n' }}{% endif %}"
)


@cache
def _tree() -> ModuleType:
    """`tests/conftest.py` as a module: its name is taken by this file."""
    spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).parents[2] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """`random_model(family, seed, layers)`."""
    found: Callable[..., Any] = _tree().random_model
    return found


def tiny_llama(layers: int = 3) -> Any:
    """A LlamaForCausalLM with grouped-query attention, large enough weights to make every part matter."""
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=[257, 258],
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    return tiny_llama


@pytest.fixture
def llama() -> Any:
    return tiny_llama()


@pytest.fixture
def adapter(llama: Any) -> SiteAdapter:
    return SiteAdapter.of(llama)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two prompts of six tokens."""
    return torch.tensor([[5, 250, 17, 99, 3, 42], [1, 2, 3, 200, 201, 202]])


@pytest.fixture
def tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|a|>", "<|b|>", "<|end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|a|>", eos_token="<|b|>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("TROCAR_CACHE", str(root))
    return root


@pytest.fixture
def tiny_dir(tmp_path: Path, llama: Any, tokenizer: Any, cache_root: Path) -> Path:
    home = tmp_path / "tiny-llama"
    llama.save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home

"""From a directory on disk to a model that can be served: loaded, checked, and described.

Weights come from safetensors only, in float32, with fused attention and no gradients; a directory that asks
for code of its own is refused. Every site is validated by numbers before the model is handed out. This module
downloads nothing (`pull` does) and knows nothing about requests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trocar import errors
from trocar.graph.facts import ModelFacts
from trocar.models.adapters import SiteAdapter
from trocar.models.cache import Manifest
from trocar.models.families import family_of
from trocar.models.norms import mean_norms
from trocar.models.packed import pack as pack_linears
from trocar.models.pull import locate
from trocar.models.text import Message, TextCodec
from trocar.models.validate import validate


@dataclass(frozen=True)
class Loaded:
    """A model ready to serve.

    Attributes:
        model: Hugging Face causal language model; eval, float32, no gradients, fused attention.
        tokenizer: its fast tokenizer, unchanged; use the methods below for text from users.
        text: the safe codec behind those methods.
        adapter: the validated sites.
        facts: what the checker and the API may know.
        manifest: where it came from, and its license.
        validation_s: seconds that the load-time validation took.
        packed: whether the linear layers are packed, so that a row's bits do not depend on its neighbours.
    """

    model: Any
    tokenizer: Any
    text: TextCodec
    adapter: SiteAdapter
    facts: ModelFacts
    manifest: Manifest
    validation_s: float
    packed: bool = False

    def tokenize(self, text: str) -> list[int]:
        """Token ids; nothing is added, and special-token spellings are ordinary text."""
        return self.text.tokenize(text)

    def encode_prompt(self, text: str, *, path: str = "prompt") -> list[int]:
        """Token ids of a whole prompt; refuses text that spells a special token."""
        return self.text.encode_prompt(text, path=path)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of each id alone."""
        return self.text.token_texts(ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless `special`."""
        return self.text.decode(ids, special=special)

    def chat(self, messages: Sequence[Message], *, path: str = "messages") -> list[int]:
        """Token ids of a conversation; refuses messages that spell a special token."""
        return self.text.chat(messages, path=path)


def load(
    ref: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    threads: int | None = None,
    pack: bool = True,
) -> Loaded:
    """Loads and validates a model that is already on this machine.

    Args:
        ref: catalog name, `org/name@revision`, or directory (see `pull`).
        name: the name it is served under; the catalog name, hub id or folder name by default.
        revision: 40 hex digits, for a hub id.
        threads: torch threads for the whole process; unchanged when None.
        pack: pack the linear layers where that can be done (see `packed`); the model then has no gradients.

    Raises:
        NotFound: `model_not_pulled` or `unknown_model`.
        RunFailed: `model_unsupported` (architecture, custom code, quantised weights, or a failed
            load-time check that concerns the whole model), `checksum_mismatch`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    home, manifest = locate(ref, revision=revision)
    family_of(_architecture(home))
    model, tokenizer = _open(home)
    return assemble(model, tokenizer, manifest, name=name or manifest.name, pack=pack)


def assemble(model: Any, tokenizer: Any, manifest: Manifest, *, name: str, pack: bool = True) -> Loaded:
    """Packs, validates and describes a live model; `load` without the disk. The model is changed in place."""
    packed = pack and pack_linears(model) > 0
    adapter = SiteAdapter.of(model)
    started_s = time.perf_counter()
    failed = validate(adapter, model.config.vocab_size)
    validation_s = time.perf_counter() - started_s
    adapter = adapter.without(failed)
    codec = TextCodec(tokenizer)
    facts = _facts(adapter, tokenizer, manifest, name).model_copy(
        update={"norms": mean_norms(adapter, codec)}
    )
    return Loaded(model, tokenizer, codec, adapter, facts, manifest, validation_s, packed)


def _architecture(home: Path) -> str:
    """The architecture a directory claims, after refusing what would need code or lose precision."""
    config = json.loads((home / "config.json").read_text("utf-8"))
    wants = [config]
    if (home / "tokenizer_config.json").is_file():
        wants.append(json.loads((home / "tokenizer_config.json").read_text("utf-8")))
    if any("auto_map" in w for w in wants):
        raise errors.refuse(
            "model_unsupported", "model", f"{str(home)!r} asks to run code of its own (auto_map)"
        )
    if "quantization_config" in config:
        raise errors.refuse("model_unsupported", "model", f"{str(home)!r} holds quantised weights")
    architectures = config.get("architectures") or ["none"]
    return str(architectures[0])


def _open(home: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(home),
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(home), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise errors.refuse(
            "model_unsupported", "model", f"{str(home)!r} does not load: {str(e)[:300]}"
        ) from e
    return model.eval().requires_grad_(False), tokenizer


def _facts(adapter: SiteAdapter, tokenizer: Any, manifest: Manifest, name: str) -> ModelFacts:
    config = adapter.model.config.get_text_config()
    heads = config.num_attention_heads
    return ModelFacts(
        name=name,
        fingerprint=manifest.fingerprint,
        lineage=manifest.lineage,
        weight_bits=manifest.weight_bits,
        family=adapter.family.name,
        dtype=str(adapter.model.dtype).removeprefix("torch."),
        n_layers=adapter.n_layers,
        d_model=config.hidden_size,
        d_mlp=_neurons(config),
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=manifest.parameters,
        open_weights=manifest.open_weights,
        sites=adapter.sites,
        unavailable=dict(adapter.unavailable),
        eos=_eos(adapter.model, tokenizer),
    )


def _neurons(config: Any) -> int:
    """Width of the MLP; GPT-2 calls it `n_inner`, and None there means four times the stream."""
    known = config.n_inner if hasattr(config, "n_inner") else config.intermediate_size
    return int(known or 4 * config.hidden_size)


def _eos(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a generation, by any of the three places that may say so."""
    said = (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id)
    ids = {i for s in said if s is not None for i in (s if isinstance(s, list) else [s])}
    return tuple(sorted(ids))

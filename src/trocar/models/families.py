"""Where each site lies in the models of Hugging Face: one table of module paths per family.

A path is relative to the decoder layer for a site that exists in every layer, else to the model. The tables were
written from the sources of the library and are only claims: `validate` tests every row by numbers when a model is
loaded. An architecture without a table is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from trocar import errors

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a family's table.

    Attributes:
        path: of the module; empty for the layer itself.
        side: "input" is its first positional argument, "output" its result (first element of a tuple).
        inplace: the tensor is used again elsewhere, so an edit must be written into it.
        part: (i, n) when the site is the i-th of n equal runs of columns of a merged projection.
    """

    path: str
    side: Side
    inplace: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture is built.

    Attributes:
        name: short name for people, for example "llama".
        inner: path of the model without its unembedding.
        layers: path of the list of decoder layers.
        unembed: path of the unembedding.
        attention: path, in a layer, of the module that calls the attention function.
        places: site name to place.
        unavailable: reason by name for every site that has no place.
    """

    name: str
    inner: str
    layers: str
    unembed: str
    attention: str
    places: Mapping[str, Place]
    unavailable: Mapping[str, str]

    @property
    def sandwich(self) -> bool:
        """Whether the outputs of attention and MLP pass a norm of their own before they join the stream."""
        return "attn_out_post" in self.places


_LLAMA: Final = {
    "embeddings": Place("model.embed_tokens", "output"),
    "resid_pre": Place("", "input"),
    "attn_in": Place("input_layernorm", "output"),
    "q": Place("self_attn.q_proj", "output"),
    "k": Place("self_attn.k_proj", "output"),
    "v": Place("self_attn.v_proj", "output"),
    "z": Place("self_attn.o_proj", "input"),
    "attn_out": Place("self_attn", "output"),
    # the decoder layer keeps this very tensor as `residual`: a replaced argument would reach only the MLP
    "resid_mid": Place("post_attention_layernorm", "input", inplace=True),
    "mlp_in": Place("post_attention_layernorm", "output"),
    "mlp_act": Place("mlp.down_proj", "input"),
    "mlp_out": Place("mlp", "output"),
    "resid_post": Place("", "output"),
    "final_norm": Place("model.norm", "output"),
}
_GEMMA3: Final = {
    **_LLAMA,
    "attn_out_post": Place("post_attention_layernorm", "output"),
    "resid_mid": Place("pre_feedforward_layernorm", "input", inplace=True),
    "mlp_in": Place("pre_feedforward_layernorm", "output"),
    "mlp_out_post": Place("post_feedforward_layernorm", "output"),
}
_GPT2: Final = {
    # the dropout, which is off, is the one module that sees token plus position embeddings
    "embeddings": Place("transformer.drop", "output"),
    "resid_pre": Place("", "input"),
    "attn_in": Place("ln_1", "output"),
    "q": Place("attn.c_attn", "output", part=(0, 3)),
    "k": Place("attn.c_attn", "output", part=(1, 3)),
    "v": Place("attn.c_attn", "output", part=(2, 3)),
    "z": Place("attn.c_proj", "input"),
    "attn_out": Place("attn", "output"),
    "resid_mid": Place("ln_2", "input", inplace=True),
    "mlp_in": Place("ln_2", "output"),
    "mlp_act": Place("mlp.c_proj", "input"),
    "mlp_out": Place("mlp", "output"),
    "resid_post": Place("", "output"),
    "final_norm": Place("transformer.ln_f", "output"),
}
_SANDWICHED: Final = {
    "attn_probs": "this engine runs fused attention, which never forms the pattern",
    "router_logits": "this is a dense model: it has no router",
    "logits": "logits never leave as rows: use lens or logprobs",
}
_PLAIN: Final = {
    **_SANDWICHED,
    "attn_out_post": "this family has no sandwich norm: use attn_out",
    "mlp_out_post": "this family has no sandwich norm: use mlp_out",
}


def _like_llama(name: str) -> Family:
    return Family(name, "model", "model.layers", "lm_head", "self_attn", _LLAMA, _PLAIN)


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "LlamaForCausalLM": _like_llama("llama"),
        "MistralForCausalLM": _like_llama("mistral"),
        "Qwen2ForCausalLM": _like_llama("qwen2"),
        "Qwen3ForCausalLM": _like_llama("qwen3"),
        "Gemma3ForCausalLM": Family(
            "gemma3", "model", "model.layers", "lm_head", "self_attn", _GEMMA3, _SANDWICHED
        ),
        "GPT2LMHeadModel": Family("gpt2", "transformer", "transformer.h", "lm_head", "attn", _GPT2, _PLAIN),
    }
)


def family_of(architecture: str, path: str = "model") -> Family:
    """The table for an architecture name.

    Raises:
        RunFailed: `model_unsupported`, with the list of architectures that have a table.
    """
    if architecture not in FAMILIES:
        raise errors.refuse(
            "model_unsupported",
            path,
            f"{architecture[:80]!r} has no site table; served are: {', '.join(sorted(FAMILIES))}",
            closest=errors.closest(architecture, FAMILIES),
        )
    return FAMILIES[architecture]

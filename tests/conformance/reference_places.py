"""Where a site can be seen in a plain Hugging Face model: the reference's own table per family.

Written from `docs/sites.md` and the modelling code, not from the tables of the product. A `Spot` is a module
and a side of it; `columns` where several sites share one tensor; `shared` where the model uses the tensor twice,
so that a write must go into the tensor itself. Attention patterns have no spot: `reference_attention` shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

ORDER = (
    "embeddings", "resid_pre", "attn_in", "q", "k", "v", "attn_probs", "z", "attn_out", "attn_out_post",
    "resid_mid", "mlp_in", "mlp_act", "mlp_out", "mlp_out_post", "resid_post", "final_norm",
)  # fmt: skip
Visit = Callable[[torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Spot:
    """A module, the side on which the tensor shows, and which of its columns are the site."""

    module: torch.nn.Module
    side: Literal["in", "out"]
    columns: slice | None = None
    shared: bool = False


@dataclass(frozen=True)
class Frame:
    """Paths of the parts that exist once."""

    layers: str
    embeddings: str
    final_norm: str


_MODERN = Frame("model.layers", "model.embed_tokens", "model.norm")
FRAMES = {
    "llama": _MODERN,
    "qwen2": _MODERN,
    "qwen3": _MODERN,
    "mistral": _MODERN,
    "gemma3_text": _MODERN,
    "gpt2": Frame("transformer.h", "transformer.drop", "transformer.ln_f"),
}
_ATTENTION = {
    "attn_in": ("input_layernorm", "out"),
    "q": ("self_attn.q_proj", "out"),
    "k": ("self_attn.k_proj", "out"),
    "v": ("self_attn.v_proj", "out"),
    "z": ("self_attn.o_proj", "in"),
    "attn_out": ("self_attn", "out"),
    "mlp_act": ("mlp.down_proj", "in"),
    "mlp_out": ("mlp", "out"),
}
_PRE_NORM = {
    **_ATTENTION,
    "resid_mid": ("post_attention_layernorm", "in"),
    "mlp_in": ("post_attention_layernorm", "out"),
}
_SANDWICH = {
    **_ATTENTION,
    "attn_out_post": ("post_attention_layernorm", "out"),
    "resid_mid": ("pre_feedforward_layernorm", "in"),
    "mlp_in": ("pre_feedforward_layernorm", "out"),
    "mlp_out_post": ("post_feedforward_layernorm", "out"),
}
_GPT2 = {
    "attn_in": ("ln_1", "out"),
    "q": ("attn.c_attn", "out"),
    "k": ("attn.c_attn", "out"),
    "v": ("attn.c_attn", "out"),
    "z": ("attn.c_proj", "in"),
    "attn_out": ("attn", "out"),
    "resid_mid": ("ln_2", "in"),
    "mlp_in": ("ln_2", "out"),
    "mlp_act": ("mlp.c_proj", "in"),
    "mlp_out": ("mlp", "out"),
}
LAYERS = {
    "llama": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "mistral": _PRE_NORM,
    "gemma3_text": _SANDWICH,
    "gpt2": _GPT2,
}


def kind_of(model: Any) -> str:
    return str(model.config.model_type)


def layers_of(model: Any) -> Any:
    return model.get_submodule(FRAMES[kind_of(model)].layers)


def final_norm_of(model: Any) -> Any:
    return model.get_submodule(FRAMES[kind_of(model)].final_norm)


def d_head_of(model: Any) -> int:
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def named(model: Any) -> tuple[str, ...]:
    """Names of the sites that this family has, the attention pattern included, in the order of a pass."""
    inner = {"embeddings", "final_norm", "resid_pre", "resid_post", "attn_probs", *LAYERS[kind_of(model)]}
    return tuple(n for n in ORDER if n in inner)


def order_of(site: str) -> tuple[int, int]:
    """Sorts sites as a pass computes them."""
    name, _, layer = site.partition(".")
    if name == "final_norm":
        return (1 << 20, 0)
    return (int(layer) if layer else -1, ORDER.index(name))


def spot(model: Any, site: str) -> Spot:
    """Where a plain model shows a site."""
    frame, (name, _, layer) = FRAMES[kind_of(model)], site.partition(".")
    if name in ("embeddings", "final_norm"):
        return Spot(model.get_submodule(getattr(frame, name)), "out")
    block = layers_of(model)[int(layer)]
    if name in ("resid_pre", "resid_post"):
        return Spot(block, "in" if name == "resid_pre" else "out")
    path, side = LAYERS[kind_of(model)][name]
    columns = None
    if kind_of(model) == "gpt2" and name in "qkv":
        width = int(model.config.hidden_size)
        columns = slice("qkv".index(name) * width, ("qkv".index(name) + 1) * width)
    return Spot(block.get_submodule(path), side, columns, shared=name == "resid_mid")  # type: ignore[arg-type]


def hook(model: Any, site: str, visit: Visit) -> Any:
    """Registers `visit(x [T, D]) -> x or None` at a site; returns the removable handle."""
    where = spot(model, site)
    columns = where.columns or slice(None)

    def seen(x: torch.Tensor) -> torch.Tensor | None:
        """The whole tensor [1, T, W] after the visit, None where nothing was written."""
        new = visit(x[0, :, columns])
        if new is None:
            return None
        out = x.clone()
        out[0, :, columns] = new
        return out

    def after(_module: Any, _args: Any, out: Any) -> Any:
        new = seen(out[0] if isinstance(out, tuple) else out)
        return new if new is None or not isinstance(out, tuple) else (new, *out[1:])

    def before(_module: Any, args: Any) -> Any:
        new = seen(args[0])
        if new is None:
            return None
        if where.shared:
            args[0].copy_(new)
            return None
        return (new, *args[1:])

    if where.side == "out":
        return where.module.register_forward_hook(after)
    return where.module.register_forward_pre_hook(before)


def unembed(model: Any, rows: torch.Tensor, *, normed: bool = False) -> torch.Tensor:
    """Log-probabilities [N, V] of the last norm and the unembedding, by hand, in float64."""
    h = rows.double()
    if not normed:
        h = _normed(model, h)
    return (h @ model.lm_head.weight.double().T).log_softmax(-1)


def _normed(model: Any, h: torch.Tensor) -> torch.Tensor:
    norm, kind = final_norm_of(model), kind_of(model)
    weight = norm.weight.double()
    if kind == "gpt2":
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
        return scaled * weight + norm.bias.double()
    eps = norm.eps if kind == "gemma3_text" else norm.variance_epsilon
    scaled = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return scaled * (1.0 + weight if kind == "gemma3_text" else weight)

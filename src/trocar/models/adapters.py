"""Where each site lives in a Hugging Face model: one table of module paths per family.

A `Tap` is a module and the side of it on which the site's tensor can be seen. `inplace` marks a tensor that
the model uses twice, so that only a write into the tensor itself reaches both uses. An architecture without a
table is refused; a site without a row, or one that failed validation, is refused by name with the reason.
This module knows where sites are, not whether that is true: `validate` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import nn

from trocar import errors
from trocar.sites import SITES, Site

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Tap:
    """A place to hook.

    Attributes:
        module: the live module.
        side: "input" is its first positional argument, "output" its result (first element of a tuple).
        inplace: the tensor is used again elsewhere, so an edit must be written into it.
    """

    module: nn.Module
    side: Side
    inplace: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a family's table: a module path (relative to the layer for a layered site) and a side."""

    path: str
    side: Side
    inplace: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture is built.

    Attributes:
        name: short name for people, for example "llama".
        layers: path of the list of decoder layers.
        unembed: path of the unembedding.
        inner: path of the model without its unembedding.
        places: site name to place.
        unavailable: reason by name for every site that has no place.
    """

    name: str
    inner: str
    layers: str
    unembed: str
    places: Mapping[str, Place]
    unavailable: Mapping[str, str]


_PRE_NORM: Final = {
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
_ABSENT: Final = {
    "attn_probs": "this engine runs fused attention, which never forms the pattern",
    "attn_out_post": "this family has no sandwich norm: use attn_out",
    "mlp_out_post": "this family has no sandwich norm: use mlp_out",
    "router_logits": "this is a dense model: it has no router",
    "logits": "logits never leave as rows: use lens or logprobs",
}
FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "LlamaForCausalLM": Family("llama", "model", "model.layers", "lm_head", _PRE_NORM, _ABSENT),
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


@dataclass(frozen=True)
class SiteAdapter:
    """The sites of one live model.

    Attributes:
        model: the Hugging Face model.
        family: its table.
        unavailable: reason by site name, for sites without a place and those that failed validation.
    """

    model: Any
    family: Family
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> SiteAdapter:
        """The adapter of a model, before validation.

        Raises:
            RunFailed: `model_unsupported`.
        """
        family = family_of(type(model).__name__)
        return cls(model, family, dict(family.unavailable))

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the served sites, in the order of the closed table."""
        return tuple(name for name in SITES if name not in self.unavailable)

    @property
    def inner(self) -> nn.Module:
        """The model without its unembedding; its `last_hidden_state` is the site `final_norm`."""
        found: nn.Module = self.model.get_submodule(self.family.inner)
        return found

    @property
    def unembed(self) -> nn.Module:
        found: nn.Module = self.model.get_submodule(self.family.unembed)
        return found

    @property
    def final_norm(self) -> nn.Module:
        found: nn.Module = self.model.get_submodule(self.family.places["final_norm"].path)
        return found

    @property
    def _layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.model.get_submodule(self.family.layers)
        return found

    def tap(self, site: Site, path: str = "site") -> Tap:
        """Where to hook for `site`.

        Raises:
            ProgramError: `site_unavailable` with the reason, or `layer_out_of_range`.
        """
        if site.name in self.unavailable:
            reason = f"{str(site)!r} is not served: {self.unavailable[site.name]}"
            raise errors.refuse("site_unavailable", path, reason)
        place = self.family.places[site.name]
        if site.layer is None:
            return Tap(self.model.get_submodule(place.path), place.side, place.inplace)
        if site.layer >= self.n_layers:
            reason = f"{str(site)!r}: the model has {self.n_layers} layers, 0 to {self.n_layers - 1}"
            raise errors.refuse("layer_out_of_range", path, reason)
        return Tap(self._layers[site.layer].get_submodule(place.path), place.side, place.inplace)

    def part(self, layer: int, path: str) -> nn.Module:
        """A module of a layer by its path in the table, for checks that recompute a step."""
        found: nn.Module = self._layers[layer].get_submodule(path)
        return found

    def without(self, failed: Mapping[str, str]) -> SiteAdapter:
        """The same adapter with more sites refused."""
        return replace(self, unavailable={**self.unavailable, **failed})


def tensor_of(value: Any) -> torch.Tensor:
    """The tensor in what a module takes or returns: itself, or the first element of a tuple."""
    found: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return found

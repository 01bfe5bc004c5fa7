"""The sites of one live model: which module to hook, on which side, and which columns of what it carries.

An adapter joins a model with the table of its family. A site without a row, or one that failed validation, is
refused by name with the reason. This module knows where sites are, not whether that is true: `validate` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trocar import errors
from trocar.models.families import Family, Side, family_of
from trocar.sites import SITES, Site


@dataclass(frozen=True, slots=True)
class Tap:
    """A place to hook.

    Attributes:
        module: the live module.
        side: "input" is its first positional argument, "output" its result (first element of a tuple).
        inplace: the tensor is used again elsewhere, so an edit must be written into it.
        part: (i, n) when the site is the i-th of n equal runs of columns.
    """

    module: nn.Module
    side: Side
    inplace: bool = False
    part: tuple[int, int] | None = None

    def columns(self, whole: torch.Tensor) -> torch.Tensor:
        """The site's columns of what the module carries, as a view: `[..., W]` to `[..., D]`."""
        if self.part is None:
            return whole
        index, count = self.part
        width = whole.shape[-1] // count
        return whole[..., index * width : (index + 1) * width]


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
    _taps: dict[Site, Tap] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        return len(self.layers)

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
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        found: nn.ModuleList = self.model.get_submodule(self.family.layers)
        return found

    def attention(self, layer: int) -> nn.Module:
        """The module of a layer that calls the attention function; it knows its `layer_idx`."""
        return self.part(layer, self.family.attention)

    def tap(self, site: Site, path: str = "site") -> Tap:
        """Where to hook for `site`.

        Raises:
            ProgramError: `site_unavailable` with the reason, or `layer_out_of_range`.
        """
        if site not in self._taps:  # every step asks again
            self._taps[site] = self._tap(site, path)
        return self._taps[site]

    def _tap(self, site: Site, path: str) -> Tap:
        if site.name in self.unavailable:
            reason = f"{str(site)!r} is not served: {self.unavailable[site.name]}"
            raise errors.refuse("site_unavailable", path, reason)
        place = self.family.places[site.name]
        if site.layer is None:
            module: nn.Module = self.model.get_submodule(place.path)
            return Tap(module, place.side, place.inplace, place.part)
        if site.layer >= self.n_layers:
            reason = f"{str(site)!r}: the model has {self.n_layers} layers, 0 to {self.n_layers - 1}"
            raise errors.refuse("layer_out_of_range", path, reason)
        return Tap(self.part(site.layer, place.path), place.side, place.inplace, place.part)

    def part(self, layer: int, path: str) -> nn.Module:
        """A module of a layer by its path in the table, for checks that recompute a step."""
        found: nn.Module = self.layers[layer].get_submodule(path)
        return found

    def without(self, failed: Mapping[str, str]) -> SiteAdapter:
        """The same adapter with more sites refused."""
        return replace(self, unavailable={**self.unavailable, **failed})


def tensor_of(value: Any) -> torch.Tensor:
    """The tensor in what a module takes or returns: itself, or the first element of a tuple."""
    found: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return found

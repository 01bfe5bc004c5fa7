"""Which sites are the two ends of one linear map: whoever holds both for enough tokens solves for the weights.

`ends` answers for a set of sites, and also for what follows from them: some sites hold the same numbers under
two names, some are a sum of two others, and a norm is a known function, which only loses one number of each
row. It knows sites and nothing else: not how many rows there are, nor whether they are of the same tokens. It
therefore says yes too often, never too rarely.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from trocar.sites import Site


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One matrix of a layer: `target` = W `source`.

    Attributes:
        first_only: it is linear at position 0 alone, where a token attends to nothing but itself.
    """

    source: str
    target: str
    first_only: bool = False


LINEAR_MAPS: Final = (
    LinearMap("attn_in", "q"),
    LinearMap("attn_in", "k"),
    LinearMap("attn_in", "v"),
    LinearMap("z", "attn_out"),
    LinearMap("mlp_in", "mlp_act"),
    LinearMap("mlp_in", "router_logits"),
    LinearMap("mlp_act", "mlp_out"),
    LinearMap("attn_in", "z", first_only=True),
    LinearMap("attn_in", "attn_out", first_only=True),
    LinearMap("attn_in", "resid_mid", first_only=True),
    LinearMap("v", "attn_out", first_only=True),
    LinearMap("v", "resid_mid", first_only=True),
)
"""`mlp_act` counts as linear: a gated unit is two linear maps, and known inputs tell them apart."""

_SAME: Final = {"attn_out_post": "attn_out", "mlp_out_post": "mlp_out"}
_SAME_AT_FIRST: Final = (("v", "z"), ("z", "v"))
_NORMS: Final = (("resid_pre", "attn_in"), ("resid_mid", "mlp_in"))
_SUMS: Final = (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post"))


def canonical(site: Site) -> Site:
    """The one name of what has several: the stream between two layers, an output without a sandwich norm."""
    if site.name == "embeddings":
        return Site("resid_pre", 0)
    if site.name == "resid_post" and site.layer is not None:
        return Site("resid_pre", site.layer + 1)
    return Site(_SAME.get(site.name, site.name), site.layer)


def known(sites: Iterable[Site], *, first: bool = False) -> frozenset[Site]:
    """The sites, canonically, with every one whose rows follow from theirs.

    Args:
        first: of rows at position 0, where a head gives its own value back.
    """
    found = {canonical(site) for site in sites}
    while True:
        layers = {site.layer for site in found if site.layer is not None}
        # the stream after layer L is named as that before L + 1
        more = {site for layer in layers | {n - 1 for n in layers} for site in _implied(found, layer, first)}
        if more <= found:
            return frozenset(found)
        found |= more


def _implied(found: set[Site], layer: int, first: bool) -> Iterable[Site]:
    for stream, normed in _NORMS:
        # from the normed rows the stream follows but for each row's length, which a sum with others tells
        if found & {Site(stream, layer), Site(normed, layer)}:
            yield from (Site(stream, layer), Site(normed, layer))
    for one, same in _SAME_AT_FIRST if first else ():
        if Site(one, layer) in found:
            yield Site(same, layer)
    for names in _SUMS:
        three = {canonical(Site(name, layer)) for name in names}
        if len(three & found) == 2:  # two of a sum give the third
            yield from three


def ends(
    sites: Iterable[Site], at_first: Iterable[Site] = (), maps: tuple[LinearMap, ...] = LINEAR_MAPS
) -> tuple[tuple[Site, Site], ...]:
    """Each pair (source, target) of a linear map that the sites hold or give away, in order.

    Args:
        sites: all sites.
        at_first: those of which the row of position 0 is among the rows.
        maps: the maps to look for.
    """
    everywhere, first = known(sites), known(at_first, first=True)
    return tuple(
        (source, target)
        for source in sorted(everywhere | first, key=_place)
        for one in maps
        if one.source == source.name
        for target in (canonical(Site(one.target, source.layer)),)
        if {source, target} <= (first if one.first_only else everywhere)
    )


def _place(site: Site) -> tuple[int, str]:
    return (-1 if site.layer is None else site.layer, site.name)

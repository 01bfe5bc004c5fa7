"""Names of one stream: sites that hold the same rows, and sites that hold what a norm makes of them.

Whatever is remembered of a site, or counted for it, is kept under one name, or else whoever knows the others
would get as much again.
"""

from __future__ import annotations

from typing import Final

from trocar.sites import Site

NORMS: Final = (("resid_pre", "attn_in"), ("resid_mid", "mlp_in"))
"""Streams, and what a layer's own norm makes of their rows."""
_SANDWICH: Final = {"attn_out_post": "attn_out", "mlp_out_post": "mlp_out"}
_NORMED: Final = {normed: stream for stream, normed in NORMS} | _SANDWICH


def same(site: Site) -> Site:
    """The one name of rows that have several: the stream between two layers is named by the later one."""
    if site.name == "embeddings":
        return Site("resid_pre", 0)
    if site.name == "resid_post" and site.layer is not None:
        return Site("resid_pre", site.layer + 1)
    return site


def canonical(site: Site) -> Site:
    """The same, with an output's name before a sandwich norm for both."""
    site = same(site)
    return Site(_SANDWICH.get(site.name, site.name), site.layer)


def depth(site: Site) -> int | None:
    """The layer that made a site's rows, 0 for embeddings; None for what lies behind all layers.

    The stream before a layer is what the layer before made.
    """
    if site.name == "embeddings":
        return 0
    if site.name == "resid_pre" and site.layer is not None:
        return max(0, site.layer - 1)
    return site.layer


def last(site: Site, n_layers: int | None) -> Site:
    """The site, or where it is the last norm the stream that it reads; None when that is not known."""
    return Site("resid_pre", n_layers) if site.name == "final_norm" and n_layers is not None else site


def stream(site: Site, n_layers: int | None) -> Site:
    """Where directions of a site are counted: at the stream whose rows, or whose normed rows, it holds."""
    site = last(same(site), n_layers)
    return Site(_NORMED.get(site.name, site.name), site.layer)

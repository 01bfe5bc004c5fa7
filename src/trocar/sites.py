"""The closed table of sites: named places in a transformer's forward pass.

A site is written `resid_post.12` (layered) or `final_norm` (once per model). Layers count from 0. The table
says where a site lies inside a layer, how wide its rows are, and whether programs may write there. Which of
these a model really serves is decided by its adapter and its load-time validation (`trocar.models`), and a
site that fails there is refused by name. Foreign spellings do not belong here.

Order matters: `order(site, n_layers)` is the place in the forward pass, and the checker uses it to refuse
edits that would need a value from later in the pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from trocar import errors

Width = Literal["d_model", "d_mlp", "d_heads", "d_kv_heads", "vocab"]


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One row of the table.

    Attributes:
        name: canonical name without the layer.
        phase: place inside a layer, ascending in the order of evaluation.
        layered: whether the site exists once per layer.
        width: which width of the model its rows have.
        editable: whether a program may write there.
        meaning: one sentence for docs and hints.
    """

    name: str
    phase: int
    layered: bool
    width: Width
    editable: bool
    meaning: str


_TABLE: Final = (
    SiteSpec(
        "embeddings",
        0,
        False,
        "d_model",
        True,
        "Embeddings as they enter layer 0 (scaled, or with positions added, where the family does that).",
    ),
    SiteSpec(
        "resid_pre",
        1,
        True,
        "d_model",
        True,
        "The residual stream before layer L; equals resid_post of the layer before.",
    ),
    SiteSpec(
        "attn_in",
        2,
        True,
        "d_model",
        True,
        "What the attention block reads: the stream after its input norm.",
    ),
    SiteSpec(
        "q",
        3,
        True,
        "d_heads",
        True,
        "Queries as projected, before any per-head norm and the rotary embedding, heads concatenated.",
    ),
    SiteSpec(
        "k",
        4,
        True,
        "d_kv_heads",
        True,
        "Keys as projected, before any per-head norm and the rotary embedding, key/value heads concatenated.",
    ),
    SiteSpec("v", 5, True, "d_kv_heads", True, "Values, key/value heads concatenated."),
    SiteSpec("attn_probs", 6, True, "d_heads", False, "Attention pattern after the softmax."),
    SiteSpec(
        "z", 7, True, "d_heads", True, "Per-head outputs before the output projection, heads concatenated."
    ),
    SiteSpec(
        "attn_out",
        8,
        True,
        "d_model",
        True,
        "Output of the attention block's output projection, before a sandwich norm.",
    ),
    SiteSpec(
        "attn_out_post",
        9,
        True,
        "d_model",
        True,
        "What attention adds to the stream, after a sandwich norm where there is one.",
    ),
    SiteSpec("resid_mid", 10, True, "d_model", True, "The residual stream between attention and MLP."),
    SiteSpec("mlp_in", 11, True, "d_model", True, "What the MLP reads: the stream after its input norm."),
    SiteSpec("mlp_act", 12, True, "d_mlp", True, "MLP neurons: the input of the down projection."),
    SiteSpec(
        "mlp_out", 13, True, "d_model", True, "Output of the MLP's down projection, before a sandwich norm."
    ),
    SiteSpec(
        "mlp_out_post",
        14,
        True,
        "d_model",
        True,
        "What the MLP adds to the stream, after a sandwich norm where there is one.",
    ),
    SiteSpec(
        "router_logits", 15, True, "d_model", False, "Expert router logits of a mixture-of-experts layer."
    ),
    SiteSpec("resid_post", 16, True, "d_model", True, "The residual stream after layer L."),
    SiteSpec(
        "final_norm", 17, False, "d_model", True, "Output of the last norm: what the unembedding reads."
    ),
    SiteSpec(
        "logits",
        18,
        False,
        "vocab",
        False,
        "Next-token logits. Never readable as rows: use lens or logprobs.",
    ),
)
SITES: Final[dict[str, SiteSpec]] = {row.name: row for row in _TABLE}
_STRIDE: Final = 32
_FORM: Final = re.compile(r"^([a-z_]+)(?:\.(0|[1-9][0-9]{0,4}))?$")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A parsed site, for example `Site("resid_post", 12)`; `str()` gives the canonical spelling back."""

    name: str
    layer: int | None = None

    @property
    def spec(self) -> SiteSpec:
        return SITES[self.name]

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}.{self.layer}"


def parse(text: str, path: str = "site") -> Site:
    """Reads `resid_post.12`.

    Raises:
        ProgramError: `unknown_site`, with the closest spelling.
    """
    match = _FORM.fullmatch(text)
    if match is None or match[1] not in SITES:
        raise errors.refuse("unknown_site", path, f"{text[:80]!r} is not a site", closest=_nearest(text))
    spec, layer = SITES[match[1]], match[2]
    if spec.layered and layer is None:
        raise errors.refuse("unknown_site", path, f"{text!r} needs a layer", closest=f"{spec.name}.0")
    if not spec.layered and layer is not None:
        raise errors.refuse(
            "unknown_site", path, f"{spec.name!r} exists once per model and takes no layer", closest=spec.name
        )
    return Site(spec.name, None if layer is None else int(layer))


def _nearest(text: str) -> str | None:
    name, dot, layer = text[:80].partition(".")
    near = errors.closest(name, SITES)
    if near is None:
        return None
    if not SITES[near].layered:
        return near
    known = dot and layer.isascii() and layer.isdecimal() and len(layer) <= 5
    return f"{near}.{int(layer)}" if known else f"{near}.0"


def order(site: Site, n_layers: int) -> int:
    """Place in the forward pass; a smaller number is computed earlier, an equal one is the same site."""
    if site.layer is not None:
        return (site.layer + 1) * _STRIDE + site.spec.phase
    return site.spec.phase if site.spec.phase == 0 else (n_layers + 1) * _STRIDE + site.spec.phase


def expand(pattern: str, n_layers: int, path: str = "sites") -> list[Site]:
    """Expands `resid_post.*` into one site per layer; anything else is read by `parse`."""
    name, _, layer = pattern.partition(".")
    if layer != "*":
        return [parse(pattern, path)]
    if name not in SITES or not SITES[name].layered:
        raise errors.refuse(
            "unknown_site", path, f"{pattern!r} is not a layered site", closest=_nearest(pattern)
        )
    return [Site(name, i) for i in range(n_layers)]


def unique(sites: Iterable[Site]) -> list[Site]:
    """The sites without repeats, in the given order."""
    return list(dict.fromkeys(sites))

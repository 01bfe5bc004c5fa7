"""What the checker may know about a model and about a handle: numbers and names, never weights.

`ModelFacts` is public (the API serves it); `HandleFacts` is what the store tells the checker about a handle
that the caller owns. Both are plain values, so checking needs neither torch nor a server.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trocar import errors
from trocar.sites import SITES, Site
from trocar.strict import Strict


class ModelFacts(Strict):
    """Public facts of a served model.

    Attributes:
        name: the name it is served under.
        fingerprint: hash of weights, config and tokenizer; handles remember it.
        lineage: the secret it belongs to: all fine-tunes of one base share it.
        weight_bits: size of the secret in bits (parameters times bits per stored parameter).
        sites: names of the sites that passed load-time validation, without layers.
        unavailable: reason by name for the sites that this model does not serve.
        eos: token ids that end a generation.
        norms: mean norm of a row at each site as wide as the stream, by layer (one number where there is none).
    """

    name: str
    fingerprint: str
    lineage: str
    family: str
    dtype: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    context: int
    parameters: int
    weight_bits: int
    open_weights: bool
    sites: tuple[str, ...]
    unavailable: dict[str, str]
    eos: tuple[int, ...]
    norms: dict[str, tuple[float, ...]] = Field(default_factory=dict)

    def width(self, site: Site | str) -> int:
        """Width of one row at `site`, in numbers."""
        spec = SITES[site.name if isinstance(site, Site) else site.partition(".")[0]]
        return {
            "d_model": self.d_model,
            "d_mlp": self.d_mlp,
            "d_heads": self.n_heads * self.d_head,
            "d_kv_heads": self.n_kv_heads * self.d_head,
            "vocab": self.vocab_size,
        }[spec.width]

    def require(self, site: Site, path: str) -> None:
        """Refuses a site that the model does not serve or a layer that it does not have."""
        if site.name not in self.sites:
            reason = self.unavailable.get(site.name, "it is not served here")
            raise errors.refuse(
                "site_unavailable", path, f"{str(site)!r} cannot be used on {self.name}: {reason}"
            )
        if site.layer is not None and site.layer >= self.n_layers:
            raise errors.refuse(
                "layer_out_of_range",
                path,
                f"{str(site)!r}: {self.name} has {self.n_layers} layers, 0 to {self.n_layers - 1}",
                closest=f"{site.name}.{self.n_layers - 1}",
            )


class HandleFacts(Strict):
    """What a handle holds, seen by the checker.

    Attributes:
        kind: stored rows, or an artifact of a fit (one direction per site).
        fingerprint: of the model it was made on.
        widths: width of a row or direction, by site.
        rows_per_prompt: stored rows of each prompt, in prompt order; empty for artifacts.
        has_probe: whether the artifact has weights and a bias (score) besides a direction.
    """

    handle: str
    kind: Literal["activations", "artifact"]
    fingerprint: str
    widths: dict[str, int]
    rows_per_prompt: tuple[int, ...] = ()
    has_probe: bool = False

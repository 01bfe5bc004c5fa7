"""Finds out at load time whether the adapter's sites are what their names say, by numbers.

Three short checks on sequences made from the vocabulary. The first pass is plain and checks identities
between sites in every layer (the stream adds up, each part recomputed from its input gives its output). The
second has one batch row per (site, layer), edits that row at one token there, and checks that the same
identities still hold with the edited values: an edit that the model did not take up, or a site that is not
where the table says, breaks one. A third checks that right padding cannot be felt. A site that fails is named
with the reason; nothing is repaired here.

Shapes: B batch rows, T tokens, D width of the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import nn

from trocar import errors
from trocar.models.adapters import SiteAdapter, tensor_of
from trocar.models.taps import tapped
from trocar.sites import SITES, Site

TOLERANCE: Final = 1e-5
"""Largest relative error of a row (float32, norm of the difference over norm of the row)."""
PADDING_TOLERANCE: Final = 1e-4
"""The same after all layers, where rounding of differently shaped kernels has accumulated."""
MOVED: Final = 1e-4
"""Smallest relative change by which an edited row counts as changed."""
_PLAIN_TOKENS: Final = 8
_EDIT_TOKENS: Final = 4
_EDIT_AT: Final = 2
_ATTENDED: Final = ("q", "k", "v")

Seen = Mapping[Site, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Identity:
    """One equation: what arrives at `target` is computed from what left the sources.

    Attributes:
        text: the equation, for the reason.
        blamed: site names that are refused when it does not hold in a plain pass.
        target: the site on the left.
        sources: the sites on the right.
        compute: the right side from the tensors that left the sources, `[B, T, D]`.
        exact: whether both sides must be the same bits.
        first: whether it holds for the first token alone.
    """

    text: str
    blamed: tuple[str, ...]
    target: Site
    sources: tuple[Site, ...]
    compute: Callable[[Seen], torch.Tensor]
    exact: bool = False
    first: bool = False

    def error(self, pass_: Pass) -> torch.Tensor:
        """Relative error of each token row, `[B, T]`; infinite where equal bits were due and are not."""
        left, right = pass_.arrived[self.target], self.compute(pass_.left)
        if self.first:
            left, right = left[:, :1], right[:, :1]
        if self.exact:
            return torch.where((left == right).all(-1), 0.0, torch.inf)
        return relative(left, right)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass as seen at some sites: before and after our own edit there, if there was one."""

    logits: torch.Tensor
    arrived: Seen
    left: Seen


def relative(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Norm of the difference over the norm of `right`, per row: `[..., D]` to `[...]`; NaN stays NaN."""
    tiny = torch.finfo(right.dtype).tiny
    size: torch.Tensor = torch.linalg.vector_norm(right, dim=-1).clamp_min(tiny)
    off: torch.Tensor = torch.linalg.vector_norm(left - right, dim=-1)
    return off / size


def identities(adapter: SiteAdapter, layers: range | list[int]) -> Iterator[Identity]:
    """The equations of a pre-norm or sandwich-norm transformer, for the given layers."""
    for layer in layers:
        yield from _layer_identities(adapter, layer)
    last = Site("resid_post", adapter.n_layers - 1)
    yield _same(Site("resid_pre", 0), Site("embeddings"))
    yield _through(adapter.final_norm, last, Site("final_norm"), blamed="final_norm")


def _layer_identities(adapter: SiteAdapter, layer: int) -> Iterator[Identity]:
    def at(name: str) -> Site:
        return Site(name, layer)

    def through(module: str, source: str, target: str, blamed: str) -> Identity:
        """The module beside the place of one site takes `source` to `target`."""
        return _through(adapter.part(layer, places[module].path), at(source), at(target), blamed=blamed)

    places = adapter.family.places
    attended, computed = ("attn_out", "mlp_out")
    if layer + 1 < adapter.n_layers:
        yield _same(Site("resid_pre", layer + 1), at("resid_post"))
    yield through("attn_in", "resid_pre", "attn_in", "attn_in")
    for name in _ATTENDED:
        yield _projected(adapter, at("attn_in"), at(name))
    yield _attended_alone(adapter, layer)
    yield through("z", "z", "attn_out", "z")
    if adapter.family.sandwich:
        attended, computed = ("attn_out_post", "mlp_out_post")
        yield through(attended, "attn_out", attended, attended)
        yield through(computed, "mlp_out", computed, computed)
    yield _sum(at("resid_mid"), at("resid_pre"), at(attended))
    yield through("mlp_in", "resid_mid", "mlp_in", "mlp_in")
    block, inner = adapter.part(layer, places["mlp_out"].path), adapter.part(layer, places["mlp_act"].path)
    yield _inside(block, inner, at("mlp_in"), at("mlp_act"))
    yield through("mlp_act", "mlp_act", "mlp_out", "mlp_out")
    yield _sum(at("resid_post"), at("resid_mid"), at(computed))


def _same(target: Site, source: Site) -> Identity:
    blamed = (target.name, source.name)
    return Identity(f"{target} == {source}", blamed, target, (source,), lambda s: s[source], exact=True)


def _sum(target: Site, base: Site, added: Site) -> Identity:
    """The stream itself is checked from layer to layer, so a wrong sum is the fault of its parts."""
    text, blamed = f"{target} == {base} + {added}", (added.name, "resid_mid")
    return Identity(text, blamed, target, (base, added), lambda s: s[base] + s[added])


def _through(module: nn.Module, source: Site, target: Site, *, blamed: str) -> Identity:
    text = f"{target} == {type(module).__name__}({source})"
    return Identity(text, (blamed,), target, (source,), lambda s: tensor_of(module(s[source])))


def _projected(adapter: SiteAdapter, source: Site, target: Site) -> Identity:
    """A projection, or the site's columns of a merged one."""
    tap = adapter.tap(target)
    text = f"{target} == {type(tap.module).__name__}({source})"
    return Identity(
        text, (target.name,), target, (source,), lambda s: tap.columns(tensor_of(tap.module(s[source])))
    )


def _attended_alone(adapter: SiteAdapter, layer: int) -> Identity:
    """The first token can attend to itself only, so each of its heads passes its value on."""
    v, z = Site("v", layer), Site("z", layer)
    width = int(adapter.attention(layer).head_dim)  # type: ignore[arg-type]

    def compute(seen: Seen) -> torch.Tensor:
        heads = seen[v].view(*seen[v].shape[:-1], -1, width)
        sharing = seen[z].shape[-1] // seen[v].shape[-1]
        return heads.repeat_interleave(sharing, dim=-2).flatten(-2)

    return Identity(f"{z} == {v} at the first token", ("v", "z"), z, (v, z), compute, first=True)


def _inside(block: nn.Module, inner: nn.Module, source: Site, target: Site) -> Identity:
    """What `inner` is given when `block` runs alone on what left the source."""

    def compute(seen: Seen) -> torch.Tensor:
        given: list[torch.Tensor] = []
        hook = inner.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
        try:
            block(seen[source])
        finally:
            hook.remove()
        return given[0] if given else seen[target] * torch.nan

    text = f"{target} == the inside of {type(block).__name__}({source})"
    return Identity(text, (target.name,), target, (source,), compute)


@torch.no_grad()
def validate(adapter: SiteAdapter, vocab_size: int) -> dict[str, str]:
    """Checks every site that the adapter claims.

    Args:
        adapter: as `SiteAdapter.of` made it; the model is in eval mode, float32.
        vocab_size: token ids run below this.

    Returns:
        Reason by site name for those that failed; empty when all is well.

    Raises:
        RunFailed: `model_unsupported` when the logits are not the unembedding of `final_norm`, or when
            right padding changes a prompt's rows: then no site could be trusted.
    """
    failed = _check_plain(adapter, vocab_size)
    failed |= {k: v for k, v in _check_edits(adapter, vocab_size, failed).items() if k not in failed}
    _check_padding(adapter, vocab_size)
    return {name: failed[name] for name in SITES if name in failed}


def _tokens(vocab_size: int, rows: int, length: int) -> torch.Tensor:
    """Token ids `[rows, length]` spread over the vocabulary in odd steps near the golden ratio."""
    step = max(1, int(vocab_size * 0.6180339887)) | 1
    return ((torch.arange(rows * length) * step + 1) % vocab_size).view(rows, length)


def _check_plain(adapter: SiteAdapter, vocab_size: int) -> dict[str, str]:
    checks = list(identities(adapter, range(adapter.n_layers)))
    plain = _run(adapter, _tokens(vocab_size, 2, _PLAIN_TOKENS), _needed(checks), {})
    unembedded = adapter.unembed(plain.left[Site("final_norm")])
    _require(relative(unembedded, plain.logits), "the logits are not unembed(final_norm)")
    failed: dict[str, str] = {}
    for check in checks:
        worst = float(check.error(plain).max())
        if not worst <= TOLERANCE:
            for name in check.blamed:
                failed.setdefault(name, f"load-time check failed: {check.text} (relative error {worst:.1e})")
    return failed


def _needed(checks: list[Identity]) -> list[Site]:
    return list(dict.fromkeys(site for check in checks for site in (check.target, *check.sources)))


def _run(
    adapter: SiteAdapter, tokens: torch.Tensor, sites: list[Site], edits: Mapping[Site, int], last: int = 0
) -> Pass:
    """One forward pass that keeps `sites` and edits batch row `edits[site]` at token `_EDIT_AT`.

    Logits are made for the `last` tokens, for all when 0: they are most of the work of a small model.
    """
    arrived: dict[Site, torch.Tensor] = {}
    left: dict[Site, torch.Tensor] = {}

    def visitor(site: Site, live: torch.Tensor) -> torch.Tensor | None:
        arrived[site] = left[site] = live.clone()
        if site not in edits:
            return None
        left[site] = live.clone()
        left[site][edits[site], _EDIT_AT] += _push(live[edits[site], _EDIT_AT])
        return left[site].clone()

    with tapped(adapter, {site: partial(visitor, site) for site in sites}):
        logits = adapter.model(input_ids=tokens, use_cache=False, logits_to_keep=last).logits
    return Pass(logits, arrived, left)


def _push(row: torch.Tensor) -> torch.Tensor:
    """A fixed pseudo-random direction three times as long as the row it is added to, `[D]`."""
    direction = torch.cos(torch.arange(1, len(row) + 1, dtype=torch.float64) ** 2).to(row.dtype)
    size = torch.linalg.vector_norm(row) / torch.linalg.vector_norm(direction)
    pushed: torch.Tensor = direction * (3 * size)
    return pushed


def _check_edits(adapter: SiteAdapter, vocab_size: int, failed: Mapping[str, str]) -> dict[str, str]:
    """One batch row per editable (site, layer) at the first, middle and last layer; row 0 is left alone."""
    n = adapter.n_layers
    layers = sorted({0, n // 2, n - 1})
    names = [name for name in adapter.sites if SITES[name].editable and name not in failed]
    sites = [Site(name, i) for name in names for i in (layers if SITES[name].layered else [None])]
    edits = {site: row for row, site in enumerate(sites, start=1)}
    checks = [c for c in identities(adapter, layers) if not failed.keys() & set(c.blamed)]
    kept = [*_needed(checks), *edits, *(Site("z", i) for i in layers), Site("final_norm")]
    tokens = _tokens(vocab_size, 1, _EDIT_TOKENS).expand(len(edits) + 1, -1)
    edited = _run(adapter, tokens, list(dict.fromkeys(kept)), edits, _EDIT_TOKENS - _EDIT_AT)
    reached = edited.left[Site("final_norm")][:, _EDIT_AT:]
    unembedded = relative(adapter.unembed(reached), edited.logits)
    found = [(c.text, c.error(edited)) for c in checks] + [("logits == unembed(final_norm)", unembedded)]
    reasons: dict[str, str] = {}
    for site, row in edits.items():
        if (reason := _verdict(site, row, found, edited)) is not None:
            reasons.setdefault(site.name, f"load-time check failed: an edit at {reason}")
    return reasons


def _verdict(site: Site, row: int, found: list[tuple[str, torch.Tensor]], edited: Pass) -> str | None:
    """What is wrong with an edit, as the end of a sentence, or None."""
    for text, error in found:
        worst = float(error[row].max())
        if not worst <= TOLERANCE:
            return f"{site} breaks {text} (relative error {worst:.1e})"
    if site.name in _ATTENDED and (wrong := _misattended(site, row, edited)) is not None:
        return f"{site} {wrong}"
    for place, rows in edited.left.items():
        early = float(relative(rows[row, :_EDIT_AT], rows[0, :_EDIT_AT]).max())
        if not early <= PADDING_TOLERANCE:
            return f"{site} changes tokens before it at {place} (relative change {early:.1e})"
    return None


def _misattended(site: Site, row: int, edited: Pass) -> str | None:
    """Queries act on their own token alone, keys and values on every later one too."""
    z = edited.arrived[Site("z", site.layer)]
    moved = relative(z[row, _EDIT_AT:], z[0, _EDIT_AT:])
    own, later = float(moved[0]), float(moved[1:].max())
    if not own >= MOVED:
        return "does not change the heads' outputs"
    if site.name == "q":
        return None if later <= PADDING_TOLERANCE else "changes the heads' outputs of later tokens"
    return None if later >= MOVED else "does not change the heads' outputs of later tokens"


def _check_padding(adapter: SiteAdapter, vocab_size: int) -> None:
    """A prompt alone and the same prompt right-padded beside a longer one, without a mask."""
    long = _tokens(vocab_size, 2, _PLAIN_TOKENS)
    short = long[:1, : _PLAIN_TOKENS // 2]
    alone = adapter.inner(input_ids=short, use_cache=False).last_hidden_state
    padded = torch.cat([torch.nn.functional.pad(short, (0, _PLAIN_TOKENS // 2)), long[1:]])
    beside = adapter.inner(input_ids=padded, use_cache=False).last_hidden_state[:1, : short.shape[1]]
    _require(relative(beside, alone), "right padding changes a prompt's own rows")


def _require(error: torch.Tensor, complaint: str) -> None:
    worst = float(error.max())
    if not worst <= PADDING_TOLERANCE:
        reason = f"load-time check failed: {complaint} (relative error {worst:.1e})"
        raise errors.refuse("model_unsupported", "model", reason)

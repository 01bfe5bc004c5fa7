"""Taps against plain torch hooks written here by hand, and edits against hand-made forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trocar import errors
from trocar.models.adapters import SiteAdapter
from trocar.models.families import family_of
from trocar.models.taps import tapped
from trocar.sites import Site, parse


def plain_reads(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every site of layer 1 by hooks that know nothing of the adapter."""
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    attn, mlp = layer.self_attn, layer.mlp
    inputs = {"resid_pre.1": layer, "z.1": attn.o_proj, "mlp_act.1": mlp.down_proj}
    inputs["resid_mid.1"] = layer.post_attention_layernorm
    outputs = {"attn_in.1": layer.input_layernorm, "q.1": attn.q_proj, "k.1": attn.k_proj, "v.1": attn.v_proj}
    outputs |= {
        "attn_out.1": attn.o_proj,
        "mlp_in.1": layer.post_attention_layernorm,
        "mlp_out.1": mlp.down_proj,
    }
    outputs |= {"resid_post.1": layer, "embeddings": model.model.embed_tokens, "final_norm": model.model.norm}
    hooks = [
        m.register_forward_pre_hook(lambda _m, a, n=n: seen.__setitem__(n, a[0].clone()))
        for n, m in inputs.items()
    ]
    hooks += [
        m.register_forward_hook(lambda _m, _a, o, n=n: seen.__setitem__(n, o.clone()))
        for n, m in outputs.items()
    ]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_tapped_read_is_bit_equal_to_a_plain_hook(adapter: SiteAdapter, tokens: torch.Tensor) -> None:
    expected = plain_reads(adapter.model, tokens)
    seen: dict[str, torch.Tensor] = {}
    visitors = {parse(n): (lambda t, n=n: seen.__setitem__(n, t.clone())) for n in expected}
    with tapped(adapter, visitors):
        adapter.model(input_ids=tokens)
    assert {s.partition(".")[0] for s in expected} == set(adapter.sites)
    for name, rows in expected.items():
        assert torch.equal(seen[name], rows), name


def test_no_visitor_is_the_plain_model(adapter: SiteAdapter, tokens: torch.Tensor) -> None:
    plain = adapter.model(input_ids=tokens).logits
    with tapped(adapter, {}):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapter.model.modules())
        assert torch.equal(adapter.model(input_ids=tokens).logits, plain)


def test_reading_everything_changes_no_bit(adapter: SiteAdapter, tokens: torch.Tensor) -> None:
    plain = adapter.model(input_ids=tokens).logits
    sites = [Site(n, 1 if parse_layered(n) else None) for n in adapter.sites]
    with tapped(adapter, dict.fromkeys(sites, lambda _t: None)):
        assert torch.equal(adapter.model(input_ids=tokens).logits, plain)


def parse_layered(name: str) -> bool:
    return name not in ("embeddings", "final_norm")


def test_hooks_go_away_after_an_error(adapter: SiteAdapter, tokens: torch.Tensor) -> None:
    def broken(_t: torch.Tensor) -> None:
        raise RuntimeError("visitor")

    with pytest.raises(RuntimeError, match="visitor"), tapped(adapter, {Site("z", 0): broken}):
        adapter.model(input_ids=tokens)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapter.model.modules())


def test_nothing_is_hooked_when_one_site_is_refused(adapter: SiteAdapter) -> None:
    visitors = dict.fromkeys([Site("z", 0), Site("attn_probs", 0)], lambda _t: None)
    with pytest.raises(errors.ProgramError, match="fused attention"), tapped(adapter, visitors):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapter.model.modules())


def manual_tail(model: Any, resid_mid: torch.Tensor, layer: int) -> torch.Tensor:
    """resid_post of `layer` from its resid_mid, by hand."""
    block = model.model.layers[layer]
    return resid_mid + block.mlp(block.post_attention_layernorm(resid_mid))


def test_an_edit_at_resid_mid_reaches_the_stream_and_the_mlp(
    adapter: SiteAdapter, tokens: torch.Tensor
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def edit(live: torch.Tensor) -> torch.Tensor:
        seen["mid"] = live + 1.0
        return seen["mid"].clone()

    with tapped(
        adapter, {Site("resid_mid", 1): edit, Site("resid_post", 1): lambda t: seen.update(post=t.clone())}
    ):
        adapter.model(input_ids=tokens)
    assert torch.equal(seen["post"], manual_tail(adapter.model, seen["mid"], 1))


@pytest.mark.parametrize(
    "name", ["resid_pre", "attn_in", "q", "k", "v", "z", "attn_out", "mlp_in", "mlp_act", "mlp_out"]
)
def test_an_edit_changes_its_token_and_none_before(
    adapter: SiteAdapter, tokens: torch.Tensor, name: str
) -> None:
    def edit(live: torch.Tensor) -> torch.Tensor:
        new = live.clone()
        new[1, 3] += 2.0
        return new

    plain = adapter.model(input_ids=tokens).logits
    with tapped(adapter, {Site(name, 1): edit}):
        edited = adapter.model(input_ids=tokens).logits
    assert torch.equal(edited[0], plain[0])
    assert torch.equal(edited[1, :3], plain[1, :3])
    assert (edited[1, 3] - plain[1, 3]).abs().max() > 1e-3


def test_an_inplace_edit_can_be_differentiated(adapter: SiteAdapter, tokens: torch.Tensor) -> None:
    """The gradient through h * gate at resid_mid equals a central difference."""

    def loss(gate: torch.Tensor) -> torch.Tensor:
        with tapped(adapter, {Site("resid_mid", 1): lambda t: t * gate}):
            return adapter.model(inputs_embeds=embeds).logits.double().square().mean()

    embeds = adapter.model.model.embed_tokens(tokens).requires_grad_(True)
    gate = torch.tensor(1.0, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(gate), gate)
    with torch.no_grad():
        step = 1e-2
        numeric = (loss(torch.tensor(1 + step)) - loss(torch.tensor(1 - step))) / (2 * step)
    assert abs(float(numeric)) > 1e-3
    assert float(slope) == pytest.approx(float(numeric), rel=2e-2)


def test_a_replacement_of_another_shape_is_a_broken_invariant(
    adapter: SiteAdapter, tokens: torch.Tensor
) -> None:
    with pytest.raises(AssertionError, match="turned"), tapped(adapter, {Site("z", 0): lambda t: t[:, :1]}):
        adapter.model(input_ids=tokens)


def test_an_unknown_architecture_is_refused_with_the_list() -> None:
    with pytest.raises(errors.RunFailed) as e:
        family_of("BloomForCausalLM")
    assert e.value.code == "model_unsupported"
    assert "LlamaForCausalLM" in e.value.reason


@pytest.mark.parametrize(
    ("site", "word"),
    [
        ("attn_out_post.0", "attn_out"),
        ("mlp_out_post.0", "mlp_out"),
        ("router_logits.0", "dense"),
        ("logits", "lens"),
    ],
)
def test_absent_sites_say_why(adapter: SiteAdapter, site: str, word: str) -> None:
    with pytest.raises(errors.ProgramError) as e:
        adapter.tap(parse(site))
    assert e.value.code == "site_unavailable"
    assert word in e.value.reason


def test_a_layer_too_many_is_refused(adapter: SiteAdapter) -> None:
    with pytest.raises(errors.ProgramError, match="layer_out_of_range"):
        adapter.tap(Site("z", 3))

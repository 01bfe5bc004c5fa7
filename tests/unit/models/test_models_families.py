"""Every site of every family against plain hooks and sums made by hand, edits, and tables that lie.

The paths here are written out a second time, and attention is computed here from the queries, keys and values that
the sites give: nothing of the adapter is used on the right-hand side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

from trocar.models.adapters import SiteAdapter
from trocar.models.families import FAMILIES as TABLES
from trocar.models.families import Place
from trocar.models.load import _facts
from trocar.models.packed import pack
from trocar.models.taps import tapped
from trocar.models.validate import identities, validate
from trocar.sites import SITES, Site

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")
VOCAB, TOKENS, LAYERS = 300, 14, 4
Seen = Mapping[str, torch.Tensor]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(make_model: Callable[..., Any], family: str) -> Any:
    return make_model(family, layers=LAYERS)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(5))


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return float((left - right).norm() / right.norm()) < 1e-5


def reads(model: Any, ids: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """Every served site of one layer, by the taps."""
    adapter, seen = SiteAdapter.of(model), dict[str, torch.Tensor]()

    def visitor(name: str) -> Callable[[torch.Tensor], None]:
        return lambda live: seen.__setitem__(name, live.clone())

    sites = [Site(n, layer if SITES[n].layered else None) for n in adapter.sites]
    with torch.no_grad(), tapped(adapter, {site: visitor(site.name) for site in sites}):
        model(input_ids=ids)
    return seen


def outputs(model: Any, ids: torch.Tensor, modules: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What modules give, by plain hooks."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _m, _a, out: seen.__setitem__(name, (out if torch.is_tensor(out) else out[0]).clone())

    hooks = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    with torch.no_grad():
        model(input_ids=ids)
    for h in hooks:
        h.remove()
    return seen


def norm(module: Any, x: torch.Tensor, family: str) -> torch.Tensor:
    """A norm by its formula."""
    if family == "gpt2":
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return scaled * module.weight + module.bias
    eps = module.eps if family == "gemma3" else module.variance_epsilon
    gain = 1 + module.weight if family == "gemma3" else module.weight
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def rotated(x_BTHD: torch.Tensor, theta: float) -> torch.Tensor:
    half = x_BTHD.shape[-1] // 2
    angle = torch.arange(x_BTHD.shape[1])[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    left, right = x_BTHD[..., :half], x_BTHD[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def heads_outputs(model: Any, seen: Seen, layer: int, family: str) -> torch.Tensor:
    """`z` by hand from `q`, `k` and `v`."""
    config = model.config
    width = seen["q"].shape[-1] // 4
    q, k, v = (seen[n].unflatten(-1, (-1, width)) for n in ("q", "k", "v"))
    window = None
    if family != "gpt2":
        attn = model.model.layers[layer].self_attn
        if family in ("qwen3", "gemma3"):
            q, k = norm(attn.q_norm, q, family), norm(attn.k_norm, k, family)
        theta = 10_000.0
        if family == "gemma3":
            sliding = config.layer_types[layer] == "sliding_attention"
            theta, window = (10_000.0, 8) if sliding else (1_000_000.0, None)
        q, k = rotated(q, theta), rotated(k, theta)
    k, v = (x.repeat_interleave(4 // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(width)
    ago = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    scores[..., (ago < 0) | (ago >= (window or TOKENS))] = -torch.inf
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(-2)


def neurons(block: Any, x: torch.Tensor, family: str) -> torch.Tensor:
    if family == "gpt2":
        return gelu(x @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh")
    gate, up = x @ block.mlp.gate_proj.weight.T, x @ block.mlp.up_proj.weight.T
    return (gelu(gate, approximate="tanh") if family == "gemma3" else silu(gate)) * up


def projected(block: Any, x: torch.Tensor, family: str) -> list[torch.Tensor]:
    if family == "gpt2":
        c = block.attn.c_attn
        return [x @ c.weight[:, 32 * i : 32 * (i + 1)] + c.bias[32 * i : 32 * (i + 1)] for i in range(3)]
    found = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    return [x @ p.weight.T + (0 if p.bias is None else p.bias) for p in found]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_every_site_is_what_its_name_says(model: Any, ids: torch.Tensor, family: str, layer: int) -> None:
    seen = reads(model, ids, layer)
    inner = model.base_model
    block = (inner.h if family == "gpt2" else inner.layers)[layer]
    first, last = (block.ln_1, inner.ln_f) if family == "gpt2" else (block.input_layernorm, inner.norm)
    attn, mlp = (block.attn if family == "gpt2" else block.self_attn), block.mlp
    plain = outputs(model, ids, {"attn_out": attn, "mlp_out": mlp, "resid_post": block, "final_norm": last})
    for name, rows in plain.items():
        assert torch.equal(seen[name], rows), name
    assert torch.equal(seen["embeddings"], embedded(model, ids, family))
    assert close(seen["attn_in"], norm(first, seen["resid_pre"], family))
    for name, rows in zip(("q", "k", "v"), projected(block, seen["attn_in"], family), strict=True):
        assert close(seen[name], rows), name
    assert close(seen["z"], heads_outputs(model, seen, layer, family))
    added, computed = seen["attn_out"], seen["mlp_out"]
    before = block.ln_2 if family == "gpt2" else block.post_attention_layernorm
    if family == "gemma3":
        before = block.pre_feedforward_layernorm
        added, computed = seen["attn_out_post"], seen["mlp_out_post"]
        assert close(added, norm(block.post_attention_layernorm, seen["attn_out"], family))
        assert close(computed, norm(block.post_feedforward_layernorm, seen["mlp_out"], family))
    assert close(seen["resid_mid"], seen["resid_pre"] + added)
    assert close(seen["mlp_in"], norm(before, seen["resid_mid"], family))
    assert close(seen["mlp_act"], neurons(block, seen["mlp_in"], family))
    assert close(seen["resid_post"], seen["resid_mid"] + computed)
    assert len(seen) == (16 if family == "gemma3" else 14)


def embedded(model: Any, ids: torch.Tensor, family: str) -> torch.Tensor:
    if family == "gpt2":
        found: torch.Tensor = model.transformer.wte.weight[ids] + model.transformer.wpe.weight[:TOKENS]
        return found
    scale = torch.tensor(32**0.5) if family == "gemma3" else 1.0
    rows: torch.Tensor = model.model.embed_tokens.weight[ids] * scale
    return rows


def test_the_first_layer_reads_the_embeddings(model: Any, ids: torch.Tensor) -> None:
    seen = reads(model, ids, 0)
    assert torch.equal(seen["embeddings"], seen["resid_pre"])


def test_an_edit_at_each_site_moves_its_token_and_none_before(model: Any, ids: torch.Tensor) -> None:
    adapter = SiteAdapter.of(model)
    plain = model(input_ids=ids).logits

    def edit(live: torch.Tensor) -> torch.Tensor:
        new = live.clone()
        # not a constant, which a LayerNorm would take out
        new[1, 9] += torch.arange(live.shape[-1]).cos() * 2.0
        return new

    for name in adapter.sites:
        with tapped(adapter, {Site(name, 1 if SITES[name].layered else None): edit}):
            edited = model(input_ids=ids).logits
        assert torch.equal(edited[0], plain[0]), name
        assert close(edited[1, :9], plain[1, :9]), name
        assert float((edited[1, 9] - plain[1, 9]).abs().max()) > 1e-3, name


def test_a_write_into_a_part_leaves_its_neighbours(make_model: Callable[..., Any], ids: torch.Tensor) -> None:
    """Against a plain hook that writes the columns of the merged projection by hand."""
    model = make_model("gpt2", layers=2)
    adapter = SiteAdapter.of(model)
    whole = model.transformer.h[1].attn.c_attn
    for i, name in enumerate(("q", "k", "v")):
        columns = slice(32 * i, 32 * (i + 1))

        def by_hand(_m: Any, _a: Any, out: torch.Tensor, columns: slice = columns) -> torch.Tensor:
            new = out.clone()
            new[:, 3, columns] *= -2.0
            return new

        def edit(live: torch.Tensor) -> torch.Tensor:
            new = live.clone()
            new[:, 3] *= -2.0
            return new

        hook = whole.register_forward_hook(by_hand)
        expected = model(input_ids=ids).logits
        hook.remove()
        seen: dict[str, torch.Tensor] = {}
        others = [n for n in ("q", "k", "v") if n != name]
        looks = {Site(n, 1): (lambda live, n=n, seen=seen: seen.__setitem__(n, live.clone())) for n in others}
        with tapped(adapter, {Site(name, 1): edit, **looks}):
            assert torch.equal(model(input_ids=ids).logits, expected)
        plain = reads(model, ids, 1)
        assert all(torch.equal(seen[n], plain[n]) for n in others)
        assert not torch.equal(expected, model(input_ids=ids).logits)


def test_all_three_parts_can_be_written_in_one_pass(
    make_model: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = make_model("gpt2", layers=2)
    adapter = SiteAdapter.of(model)
    whole = model.transformer.h[0].attn.c_attn
    factors = torch.tensor([2.0, 3.0, 5.0]).repeat_interleave(32)
    hook = whole.register_forward_hook(lambda _m, _a, out: out * factors)
    expected = model(input_ids=ids).logits
    hook.remove()
    edits = {
        Site(n, 0): (lambda live, f=f: live * f) for n, f in zip(("q", "k", "v"), (2, 3, 5), strict=True)
    }
    with tapped(adapter, edits):
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_part_can_be_differentiated(make_model: Callable[..., Any], ids: torch.Tensor) -> None:
    model = make_model("gpt2", layers=2)
    adapter = SiteAdapter.of(model)

    def loss(gate: torch.Tensor) -> torch.Tensor:
        with tapped(adapter, {Site("v", 1): lambda live: live * gate}):
            found: torch.Tensor = model(input_ids=ids).logits.double().square().mean()
            return found

    gate = torch.tensor(1.0, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(gate), gate)
    with torch.no_grad():
        numeric = (loss(torch.tensor(1.01)) - loss(torch.tensor(0.99))) / 0.02
    assert abs(float(numeric)) > 1e-3
    assert float(slope) == pytest.approx(float(numeric), rel=2e-2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_sound_model_passes(make_model: Callable[..., Any], family: str, layers: int, packed: bool) -> None:
    model = make_model(family, layers=layers)
    assert bool(packed and pack(model)) == packed
    assert validate(SiteAdapter.of(model), VOCAB) == {}


def test_every_site_has_an_equation(model: Any) -> None:
    adapter = SiteAdapter.of(model)
    checks = list(identities(adapter, range(LAYERS)))
    touched = {site.name for check in checks for site in (check.target, *check.sources)}
    assert touched == set(adapter.sites)


def lying(model: Any, **places: Place) -> SiteAdapter:
    adapter = SiteAdapter.of(model)
    return replace(adapter, family=replace(adapter.family, places={**adapter.family.places, **places}))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_site_said_to_be_where_another_lies_is_refused(make_model: Callable[..., Any], family: str) -> None:
    """Wherever the check can be made at all: the module beside the other site must take one tensor of that width."""
    model = make_model(family, layers=2)
    true = SiteAdapter.of(model).family.places
    names = [n for n in true if SITES[n].layered]
    told = 0
    for name in names:
        for other in names:
            if name == other or SITES[name].width != SITES[other].width or {name, other} == {"q", "z"}:
                continue
            if name != "resid_mid" and other in ("resid_pre", "resid_post", "attn_out"):
                continue
            told += 1
            assert validate(lying(model, **{name: true[other]}), VOCAB), (name, other)
    assert told > 20


@pytest.mark.parametrize(("site", "other"), [("q", 1), ("q", 2), ("k", 0), ("k", 2), ("v", 0), ("v", 1)])
def test_the_wrong_part_of_a_merged_projection_is_refused(
    make_model: Callable[..., Any], site: str, other: int
) -> None:
    adapter = lying(make_model("gpt2"), **{site: Place("attn.c_attn", "output", part=(other, 3))})
    failed = validate(adapter, VOCAB)
    assert site in failed
    assert "load-time check failed" in failed[site]


def test_a_norm_that_is_skipped_is_refused(model: Any, family: str) -> None:
    """The last layer's attention output joins the stream halved, as if a scale had been forgotten in the table."""
    block = SiteAdapter.of(model).layers[LAYERS - 1]
    attn = block.attn if family == "gpt2" else block.self_attn
    whole = type(attn).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = whole(attn, *args, **kwargs)
        return (out[0] * 0.5, *out[1:])

    attn.forward = forward
    failed = validate(SiteAdapter.of(model), VOCAB)
    assert "z" in failed
    assert "attn_out.3" in failed["z"]


def test_a_sandwich_norm_that_is_left_out_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model("gemma3")
    block = model.model.layers[2]

    def forward(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = block.self_attn(hidden_states=block.input_layernorm(hidden), **kwargs)[0]
        mid = hidden + block.post_attention_layernorm(attended)
        out = block.mlp(block.pre_feedforward_layernorm(mid))
        block.post_feedforward_layernorm(out)
        return mid + out

    block.forward = forward
    failed = validate(SiteAdapter.of(model), VOCAB)
    assert "mlp_out_post" in failed
    assert "resid_post.2 == resid_mid.2 + mlp_out_post.2" in failed["mlp_out_post"]


def test_logits_that_are_capped_are_refused_whole(make_model: Callable[..., Any]) -> None:
    model = make_model("gemma3")
    model.config.final_logit_softcapping = 3.0
    with pytest.raises(Exception, match="unembed"):
        validate(SiteAdapter.of(model), VOCAB)


def test_facts_of_each_family(model: Any, family: str, tokenizer: Any) -> None:
    from types import SimpleNamespace

    manifest: Any = SimpleNamespace(
        fingerprint="f", lineage="l", weight_bits=1, parameters=1, open_weights=True
    )
    facts = _facts(SiteAdapter.of(model), tokenizer, manifest, "m")
    assert (facts.family, facts.n_layers, facts.d_model, facts.n_heads) == (family, LAYERS, 32, 4)
    assert facts.d_head == (12 if family in ("qwen3", "gemma3") else 8)
    assert facts.n_kv_heads == (4 if family == "gpt2" else 2)
    assert facts.d_mlp == (128 if family == "gpt2" else 48)
    assert (facts.vocab_size, facts.context) == (300, 256)
    seen = reads(model, torch.tensor([[1, 2, 3]]), 0)
    assert all(rows.shape[-1] == facts.width(name) for name, rows in seen.items())


def test_layers_and_attention_can_be_driven(model: Any) -> None:
    adapter = SiteAdapter.of(model)
    assert [adapter.attention(i).layer_idx for i in range(LAYERS)] == list(range(LAYERS))
    assert len(adapter.layers) == LAYERS
    assert adapter.unembed is model.get_output_embeddings()


def test_the_conftest_knows_every_table(make_model: Callable[..., Any]) -> None:
    assert {type(make_model(f, layers=1)).__name__ for f in FAMILIES} == set(TABLES)

"""Packed linear layers: the same numbers, and the same bits for a row in any company."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trocar.models.load import load
from trocar.models.packed import PackedLinear, Panel, can_pack, pack

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")
SHAPES = [(48, 32), (576, 576), (192, 576), (576, 1536), (300, 32), (1024, 640)]


def layer(out: int, into: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(into, out, bias=bias).requires_grad_(False)


def rows(n: int, width: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(((left - right).norm(dim=-1) / right.norm(dim=-1)).max())


@pytest.mark.parametrize(("out", "into"), SHAPES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_row_alone_has_the_bits_it_has_in_company(out: int, into: int, mode: Any) -> None:
    packed, x = PackedLinear(layer(out, into)), rows(300, into)
    with mode():
        whole = packed(x)
        for n in (1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 100, 299):
            assert torch.equal(packed(x[:n]), whole[:n]), n
        for at in (0, 7, 150, 299):
            assert torch.equal(packed(x[at : at + 1]), whole[at : at + 1]), at
            assert torch.equal(packed(x[at].clone()[None, None])[0], whole[at : at + 1]), at
        assert torch.equal(packed(x.view(3, 100, into)).view(300, out), whole)


@pytest.mark.parametrize(("out", "into"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_is_dense_within_rounding(out: int, into: int, bias: bool) -> None:
    dense, x = layer(out, into, bias=bias), rows(40, into)
    packed = PackedLinear(dense)
    exact = x.double() @ dense.weight.double().T + (dense.bias.double() if bias else 0)
    assert relative(packed(x).double(), exact) < 1e-5
    assert relative(packed(x), dense(x)) < 1e-5
    assert torch.equal(packed.weight, dense.weight)


def panel(*sizes: int, into: int, biased: tuple[bool, ...]) -> tuple[list[nn.Linear], list[PackedLinear]]:
    plain = [layer(n, into, bias=b, seed=i) for i, (n, b) in enumerate(zip(sizes, biased, strict=True))]
    shared, starts = Panel(plain), [sum(sizes[:i]) for i in range(len(sizes))]
    return plain, [PackedLinear(p, None, (shared, i, starts[i])) for i, p in enumerate(plain)]


@pytest.mark.parametrize("biased", [(False, False, False), (True, True, True), (True, False, True)])
def test_layers_that_share_a_panel_give_what_each_gives_alone(biased: tuple[bool, ...]) -> None:
    plain, packed = panel(576, 192, 192, into=576, biased=biased)
    x = rows(300, 576)
    with torch.inference_mode():
        whole = [p(x) for p in packed]
        for dense, made, out in zip(plain, packed, whole, strict=True):
            assert relative(out, dense(x)) < 1e-5
            assert torch.equal(made.weight, dense.weight)
        for n in (1, 2, 5, 16, 33, 299):
            few = x[:n].clone()
            assert all(torch.equal(p(few), out[:n]) for p, out in zip(packed, whole, strict=True)), n


def test_a_panel_computes_once_for_one_input_and_anew_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (gate, up) = panel(64, 64, into=32, biased=(False, False))
    made, product = [], Panel._product
    monkeypatch.setattr(Panel, "_product", lambda self, x: (made.append(len(x)), product(self, x))[1])
    x, y = rows(4, 32), rows(5, 32)
    gate(x), up(x)
    assert made == [4]
    gate(x), gate(x)  # the same layer again: somebody may have written into x
    assert made == [4, 4, 4]
    assert torch.equal(up(y), up(y.clone()))
    up(x)
    assert made == [4, 4, 4, 5, 5, 4]
    gate(x)
    assert made == [4, 4, 4, 5, 5, 4]
    x.add_(1)
    before = gate(y)
    assert not torch.equal(gate(x)[:4], before[:4])
    gate(x), up(x)
    assert gate._place[0]._last is None  # nothing is held once all have asked


def test_strides_and_empty_batches_are_understood() -> None:
    dense, x = layer(48, 32), rows(12, 32)
    packed = PackedLinear(dense)
    assert torch.equal(packed(x[::2]), packed(x)[::2])
    turned = x.view(3, 4, 32).transpose(0, 1)
    assert torch.equal(packed(turned), packed(x).view(3, 4, 48).transpose(0, 1))
    assert packed(x[:0]).shape == (0, 48)


def test_the_transposed_layer_of_gpt2_is_the_same_product() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dense = Conv1D(96, 32).requires_grad_(False)
        dense.bias.normal_()
    packed, x = PackedLinear(dense), rows(9, 32)
    assert relative(packed(x), dense(x)) < 1e-5
    assert torch.equal(packed.weight, dense.weight.T)
    assert torch.equal(packed.state_dict()["weight"], dense.weight)


def test_a_gradient_is_refused_rather_than_lost() -> None:
    packed = PackedLinear(layer(48, 32))
    with pytest.raises(AssertionError, match="no gradient"):
        packed(rows(2, 32).requires_grad_(True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_it_did(
    make_model: Callable[..., Any], tokens: torch.Tensor, family: str
) -> None:
    model = make_model(family)
    plain = copy.deepcopy(model)
    swapped = pack(model)
    attention = model.get_submodule(
        "transformer.h.0.attn" if family == "gpt2" else "model.layers.0.self_attn"
    )
    places = {m._place[0] for m in attention.children() if isinstance(m, PackedLinear)}
    assert len(places) == 2  # queries, keys and values together, and the output
    assert swapped == sum(isinstance(m, PackedLinear) for m in model.modules()) > 0
    assert not any(isinstance(m, nn.Linear | Conv1D) for m in model.modules())
    with torch.no_grad():
        assert relative(model(input_ids=tokens).logits, plain(input_ids=tokens).logits) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_a_packed_model_is_the_plain_model(
    make_model: Callable[..., Any], tokens: torch.Tensor, family: str
) -> None:
    model = make_model(family)
    logits, before = model(input_ids=tokens).logits, copy.deepcopy(model.state_dict())
    pack(model)
    stored = model.state_dict()
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[name], value) for name, value in before.items())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=tokens).logits, logits)
    assert copied.lm_head.weight is copied.get_input_embeddings().weight
    assert copied.lm_head.weight is not model.lm_head.weight
    assert copied.double().dtype == torch.float64
    with pytest.raises(TypeError, match="pack=False"):
        model.double()


def test_a_tied_unembedding_has_no_second_dense_matrix(llama: Any) -> None:
    embedding = llama.model.embed_tokens.weight
    pack(llama)
    assert llama.lm_head.weight is embedding
    names = [name for name, _ in llama.named_parameters()]
    assert names.count("model.embed_tokens.weight") == 1
    assert not any("proj" in name or "lm_head" in name for name in names)


def test_nothing_is_packed_where_it_cannot_be(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_pack(llama)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    assert not can_pack(half)
    assert pack(half) == 0
    assert type(half.lm_head) is nn.Linear
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert (can_pack(llama), pack(llama)) == (False, 0)


def test_a_loaded_model_is_packed_unless_told_otherwise(tiny_dir: Any) -> None:
    loaded = load(tiny_dir)
    assert loaded.packed
    assert type(loaded.model.lm_head) is PackedLinear
    assert not load(tiny_dir, pack=False).packed


def test_a_models_rows_do_not_depend_on_their_number(tiny_dir: Any) -> None:
    """Projections, norms and MLP of a layer on one row and among 40; attention is the engine's concern."""
    model = load(tiny_dir).model
    x, mlp = rows(40, 32), model.model.layers[0].mlp
    norm = model.model.layers[0].post_attention_layernorm
    with torch.inference_mode():
        whole = model.lm_head(mlp(norm(x)))
        for n in (1, 2, 3, 7):
            assert torch.equal(model.lm_head(mlp(norm(x[:n]))), whole[:n])

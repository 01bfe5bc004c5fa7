"""The fused step: loss and every gradient are those of SAELens's TopK, auxiliary loss included.

In float64, so that agreement is agreement and not rounding.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from trocar.dictionaries import library

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the extra `sae`")

N, D, F, K = 96, 12, 40, 5


def config(rescale: bool, **more: Any) -> Any:
    settings = {"d_in": D, "d_sae": F, "k": K, "dtype": "float64", "rescale_acts_by_decoder_norm": rescale}
    return library.saelens().TopKTrainingSAEConfig(**settings, **more)


def twins(rescale: bool, bias: float, aux: float = 1.0) -> tuple[Any, Any]:
    """The library's module and ours with the same weights; decoder rows of very different lengths."""
    lens = library.saelens()
    from trocar.dictionaries.fused import FusedTopK

    torch.manual_seed(0)
    theirs = lens.TopKTrainingSAE(config(rescale, aux_loss_coefficient=aux))
    ours = FusedTopK(config(rescale, aux_loss_coefficient=aux))
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(torch.randn(value.shape, dtype=torch.float64))
        theirs.W_dec.mul_(torch.linspace(0.2, 3, F, dtype=torch.float64)[:, None])
        theirs.b_enc.add_(bias)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def stepped(module: Any, dead: torch.Tensor | None) -> Any:
    rows = torch.randn((N, D), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = library.saelens().saes.sae.TrainStepInput(
        sae_in=rows, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )
    output = module.training_forward_pass(given)
    output.loss.backward()
    return output


def mask(count: int) -> torch.Tensor | None:
    """The last features are dead: fewer than half the width, more, or all of them."""
    return None if count < 0 else torch.arange(F) >= F - count


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dead", [-1, 0, 1, 4, 20, F])
@pytest.mark.parametrize("bias", [0.0, -6.0])
def test_loss_and_gradients_are_the_librarys(rescale: bool, dead: int, bias: float) -> None:
    theirs, ours = twins(rescale, bias)
    a, b = stepped(theirs, mask(dead)), stepped(ours, mask(dead))
    for name, value in a.losses.items():
        torch.testing.assert_close(b.losses[name], value, rtol=1e-12, atol=1e-12)
    assert (a.losses["auxiliary_reconstruction_loss"] > 0) == (dead > 0)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.sae_out, a.sae_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(b.feature_acts, a.feature_acts, rtol=1e-10, atol=1e-12)
    for name, value in theirs.named_parameters():
        found = dict(ours.named_parameters())[name].grad
        assert value.grad.abs().max() > 0
        torch.testing.assert_close(found, value.grad, rtol=1e-9, atol=1e-10)


def test_the_case_of_few_active_features_is_met() -> None:
    """With the low bias, rows have fewer than K positive features: there the bare kernel is wrong."""
    theirs, _ = twins(True, -6.0)
    active = stepped(theirs, None).feature_acts.count_nonzero(dim=1)
    assert (active < K).float().mean() > 0.5
    assert (active > 0).any()


def test_the_coefficient_of_the_auxiliary_loss_counts() -> None:
    one, two = (stepped(twins(True, 0.0, aux)[1], mask(9)) for aux in (1.0, 0.25))
    name = "auxiliary_reconstruction_loss"
    torch.testing.assert_close(two.losses[name], one.losses[name] / 4)


def test_rows_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = twins(True, 0.0)
    _, parts = twins(True, 0.0)
    a = stepped(whole, mask(4))
    from trocar.dictionaries import fused

    calls = []
    kernel = fused.fused_encoder
    monkeypatch.setattr(fused, "PRODUCT_BYTES", 7 * K * D * 8)
    monkeypatch.setattr(fused, "fused_encoder", lambda x, *rest: calls.append(len(x)) or kernel(x, *rest))
    b = stepped(parts, mask(4))
    assert calls == [7] * 13 + [5]
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.W_enc.grad, whole.W_enc.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "change", [{"normalize_activations": "layer_norm"}, {"use_sparse_activations": True}]
)
def test_what_the_kernel_does_not_do_is_refused(change: dict[str, Any]) -> None:
    library.saelens()
    from trocar.dictionaries.fused import FusedTopK

    with pytest.raises(ValueError, match="fused"):
        FusedTopK(config(True, **change))

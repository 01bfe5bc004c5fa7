"""What the spellings compute, against plain torch hooks on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

import trocar
from trocar.hooks import HookedModel
from trocar.nnsight import LanguageModel

A, B = 65, 66
Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def plain(tiny: Any) -> Any:
    """The weights without the server's code around them."""
    return tiny.adapter.model


def run(plain: Any, ids: list[int], changes: dict[Any, Change]) -> Any:
    """Log-probabilities of the next token after each position, with functions on the outputs of modules."""

    def hook(change: Change) -> Any:
        def forward(_module: Any, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0].clone()), *output[1:])
            return change(output.clone())

        return forward

    with ExitStack() as stack, torch.no_grad():
        for module, change in changes.items():
            stack.callback(module.register_forward_hook(hook(change)).remove)
        return plain(torch.tensor([ids])).logits[0].log_softmax(-1)


def ids_of(model: trocar.Model, text: str) -> list[int]:
    return [token for token, _ in model.tokenize(text)]


@pytest.fixture(scope="module")
def ids(model: trocar.Model) -> list[int]:
    return ids_of(model, "hello there")


def test_nnsight_steers_the_last_position(lm: LanguageModel, plain: Any, ids: list[int], v: Any) -> None:
    with lm.trace("hello there"):
        lm.model.layers[1].output[0][:, -1] += 3.0 * v
        lm.model.layers[2].mlp.output[:] = 0
        found = lm.lm_head.output.log_softmax(-1)[0, -1, [A, B]].save()

    def steer(h: Any) -> Any:
        h[:, -1] += 3.0 * torch.from_numpy(v)
        return h

    layers = plain.model.layers
    wanted = run(plain, ids, {layers[1]: steer, layers[2].mlp: torch.zeros_like})
    assert np.asarray(found) == pytest.approx(wanted[-1, [A, B]].numpy(), abs=2e-3)
    assert float(found[0]) != pytest.approx(float(run(plain, ids, {})[-1, A]), abs=1e-2)


def test_nnsight_patches_between_invokes(
    lm: LanguageModel, model: trocar.Model, plain: Any, ids: list[int]
) -> None:
    with lm.trace() as tracer:
        with tracer.invoke("other words"):
            clean = lm.model.layers[2].output[0][:, -1].save()
        with tracer.invoke("hello there"):
            lm.model.layers[2].output[0][:, 3, :] = clean
            difference = (lm.lm_head.output[0, -1, A] - lm.lm_head.output[0, -1, B]).save()
    kept: list[Any] = []
    layer = plain.model.layers[2]
    run(plain, ids_of(model, "other words"), {layer: lambda h: kept.append(h[0, -1]) or h})

    def patch(h: Any) -> Any:
        h[0, 3] = kept[0]
        return h

    wanted = run(plain, ids, {layer: patch})[-1]
    assert float(difference) == pytest.approx(float(wanted[A] - wanted[B]), abs=2e-3)
    unpatched = run(plain, ids, {})[-1]
    assert abs(float(wanted[A] - wanted[B] - unpatched[A] + unpatched[B])) > 1e-2


def test_hooks_ablate_a_head(hooked: HookedModel, plain: Any, ids: list[int]) -> None:
    def ablate(z: Any, hook: Any) -> None:
        z[:, :, 2] = 0

    found = hooked.run_with_hooks("hello there", fwd_hooks=[("blocks.1.attn.hook_z", ablate)]).logprobs(
        [A, B]
    )
    o_proj = plain.model.layers[1].self_attn.o_proj

    def without(_module: Any, inputs: Any) -> Any:
        z = inputs[0].clone()
        z[..., 16:24] = 0
        return (z,)

    handle = o_proj.register_forward_pre_hook(without)
    wanted = run(plain, ids, {})
    handle.remove()
    assert found.values[0] == pytest.approx(wanted[-1, [A, B]].numpy(), abs=2e-3)
    assert found.values[0] != pytest.approx(run(plain, ids, {})[-1, [A, B]].numpy(), abs=1e-2)


def test_hooks_mean_ablate_and_return(hooked: HookedModel, plain: Any, ids: list[int], v: Any) -> None:
    def mean(x: Any, hook: Any) -> Any:
        x[:, -1] = x.mean(dim=1)
        return x

    hooks = [
        ("blocks.0.hook_resid_post", mean),
        ("blocks.2.hook_mlp_out", lambda x, hook: x * 0.5 + v),
    ]
    found = hooked.run_with_hooks("hello there", fwd_hooks=hooks).logit_diff(A, B)

    def average(h: Any) -> Any:
        h[:, -1] = h.mean(dim=1)
        return h

    layers = plain.model.layers
    changes = {layers[0]: average, layers[2].mlp: lambda h: h * 0.5 + torch.from_numpy(v)}
    wanted = run(plain, ids, changes)[-1]
    assert found.values[0] == pytest.approx(float(wanted[A] - wanted[B]), abs=2e-3)


def test_nnsight_steers_every_step(
    lm: LanguageModel, model: trocar.Model, plain: Any, ids: list[int], v: Any
) -> None:
    with lm.generate("hello there", max_new_tokens=5, stop_at_eos=False) as tracer:
        with tracer.iter[1:3]:
            lm.model.layers[2].output[0][:, -1] += 4.0 * v
        text = tracer.result.save()
    sequence = list(ids)
    for _ in range(5):

        def steer(h: Any) -> Any:
            h[:, len(ids) : len(ids) + 2] += 4.0 * torch.from_numpy(v)
            return h

        sequence.append(int(run(plain, sequence, {plain.model.layers[2]: steer})[-1].argmax()))
    assert list(text[0].ids) == sequence[len(ids) :]
    assert list(text[0].ids) != list(model.generate("hello there", max_new_tokens=5, stop_at_eos=False).ids)

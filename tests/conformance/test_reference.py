"""The reference itself, without any engine: held against the library, and against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_room import logprobs, read
from models_room import RANDOM, tree
from reference import Plain, solo
from reference_edits import columns_of, edited
from reference_places import hook, named, order_of, unembed
from reference_rows import in_generated, rows_at
from reference_values import Values

from trocar.graph import ops, words

IDS = tuple(range(40, 52))


@pytest.fixture(scope="module", params=RANDOM)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Plain]:
    """The library's model, and the reference's copy of it."""
    return tree().random_model(request.param), Plain.of(tree().random_model(request.param))


def _near(a: torch.Tensor, b: torch.Tensor, most: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= most * max(1.0, float(b.abs().max()))


def test_no_node_gives_the_librarys_logits(pair: tuple[Any, Plain]) -> None:
    theirs, plain = pair
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    _near(solo(plain, [], IDS).first.logits, want)


def test_the_loop_is_the_librarys_generation(pair: tuple[Any, Plain]) -> None:
    """Also the one pass along given ids: the same rows as running everything again for each token."""
    theirs, plain = pair
    nodes = [read("resid_post.1", "all"), logprobs((1,), "all")]
    run = solo(plain, nodes, IDS, max_new_tokens=6)
    with torch.no_grad():
        want = theirs.generate(
            torch.tensor([IDS]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert run.ids == tuple(want[0, len(IDS) :].tolist())
    forced = solo(plain, nodes, IDS, forced=run.ids)
    _near(forced.last.read["r"], run.last.read["r"])
    assert len(forced.last.read["r"]) == len(IDS) + 6


def test_hidden_states_are_the_librarys(pair: tuple[Any, Plain]) -> None:
    theirs, plain = pair
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    last = len(want) - 1
    sites = ["embeddings", *[f"resid_pre.{i}" for i in range(last)], "final_norm"]
    run = solo(plain, [read(s, name=f"n{i}") for i, s in enumerate(sites)], IDS).first
    for i, state in enumerate([want[0], *want[:last], want[last]]):
        _near(run.read[f"n{i}"], state[0])


def test_patterns_are_the_librarys(pair: tuple[Any, Plain]) -> None:
    theirs, plain = pair
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([IDS]), output_attentions=True).attentions
    theirs.set_attn_implementation("sdpa")
    for layer, probs in enumerate(want):
        run = solo(plain, [read(f"attn_probs.{layer}", keys="prompt[*]")], IDS).first
        _near(run.read["r"].reshape(len(IDS), -1, len(IDS)).transpose(0, 1), probs[0])


def test_a_knockout_is_a_mask_before_the_softmax(pair: tuple[Any, Plain]) -> None:
    """The cut row is zero there and the rest keeps its proportions; nothing else moves."""
    _, plain = pair
    at = "attn_probs.1"
    cut = ops.EditKnockout(id="e", site=at, at="prompt[-1]", keys="prompt[8:10]", heads=(2,))
    before, after = read(at, keys="prompt[*]", name="b"), read(at, keys="prompt[*]", name="a")
    run = solo(plain, [before, cut, after], IDS).first
    b, a = (run.read[n].reshape(len(IDS), -1, len(IDS)) for n in "ba")
    want = b[-1, 2].clone()
    want[8:10] = 0
    _near(a[-1, 2], want / want.sum())
    assert torch.equal(a[:-1], b[:-1])
    assert torch.equal(a[-1, [0, 1, 3]], b[-1, [0, 1, 3]])
    assert float((run.logits[-1] - solo(plain, [], IDS).first.logits[-1]).abs().max()) > 1e-3
    _near(run.logits[:-1], solo(plain, [], IDS).first.logits[:-1])


def test_every_site_can_be_seen_and_written(pair: tuple[Any, Plain]) -> None:
    """A push on one row changes what follows and no row before it; writing what is there changes nothing."""
    _, plain = pair
    base = solo(plain, [], IDS).first.logits
    for name in named(plain.model):
        if name == "attn_probs":
            continue
        site = name if name in ("embeddings", "final_norm") else f"{name}.1"
        width = solo(plain, [read(site)], IDS).first.read["r"].shape[1]
        push = torch.randn(width, generator=torch.Generator().manual_seed(1)) * 5
        nodes = [ops.Tensor(id="v", name="v"), ops.EditAdd(id="e", site=site, at="prompt[5]", value="v")]
        moved = solo(plain, nodes, IDS, {"v": push}).first.logits
        assert torch.equal(moved[:5], base[:5]), site
        assert float((moved[5:] - base[5:]).abs().max()) > 1e-3, site
        same = [read(site), ops.EditSet(id="e", site=site, at="prompt[*]", value="r")]
        assert torch.equal(solo(plain, same, IDS).first.logits, base), site


def test_sites_are_in_the_order_of_a_pass(pair: tuple[Any, Plain]) -> None:
    _, plain = pair
    seen: list[str] = []
    sites = [s for s in named(plain.model) if s not in ("attn_probs", "embeddings", "final_norm")]
    undo = [hook(plain.model, f"{s}.1", lambda _, s=s: seen.append(f"{s}.1")) for s in sites]
    solo(plain, [], IDS)
    for handle in undo:
        handle.remove()
    assert seen == sorted(seen, key=order_of)


def test_the_last_norm_and_unembedding_by_hand_are_the_logits(pair: tuple[Any, Plain]) -> None:
    _, plain = pair
    run = solo(plain, [read("resid_post.3"), read("final_norm", name="f")], IDS).first
    want = run.logits.double().log_softmax(-1)
    _near(unembed(plain.model, run.read["r"]), want)
    _near(unembed(plain.model, run.read["f"], normed=True), want)


def test_a_mean_of_the_prompt_is_one_value_for_the_text(pair: tuple[Any, Plain]) -> None:
    """It comes from the pass over the bare prompt, though a later layer of it steers an earlier one of the text."""
    _, plain = pair
    nodes = [
        read("resid_post.3"),
        ops.Mean(id="m", of="r"),
        ops.EditSet(id="e", site="resid_post.0", at="gen[*]", value="m"),
        read("resid_post.0", "gen[*]", name="g"),
    ]
    run = solo(plain, nodes, IDS, max_new_tokens=3)
    first = solo(plain, [read("resid_post.3")], IDS).first.read["r"].mean(0)
    _near(run.last.read["g"], first.expand(3, -1))


# ---- sums by hand ----

H = torch.tensor([[1.0, 2.0, -2.0, 4.0], [0.0, -1.0, 3.0, 0.5]])
V = torch.tensor([2.0, 0.0, 0.0, 0.0])


def _values(nodes: list[Any], **constants: torch.Tensor) -> Values:
    return Values(nodes, constants, torch.float32, read={"r": H})


def _edit(
    node: Any, *nodes: Any, scale: float = 1.0, d_head: int = 2, **constants: torch.Tensor
) -> list[list[float]]:
    values = _values([ops.Tensor(id="v", name="v"), read("z.0"), *nodes, node], v=V, **constants)
    return edited(node, H.clone(), values, d_head, scale).tolist()  # type: ignore[no-any-return]


AT = {"id": "e", "site": "z.0"}


def test_edits_by_hand() -> None:
    assert _edit(ops.EditAdd(value="v", coef=-1.5, **AT)) == [[-2, 2, -2, 4], [-3, -1, 3, 0.5]]
    assert _edit(ops.EditAdd(value="v", coef=2, unit="site_norm", **AT), scale=3) == [
        [7, 2, -2, 4],
        [6, -1, 3, 0.5],
    ]
    assert _edit(ops.EditSet(value="v", **AT)) == [V.tolist()] * 2
    assert _edit(ops.EditSet(value="zero", **AT)) == [[0.0] * 4] * 2
    assert _edit(ops.EditSet(value="r", **AT)) == H.tolist()
    assert _edit(ops.EditScale(by=-2, **AT)) == (-2 * H).tolist()
    assert _edit(ops.EditProjectOut(value="v", **AT)) == [[0, 2, -2, 4], [0, -1, 3, 0.5]]
    assert _edit(ops.EditClamp(value="v", low=0.5, **AT)) == [[1, 2, -2, 4], [0.5, -1, 3, 0.5]]
    assert _edit(ops.EditClamp(value="v", high=0.25, unit="site_norm", **AT), scale=2) == [
        [0.5, 2, -2, 4],
        [0, -1, 3, 0.5],
    ]


def test_parts_by_hand() -> None:
    zero = ops.EditSet(value="zero", heads=(1,), **AT)
    assert columns_of(zero, 2) == [2, 3]
    assert columns_of(ops.Read(id="r", site="z.0", heads=(1, 0)), 2) == [2, 3, 0, 1]
    assert _edit(zero) == [[1, 2, 0, 0], [0, -1, 0, 0]]
    two = ops.EditAdd(id="e", site="mlp_act.0", value="w", neurons=(3, 0))
    assert _edit(two, ops.Tensor(id="w", name="w"), w=torch.tensor([10.0, 20.0])) == [
        [21, 2, -2, 14],
        [20, -1, 3, 10.5],
    ]


def test_gates_by_hand() -> None:
    score = [
        ops.Dot(id="d", a="r", b="v"),
        ops.Gt(id="g", a="d", b=1.0),
        ops.Scale(id="half", of="d", by=0.25),
    ]
    zero = ops.EditSet(value="zero", gate="g", **AT)
    assert _edit(zero, *score) == [[0] * 4, H[1].tolist()]
    assert _edit(zero.model_copy(update={"gate": "half"}), *score) == [(0.5 * H[0]).tolist(), H[1].tolist()]
    mean = ops.Mean(id="m", of="half")
    assert _edit(zero.model_copy(update={"gate": "m"}), *score, mean) == (0.75 * H).tolist()


def test_affine_by_hand() -> None:
    """h + (h D + inner) U + bias: D picks the second column, U writes to the first."""
    arrays = {
        "down": torch.tensor([[0.0], [1.0], [0.0], [0.0]]),
        "up": torch.tensor([[10.0, 0.0, 0.0, 0.0]]),
        "inner": torch.tensor([1.0]),
        "bias": torch.tensor([0.0, 0.0, 0.0, 7.0]),
    }
    node = ops.EditAffine(down="down", up="up", inner="inner", bias="bias", **AT)
    assert _edit(node, **arrays) == [[31, 2, -2, 11], [0, -1, 3, 7.5]]
    assert _edit(ops.EditAffine(down="down", up="up", **AT), **arrays) == [[21, 2, -2, 4], [-10, -1, 3, 0.5]]


def _sae(**more: Any) -> Any:
    return ops.Sae(id="s", w_enc="a", b_enc="b", w_dec="c", b_dec="d", **more)


SAE = {
    "s.w_enc": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
    "s.b_enc": torch.tensor([0.5, 0.0]),
    "s.w_dec": torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]),
    "s.b_dec": torch.tensor([1.0, 0.0, 0.0, 0.0]),
    "s.threshold": torch.tensor([0.6, 5.0]),
}


def test_dictionaries_by_hand() -> None:
    def f(**more: Any) -> list[list[float]]:
        nodes = [read("z.0"), _sae(**more), ops.Encode(id="f", of="r", sae="s")]
        return _values(nodes, **SAE).get("f").data.tolist()  # type: ignore[no-any-return]

    assert f() == [[0.5, 2], [0, 0]]
    assert f(center=False) == [[1.5, 2], [0.5, 0]]
    assert f(center=False, activation="topk", k=1) == [[0, 2], [0.5, 0]]
    assert f(center=False, activation="jumprelu", threshold="t") == [[1.5, 0], [0, 0]]
    set_ = (words.Feature(index=0, set=4.0), words.Feature(index=1, scale=-1.0))
    kept = ops.EditSae(sae="s", features=set_, **AT)
    assert _edit(kept, _sae(), **SAE) == [[4.5, 2, -6, 4], [4, -1, 3, 0.5]]
    plain = ops.EditSae(sae="s", features=set_, keep_error=False, **AT)
    assert _edit(plain, _sae(), **SAE) == [[5, 0, -2, 0], [5, 0, 0, 0]]


def test_arithmetic_by_hand() -> None:
    def of(*nodes: Any) -> Any:
        values = _values(
            [read("z.0"), ops.Tensor(id="v", name="v"), ops.Tensor(id="m", name="m"), *nodes], v=V, m=M
        )
        return values.get(nodes[-1].id).data.tolist()

    M = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    dot = ops.Dot(id="d", a="r", b="v")
    assert of(ops.Add(id="x", a="r", b="v")) == [[3, 2, -2, 4], [2, -1, 3, 0.5]]
    assert of(ops.Sub(id="x", a="v", b="r")) == [[1, -2, 2, -4], [2, 1, -3, -0.5]]
    assert of(dot) == [2, 0]
    assert of(dot, ops.Scale(id="x", of="r", by="d")) == [[2, 4, -4, 8], [0, 0, 0, 0]]
    assert of(ops.MatMul(id="x", a="r", b="m")) == [[1, 2], [0, -1]]
    assert of(ops.Norm(id="x", of="r"))[0] == 5.0
    assert of(ops.Sub(id="z", a="r", b="r"), ops.Normalize(id="x", of="z")) == [[0] * 4] * 2
    assert of(ops.Normalize(id="x", of="v")) == [1, 0, 0, 0]
    assert of(ops.Relu(id="x", of="r")) == [[1, 2, 0, 4], [0, 0, 3, 0.5]]
    assert of(ops.TopK(id="x", of="r", k=2)) == [[0, 2, 0, 4], [0, 0, 3, 0.5]]
    assert of(ops.Mean(id="x", of="r")) == [0.5, 0.5, 0.5, 2.25]
    assert of(ops.Mean(id="x", of="r", over="width")) == [1.25, 0.625]
    assert of(dot, ops.Eq(id="x", a="d", b=0.0)) == [False, True]
    assert of(dot, ops.Lt(id="l", a="d", b=1.0), ops.Not(id="x", of="l")) == [True, False]
    both = [dot, ops.Gt(id="g", a="d", b=1.0), ops.Lt(id="l", a="d", b=9.0)]
    assert of(*both, ops.And(id="x", a="g", b="l")) == [True, False]
    assert of(*both, ops.Or(id="x", a="g", b="l")) == [True, True]
    assert of(*both, ops.Where(id="x", cond="g", a="r", b="v")) == [H[0].tolist(), V.tolist()]


def test_of_equal_numbers_the_first_stays() -> None:
    nodes = [ops.Tensor(id="v", name="v"), ops.TopK(id="x", of="v", k=2)]
    values = Values(nodes, {"v": torch.tensor([1.0, 3.0, 3.0, 3.0])}, torch.float32)
    assert values.get("x").data.tolist() == [0, 3, 3, 0]


def test_margins_are_noticed() -> None:
    nodes = [read("z.0"), ops.Norm(id="n", of="r"), ops.Gt(id="g", a="n", b=5.001)]
    values = _values(nodes)
    values.get("g")
    assert 1e-4 < min(values.near) < 1e-3


@pytest.mark.parametrize(
    ("at", "rows"),
    [
        ("prompt[*]", [0, 1, 2, 3, 4]),
        ("prompt[-1]", [4]),
        ("prompt[1:3]", [1, 2]),
        ("prompt[:-3]", [0, 1]),
        ("prompt[0,-1]", [0, 4]),
        ("gen[*]", [5, 6]),
        ("gen[1]", [6]),
        ("gen[1:9]", [6]),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ('mask("m")', [1, 3]),
        ('mask("m")[-1]', [3]),
        ('span("a, b")[0]', [2]),
    ],
)
def test_rows(at: str, rows: list[int]) -> None:
    assert rows_at(at, 5, 2, {'mask("m")': [1, 3], 'span("a, b")': [2]}) == rows
    assert in_generated(at) == (at == "all" or at.startswith("gen"))

"""Behaviours 31, 32 and 35, and the ops that they rest on: gates, dictionaries, values from one run in another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_room import Ask, Bench, Fit, capture, greedy, handle, logprobs, read, text
from compare_room import against_hooks, changed, close, same_bits

from trocar.engine.protocol import TaskResult
from trocar.graph import ops, words
from trocar.graph.positions import Marks

TOKENS = (1, 17, 42, 99)
EFFECT = 1e-2
V = ops.Tensor(id="v", name="v")


def _same(bench: Bench, ask: Ask, name: str) -> TaskResult:
    result = bench.alone(ask)
    against_hooks(bench, ask, result, name)
    assert changed(bench, ask, result) > EFFECT, f"{name} changed nothing"
    return result


def _threshold(bench: Bench, site: str, v: torch.Tensor) -> float:
    """A number that some rows of the prompts lie above and some below, far from all of them."""
    rows = torch.cat([bench.solo([read(site)], p).first.read["r"] for p in bench.prompts])
    along = (rows @ v).sort().values
    gaps = along[1:] - along[:-1]
    middle = gaps[len(gaps) // 4 : 3 * len(gaps) // 4 + 1]
    at = int(middle.argmax()) + len(gaps) // 4
    return float((along[at] + along[at + 1]) / 2)


def test_c31_a_gate_opens_for_true_rows_only(bench: Bench) -> None:
    """score > t, row by row: rows below keep their bits, rows above get the edit."""
    site = f"resid_post.{bench.middle}"
    v = bench.pushing(site, 2.0)
    t = _threshold(bench, site, v / v.norm())
    nodes = [
        V,
        ops.Normalize(id="u", of="v"),
        read(site),
        ops.Dot(id="along", a="r", b="u"),
        ops.Gt(id="over", a="along", b=t),
        ops.EditAdd(id="e", site=site, at="prompt[*]", value="v", coef=-1.0, gate="over"),
        read(site, name="after"),
        capture("after", name="kept"),
        capture("r", name="before"),
        ops.Score(id="open", of="over"),
        logprobs(TOKENS),
    ]
    ask = Ask(nodes, bench.prompts, vectors={"v": v})
    result = _same(bench, ask, "gate")
    opened = torch.from_numpy(result.outputs["open"].scores).bool()
    assert 0 < int(opened.sum()) < len(opened)
    before, after = ask.sinks["before"].rows(site), ask.sinks["kept"].rows(site)
    assert torch.equal(after[~opened], before[~opened])
    assert not bool((after[opened] == before[opened]).all(-1).any())


def test_c31_logic_of_gates(bench: Bench) -> None:
    """and, or, not, where, eq, lt: the same rows by another road give the same bits."""
    site = f"resid_post.{bench.middle}"
    v = bench.pushing(site)
    t = _threshold(bench, site, v)
    score = [V, read(site), ops.Dot(id="d", a="r", b="v")]
    masks = [
        ops.Gt(id="g", a="d", b=t),
        ops.Lt(id="l", a="d", b=t),
        ops.Not(id="n", of="l"),
        ops.And(id="both", a="g", b="n"),
        ops.Or(id="either", a="both", b="g"),
        ops.Eq(id="never", a="d", b=t),
        ops.Or(id="gate", a="either", b="never"),
    ]
    edit = {"id": "e", "site": site, "at": "prompt[*]"}
    gated = [*score, *masks, ops.EditAdd(value="v", gate="gate", **edit), logprobs(TOKENS)]
    added = ops.Add(id="sum", a="r", b="v")
    chosen = [*score, masks[0], added, ops.Where(id="w", cond="g", a="sum", b="r")]
    chosen += [ops.EditSet(value="w", **edit), logprobs(TOKENS)]
    a = _same(bench, Ask(gated, bench.prompts, vectors={"v": v}), "logic")
    b = _same(bench, Ask(chosen, bench.prompts, vectors={"v": v}), "where")
    assert same_bits(a.outputs["lp"].logprobs, b.outputs["lp"].logprobs)


def test_c31_gates_of_numbers_and_of_prompts(bench: Bench) -> None:
    """h + gate (f(h) - h), with a number per row, and with one per prompt."""
    site = f"resid_post.{bench.middle}"
    v = bench.pushing(site, 3.0)
    small = v / v.norm() / bench.usual(site)
    score = [V, ops.Tensor(id="u", name="u"), read(site), ops.Dot(id="d", a="r", b="u")]
    edit = ops.EditSet(id="e", site=site, at="prompt[*]", value="v", gate="d")
    nodes: list[Any] = [*score, edit, logprobs(TOKENS)]
    _same(bench, Ask(nodes, bench.prompts, vectors={"v": v, "u": small}), "gate of numbers")
    whole = [*score, ops.Mean(id="m", of="d"), edit.model_copy(update={"gate": "m"}), logprobs(TOKENS)]
    _same(bench, Ask(whole, bench.prompts, vectors={"v": v, "u": small}), "gate per prompt")


def _identity(width: int) -> dict[str, torch.Tensor]:
    """A dictionary that loses nothing: each number and its negative have a feature of their own."""
    eye = torch.eye(width)
    return {
        "w_enc": torch.cat([eye, -eye], 1),
        "b_enc": torch.zeros(2 * width),
        "w_dec": torch.cat([eye, -eye], 0),
        "b_dec": torch.zeros(width),
    }


def _sae(**more: Any) -> ops.Sae:
    return ops.Sae(id="sae", w_enc="w_enc", b_enc="b_enc", w_dec="w_dec", b_dec="b_dec", **more)


def test_c32_an_identity_dictionary_changes_nothing(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    splice = ops.EditSae(id="e", site=site, at="prompt[*]", sae="sae", keep_error=False)
    ask = Ask([_sae(), splice, logprobs(TOKENS)], bench.prompts, vectors=_identity(bench.width(site)))
    found = bench.alone(ask).outputs["lp"].logprobs
    base = bench.alone(Ask([logprobs(TOKENS)], bench.prompts)).outputs["lp"].logprobs
    close("identity dictionary", found, base, bench.most)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("keep_error", [True, False])
def test_c32_dictionaries(bench: Bench, activation: str, keep_error: bool) -> None:
    """Latents read, set and scaled; the reconstruction, or the row with its error kept."""
    site, width, features = f"resid_post.{bench.middle}", bench.width("resid_post"), 24
    size = bench.usual(site)
    draw = torch.Generator().manual_seed(4)
    enc = torch.randn(width, features, generator=draw) / width**0.5
    vectors = {
        "w_enc": enc,
        "b_enc": 0.1 * size * torch.randn(features, generator=draw),
        "w_dec": enc.T.clone(),
        "b_dec": 0.1 * size * torch.randn(width, generator=draw) / width**0.5,
        "threshold": torch.full((features,), 0.05 * size),
        "one": torch.nn.functional.one_hot(torch.tensor(3), features).float(),
    }
    extra: dict[str, Any] = {"k": 6} if activation == "topk" else {}
    extra |= {"threshold": "threshold"} if activation == "jumprelu" else {}
    changed_ = (words.Feature(index=3, set=2.0 * size), words.Feature(index=5, scale=-3.0))
    nodes = [
        _sae(activation=activation, center=keep_error, **extra),
        read(site),
        ops.Encode(id="f", of="r", sae="sae"),
        ops.Tensor(id="one", name="one"),
        ops.Dot(id="third", a="f", b="one"),
        ops.Score(id="latent", of="third"),
        ops.EditSae(id="e", site=site, at="prompt[1:]", sae="sae", features=changed_, keep_error=keep_error),
        logprobs(TOKENS),
    ]
    _same(bench, Ask(nodes, bench.prompts, vectors=vectors), f"dictionary {activation}")


def test_c35_a_value_of_one_run_in_another(bench: Bench) -> None:
    """Stored rows put back where they came from change no bit; their difference to the run is zero."""
    site = f"resid_post.{bench.middle}"
    source = Ask([read(site), capture("r")], bench.prompts)
    bench.alone(source)
    rows = [source.sinks["kept"].rows(site, i) for i in range(len(bench.prompts))]
    stored = ops.Stored(id="s", handle=handle(), site=site)
    gap = [
        read(site),
        ops.Sub(id="gap", a="r", b="s"),
        ops.Norm(id="size", of="gap"),
        ops.Score(id="z", of="size"),
    ]
    put = ops.EditSet(id="e", site=site, at="prompt[*]", value="s")
    ask = Ask([stored, *gap, put, logprobs(TOKENS)], bench.prompts, stored={"s": rows})
    result = bench.alone(ask)
    assert float(abs(result.outputs["z"].scores).max()) == 0.0
    base = bench.alone(Ask([logprobs(TOKENS)], bench.prompts)).outputs["lp"].logprobs
    assert same_bits(result.outputs["lp"].logprobs, base)
    half = Ask([stored, put, logprobs(TOKENS)], bench.prompts, stored={"s": [0.5 * r for r in rows]})
    assert not same_bits(bench.alone(half).outputs["lp"].logprobs, base)


def test_c35_a_fit_of_one_run_in_another(bench: Bench) -> None:
    """A direction steers, weights and bias score: what the server kept, used by name."""
    site, width = f"resid_post.{bench.middle}", bench.width("resid_post")
    fit = Fit(
        bench.pushing(site, 2.0, 1), torch.randn(width, generator=torch.Generator().manual_seed(2)), -0.5
    )
    art = "art_" + "1" * 32
    nodes = [
        ops.Vector(id="d", handle=art, site=site),
        read(site),
        ops.Score(id="p", of="r", probe=art, site=site),
        ops.EditAdd(id="e", site=site, at="prompt[-1]", value="d"),
        logprobs(TOKENS),
    ]
    _same(bench, Ask(nodes, bench.prompts, fits={"d": fit, "p": fit}), "a fit in a run")


def test_affine_and_clamp(bench: Bench) -> None:
    """h + (h D + inner) U + bias, and a component held between bounds."""
    site, width = f"resid_post.{bench.middle}", bench.width("resid_post")
    draw, size = torch.Generator().manual_seed(5), bench.usual(site)
    vectors = {
        "down": torch.randn(width, 3, generator=draw) / width**0.5,
        "up": torch.randn(3, width, generator=draw),
        "inner": size * torch.randn(3, generator=draw),
        "bias": size * torch.randn(width, generator=draw) / width**0.5,
    }
    arrays = [ops.Tensor(id=name, name=name) for name in vectors]
    affine = ops.EditAffine(
        id="e", site=site, at="prompt[*]", down="down", up="up", inner="inner", bias="bias"
    )
    _same(bench, Ask([*arrays, affine, logprobs(TOKENS)], bench.prompts, vectors=vectors), "affine")
    v = bench.pushing(site)
    clamp = ops.EditClamp(id="e", site=site, at="prompt[*]", value="v", low=2 * size, high=3 * size)
    after = [V, clamp, read(site), ops.Normalize(id="u", of="v"), ops.Dot(id="d", a="r", b="u")]
    ask = Ask([*after, ops.Score(id="s", of="d"), logprobs(TOKENS)], bench.prompts, vectors={"v": v})
    along = _same(bench, ask, "clamp").outputs["s"].scores / size
    assert along.min() >= 2 - 1e-3
    assert along.max() <= 3 + 1e-3


def test_site_norm_counts_in_mean_norms(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    add = ops.EditAdd(id="e", site=site, at="prompt[*]", value="v", coef=0.5, unit="site_norm")
    clamp = ops.EditClamp(
        id="c", site=site, at="prompt[*]", value="v", low=-1e-3, high=1e-3, unit="site_norm"
    )
    for edit in (add, clamp):
        for scale in (1e-3, 1e3):  # only the direction counts
            ask = Ask([V, edit, logprobs(TOKENS)], bench.prompts, vectors={"v": bench.vector(site, scale)})
            _same(bench, ask, "site norm")


def test_knockout(bench: Bench) -> None:
    """Cut edges carry nothing, the rest of the row sums to one, other rows and heads keep theirs."""
    site, prompt = f"attn_probs.{bench.middle}", bench.prompts[3]
    pattern = read(site, keys="prompt[*]")
    cut = ops.EditKnockout(id="e", site=site, at="prompt[-1]", keys="prompt[1:4]", heads=(0,))
    ask = Ask([cut, pattern, ops.Pattern(id="p", of="r"), logprobs(TOKENS)], [prompt])
    probs = bench.alone(ask).outputs["p"].probs
    assert abs(probs[-1, 0, 1:4]).max() == 0.0
    assert abs(probs[-1, 0].sum() - 1) < 1e-5
    base = bench.alone(Ask([pattern, ops.Pattern(id="p", of="r")], [prompt])).outputs["p"].probs
    assert same_bits(probs[:-1], base[:-1])
    assert same_bits(probs[-1, 1:], base[-1, 1:])
    assert abs(base[-1, 0, 1:4]).max() > 0
    every = [
        ops.EditKnockout(id=f"e{i}", site=f"attn_probs.{i}", at="prompt[1:]", keys="prompt[0]")
        for i in (0, 1)
    ]
    _same(bench, Ask([*every, logprobs(TOKENS)], bench.prompts), "knockout")


def test_knockout_of_generated_queries(bench: Bench) -> None:
    every = [
        ops.EditKnockout(id=f"e{i}", site=f"attn_probs.{i}", at="gen[*]", keys="prompt[0:2]") for i in (0, 1)
    ]
    ask = Ask([*every, logprobs(TOKENS, "gen[*]"), text()], bench.prompts, greedy(4))
    _same(bench, ask, "knockout of generated queries")


def test_metrics(bench: Bench) -> None:
    """logit_diff per prompt, cross_entropy of what follows, kl from a run before."""
    n, prompts = len(bench.prompts), bench.prompts
    before = [bench.solo([read("final_norm")], p).first.read["r"] for p in prompts]
    site = f"resid_post.{bench.middle}"
    nodes = [
        V,
        ops.EditAdd(id="e", site=site, at="prompt[*]", value="v"),
        ops.Stored(id="s", handle=handle(), site="final_norm", at="prompt[-2:]"),
        ops.Metric(id="pair", metric="logit_diff", tokens=(1, 2)),
        ops.Metric(
            id="pairs", metric="logit_diff", at="prompt[*]", tokens=tuple((i, i + 1) for i in range(n))
        ),
        ops.Metric(id="ce", metric="cross_entropy", at="prompt[:-1]"),
        ops.Metric(id="kl", metric="kl", at="prompt[-2:]", to="s"),
        logprobs(TOKENS),
    ]
    vectors = {"v": bench.pushing(site, 2.0)}
    result = _same(bench, Ask(nodes, prompts, vectors=vectors, stored={"s": before}), "metrics")
    assert result.outputs["kl"].values.min() > 1e-3
    same = bench.alone(Ask([nodes[2], nodes[6]], prompts, stored={"s": before}))
    close("kl of a run from itself", same.outputs["kl"].values, [0.0] * n, bench.most)


def test_rows_by_text_role_and_mask(family: Bench) -> None:
    """The same rows by index and by mark: the same bits; and the reference is told the rows by hand."""
    prompts = [p for p in family.prompts if len(p) > 3]
    marks = [_marks(len(p)) for p in prompts]
    marked = [{'mask("m")': [1, 3], 'span("bc")': [1, 2], 'role("user")': range(2, len(p))} for p in prompts]
    site = f"resid_post.{family.middle}"
    for mark, index in (
        ('mask("m")', "prompt[1,3]"),
        ('span("bc")', "prompt[1:3]"),
        ('role("user")[-1]', "prompt[-1]"),
    ):
        found = []
        for at in (mark, index):
            edit = ops.EditAdd(id="e", site=site, at=at, value="v")
            tail = [read(site, at), ops.Mean(id="m", of="r"), ops.Lens(id="l", of=("m",)), logprobs(TOKENS)]
            vectors = {"v": family.pushing(site)}
            ask = Ask([V, edit, *tail], prompts, vectors=vectors, marks=marks, marked=marked)
            found.append(_same(family, ask, "marks").outputs["lp"].logprobs)
        assert same_bits(found[0], found[1])


def _marks(length: int) -> Marks:
    """A letter per token; the first two tokens are a system message, the rest the user's."""
    offsets = tuple((i, i + 1) for i in range(length))
    roles = (("system", 0, 2), ("user", 2, length))
    mask = tuple(i in (1, 3) for i in range(length))
    return Marks("".join(chr(97 + i) for i in range(length)), offsets, roles, {"m": mask})

"""Behaviours 1 to 5, 14, 15, 24 to 28, 33 and 41: what a program sees is what a plain torch hook sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_room import Ask, Bench, capture, logprobs, read
from compare_room import against_hooks, close, close_rows, same_bits
from reference_places import named, spot, unembed

from trocar.errors import ProgramError
from trocar.graph import ops

TOKENS = (1, 17, 42, 99)


def test_c41_the_same_request_twice_is_bit_equal(bench: Bench) -> None:
    """Run before anything is compared: else the comparisons mean nothing."""
    site = f"resid_post.{bench.middle}"
    ask = Ask([read(site), capture("r"), logprobs(TOKENS)], bench.prompts)
    first = bench.alone(ask).outputs["lp"].logprobs
    rows = ask.sinks["kept"].rows(site)
    assert same_bits(bench.alone(ask).outputs["lp"].logprobs, first)
    assert torch.equal(ask.sinks["kept"].rows(site), rows)


def test_c01_noop(bench: Bench) -> None:
    """An empty program gives the model's own numbers, and one that only reads gives the same bits."""
    bare = Ask([logprobs(TOKENS)], bench.prompts)
    found = bench.alone(bare)
    against_hooks(bench, bare, found, "noop", most=1e-4)
    reading = Ask(
        [read(s, name=f"r{i}") for i, s in enumerate(bench.sites())] + [logprobs(TOKENS)], bench.prompts
    )
    assert same_bits(bench.alone(reading).outputs["lp"].logprobs, found.outputs["lp"].logprobs)


def test_c02_a_read_is_what_a_hook_sees(bench: Bench) -> None:
    sites = bench.sites()
    reads = [read(site, name=f"r{i}") for i, site in enumerate(sites)]
    ask = Ask([*reads, capture(*[r.id for r in reads])], bench.prompts)
    against_hooks(bench, ask, bench.alone(ask), "read")
    for site in sites:
        assert ask.sinks["kept"].rows(site).shape == (sum(map(len, ask.prompts)), bench.width(site))


def test_c02_every_site_of_the_family_is_served(bench: Bench) -> None:
    """What the modelling code has, and nothing else; the rest is refused with a reason."""
    assert set(bench.facts.sites) == set(named(bench.plain.model))
    for missing in {"router_logits.0", "attn_out_post.0", "logits"} - {f"{s}.0" for s in bench.facts.sites}:
        with pytest.raises(ProgramError) as caught:
            bench.task(Ask([read(missing), capture("r")], bench.prompts[:1]))
        assert caught.value.code == "site_unavailable"
        assert len(caught.value.reason) > 20


def test_c03_the_input_of_a_block_is_the_output_before(bench: Bench) -> None:
    last = bench.layers - 1
    names = [f"resid_post.{i}" for i in range(last)] + [f"resid_pre.{i + 1}" for i in range(last)]
    names += ["embeddings", "resid_pre.0"]
    nodes = [read(site, name=f"n{i}") for i, site in enumerate(names)]
    ask = Ask([*nodes, capture(*[n.id for n in nodes])], bench.prompts[:1])
    bench.alone(ask)
    shelf = ask.sinks["kept"]
    for layer in range(last):
        assert torch.equal(shelf.rows(f"resid_post.{layer}"), shelf.rows(f"resid_pre.{layer + 1}"))
    assert torch.equal(shelf.rows("embeddings"), shelf.rows("resid_pre.0"))
    assert not torch.equal(shelf.rows("resid_post.0"), shelf.rows("resid_post.1"))


def test_c04_all_layers_in_one_pass_in_any_order(bench: Bench) -> None:
    order = list(reversed(range(bench.layers)))
    nodes = [read(f"resid_post.{i}", name=f"n{i}") for i in order]
    ask = Ask([*nodes, capture(*[n.id for n in nodes])], bench.prompts[:1])
    against_hooks(bench, ask, bench.alone(ask), "all layers")
    for layer in order:
        one = Ask([read(f"resid_post.{layer}"), capture("r")], bench.prompts[:1])
        bench.alone(one)
        site = f"resid_post.{layer}"
        assert torch.equal(ask.sinks["kept"].rows(site), one.sinks["kept"].rows(site))


def test_c05_a_read_is_a_snapshot(bench: Bench) -> None:
    for site in bench.sites(editable=True):
        bare = Ask([read(site), capture("r")], bench.prompts[:1])
        edited = [read(site), ops.EditSet(id="e", site=site, at="prompt[*]", value="zero"), capture("r")]
        ask = Ask(edited, bench.prompts[:1])
        bench.alone(bare)
        bench.alone(ask)
        assert torch.equal(ask.sinks["kept"].rows(site), bare.sinks["kept"].rows(site)), site
        assert ask.sinks["kept"].rows(site).abs().max() > 0


def test_c33_before_and_after_an_edit_differ(bench: Bench) -> None:
    for site in bench.sites(editable=True):
        nodes = [
            read(site, name="before"),
            ops.EditScale(id="e", site=site, at="prompt[*]", by=2.0),
            read(site, name="after"),
            capture("before", name="b"),
            capture("after", name="a"),
        ]
        ask = Ask(nodes, bench.prompts[:1])
        against_hooks(bench, ask, bench.alone(ask), "before and after")
        before, after = ask.sinks["b"].rows(site), ask.sinks["a"].rows(site)
        assert torch.equal(after, 2 * before), site
        assert not torch.equal(after, before)


def test_c14_rows_are_the_requests_own(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    asks = [Ask([read(site), capture("r")], [p]) for p in bench.prompts]
    for ask, prompt, result in zip(asks, bench.prompts, bench.together(*asks), strict=True):
        assert ask.sinks["kept"].keys().tolist() == [[0, i, token] for i, token in enumerate(prompt)]
        against_hooks(bench, ask, result, "read in a mixed batch")
    assert bench.engine.stats().most_requests >= len(asks)


def test_c15_mixed_lengths_equal_each_alone(bench: Bench) -> None:
    ask = Ask([logprobs(TOKENS, "prompt[-1]")], bench.prompts)
    found = bench.alone(ask)
    against_hooks(bench, ask, found, "mixed lengths", most=1e-4)
    assert found.outputs["lp"].tags.positions.tolist() == [len(p) - 1 for p in bench.prompts]
    for i, prompt in enumerate(bench.prompts):
        one = bench.alone(Ask(ask.nodes, [prompt])).outputs["lp"].logprobs
        assert same_bits(one[0], found.outputs["lp"].logprobs[i])


def test_c24_logit_lens_is_norm_and_unembedding(bench: Bench) -> None:
    """For every layer; the last one is the model, and so is the lens behind the last norm."""
    names = [f"n{i}" for i in range(bench.layers)]
    reads = [read(f"resid_post.{i}", name=n) for i, n in enumerate(names)]
    lenses = [ops.Lens(id="lens", of=tuple(names), top_k=5), ops.Lens(id="normed", of=("f",), top_k=5)]
    ask = Ask([*reads, read("final_norm", name="f"), *lenses], bench.prompts[2:3])
    result = bench.alone(ask)
    (run,) = against_hooks(bench, ask, result, "logit lens")
    model = run.first.logits.double().log_softmax(-1).topk(5).values
    close("last lens is the model", result.outputs["lens"].logprobs[-1], model, bench.most)
    close("lens after the final norm", result.outputs["normed"].logprobs[0], model, bench.most)
    early = torch.from_numpy(result.outputs["lens"].logprobs[0])
    assert (early - model).abs().max() > 0.1


def test_c24_the_hand_made_lens_of_the_last_layer_is_the_model(bench: Bench) -> None:
    run = bench.solo([read(f"resid_post.{bench.layers - 1}")], bench.prompts[0]).first
    close(
        "reference: lens by hand",
        unembed(bench.plain.model, run.read["r"]),
        run.logits.double().log_softmax(-1),
    )


def _captured(bench: Bench, *sites: str) -> dict[str, torch.Tensor]:
    nodes = [read(s, name=f"n{i}") for i, s in enumerate(sites)]
    ask = Ask([*nodes, *[capture(n.id, name=f"k{n.id}") for n in nodes]], bench.prompts[:1])
    bench.alone(ask)
    return {s: ask.sinks[f"kn{i}"].rows(s) for i, s in enumerate(sites)}


def test_c25_z_through_the_output_projection_is_attn_out(bench: Bench) -> None:
    z, out = f"z.{bench.middle}", f"attn_out.{bench.middle}"
    rows = _captured(bench, z, out)
    close_rows("z through its projection", rows[out], spot(bench.plain.model, z).module(rows[z]))


def test_c25_heads_of_a_read_are_slices_in_their_order(bench: Bench) -> None:
    site, d = f"z.{bench.middle}", int(bench.facts.d_head)
    last = int(bench.facts.n_heads) - 1
    nodes = [
        read(site, heads=(last, 0)),
        ops.Norm(id="n", of="r"),
        ops.Score(id="s", of="n"),
        read(site, name="w"),
    ]
    onehot = torch.zeros(2 * d)
    onehot[0] = 1.0
    nodes += [ops.Tensor(id="v", name="v"), ops.Dot(id="first", a="r", b="v"), ops.Score(id="f", of="first")]
    ask = Ask([*nodes, capture("w")], bench.prompts[:1], vectors={"v": onehot})
    result = bench.alone(ask)
    against_hooks(bench, ask, result, "heads")
    whole = ask.sinks["kept"].rows(site)
    close_rows(
        "first column of the last head", torch.from_numpy(result.outputs["f"].scores), whole[:, last * d]
    )


def test_c26_mlp_act_is_the_inside_of_the_mlp(bench: Bench) -> None:
    """The MLP run by hand on what it read: its neurons are those that were captured."""
    inside, act = f"mlp_in.{bench.middle}", f"mlp_act.{bench.middle}"
    rows = _captured(bench, inside, act)
    seen: list[torch.Tensor] = []
    undo = spot(bench.plain.model, act).module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        spot(bench.plain.model, f"mlp_out.{bench.middle}").module(rows[inside])
    undo.remove()
    close_rows("neurons", rows[act], seen[0])


def test_c27_patterns_sum_to_one_and_look_back_only(bench: Bench) -> None:
    prompt, layers = bench.prompts[3], sorted({0, bench.middle, bench.layers - 1})
    for layer in layers:
        nodes = [read(f"attn_probs.{layer}", keys="prompt[*]"), ops.Pattern(id="p", of="r")]
        ask = Ask(nodes, [prompt])
        result = bench.alone(ask)
        against_hooks(bench, ask, result, "pattern")
        probs = torch.from_numpy(result.outputs["p"].probs)
        assert probs.shape == (len(prompt), bench.facts.n_heads, len(prompt))
        close("a pattern's sum", probs.sum(-1), torch.ones(probs.shape[:2]), 1e-5)
        ahead = torch.ones(len(prompt), len(prompt)).triu(1).bool()
        assert float(probs.transpose(0, 1)[:, ahead].abs().max()) == 0.0
        assert float(probs[-1].std()) > 0


def test_c27_what_a_pattern_is_not(bench: Bench) -> None:
    """No rows of a stream, no write but a knockout, no read without keys: typed refusals."""
    site = f"attn_probs.{bench.middle}"
    pattern = read(site, keys="prompt[*]")
    bad: dict[str, list[Any]] = {
        "wrong_operand": [pattern, capture("r")],
        "missing_field": [read(site), ops.Pattern(id="p", of="r")],
        "site_not_editable": [
            ops.EditSet(id="e", site=site, at="prompt[-1]", value="zero"),
            logprobs(TOKENS),
        ],
    }
    for code, nodes in bad.items():
        with pytest.raises(ProgramError) as caught:
            bench.task(Ask(nodes, bench.prompts[:1]))
        assert caught.value.code == code


def test_c28_q_k_v_are_separate(bench: Bench) -> None:
    """Also where the model computes the three in one matrix."""
    facts, sites = bench.facts, {s: f"{s}.{bench.middle}" for s in ("attn_in", "q", "k", "v")}
    rows = _captured(bench, *sites.values())
    assert rows[sites["q"]].shape[1] == facts.n_heads * facts.d_head
    assert rows[sites["k"]].shape[1] == rows[sites["v"]].shape[1] == facts.n_kv_heads * facts.d_head
    for s in "qkv":
        where = spot(bench.plain.model, sites[s])
        made = where.module(rows[sites["attn_in"]])[:, where.columns or slice(None)]
        close_rows("q, k, v", rows[sites[s]], made)
    assert not torch.allclose(rows[sites["k"]], rows[sites["v"]])

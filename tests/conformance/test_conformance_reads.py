"""Reads: what a program sees is what a plain torch hook sees, bit for bit when a request runs alone."""

from __future__ import annotations

import torch
from bench_room import Ask, Bench, capture, close, logprobs, read
from reference import logprobs as reference_logprobs
from reference import solo, unembed

from trocar.engine.protocol import Lensed
from trocar.graph import ops

TOKENS = (1, 17, 42, 99)


def test_c41_the_same_request_twice_is_bit_equal(bench: Bench) -> None:
    ask = Ask([read(f"resid_post.{bench.middle}"), capture("r"), logprobs(TOKENS)], bench.prompts)
    first = bench.alone(ask).outputs["lp"].logprobs
    rows = ask.sinks["kept"].rows(f"resid_post.{bench.middle}")
    assert torch.equal(torch.from_numpy(bench.alone(ask).outputs["lp"].logprobs), torch.from_numpy(first))
    assert torch.equal(ask.sinks["kept"].rows(f"resid_post.{bench.middle}"), rows)


def test_c01_noop(bench: Bench) -> None:
    for prompt in bench.prompts:
        with torch.no_grad():
            base = bench.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        found = bench.alone(Ask([logprobs(TOKENS)], [prompt])).outputs["lp"].logprobs
        assert torch.equal(torch.from_numpy(found), base.log_softmax(-1)[:, list(TOKENS)])


def test_c02_read_bit_exact(bench: Bench) -> None:
    for site in bench.sites():
        for prompt in bench.prompts[:2]:
            ask = Ask([read(site), capture("r")], [prompt])
            bench.alone(ask)
            seen = solo(bench.model, ask.nodes, prompt).first.read["r"]
            assert seen.shape == (len(prompt), bench.width(site))
            assert torch.equal(ask.sinks["kept"].rows(site), seen), site


def test_c02_every_site_that_a_llama_has_is_served(bench: Bench) -> None:
    served = {site.partition(".")[0] for site in bench.sites()}
    assert served == {
        "embeddings", "resid_pre", "attn_in", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_in",
        "mlp_act", "mlp_out", "resid_post", "final_norm",
    }  # fmt: skip


def test_c03_block_input_is_the_output_before(bench: Bench) -> None:
    last = bench.layers - 1
    names = [f"resid_post.{i}" for i in range(last)] + [f"resid_pre.{i + 1}" for i in range(last)]
    nodes = [read(site, name=f"n{i}") for i, site in enumerate(names)]
    ask = Ask([*nodes, capture(*[n.id for n in nodes])], bench.prompts[:1])
    bench.alone(ask)
    shelf = ask.sinks["kept"]
    for layer in range(last):
        assert torch.equal(shelf.rows(f"resid_post.{layer}"), shelf.rows(f"resid_pre.{layer + 1}"))
    assert not torch.equal(shelf.rows("resid_post.0"), shelf.rows("resid_post.1"))


def test_c04_all_layers_in_any_order(bench: Bench) -> None:
    prompt = bench.prompts[0]
    order = list(reversed(range(bench.layers)))
    nodes = [read(f"resid_post.{i}", name=f"n{i}") for i in order]
    ask = Ask([*nodes, capture(*[n.id for n in nodes])], [prompt])
    bench.alone(ask)
    for layer in order:
        one = solo(bench.model, [read(f"resid_post.{layer}")], prompt).first.read["r"]
        assert torch.equal(ask.sinks["kept"].rows(f"resid_post.{layer}"), one)


def test_c05_a_read_is_a_snapshot(bench: Bench) -> None:
    """For a site that is edited by replacing it, and for the one that is edited in place."""
    for name in ("resid_post", "resid_mid"):
        site = f"{name}.{bench.middle}"
        nodes = [read(site), ops.EditSet(id="e", site=site, at="prompt[*]", value="zero"), capture("r")]
        ask = Ask(nodes, bench.prompts[:1])
        bench.alone(ask)
        base = solo(bench.model, [read(site)], bench.prompts[0]).first.read["r"]
        assert torch.equal(ask.sinks["kept"].rows(site), base)
        assert base.abs().max() > 0


def test_c33_before_and_after_an_edit_differ(bench: Bench) -> None:
    for name in ("resid_post", "resid_mid", "mlp_act", "z", "k"):
        site = f"{name}.{bench.middle}"
        nodes = [
            read(site, name="before"),
            ops.EditScale(id="e", site=site, at="prompt[*]", by=2.0),
            read(site, name="after"),
            capture("before", name="b"),
            capture("after", name="a"),
        ]
        ask = Ask(nodes, bench.prompts[:1])
        bench.alone(ask)
        before, after = ask.sinks["b"].rows(site), ask.sinks["a"].rows(site)
        assert torch.equal(after, 2 * before), site
        assert not torch.equal(after, before)


def test_c14_rows_are_the_requests_own(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    asks = [Ask([read(site), capture("r")], [p]) for p in bench.prompts]
    bench.together(*asks)
    for ask, prompt in zip(asks, bench.prompts, strict=True):
        shelf = ask.sinks["kept"]
        assert shelf.keys().tolist() == [[0, i, token] for i, token in enumerate(prompt)]
        alone = solo(bench.model, [read(site)], prompt).first.read["r"]
        size = alone.abs().max()  # some models have rows a thousand times larger than others
        close("read in a mixed batch, relative", shelf.rows(site) / size, alone / size, 1e-5)
    assert bench.engine.stats().most_requests >= len(asks)


def test_c15_mixed_lengths_equal_solo(bench: Bench) -> None:
    found = bench.alone(Ask([logprobs(TOKENS, "prompt[-1]")], bench.prompts)).outputs["lp"]
    assert found.tags.prompts.tolist() == list(range(len(bench.prompts)))
    assert found.tags.positions.tolist() == [len(p) - 1 for p in bench.prompts]
    for row, prompt in zip(found.logprobs, bench.prompts, strict=True):
        base = reference_logprobs(solo(bench.model, [], prompt).first.logits[-1])
        close("mixed lengths against solo", row, base[list(TOKENS)])


def test_c24_logit_lens_is_norm_and_unembedding(bench: Bench) -> None:
    prompt, top_k = bench.prompts[0], 5
    names = [f"n{i}" for i in range(bench.layers)]
    nodes = [read(f"resid_post.{i}", name=n) for i, n in enumerate(names)]
    nodes += [read("final_norm", name="f")]
    ask = Ask(
        [
            *nodes,
            ops.Lens(id="lens", of=tuple(names), top_k=top_k),
            ops.Lens(id="last", of=("f",), top_k=top_k),
        ],
        [prompt],
    )
    result = bench.alone(ask)
    seen = solo(bench.model, nodes, prompt).first
    lens, last = result.outputs["lens"], result.outputs["last"]
    assert isinstance(lens, Lensed)
    assert isinstance(last, Lensed)
    for layer, name in enumerate(names):
        table = unembed(bench.model, seen.read[name])
        ids = torch.from_numpy(lens.ids[layer])
        close("lens against norm and unembedding", lens.logprobs[layer], table.gather(1, ids))
        close("lens takes the best", lens.logprobs[layer], table.topk(top_k).values)
    model = reference_logprobs(seen.logits)
    close("last lens is the model", lens.logprobs[-1], model.topk(top_k).values)
    assert lens.ids[-1][:, 0].tolist() == seen.logits.argmax(-1).tolist()
    close("lens after the final norm", last.logprobs[0], model.topk(top_k).values)


def test_c25_z_through_the_output_projection_is_attn_out(bench: Bench) -> None:
    layer = bench.middle
    nodes = [
        read(f"z.{layer}", name="z"),
        read(f"attn_out.{layer}", name="o"),
        capture("z", name="kz"),
        capture("o", name="ko"),
    ]
    ask = Ask(nodes, bench.prompts[:1])
    bench.alone(ask)
    made = bench.model.model.layers[layer].self_attn.o_proj(ask.sinks["kz"].rows(f"z.{layer}"))
    close("o_proj(z)", ask.sinks["ko"].rows(f"attn_out.{layer}"), made)


def test_c26_mlp_act_is_gate_times_up(bench: Bench) -> None:
    layer = bench.middle
    nodes = [
        read(f"mlp_in.{layer}", name="i"),
        read(f"mlp_act.{layer}", name="a"),
        capture("i", name="ki"),
        capture("a", name="ka"),
    ]
    ask = Ask(nodes, bench.prompts[:1])
    bench.alone(ask)
    mlp, x = bench.model.model.layers[layer].mlp, ask.sinks["ki"].rows(f"mlp_in.{layer}")
    made = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    close("act(gate) * up", ask.sinks["ka"].rows(f"mlp_act.{layer}"), made)


def test_c28_q_k_v_are_separate(bench: Bench) -> None:
    layer, facts = bench.middle, bench.loaded.facts
    nodes = [read(f"attn_in.{layer}", name="x"), *[read(f"{s}.{layer}", name=s) for s in "qkv"]]
    ask = Ask([*nodes, *[capture(n.id, name=f"k{n.id}") for n in nodes]], bench.prompts[:1])
    bench.alone(ask)
    x = ask.sinks["kx"].rows(f"attn_in.{layer}")
    attention = bench.model.model.layers[layer].self_attn
    rows = {s: ask.sinks[f"k{s}"].rows(f"{s}.{layer}") for s in "qkv"}
    assert rows["q"].shape[1] == facts.n_heads * facts.d_head
    assert rows["k"].shape[1] == rows["v"].shape[1] == facts.n_kv_heads * facts.d_head
    for s in "qkv":
        close("q, k, v", rows[s], x @ getattr(attention, f"{s}_proj").weight.T)
    assert not torch.allclose(rows["k"], rows["v"])

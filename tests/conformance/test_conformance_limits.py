"""Behaviours 21, 29, 30, 36, 40 and 43: what is not computed, cannot be asked for, or costs what it gives."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from bench_room import Ask, Bench, capture, greedy, handle, logprobs, ok, read, text
from compare_room import against_hooks
from reference_places import layers_of

from trocar import strict
from trocar.errors import ProgramError, TrocarError
from trocar.graph import ops
from trocar.graph.labels import Label
from trocar.graph.spec import OUTPUTS, SPEC
from trocar.sites import SITES
from trocar.wire.requests import RunRequest

TOKENS = (1, 17, 42, 99)
V = ops.Tensor(id="v", name="v")
SCALAR_BITS = 32


def test_c21_layers_after_the_stop_are_not_computed(bench: Bench) -> None:
    """Counted at the end of the model's own layers; what was read before is what a whole run reads."""
    site, calls = f"resid_post.{bench.middle}", [0] * bench.layers

    def counting(layer: int) -> Any:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    undo = [m.register_forward_hook(counting(i)) for i, m in enumerate(layers_of(bench.loaded.model))]
    try:
        stop = [
            ops.StopAfter(id="stop", layer=bench.middle),
            read(site),
            capture("r"),
            ops.Lens(id="l", of=("r",)),
        ]
        ask = Ask(stop, bench.prompts)
        result = bench.alone(ask)
        computed = list(calls)
        whole = Ask([read(site), capture("r"), logprobs(TOKENS)], bench.prompts)
        bench.alone(whole)
    finally:
        for handle_ in undo:
            handle_.remove()
    assert all(computed[: bench.middle + 1])
    assert not any(computed[bench.middle + 1 :])
    assert all(calls)
    against_hooks(bench, ask, result, "stop")
    assert torch.equal(ask.sinks["kept"].rows(site), whole.sinks["kept"].rows(site))


def test_c21_a_stop_in_company_stops_alone(bench: Bench) -> None:
    """Early rows leave a pass that goes on for others: both answers are those of each alone."""
    early = [read("resid_post.0"), capture("r"), ops.Lens(id="l", of=("r",))]
    asks = [
        Ask([ops.StopAfter(id="stop", layer=0), *early], bench.prompts[:2]),
        Ask([logprobs(TOKENS, "all"), text()], bench.prompts, greedy(3)),
        Ask([read("embeddings"), capture("r")], bench.prompts[2:]),
    ]
    for ask, result in zip(asks, bench.together(*asks), strict=True):
        against_hooks(bench, ask, ok(result), "stop in company")


def test_c21_what_needs_later_layers_is_refused(small: Bench) -> None:
    stop, kept = ops.StopAfter(id="stop", layer=1), [read("resid_post.1"), capture("r")]
    bad = {
        "logits": [stop, *kept, logprobs(TOKENS)],
        "a later read": [stop, *kept, read("resid_post.2", name="x")],
        "a later edit": [stop, *kept, ops.EditScale(id="e", site="resid_post.2", at="prompt[*]", by=2.0)],
        "a metric": [stop, *kept, ops.Metric(id="m", metric="cross_entropy", at="prompt[:-1]")],
    }
    for what, nodes in bad.items():
        with pytest.raises(ProgramError) as caught:
            small.task(Ask(nodes, small.prompts))
        assert caught.value.code == "after_stop", what
    with pytest.raises(ProgramError) as caught:
        small.task(Ask([stop, *kept], small.prompts, greedy(2)))
    assert caught.value.code == "after_stop"


def test_c29_the_stream_is_the_whole_stream(bench: Bench) -> None:
    """resid_post is the library's own hidden state after each layer, not one half of a split sum."""
    prompt, last = bench.prompts[0], bench.layers - 1
    nodes = [read(f"resid_post.{i}", name=f"n{i}") for i in range(last)]
    ask = Ask([*nodes, capture(*[n.id for n in nodes])], [prompt])
    bench.alone(ask)
    with torch.no_grad():
        out = bench.plain.model(input_ids=torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
    for layer in range(last):
        ours, theirs = ask.sinks["kept"].rows(f"resid_post.{layer}"), out.hidden_states[layer + 1][0]
        assert float(torch.cosine_similarity(ours, theirs, dim=-1).min()) > 1 - 1e-6
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["hidden_states", "residual", "resid_post_half", "delta", "mlp_out_fused"])
def test_c29_half_a_stream_has_no_name(small: Bench, name: str) -> None:
    assert name not in SITES
    with pytest.raises(ProgramError) as caught:
        small.task(Ask([read(f"{name}.1"), capture("r")], small.prompts[:1]))
    assert caught.value.code in ("unknown_site", "ambiguous_site")


def _sent(nodes: list[dict[str, Any]], **more: Any) -> bytes:
    request = {"model": "m", "prompts": [[1, 2]], "program": {"version": 1, "nodes": nodes}, **more}
    return json.dumps(request).encode()


def _refused(raw: bytes) -> TrocarError:
    with pytest.raises(TrocarError) as caught:
        strict.parse(RunRequest, raw)
    return caught.value


TEXT = {"id": "t", "op": "text"}


@pytest.mark.parametrize("op", ["grad", "jacobian", "backward", "metric_grad", "attribution"])
def test_c30_gradients_are_refused_by_name(op: str) -> None:
    """An engine without a backward pass has no op that asks for one."""
    assert op not in SPEC
    assert _refused(_sent([{"id": "g", "op": op, "of": "r"}])).code == "unknown_op"
    assert strict.parse(RunRequest, _sent([TEXT])).program.nodes[0].op == "text"


def test_c30_nothing_that_is_computed_has_a_gradient(bench: Bench) -> None:
    ask = Ask(
        [read(f"resid_post.{bench.middle}"), ops.Norm(id="n", of="r"), capture("r"), logprobs(TOKENS)],
        bench.prompts,
    )
    checked = bench.task(ask).checked
    assert all(v.label < Label.GRAD for v in checked.values.values())
    assert not any(p.requires_grad for p in bench.loaded.model.parameters())
    bench.alone(ask)
    assert not ask.sinks["kept"].rows(f"resid_post.{bench.middle}").requires_grad


def test_c36_bad_programs_are_refused_before_any_forward(bench: Bench) -> None:
    m, n = bench.middle, bench.layers
    site, tail = f"resid_post.{m}", [logprobs(TOKENS)]
    bad: dict[str, list[Any]] = {
        "unknown_site": [ops.EditSet(id="e", site=f"resid_pots.{m}", value="zero"), *tail],
        "layer_out_of_range": [ops.EditSet(id="e", site=f"resid_post.{n}", value="zero"), *tail],
        "site_unavailable": [read(f"router_logits.{m}"), capture("r")],
        "site_not_editable": [ops.EditSet(id="e", site=f"attn_probs.{m}", value="zero"), *tail],
        "width_mismatch": [V, ops.EditAdd(id="e", site=f"mlp_act.{m}", value="v"), *tail],
        "edit_after_layer": [
            read(f"resid_post.{m + 1}"),
            ops.EditSet(id="e", site=site, at="prompt[*]", value="r"),
            *tail,
        ],
        "rows_mismatch": [read(site), ops.EditSet(id="e", site=site, at="prompt[0]", value="r"), *tail],
        "wrong_operand": [read(site), ops.And(id="x", a="r", b="r"), *tail],
        "unknown_ref": [ops.EditSet(id="e", site=site, value="later"), read(site, name="later"), *tail],
        "position_out_of_range": [ops.EditSet(id="e", site=site, at="prompt[4000]", value="zero"), *tail],
        "bad_position": [ops.EditSet(id="e", site=site, at="prompt[::2]", value="zero"), *tail],
        "touches_nothing": [ops.EditSet(id="e", site=site, at="gen[*]", value="zero"), *tail],
        "nothing_returned": [ops.EditSet(id="e", site=site, value="zero")],
        "duplicate_id": [read(site), read(site), capture("r")],
        "unknown_token": [logprobs([10**6])],
        "no_keys_left": [
            ops.EditKnockout(id="e", site=f"attn_probs.{m}", at="prompt[0]", keys="prompt[0]"),
            *tail,
        ],
        "handle_not_found": [ops.Score(id="s", of="r", probe="art_" + "9" * 32, site=site), *tail],
        "bad_value": [read(site, heads=(0,)), capture("r")],
        "missing_field": [ops.Metric(id="x", metric="kl"), *tail],
    }
    bad["handle_not_found"].insert(0, read(site))
    before = bench.engine.stats().forwards
    for code, nodes in bad.items():
        vectors = {"v": torch.zeros(bench.width("resid_post"))} if V in nodes else {}
        with pytest.raises(ProgramError) as caught:
            bench.together(Ask(nodes, bench.prompts[:1], vectors=vectors))
        assert caught.value.code == code
        assert caught.value.path.startswith("program.nodes")
    assert bench.engine.stats().forwards == before


@pytest.mark.parametrize("field", ["tensor_parallel", "tp", "ranks", "devices"])
def test_c40_asking_for_several_ranks_is_refused(field: str) -> None:
    """Ranks are the engine's own business: no request can name them, at the top or beside the generation."""
    assert _refused(_sent([TEXT], **{field: 2})).code == "unknown_field"
    assert _refused(_sent([TEXT], generation={field: 2})).code == "unknown_field"


def test_c40_this_engine_is_one_rank(bench: Bench) -> None:
    """One device holds every weight, so a read has nothing to gather: its rows have the width of the facts."""
    tensors = [*bench.loaded.model.parameters(), *bench.loaded.model.buffers()]
    assert len({t.device for t in tensors}) == 1
    ask = Ask([read(s, name=f"r{i}") for i, s in enumerate(bench.sites())], bench.prompts[:1])
    ask = Ask([*ask.nodes, capture(*[n.id for n in ask.nodes])], ask.prompts)
    bench.alone(ask)
    for site in bench.sites():
        assert ask.sinks["kept"].rows(site).shape[1] == bench.facts.width(site)


# ---- egress ----


def test_c43_weights_have_no_name(small: Bench) -> None:
    """No op reads a parameter; a matrix comes from the request, and a handle of rows is not one."""
    assert not [op for op in SPEC if "weight" in op or "param" in op]
    width = small.width("resid_post")
    stored = ops.Stored(id="s", handle=handle(), site="resid_post.1")
    nodes = [stored, read("resid_post.1"), ops.MatMul(id="m", a="r", b="s"), capture("r")]
    with pytest.raises(ProgramError) as caught:
        small.task(Ask(nodes, small.prompts[:1], stored={"s": [torch.eye(width)]}))
    assert caught.value.code == "wrong_operand"
    with pytest.raises(ProgramError) as caught:
        small.task(Ask([read("logits"), capture("r")], small.prompts[:1]))
    assert caught.value.code == "site_unavailable"


def test_c43_rows_do_not_leave_through_arithmetic(small: Bench) -> None:
    """Rows times the identity are rows: they are no output, no handle under a site's name, no score."""
    width = small.width("resid_post")
    made = [read("resid_post.1"), ops.Tensor(id="i", name="i"), ops.MatMul(id="m", a="r", b="i")]
    for output in (capture("m"), ops.Score(id="s", of="m")):
        with pytest.raises(ProgramError) as caught:
            small.task(Ask([*made, output], small.prompts[:1], vectors={"i": torch.eye(width)}))
        assert caught.value.code == "wrong_operand"
    wide = {"i": torch.eye(width)[:, :1].repeat(1, ops.MAX_RANK + 1)}
    with pytest.raises(ProgramError) as caught:
        small.task(Ask([*made, capture("r")], small.prompts[:1], vectors=wide))
    assert caught.value.code == "too_expensive"


def test_c43_every_number_is_priced(bench: Bench) -> None:
    """What comes back, counted, is what each output was priced at: full-rank probing costs what it gives."""
    site, prompts, width = f"resid_post.{bench.middle}", bench.prompts[:2], bench.width("resid_post")
    basis = [0, width // 2, width - 1]
    nodes: list[Any] = [read(site), read(f"attn_probs.{bench.middle}", keys="prompt[0]", name="a")]
    vectors = {}
    for i in basis:
        vectors[f"b{i}"] = torch.nn.functional.one_hot(torch.tensor(i), width).float()
        nodes += [ops.Tensor(id=f"b{i}", name=f"b{i}"), ops.Dot(id=f"d{i}", a="r", b=f"b{i}")]
        nodes += [ops.Score(id=f"s{i}", of=f"d{i}")]
    nodes += [
        ops.Gt(id="g", a=f"d{basis[0]}", b=0.0),
        ops.Score(id="truth", of="g"),
        ops.Lens(id="lens", of=("r",), top_k=3),
        ops.Metric(id="ce", metric="cross_entropy", at="prompt[:-1]"),
        ops.Pattern(id="pattern", of="a"),
        ops.Raw(id="raw", of=("r",)),
        capture("r"),
        logprobs(TOKENS),
    ]
    ask = Ask(nodes, prompts, vectors=vectors)
    price, result = bench.task(ask).checked.cost, bench.alone(ask)
    rows, token_bits = sum(map(len, prompts)), (bench.facts.vocab_size - 1).bit_length()
    counted = {
        "truth": rows,
        "lens": rows * 3 * (token_bits + SCALAR_BITS),
        "ce": len(result.outputs["ce"].values) * SCALAR_BITS,
        "pattern": result.outputs["pattern"].probs.size * SCALAR_BITS,
        "raw": result.outputs["raw"].rows[0].size * SCALAR_BITS,
        "kept": 0,
        "lp": result.outputs["lp"].logprobs.size * SCALAR_BITS,
    }
    counted |= {f"s{i}": result.outputs[f"s{i}"].scores.size * SCALAR_BITS for i in basis}
    assert {k: v for k, v in price.bits_out.items() if k != "overhead"} == counted
    assert price.total_bits == sum(counted.values()) + price.bits_out["overhead"]
    assert {n.op for n in nodes if n.op in OUTPUTS} == OUTPUTS - {"text"}
    assert np.isfinite(result.outputs["lens"].logprobs).all()


def test_c43_text_and_receipts_are_priced(small: Bench) -> None:
    edit = ops.EditScale(id="e", site="resid_post.1", at="all", by=1.5)
    ask = Ask([edit, text()], small.prompts, greedy(3))
    price, found = small.task(ask).checked.cost, small.alone(ask)
    token_bits = (small.facts.vocab_size - 1).bit_length()
    given = sum(len(ids) + 1 for ids in found.outputs["text"].ids) * token_bits
    assert price.bits_out["text"] == given
    assert price.bits_out["receipts"] >= 2 * SCALAR_BITS * len(found.edits)


def test_c43_captured_bytes_are_counted(small: Bench) -> None:
    """Rows stay on the server; what they take there is what was announced, less the sidecar of each row."""
    ask = Ask([read("resid_post.1", "all"), capture("r"), text()], small.prompts, greedy(3))
    price = small.task(ask).checked.cost
    small.alone(ask)
    rows = ask.sinks["kept"].rows("resid_post.1")
    assert price.bytes_stored >= rows.numel() * 4
    assert price.bytes_stored == len(rows) * (rows.shape[1] * 4 + 32)

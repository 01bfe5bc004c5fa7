"""Edits: what follows from a write follows from the same write by a plain hook; and it does change something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bench_room import Ask, Bench, capture, close, greedy, logprobs, read, text
from reference import logprobs as reference_logprobs
from reference import solo

from trocar.engine.protocol import TaskResult
from trocar.graph import ops

TOKENS = (1, 17, 42, 99)
EFFECT = 1e-2


def _same(bench: Bench, ask: Ask, name: str) -> TaskResult:
    """Runs the request in one batch and compares each prompt with the hooks, and with no edit."""
    assert ask.nodes[-1].id == "lp"
    result = bench.alone(ask)
    found = result.outputs["lp"]
    changed = 0.0
    for i, prompt in enumerate(ask.prompts):
        rows = torch.from_numpy(found.logprobs[found.tags.prompts == i])
        hooked = reference_logprobs(solo(bench.model, ask.nodes, prompt, ask.constants(i)).first.logits)
        base = reference_logprobs(solo(bench.model, [], prompt).first.logits)
        close(name, rows, hooked[:, list(TOKENS)])
        changed = max(changed, float((rows - base[:, list(TOKENS)]).abs().max()))
    assert changed > EFFECT, "the edit changed nothing"
    return result


def _tensor(bench: Bench, site: str, size: float = 3.0, seed: int = 0) -> dict[str, Any]:
    return {"v": bench.vector(site, size, seed)}


V = ops.Tensor(id="v", name="v")


def test_c06_add_at_all_positions(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    nodes = [V, ops.EditAdd(id="e", site=site, at="prompt[*]", value="v", coef=2.0), logprobs(TOKENS)]
    result = _same(bench, Ask(nodes, bench.prompts, vectors=_tensor(bench, site, 20.0)), "edit.add")
    assert result.edits[0].rows == sum(len(p) for p in bench.prompts)


def test_c06_a_large_add_changes_the_top_token(bench: Bench) -> None:
    site, prompt = f"resid_post.{bench.middle}", bench.prompts[0]
    add = ops.EditAdd(id="e", site=site, at="prompt[*]", value="v", coef=1.0)
    ask = Ask(
        [V, add, read(f"resid_post.{bench.layers - 1}"), ops.Lens(id="lens", of=("r",), top_k=1)],
        [prompt],
        vectors=_tensor(bench, site, 2000.0),
    )
    base = solo(bench.model, [], prompt).first.logits.argmax(-1)
    hooked = solo(bench.model, ask.nodes, prompt, ask.vectors).first.logits.argmax(-1)
    found = torch.from_numpy(bench.alone(ask).outputs["lens"].ids[0][:, 0])
    assert torch.equal(found, hooked)
    assert found[-1] != base[-1]


@pytest.mark.parametrize("at", ["prompt[-1]", "prompt[1]", "prompt[-2]", "prompt[0:2]", "prompt[1:]"])
def test_c07_only_the_named_positions_change(bench: Bench, at: str) -> None:
    site, prompts = f"resid_post.{bench.middle}", [p for p in bench.prompts if len(p) > 1]
    nodes = [
        V,
        ops.EditAdd(id="e", site=site, at=at, value="v"),
        read(site),
        capture("r"),
        logprobs(TOKENS),
    ]
    ask = Ask(nodes, prompts, vectors=_tensor(bench, site, 30.0))
    _same(bench, ask, "edit.add at a position")
    keys, rows = torch.from_numpy(ask.sinks["kept"].keys()), ask.sinks["kept"].rows(site)
    for i, prompt in enumerate(prompts):
        base = solo(bench.model, [read(site)], prompt).first.read["r"]
        moved = (rows[keys[:, 0] == i] - base).norm(dim=-1) > 1.0
        wanted = torch.zeros(len(prompt), dtype=torch.bool)
        wanted[_index(at)] = True
        assert moved.tolist() == wanted.tolist()


def _index(at: str) -> Any:
    inside = at.removeprefix("prompt[").removesuffix("]")
    if ":" not in inside:
        return int(inside)
    return slice(*(int(x) if x else None for x in inside.split(":")))


@pytest.mark.parametrize(
    "name",
    ["attn_out", "mlp_out", "resid_mid", "resid_pre", "z", "mlp_act", "v", "k", "q", "attn_in", "mlp_in"],
)
def test_c08_zero(bench: Bench, name: str) -> None:
    site = f"{name}.{bench.middle}"
    nodes = [ops.EditSet(id="e", site=site, at="prompt[*]", value="zero"), logprobs(TOKENS)]
    result = _same(bench, Ask(nodes, bench.prompts), f"zero {name}")
    assert result.edits[0].norm_after == 0.0
    assert result.edits[0].norm_before > 0.0


def test_c09_mean_given_and_mean_of_the_sequence(bench: Bench) -> None:
    """Two programs: a mean that the client sent, and each prompt's own."""
    site = f"mlp_out.{bench.middle}"
    given = [V, ops.EditSet(id="e", site=site, at="prompt[*]", value="v"), logprobs(TOKENS)]
    _same(bench, Ask(given, bench.prompts, vectors=_tensor(bench, site)), "set to a given mean")
    own = [
        read(site),
        ops.Mean(id="m", of="r"),
        ops.EditSet(id="e", site=site, at="prompt[*]", value="m"),
        logprobs(TOKENS),
    ]
    _same(bench, Ask(own, bench.prompts), "set to the prompt's mean")


def test_c10_scale_embeddings(bench: Bench) -> None:
    def nodes(by: float) -> list[Any]:
        return [ops.EditScale(id="e", site="embeddings", at="prompt[*]", by=by), logprobs(TOKENS)]

    _same(bench, Ask(nodes(2.0), bench.prompts), "embeddings x 2")
    _same(bench, Ask(nodes(0.0), bench.prompts), "embeddings x 0")
    same = bench.alone(Ask(nodes(1.0), bench.prompts)).outputs["lp"].logprobs
    base = bench.alone(Ask([logprobs(TOKENS)], bench.prompts)).outputs["lp"].logprobs
    assert torch.equal(torch.from_numpy(same), torch.from_numpy(base))


def test_project_out(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    nodes = [
        V,
        ops.EditProjectOut(id="e", site=site, at="prompt[*]", value="v"),
        read(site),
        capture("r"),
        logprobs(TOKENS),
    ]
    prompt = bench.prompts[0]
    towards = solo(bench.model, [read(site)], prompt).first.read["r"].mean(0)
    ask = Ask(nodes, bench.prompts, vectors={"v": towards})
    _same(bench, ask, "edit.project_out")
    left = ask.sinks["kept"].rows(site) @ (towards / towards.norm())
    close("component left", left, torch.zeros_like(left), 1e-2 if bench.width(site) > 100 else 1e-4)


def test_c11_patch_from_a_stored_handle(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    clean, corrupt = bench.prompts[0], bench.prompts[1]
    source = Ask([read(site, "prompt[-1]"), capture("r")], [clean])
    bench.alone(source)
    row = source.sinks["kept"].rows(site)
    patch = ops.Stored(id="s", handle="act_" + "0" * 32, site=site)
    nodes = [patch, ops.EditSet(id="e", site=site, at="prompt[-1]", value="s"), logprobs(TOKENS)]
    ask = Ask(nodes, [corrupt], stored={"s": [row]})
    found = bench.alone(ask).outputs["lp"].logprobs
    inside = solo(bench.model, [read(site, "prompt[-1]")], clean).first.read["r"]
    hooked = solo(bench.model, nodes, corrupt, {"s": inside}).first.logits
    close("patch from a handle", found, reference_logprobs(hooked)[:, list(TOKENS)])
    assert torch.equal(torch.from_numpy(found), hooked.log_softmax(-1)[:, list(TOKENS)])
    base = reference_logprobs(solo(bench.model, [], corrupt).first.logits)
    assert (torch.from_numpy(found[-1]) - base[-1, list(TOKENS)]).abs().max() > EFFECT


def test_c11_stored_rows_of_several_prompts_find_their_prompts(bench: Bench) -> None:
    """Rows are aligned by prompt also when the prompts of a request sit in different batches."""
    site, prompts = f"resid_post.{bench.middle}", bench.prompts
    rows = [solo(bench.model, [read(site)], p).first.read["r"].flip(0) for p in prompts]
    patch = ops.Stored(id="s", handle="act_" + "0" * 32, site=site)
    nodes = [patch, ops.EditSet(id="e", site=site, at="prompt[*]", value="s"), logprobs(TOKENS)]
    _same(bench, Ask(nodes, prompts, stored={"s": rows}), "patch of every row")


def test_c12_embedding_transfer(bench: Bench) -> None:
    length = min(len(bench.prompts[0]), len(bench.prompts[1]))
    clean, corrupt = bench.prompts[0][:length], bench.prompts[1][:length]
    rows = solo(bench.model, [read("resid_pre.0")], clean).first.read["r"]
    patch = ops.Stored(id="s", handle="act_" + "0" * 32, site="resid_pre.0")
    nodes = [patch, ops.EditSet(id="e", site="resid_pre.0", at="prompt[*]", value="s"), text()]
    ask = Ask(nodes, [corrupt], greedy(6), stored={"s": [rows]})
    moved = bench.alone(ask).outputs["text"].ids
    assert moved == bench.alone(Ask([text()], [clean], greedy(6))).outputs["text"].ids
    assert moved != bench.alone(Ask([text()], [corrupt], greedy(6))).outputs["text"].ids


def test_c25_one_head_zeroed_through_z(bench: Bench) -> None:
    """A head is a slice of z; scaling it away is subtracting the rows of that slice."""
    facts, site = bench.loaded.facts, f"z.{bench.middle}"
    base = solo(bench.model, [read(site)], bench.prompts[0]).first.read["r"]
    without = base.clone()
    without[:, : facts.d_head] = 0
    patch = ops.Stored(id="s", handle="act_" + "0" * 32, site=site)
    nodes = [patch, ops.EditSet(id="e", site=site, at="prompt[*]", value="s"), logprobs(TOKENS)]
    _same(bench, Ask(nodes, bench.prompts[:1], stored={"s": [without]}), "head zeroed")


def test_c26_neuron_edit(bench: Bench) -> None:
    site = f"mlp_act.{bench.middle}"
    one = torch.zeros(bench.width(site))
    one[3] = 50.0
    nodes = [V, ops.EditAdd(id="e", site=site, at="prompt[*]", value="v"), logprobs(TOKENS)]
    _same(bench, Ask(nodes, bench.prompts, vectors={"v": one}), "neuron edit")


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_c28_editing_one_projection(bench: Bench, name: str) -> None:
    site = f"{name}.{bench.middle}"
    nodes = [V, ops.EditAdd(id="e", site=site, at="prompt[*]", value="v"), *_reads(bench), logprobs(TOKENS)]
    ask = Ask(nodes, bench.prompts[:1], vectors=_tensor(bench, site, 40.0))
    _same(bench, ask, f"edit {name}")
    for other in "qkv":
        base = solo(bench.model, [read(f"{other}.{bench.middle}")], bench.prompts[0]).first.read["r"]
        assert torch.equal(ask.sinks[f"kept_{other}"].rows(f"{other}.{bench.middle}"), base) == (
            other != name
        )


def _reads(bench: Bench) -> Sequence[Any]:
    reads = [read(f"{s}.{bench.middle}", name=f"read_{s}") for s in "qkv"]
    return [*reads, *[capture(f"read_{s}", name=f"kept_{s}") for s in "qkv"]]


def test_two_edits_compose_in_program_order(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    add = ops.EditAdd(id="a", site=site, at="prompt[*]", value="v")
    scale = ops.EditScale(id="s", site=site, at="prompt[*]", by=0.5)
    vectors = _tensor(bench, site, 40.0)
    for nodes in ([V, add, scale, logprobs(TOKENS)], [V, scale, add, logprobs(TOKENS)]):
        _same(bench, Ask(nodes, bench.prompts, vectors=vectors), "two edits")


def test_receipts_tell_the_norms(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    nodes = [V, ops.EditAdd(id="e", site=site, at="prompt[*]", value="v"), logprobs(TOKENS)]
    ask = Ask(nodes, bench.prompts[:1], vectors=_tensor(bench, site, 25.0))
    effect = bench.alone(ask).edits[0]
    before, after, rows = solo(bench.model, nodes, bench.prompts[0], ask.vectors).first.norms["e"]
    assert effect.rows == rows
    assert effect.norm_before == pytest.approx(before, rel=1e-5)
    assert effect.norm_after == pytest.approx(after, rel=1e-5)

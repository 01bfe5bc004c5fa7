"""Behaviours 6 to 12, 22, 23, 25, 26, 28 and 34: what follows from a write is what follows from it in a plain hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bench_room import Ask, Bench, capture, greedy, handle, logprobs, read, text
from compare_room import against_hooks, changed, close, same_bits

from trocar.engine.protocol import TaskResult
from trocar.graph import ops
from trocar.graph.spec import SPEC

TOKENS = (1, 17, 42, 99)
EFFECT = 1e-2
V = ops.Tensor(id="v", name="v")


def _same(bench: Bench, ask: Ask, name: str) -> TaskResult:
    """Compares every output with the hooks, and holds that the edit changed something."""
    result = bench.alone(ask)
    against_hooks(bench, ask, result, name)
    assert changed(bench, ask, result) > EFFECT, f"{name} changed nothing"
    return result


def _pushed(bench: Bench, site: str, times: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"v": bench.pushing(site, times, seed)}


def test_c06_add_at_all_positions(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    nodes = [V, ops.EditAdd(id="e", site=site, at="prompt[*]", value="v", coef=2.0), logprobs(TOKENS)]
    result = _same(bench, Ask(nodes, bench.prompts, vectors=_pushed(bench, site)), "add")
    assert result.edits[0].rows == sum(len(p) for p in bench.prompts)


def test_c06_a_large_add_changes_the_top_token(bench: Bench) -> None:
    site, prompt = f"resid_post.{bench.middle}", bench.prompts[0]
    last = read(f"resid_post.{bench.layers - 1}", "prompt[-1]")
    add = ops.EditAdd(id="e", site=site, at="prompt[*]", value="v")
    ask = Ask(
        [V, add, last, ops.Lens(id="lens", of=("r",), top_k=1)], [prompt], vectors=_pushed(bench, site, 50.0)
    )
    result = bench.alone(ask)
    against_hooks(bench, ask, result, "large add")
    base = bench.solo([], prompt).first.logits[-1].argmax()
    assert int(result.outputs["lens"].ids[0][0, 0]) != int(base)


@pytest.mark.parametrize(
    "at", ["prompt[-1]", "prompt[1]", "prompt[-2]", "prompt[0:2]", "prompt[1:]", "prompt[0,-1]"]
)
def test_c07_only_the_named_positions_change(bench: Bench, at: str) -> None:
    site = f"resid_post.{bench.middle}"
    nodes = [V, ops.EditAdd(id="e", site=site, at=at, value="v"), read(site), capture("r"), logprobs(TOKENS)]
    ask = Ask(nodes, bench.prompts, vectors=_pushed(bench, site, 3.0))
    _same(bench, ask, "add at a position")
    bare = Ask([read(site), capture("r")], bench.prompts)
    bench.alone(bare)
    for i, prompt in enumerate(bench.prompts):
        rows, base = ask.sinks["kept"].rows(site, i), bare.sinks["kept"].rows(site, i)
        moved = [not torch.equal(a, b) for a, b in zip(rows, base, strict=True)]
        wanted = [False] * len(prompt)
        for row in _indices(at, len(prompt)):
            wanted[row] = True
        assert moved == wanted


def _indices(at: str, length: int) -> Sequence[int]:
    inside = at.removeprefix("prompt[").removesuffix("]")
    if ":" not in inside:
        return [int(i) % length for i in inside.split(",")]
    return range(length)[slice(*(int(x) if x else None for x in inside.split(":")))]


def test_c08_zero_at_every_site(bench: Bench) -> None:
    for site in bench.sites(editable=True):
        nodes = [ops.EditSet(id="e", site=site, at="prompt[*]", value="zero"), logprobs(TOKENS)]
        result = _same(bench, Ask(nodes, bench.prompts[:1]), "zero")
        assert result.edits[0].norm_after == 0.0
        assert result.edits[0].norm_before > 0.0


def test_c09_mean_given_and_mean_of_the_sequence(bench: Bench) -> None:
    """Two programs: a mean that the client sent, and each prompt's own. One is not the other."""
    site = f"mlp_out.{bench.middle}"
    set_to = [ops.EditSet(id="e", site=site, at="prompt[*]", value="m"), logprobs(TOKENS)]
    own = _same(bench, Ask([read(site), ops.Mean(id="m", of="r"), *set_to], bench.prompts), "own mean")
    given = Ask([ops.Tensor(id="m", name="v"), *set_to], bench.prompts, vectors=_pushed(bench, site))
    sent = _same(bench, given, "given mean")
    assert not same_bits(own.outputs["lp"].logprobs, sent.outputs["lp"].logprobs)


def test_c10_scale_the_embeddings(bench: Bench) -> None:
    def ask(by: float) -> Ask:
        return Ask(
            [ops.EditScale(id="e", site="embeddings", at="prompt[*]", by=by), logprobs(TOKENS)], bench.prompts
        )

    _same(bench, ask(2.0), "embeddings x 2")
    _same(bench, ask(0.0), "embeddings x 0")
    base = bench.alone(Ask([logprobs(TOKENS)], bench.prompts)).outputs["lp"].logprobs
    assert same_bits(bench.alone(ask(1.0)).outputs["lp"].logprobs, base)


def _stored(site: str, at: str = "prompt[*]", **more: Any) -> ops.Stored:
    return ops.Stored(id="s", handle=handle(), site=site, at=at, **more)


def test_c11_a_patch_from_a_run_before(bench: Bench) -> None:
    """Clean row into the corrupt run: through a handle, and from the hooks' own run."""
    site, (clean, corrupt) = f"resid_post.{bench.middle}", bench.prompts[:2]
    source = Ask([read(site, "prompt[-1]"), capture("r")], [clean])
    bench.alone(source)
    nodes = [_stored(site), ops.EditSet(id="e", site=site, at="prompt[-1]", value="s"), logprobs(TOKENS)]
    ask = Ask(nodes, [corrupt], stored={"s": [source.sinks["kept"].rows(site)]})
    found = _same(bench, ask, "patch").outputs["lp"].logprobs
    inside = bench.solo([read(site, "prompt[-1]")], clean).first.read["r"]
    hooked = bench.solo(nodes, corrupt, constants={"s": inside}).first.logits
    close("patch across runs", found, hooked.double().log_softmax(-1)[:, list(TOKENS)], bench.most)


def test_c11_stored_rows_find_their_prompts(bench: Bench) -> None:
    """Rows are aligned by prompt, by `prompts` where given, and by `at` among the stored rows."""
    site, n = f"resid_post.{bench.middle}", len(bench.prompts)
    rows = [bench.solo([read(site)], p).first.read["r"].flip(0) for p in bench.prompts]
    every = [_stored(site), ops.EditSet(id="e", site=site, at="prompt[*]", value="s"), logprobs(TOKENS)]
    _same(bench, Ask(every, bench.prompts, stored={"s": rows}), "patch of every row")
    turned = tuple(reversed(range(n)))
    last = [
        _stored(site, "prompt[-2:]", prompts=turned),
        ops.EditSet(id="e", site=site, at="prompt[-2:]", value="s"),
        logprobs(TOKENS),
    ]
    _same(bench, Ask(last, bench.prompts, stored={"s": rows}), "patch from other prompts")


def test_c12_embedding_transfer(bench: Bench) -> None:
    """All rows at the entry: the corrupt run becomes the clean one, bit by bit, and so does its text."""
    length = min(len(bench.prompts[0]), len(bench.prompts[1]))
    clean, corrupt = bench.prompts[0][:length], bench.prompts[1][:length]
    source = Ask([read("resid_pre.0"), capture("r")], [clean])
    bench.alone(source)
    tail = [text(), logprobs(TOKENS)]
    nodes = [
        _stored("resid_pre.0"),
        ops.EditSet(id="e", site="resid_pre.0", at="prompt[*]", value="s"),
        *tail,
    ]
    ask = Ask(nodes, [corrupt], greedy(6), stored={"s": [source.sinks["kept"].rows("resid_pre.0")]})
    moved, wanted = bench.alone(ask), bench.alone(Ask(tail, [clean], greedy(6)))
    assert moved.outputs["text"].ids == wanted.outputs["text"].ids
    assert same_bits(moved.outputs["lp"].logprobs, wanted.outputs["lp"].logprobs)
    assert moved.outputs["text"].ids != bench.alone(Ask(tail, [corrupt], greedy(6))).outputs["text"].ids


def test_c22_a_layer_whose_output_is_given_no_longer_matters(bench: Bench) -> None:
    """Output == value, bit by bit, whatever happens inside the layer; other rows keep their own."""
    layer = bench.middle
    site, inside = f"resid_post.{layer}", f"attn_out.{layer}"
    given = ops.EditSet(id="e", site=site, at="prompt[-1]", value="v")
    tail = [V, given, read(site), capture("r"), logprobs(TOKENS, "prompt[-1]")]
    broken = ops.EditSet(id="z", site=inside, at="prompt[-1]", value="zero")
    vectors = _pushed(bench, site)
    plain, inner = (
        Ask(tail, bench.prompts, vectors=vectors),
        Ask([broken, *tail], bench.prompts, vectors=vectors),
    )
    a, b = _same(bench, plain, "given output"), bench.alone(inner)
    assert same_bits(a.outputs["lp"].logprobs, b.outputs["lp"].logprobs)
    for i in range(len(bench.prompts)):
        assert torch.equal(plain.sinks["kept"].rows(site, i)[-1], vectors["v"])
    alone = bench.alone(Ask([broken, logprobs(TOKENS, "prompt[-1]")], bench.prompts))
    base = bench.alone(Ask([logprobs(TOKENS, "prompt[-1]")], bench.prompts))
    assert not same_bits(alone.outputs["lp"].logprobs, base.outputs["lp"].logprobs)


def test_c22_there_is_no_op_that_skips_a_layer() -> None:
    assert not [op for op in SPEC if "skip" in op]


def test_c23_given_embeddings_are_other_tokens(bench: Bench) -> None:
    """Embeddings of other ids, put at the entry, are those ids."""
    length = min(len(bench.prompts[0]), len(bench.prompts[3]))
    want, have = bench.prompts[0][:length], bench.prompts[3][:length]
    rows = bench.solo([read("embeddings")], want).first.read["r"]
    nodes = [
        _stored("embeddings"),
        ops.EditSet(id="e", site="embeddings", at="prompt[*]", value="s"),
        logprobs(TOKENS),
    ]
    found = _same(bench, Ask(nodes, [have], stored={"s": [rows]}), "given embeddings").outputs["lp"].logprobs
    direct = bench.alone(Ask([logprobs(TOKENS)], [want])).outputs["lp"].logprobs
    close("given embeddings against ids", found, direct, bench.most)


def test_c25_one_head_zeroed(bench: Bench) -> None:
    """By name, and by writing the whole row with a hole in it: the same bits."""
    d, site = int(bench.facts.d_head), f"z.{bench.middle}"
    whole = Ask([read(site), capture("r")], bench.prompts[:1])
    bench.alone(whole)
    without = whole.sinks["kept"].rows(site).clone()
    without[:, :d] = 0
    by_name = [ops.EditSet(id="e", site=site, at="prompt[*]", value="zero", heads=(0,)), logprobs(TOKENS)]
    by_row = [_stored(site), ops.EditSet(id="e", site=site, at="prompt[*]", value="s"), logprobs(TOKENS)]
    a = _same(bench, Ask(by_name, bench.prompts[:1]), "head zeroed")
    b = _same(bench, Ask(by_row, bench.prompts[:1], stored={"s": [without]}), "head zeroed by hand")
    assert same_bits(a.outputs["lp"].logprobs, b.outputs["lp"].logprobs)


def test_c26_neurons_written(bench: Bench) -> None:
    """By index, and as a row that is zero elsewhere: the same bits."""
    site = f"mlp_act.{bench.middle}"
    size = 10 * bench.usual(site)
    one = torch.zeros(bench.width(site))
    one[3], one[7] = size, -size
    few = torch.tensor([-size, size])
    by_row = [V, ops.EditAdd(id="e", site=site, at="prompt[*]", value="v"), logprobs(TOKENS)]
    by_index = [
        V,
        ops.EditAdd(id="e", site=site, at="prompt[*]", value="v", neurons=(7, 3)),
        logprobs(TOKENS),
    ]
    a = _same(bench, Ask(by_row, bench.prompts, vectors={"v": one}), "neurons as a row")
    b = _same(bench, Ask(by_index, bench.prompts, vectors={"v": few}), "neurons by index")
    assert same_bits(a.outputs["lp"].logprobs, b.outputs["lp"].logprobs)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_c28_editing_one_projection_leaves_the_others(bench: Bench, name: str) -> None:
    site = f"{name}.{bench.middle}"
    reads = [read(f"{s}.{bench.middle}", name=f"read_{s}") for s in "qkv"]
    keep = [capture(f"read_{s}", name=f"kept_{s}") for s in "qkv"]
    # Not at every row: one vector on all keys shifts all scores of a query alike, where no rotation follows.
    edit = [V, ops.EditAdd(id="e", site=site, at="prompt[1:]", value="v")]
    ask = Ask([*edit, *reads, *keep, logprobs(TOKENS)], bench.prompts[:1], vectors=_pushed(bench, site, 3.0))
    bare = Ask([*reads, *keep], bench.prompts[:1])
    _same(bench, ask, f"edit {name}")
    bench.alone(bare)
    for other in "qkv":
        where = f"{other}.{bench.middle}"
        mine, base = ask.sinks[f"kept_{other}"].rows(where), bare.sinks[f"kept_{other}"].rows(where)
        assert torch.equal(mine, base) == (other != name)


def test_c34_two_edits_compose_in_program_order(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    add = ops.EditAdd(id="a", site=site, at="prompt[*]", value="v")
    scale = ops.EditScale(id="s", site=site, at="prompt[*]", by=0.25)
    set_ = ops.EditSet(id="t", site=site, at="prompt[-1]", value="zero")
    vectors, found = _pushed(bench, site, 2.0), []
    for edits in ([add, scale, set_], [scale, add, set_], [set_, scale, add]):
        ask = Ask([V, *edits, read(site), capture("r"), logprobs(TOKENS)], bench.prompts, vectors=vectors)
        _same(bench, ask, "edits in order")
        found.append(ask.sinks["kept"].rows(site))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_c34_an_edit_never_outlives_its_request(bench: Bench) -> None:
    """Edits are a request's own: the same tenant's next plain request is the model again, bit by bit."""
    base = bench.alone(Ask([logprobs(TOKENS)], bench.prompts[:1], tenant="a")).outputs["lp"].logprobs
    for site in bench.sites(editable=True):
        edit = ops.EditScale(id="e", site=site, at="all", by=-3.0)
        bench.alone(Ask([edit, logprobs(TOKENS), text()], bench.prompts[:1], greedy(2), tenant="a"))
        after = bench.alone(Ask([logprobs(TOKENS)], bench.prompts[:1], tenant="a")).outputs["lp"].logprobs
        assert same_bits(after, base), site


def test_project_out_leaves_nothing_along_the_direction(bench: Bench) -> None:
    site = f"resid_post.{bench.middle}"
    towards = bench.solo([read(site)], bench.prompts[0]).first.read["r"].mean(0)
    edit = ops.EditProjectOut(id="e", site=site, at="prompt[*]", value="v")
    ask = Ask([V, edit, read(site), capture("r"), logprobs(TOKENS)], bench.prompts, vectors={"v": towards})
    _same(bench, ask, "project out")
    left = ask.sinks["kept"].rows(site) @ (towards / towards.norm())
    close("component left, relative", left / towards.norm(), torch.zeros_like(left), 1e-4)

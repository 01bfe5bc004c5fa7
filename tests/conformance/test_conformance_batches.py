"""Sharing: many requests in one forward pass, and none of them can tell."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from bench_room import Ask, Bench, Shelf, capture, close, greedy, logprobs, read, text
from reference import logprobs as reference_logprobs
from reference import solo

from trocar.engine.hf.engine import HFEngine, Limits
from trocar.engine.protocol import TaskResult
from trocar.errors import ProgramError, TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation

TOKENS = (1, 17, 42, 99)
V = ops.Tensor(id="v", name="v")


def _ok(found: TaskResult | TrocarError) -> TaskResult:
    assert isinstance(found, TaskResult), found
    return found


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_c13_isolation(bench: Bench) -> None:
    """A zeroes a layer, B does nothing: B is as alone and as the bare model, A is not."""
    site = f"resid_post.{bench.middle}"
    zero = ops.EditSet(id="e", site=site, at="prompt[*]", value="zero")
    a = Ask([zero, logprobs(TOKENS)], bench.prompts[:1])
    b = Ask([read(site), capture("r"), logprobs(TOKENS)], bench.prompts[:1])
    ran = [_ok(x) for x in bench.together(a, b)]
    shared_rows = b.sinks["kept"].rows(site)
    alone = bench.alone(b).outputs["lp"].logprobs
    base = reference_logprobs(solo(bench.model, [], bench.prompts[0]).first.logits)[:, list(TOKENS)]
    close("B beside an edited A", ran[1].outputs["lp"].logprobs, alone)
    close("B beside an edited A, against base", ran[1].outputs["lp"].logprobs, base)
    assert np.abs(ran[0].outputs["lp"].logprobs - base.numpy()).max() > 1e-2
    idle = Ask([logprobs(TOKENS)], bench.prompts[:1])
    quiet = [_ok(x) for x in bench.together(idle, b)]
    assert _equal(quiet[1].outputs["lp"].logprobs, ran[1].outputs["lp"].logprobs), (
        "an edit moved a neighbour's bits"
    )
    assert torch.equal(b.sinks["kept"].rows(site), shared_rows)


def _eight(bench: Bench) -> list[Ask]:
    """Eight programs of different shapes: reads, edits, means, patches, generation, lens."""
    m, p = bench.middle, bench.prompts
    post, size = f"resid_post.{m}", 20.0
    rows = [torch.stack([bench.vector(post, size, seed=i) for i in range(2)])]
    return [
        Ask([logprobs(TOKENS)], [p[0]]),
        Ask(
            [V, ops.EditAdd(id="e", site=post, at="prompt[-1]", value="v"), logprobs(TOKENS)],
            [p[1], p[2]],
            vectors={"v": bench.vector(post, size)},
        ),
        Ask(
            [ops.EditSet(id="e", site=f"attn_out.{m}", at="prompt[*]", value="zero"), logprobs(TOKENS)],
            [p[3]],
        ),
        Ask(
            [
                read(f"mlp_out.{m}"),
                ops.Mean(id="m", of="r"),
                ops.EditSet(id="e", site=f"mlp_out.{m}", at="prompt[*]", value="m"),
                logprobs(TOKENS),
            ],
            [p[0], p[3]],
        ),
        Ask(
            [V, ops.EditProjectOut(id="e", site=post, at="all", value="v"), text(), logprobs(TOKENS, "all")],
            [p[2]],
            greedy(3),
            vectors={"v": bench.vector(post)},
        ),
        Ask(
            [
                ops.Stored(id="s", handle="act_" + "0" * 32, site=post),
                ops.EditSet(id="e", site=post, at="prompt[0:2]", value="s"),
                logprobs(TOKENS),
            ],
            [p[1]],
            stored={"s": rows},
        ),
        Ask(
            [ops.EditScale(id="e", site="embeddings", at="all", by=1.5), text(), logprobs(TOKENS, "all")],
            [p[1], p[3]],
            greedy(5),
        ),
        Ask(
            [
                read(post),
                read(f"resid_post.{m + 1}", name="s"),
                ops.Sub(id="d", a="s", b="r"),
                ops.Mean(id="m", of="d"),
                ops.EditAdd(id="e", site=f"resid_post.{m + 1}", at="prompt[*]", value="m", coef=-2.0),
                logprobs(TOKENS),
            ],
            [p[2], p[0]],
        ),
    ]


def test_eight_programs_in_one_batch_equal_each_alone(bench: Bench) -> None:
    asks = _eight(bench)
    before = bench.engine.stats()
    mixed = [_ok(x) for x in bench.together(*asks)]
    after = bench.engine.stats()
    assert after.most_requests >= 8
    assert after.forwards - before.forwards == 6  # one pass over the prompts, five steps of the longest
    for number, (ask, result) in enumerate(zip(asks, mixed, strict=True)):
        alone = bench.alone(ask)
        close("eight programs against alone", result.outputs["lp"].logprobs, alone.outputs["lp"].logprobs)
        assert [e.rows for e in result.edits] == [e.rows for e in alone.edits], number
        if "text" in result.outputs:
            assert result.outputs["text"] == alone.outputs["text"]
        for i, prompt in enumerate(ask.prompts):
            run = solo(
                bench.model, ask.nodes, prompt, ask.constants(i), max_new_tokens=ask.generation.max_new_tokens
            )
            lp = result.outputs["lp"]
            theirs = reference_logprobs(run.last.logits)[:, list(TOKENS)]
            close("eight programs against hooks", lp.logprobs[lp.tags.prompts == i], theirs)


def test_neighbours_of_eight_edits_keep_their_bits(bench: Bench) -> None:
    """The same eight places in the batch, edited and not: the ninth request sees no difference, in any bit."""
    ninth = Ask([read(f"resid_post.{bench.layers - 1}"), capture("r"), logprobs(TOKENS)], bench.prompts)
    edited = _ok(bench.together(*_eight(bench), ninth)[-1]).outputs["lp"].logprobs
    rows = ninth.sinks["kept"].rows(f"resid_post.{bench.layers - 1}")
    bare = [Ask([logprobs(TOKENS)], a.prompts, a.generation) for a in _eight(bench)]
    plain = _ok(bench.together(*bare, ninth)[-1]).outputs["lp"].logprobs
    assert _equal(edited, plain)
    assert torch.equal(ninth.sinks["kept"].rows(f"resid_post.{bench.layers - 1}"), rows)


@pytest.mark.parametrize("poison", ["nan", "inf", "1e38", "overflow"])
def test_c38_non_finite_edits_stay_with_their_author(bench: Bench, poison: str) -> None:
    site = f"resid_post.{bench.middle}"
    value = {"nan": float("nan"), "inf": float("inf"), "1e38": 1e38, "overflow": 9e6}[poison]
    vector = torch.full((bench.width(site),), value)
    edit = ops.EditAdd(
        id="e", site=site, at="prompt[*]", value="v", coef=1e6 if poison == "overflow" else 1.0
    )
    a = Ask([V, edit, logprobs(TOKENS), text()], bench.prompts[:2], greedy(3), vectors={"v": vector})
    b = Ask([read(site), capture("r"), logprobs(TOKENS)], bench.prompts)
    refused, ran = bench.together(a, b)
    assert isinstance(refused, TrocarError)
    assert (refused.code, refused.path) == ("edit_not_finite", "program.nodes[1]")
    rows = b.sinks["kept"].rows(site)
    idle = Ask([logprobs(TOKENS), text()], bench.prompts[:2], greedy(3))
    quiet = _ok(bench.together(idle, b)[1])
    assert _equal(_ok(ran).outputs["lp"].logprobs, quiet.outputs["lp"].logprobs)
    assert torch.equal(b.sinks["kept"].rows(site), rows)


def test_c38_a_poisoned_decode_step_stays_with_its_author(small: Bench) -> None:
    vector = torch.full((small.width("resid_post.1"),), float("nan"))
    edit = ops.EditAdd(id="e", site="resid_post.1", at="gen[1]", value="v")
    a = Ask([V, edit, text()], small.prompts[:2], greedy(5), vectors={"v": vector})
    b = Ask([text(), logprobs(TOKENS, "all")], small.prompts, greedy(5))
    refused, ran = small.together(a, b)
    assert isinstance(refused, TrocarError)
    assert refused.code == "edit_not_finite"
    alone = small.alone(b)
    assert _ok(ran).outputs["text"] == alone.outputs["text"]
    close("B beside a poisoned step", ran.outputs["lp"].logprobs, alone.outputs["lp"].logprobs)


def test_c36_bad_programs_are_refused_before_any_forward(bench: Bench) -> None:
    m, n = bench.middle, bench.layers
    site, text_ = f"resid_post.{m}", [logprobs(TOKENS)]
    bad = {
        "unknown_site": [ops.EditSet(id="e", site=f"resid_pots.{m}", value="zero"), *text_],
        "layer_out_of_range": [ops.EditSet(id="e", site=f"resid_post.{n}", value="zero"), *text_],
        "site_unavailable": [read(f"attn_probs.{m}"), capture("r")],
        "width_mismatch": [V, ops.EditAdd(id="e", site=f"mlp_act.{m}", value="v"), *text_],
        "edit_after_layer": [
            read(f"resid_post.{m + 1}"),
            ops.EditSet(id="e", site=site, at="prompt[*]", value="r"),
            *text_,
        ],
        "unknown_ref": [ops.EditSet(id="e", site=site, value="later"), read(site, name="later"), *text_],
        "position_out_of_range": [ops.EditSet(id="e", site=site, at="prompt[4000]", value="zero"), *text_],
        "bad_position": [ops.EditSet(id="e", site=site, at="prompt[::2]", value="zero"), *text_],
        "touches_nothing": [ops.EditSet(id="e", site=site, at="gen[*]", value="zero"), *text_],
        "nothing_returned": [ops.EditSet(id="e", site=site, value="zero")],
        "duplicate_id": [read(site), read(site), capture("r")],
        "unknown_token": [logprobs([10**6])],
    }
    before = bench.engine.stats().forwards
    for code, nodes in bad.items():
        vectors = {"v": torch.zeros(bench.width("resid_post"))} if V in nodes else {}
        with pytest.raises(ProgramError) as caught:
            bench.together(Ask(nodes, bench.prompts[:1], vectors=vectors))
        assert caught.value.code == code
        assert caught.value.path.startswith("program.nodes")
    assert bench.engine.stats().forwards == before


class FullDisk:
    """A sink that fails at its second append."""

    def __init__(self, error: Exception) -> None:
        self._error, self._count = error, 0

    def append(self, *_: Any) -> None:
        self._count += 1
        if self._count == 2:
            raise self._error


@pytest.mark.parametrize(
    "fault", [RuntimeError("boom"), OSError(5, "input/output"), KeyError("lost"), ValueError("bad")]
)
def test_c37_a_failing_request_fails_alone(small: Bench, fault: Exception) -> None:
    """Whatever a sink raises ends its own request; the neighbour and the next request are served."""
    a = Ask(
        [read("resid_post.1", "all"), capture("r")],
        small.prompts[:1],
        greedy(4),
        own={"kept": FullDisk(fault)},
    )
    b = Ask([text(), logprobs(TOKENS, "all")], small.prompts, greedy(4))
    failed, ran = small.together(a, b)
    assert isinstance(failed, TrocarError)
    assert failed.code == "internal"
    assert "boom" not in str(failed)
    assert _ok(ran).outputs["text"] == small.alone(b).outputs["text"]
    assert small.engine.check() == []


def test_c37_a_refusal_of_the_sink_keeps_its_code(small: Bench) -> None:
    from trocar import errors

    full = FullDisk(errors.refuse("disk_full", "", "no room"))
    a = Ask([read("resid_post.1", "all"), capture("r")], small.prompts[:1], greedy(4), own={"kept": full})
    failed, ran = small.together(a, Ask([text()], small.prompts, greedy(4)))
    assert isinstance(failed, TrocarError)
    assert failed.code == "disk_full"
    assert isinstance(ran, TaskResult)


def test_c37_a_progress_callback_that_raises_fails_alone(small: Bench) -> None:
    def progress(_done: int) -> None:
        raise RuntimeError("boom")

    failed, ran = small.together(
        Ask([text()], small.prompts[:1], greedy(2), progress=progress),
        Ask([text()], small.prompts, greedy(2)),
    )
    assert isinstance(failed, TrocarError)
    assert failed.code == "internal"
    assert isinstance(ran, TaskResult)
    assert small.alone(Ask([text()], small.prompts, greedy(2))) == ran


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_c37_logits_that_are_not_finite_fail_alone(small: Bench, temperature: float) -> None:
    """Writes within the limit can still overflow later; sampling from NaN must not reach the neighbours."""
    generation = Generation(max_new_tokens=3, temperature=temperature, stop_at_eos=False)
    a = Ask([text()], small.prompts[:1], generation)
    b = Ask([text()], small.prompts, greedy(3))
    readout, poisoned = small.engine._body.readout, []
    plain = type(readout).logits

    def logits(self: Any, rows: torch.Tensor) -> torch.Tensor:
        out = plain(self, rows).clone()
        if not poisoned:
            out[0] = float("nan")
        poisoned.append(1)
        return out

    type(readout).logits = logits  # type: ignore[method-assign]
    try:
        failed, ran = small.together(a, b)
    finally:
        type(readout).logits = plain  # type: ignore[method-assign]
    assert poisoned
    assert isinstance(failed, TrocarError)
    assert failed.code == "result_not_finite"
    assert isinstance(ran, TaskResult)


def test_c42_nothing_is_left_after_two_hundred_requests(small: Bench) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)

    ask = Ask(
        [
            read("resid_post.1"),
            ops.EditScale(id="e", site="resid_post.2", by=1.1, at="prompt[*]"),
            capture("r"),
            text(),
        ],
        small.prompts[:2],
        greedy(2),
    )
    for _ in range(5):
        small.alone(ask)
    ask.sinks.clear()
    before, threads = tensors(), threading.active_count()
    for start in range(0, 200, 20):
        asks = [Ask(ask.nodes, ask.prompts, ask.generation) for _ in range(20)]
        assert all(isinstance(x, TaskResult) for x in small.together(*asks)), start
        del asks
    assert small.engine.stats().live_requests == 0
    assert small.engine.check() == []
    assert threading.active_count() == threads
    assert tensors() <= before + 5
    hooks = [m for m in small.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_long_requests_are_cut_into_batches_and_take_turns(tiny: Any) -> None:
    """Forty prompts in batches of eight: order, groups and per-prompt values survive the cuts."""
    engine = HFEngine(tiny, Limits(batch_sequences=8, batch_tokens=64))
    bench = Bench(tiny, engine, ())
    draw = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(0, 256, (3 + i % 5,), generator=draw).tolist()) for i in range(40)]
    nodes = [
        read("resid_post.1"),
        ops.Mean(id="m", of="r"),
        ops.EditAdd(id="e", site="resid_post.2", at="prompt[-1]", value="m"),
        capture("r"),
        logprobs(TOKENS, "prompt[-1]"),
    ]
    done: list[int] = []
    ask = Ask(nodes, prompts, progress=done.append)
    other = Ask([text()], prompts[:2], greedy(2))
    found, short = bench.together(ask, other)
    assert isinstance(short, TaskResult)
    lp = _ok(found).outputs["lp"]
    assert lp.tags.prompts.tolist() == list(range(40))
    assert found.outputs["kept"].rows_per_prompt == tuple(len(p) for p in prompts)
    assert done == sorted(done)
    assert done[-1] == 40
    assert engine.stats().forwards >= 6
    for i, prompt in enumerate(prompts):
        theirs = reference_logprobs(solo(tiny.model, nodes, prompt).first.logits[-1])[list(TOKENS)]
        close("forty prompts in cut batches", lp.logprobs[i], theirs)
    assert [k[:2] for k in ask.sinks["kept"].keys().tolist()] == [
        [i, j] for i, p in enumerate(prompts) for j in range(len(p))
    ]
    engine.close()


def test_shelves_are_the_tests_own() -> None:
    """The harness itself: rows come back ordered by prompt, then position."""
    shelf = Shelf()
    tags = type(
        "T", (), {"prompts": np.array([1, 0]), "positions": np.array([0, 3]), "token_ids": np.array([7, 8])}
    )
    shelf.append({"s": np.array([[1.0], [2.0]], dtype=np.float32)}, tags)
    assert shelf.keys().tolist() == [[0, 3, 8], [1, 0, 7]]
    assert shelf.rows("s").tolist() == [[2.0], [1.0]]

"""Behaviours 39 and 42, and what a scheduler may not change: chunks, preemption, cached prefixes, turns, leaks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_room import Ask, Bench, capture, greedy, logprobs, ok, read, text
from compare_room import against_hooks, changed, same_bits
from models_room import RANDOM, random_prompts

from trocar.engine.protocol import TaskResult
from trocar.errors import TrocarError
from trocar.graph import ops

TOKENS = (1, 17, 42, 99)
V = ops.Tensor(id="v", name="v")
LONG = random_prompts((40, 23, 57, 31), seed=8)


def _reading(bench: Bench, prompts: Sequence[Sequence[int]] = LONG, most: int = 3, **more: Any) -> Ask:
    """Rows of two layers, an edit in the middle of the prompt and of the text, a pattern, numbers, a text."""
    site, late = f"resid_post.{bench.middle}", f"mlp_out.{bench.layers - 1}"
    nodes = [
        V,
        ops.EditAdd(id="e", site=site, at="all", value="v"),
        read(site, "all"),
        read(late, "all", name="s"),
        capture("r", "s"),
        logprobs(TOKENS, "all"),
        text(),
    ]
    return Ask(nodes, prompts, greedy(most), vectors={"v": bench.pushing(site)}, **more)


def _rows(ask: Ask) -> list[torch.Tensor]:
    sites = [n.site for n in ask.nodes if n.op == "read"]
    return [ask.sinks["kept"].rows(site) for site in sites]


def _same_numbers(bench: Bench, other: Bench, ask: Ask) -> tuple[TaskResult, TaskResult]:
    """The same request on two engines: every captured number and every output, bit by bit."""
    first = bench.alone(ask)
    mine = _rows(ask)
    second = other.alone(ask)
    for a, b in zip(mine, _rows(ask), strict=True):
        assert torch.equal(a, b)
    assert same_bits(first.outputs["lp"].logprobs, second.outputs["lp"].logprobs)
    assert first.outputs["text"] == second.outputs["text"]
    assert [e.rows for e in first.edits] == [e.rows for e in second.edits]
    return first, second


@pytest.mark.parametrize("model", RANDOM)
def test_c39_chunks_change_no_number(limited: Any, model: str) -> None:
    whole, cut = limited(model, step_tokens=512), limited(model, step_tokens=8)
    ask = _reading(whole)
    first, _ = _same_numbers(whole, cut, ask)
    against_hooks(whole, ask, first, "in one piece")
    assert cut.engine.stats().chunks > 0
    assert whole.engine.stats().chunks == 0


@pytest.mark.parametrize("model", RANDOM)
def test_c39_preemption_changes_no_number(limited: Any, model: str) -> None:
    """Room for few keys and values: sequences give way, are computed again, and nothing is collected twice."""
    roomy, tight = limited(model), limited(model, kv_tokens=256)
    prompts = random_prompts((60, 61, 62, 50), seed=9)
    ask = _reading(roomy, prompts, most=8)
    first, _ = _same_numbers(roomy, tight, ask)
    against_hooks(roomy, ask, first, "without preemption")
    assert tight.engine.stats().preemptions > 0
    assert roomy.engine.stats().preemptions == 0
    assert tight.engine.stats().live_sequences == 0


@pytest.mark.parametrize("model", RANDOM)
def test_c39_preemption_keeps_values_of_the_prompt(limited: Any, model: str) -> None:
    """A mean over the prompt steers the text; after a preemption it is still that mean. Sampling goes on too."""
    roomy, tight = limited(model), limited(model, kv_tokens=256)
    site = f"resid_post.{roomy.middle}"
    nodes = [
        read(f"resid_post.{roomy.layers - 1}"),
        ops.Mean(id="m", of="r"),
        ops.EditAdd(id="e", site=site, at="gen[*]", value="m"),
        read(site, "gen[*]", name="g"),
        capture("g"),
        logprobs(TOKENS, "gen[*]"),
        text(),
    ]
    prompts = random_prompts((60, 61, 62, 50), seed=9)
    warm = greedy(8).model_copy(update={"temperature": 1.0, "seed": 3})
    for generation in (greedy(8), warm):
        ask = Ask(nodes, prompts, generation)
        found = [b.alone(ask).outputs for b in (roomy, tight)]
        assert found[0]["text"] == found[1]["text"]
        assert same_bits(found[0]["lp"].logprobs, found[1]["lp"].logprobs)
    assert tight.engine.stats().preemptions > 0


@pytest.mark.parametrize("model", RANDOM)
def test_c39_a_cached_prefix_changes_no_number(limited: Any, model: str) -> None:
    """The same prompts again: their first blocks come from the cache, and every number is the same."""
    never, cached = limited(model, prefix_cache=False), limited(model)
    site = f"resid_post.{never.middle}"
    edit = ops.EditAdd(id="e", site=site, at="prompt[-1]", value="v")
    tail = [read(site, "prompt[-1]"), capture("r"), logprobs(TOKENS, "prompt[-1]"), text()]
    ask = Ask([V, edit, *tail], LONG, greedy(4), vectors={"v": never.pushing(site)}, tenant="a")
    wanted = never.alone(ask)
    rows = ask.sinks["kept"].rows(site)
    against_hooks(never, ask, wanted, "without a cache")
    for turn in range(3):
        found = cached.alone(ask)
        assert torch.equal(ask.sinks["kept"].rows(site), rows), turn
        assert same_bits(found.outputs["lp"].logprobs, wanted.outputs["lp"].logprobs)
        assert found.outputs["text"] == wanted.outputs["text"]
    assert cached.engine.stats().prefix_hit_tokens > 0
    assert never.engine.stats().prefix_hit_tokens == 0


@pytest.mark.parametrize("model", RANDOM)
def test_c39_strangers_never_share_what_was_steered(limited: Any, model: str) -> None:
    """One prompt, seven edits at seven depths, two tenants: after each, the plain run has the plain bits."""
    never, cached = limited(model, prefix_cache=False), limited(model)
    plain = [
        Ask([logprobs(TOKENS, "prompt[-1]"), text()], LONG[:1], greedy(3), tenant=name) for name in ("a", "b")
    ]
    wanted = never.alone(plain[0])
    for site in never.sites(editable=True):
        for at in ("prompt[*]", "prompt[20:]", "prompt[0]", "all", "gen[*]"):
            nodes = [ops.EditScale(id="e", site=site, at=at, by=-2.0), logprobs(TOKENS, "all"), text()]
            steered = Ask(nodes, LONG[:1], greedy(3), tenant="a")
            found = cached.alone(steered)
            assert same_bits(never.alone(steered).outputs["lp"].logprobs, found.outputs["lp"].logprobs), (
                site,
                at,
            )
            for ask in plain:
                result = cached.alone(ask)
                assert same_bits(result.outputs["lp"].logprobs, wanted.outputs["lp"].logprobs), (site, at)
                assert result.outputs["text"] == wanted.outputs["text"]
    assert cached.engine.stats().prefix_hit_tokens > 0


def test_c39_a_prefix_is_its_tenants_own(limited: Any) -> None:
    """Whether a prompt was seen before shows in counters and in time, so strangers get no hit."""
    bench = limited()

    def hits(tenant: str) -> int:
        before = bench.engine.stats().prefix_hit_tokens
        bench.alone(Ask([logprobs(TOKENS, "prompt[-1]")], LONG[:1], tenant=tenant))
        return int(bench.engine.stats().prefix_hit_tokens - before)

    assert hits("a") == 0
    assert hits("b") == 0
    assert hits("a") > 0
    assert hits("b") > 0


def test_c39_rows_that_are_read_are_never_skipped(limited: Any) -> None:
    """A program that reads rows of a cached prefix gets all of them: no short tensor, no stale one."""
    bench, site = limited(), "resid_post.1"
    for at, count in (("prompt[*]", 40), ("prompt[0:5]", 5), ("prompt[17]", 1), ("prompt[30:]", 10)):
        ask = Ask([read(site, at), capture("r"), logprobs(TOKENS, at)], LONG[:1])
        first = bench.alone(ask)
        rows = ask.sinks["kept"].rows(site)
        assert len(rows) == count
        second = bench.alone(ask)
        assert torch.equal(ask.sinks["kept"].rows(site), rows)
        assert same_bits(first.outputs["lp"].logprobs, second.outputs["lp"].logprobs)


@pytest.mark.parametrize("model", RANDOM)
def test_c39_everything_at_once(limited: Any, model: str) -> None:
    """Chunks, preemptions and cached prefixes under eight requests that come together."""
    roomy = limited(model, prefix_cache=False)
    tight = limited(model, step_tokens=24, kv_tokens=384, sequences=5)
    asks = [
        _reading(roomy, [LONG[i % 4], LONG[(i + 1) % 4]], most=2 + i % 3, tenant=f"t{i % 3}")
        for i in range(8)
    ]
    wanted, rows = [], []
    for ask in asks:
        wanted.append(roomy.alone(ask))
        rows.append(_rows(ask))
    for _ in range(2):
        for ask, want, kept, found in zip(asks, wanted, rows, tight.together(*asks), strict=True):
            assert same_bits(ok(found).outputs["lp"].logprobs, want.outputs["lp"].logprobs)
            assert found.outputs["text"] == want.outputs["text"]
            assert all(torch.equal(a, b) for a, b in zip(_rows(ask), kept, strict=True))
    stats = tight.engine.stats()
    assert stats.chunks > 0
    assert stats.live_sequences == 0


def test_prompts_that_must_stay_whole_do(limited: Any) -> None:
    """A mean over the prompt edits the prompt: rows of it are tied together, whatever a step may hold."""
    roomy, cut = limited(), limited(step_tokens=8)
    site = "resid_post.1"
    nodes = [
        read(site),
        ops.Mean(id="m", of="r"),
        ops.EditAdd(id="e", site="resid_post.2", at="prompt[*]", value="m"),
    ]
    ask = Ask([*nodes, logprobs(TOKENS)], LONG)
    first, second = roomy.alone(ask), cut.alone(ask)
    against_hooks(roomy, ask, first, "whole prompts")
    assert changed(roomy, ask, first) > 1e-2
    assert same_bits(first.outputs["lp"].logprobs, second.outputs["lp"].logprobs)


def test_a_long_request_takes_turns(limited: Any) -> None:
    """Forty prompts through eight places: order and per-prompt values survive, and a stranger is not kept waiting."""
    bench = limited(sequences=8, step_tokens=64)
    prompts = random_prompts(tuple(3 + i % 5 for i in range(40)), seed=1)
    nodes = [
        read("resid_post.1"),
        ops.Mean(id="m", of="r"),
        ops.EditAdd(id="e", site="resid_post.2", at="prompt[-1]", value="m"),
        capture("r"),
        logprobs(TOKENS, "prompt[-1]"),
    ]
    done: list[int] = []
    ask = Ask(nodes, prompts, progress=done.append, tenant="long")
    long, short = bench.started(ask, Ask([text()], prompts[:2], greedy(2), tenant="short"))
    ok(short.result(60))
    early = len(done)
    result = long.result(60)
    against_hooks(bench, ask, result, "forty prompts in turns")
    assert early < 40
    assert done == sorted(done)
    assert done[-1] == 40


def test_cancelling_one_request_disturbs_nobody(limited: Any) -> None:
    bench = limited()
    asks = [Ask([text(), logprobs(TOKENS, "all")], bench.prompts, greedy(40)) for _ in range(3)]
    wanted = bench.alone(asks[0])
    tasks = [bench.task(a) for a in asks]
    futures = [bench.engine.submit(t) for t in tasks]
    bench.engine.cancel(tasks[1].request)
    error = futures[1].exception(60)
    assert error is None or (isinstance(error, TrocarError) and error.code == "cancelled")
    for future in (futures[0], futures[2]):
        assert same_bits(future.result(60).outputs["lp"].logprobs, wanted.outputs["lp"].logprobs)
    assert bench.engine.stats().live_requests == 0


# ---- leaks ----


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _tensors() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)


def _small_requests(bench: Bench, count: int) -> None:
    """Eights of requests that read, edit, generate, capture, fail and are cancelled."""
    width = bench.width("resid_post")
    for start in range(0, count, 8):
        nodes = [
            read("resid_post.1", "all"),
            ops.Mean(id="m", of="p"),
            ops.EditAdd(id="e", site="resid_post.2", at="gen[*]", value="m"),
            capture("r"),
            text(),
        ]
        nodes.insert(1, read("resid_post.0", name="p"))
        prompts = random_prompts((5, 3), seed=start)
        asks = [Ask(nodes, prompts, greedy(2), tenant=f"t{i}") for i in range(6)]
        bad = Ask(
            [V, ops.EditAdd(id="e", site="resid_post.1", value="v"), text()],
            prompts,
            greedy(2),
            vectors={"v": torch.full((width,), float("nan"))},
        )
        tasks = [bench.task(a) for a in (*asks, bad, Ask([text()], prompts, greedy(6)))]
        futures = bench.submitted(tasks)
        bench.engine.cancel(tasks[-1].request)
        for future in futures:
            future.exception(60)


def test_c42_nothing_is_left_after_a_thousand_requests(limited: Any) -> None:
    """Live state is zero, tensors and threads are back, and so is memory."""
    bench = limited()
    _small_requests(bench, 200)
    tensors, threads, memory = _tensors(), threading.active_count(), _resident_bytes()
    _small_requests(bench, 1000)
    stats = bench.engine.stats()
    assert (stats.live_requests, stats.live_sequences) == (0, 0)
    assert bench.engine.check() == []
    assert threading.active_count() == threads
    assert _tensors() <= tensors + 8
    assert _resident_bytes() - memory < 8 << 20
    hooks = [m for m in bench.loaded.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_c42_the_gauge_sees_a_leak() -> None:
    """What a leak of one tensor per request would look like."""
    before = _tensors()
    kept = [torch.zeros(4) for _ in range(20)]
    assert _tensors() >= before + 20
    del kept


def test_c42_keys_and_values_are_given_back(limited: Any) -> None:
    """Without a cache, an idle engine holds none."""
    bench = limited(prefix_cache=False)
    for _ in range(3):
        bench.together(*[Ask([text()], LONG, greedy(6)) for _ in range(3)])
    assert bench.engine.stats().kv_bytes == 0
    assert bench.engine.stats().live_sequences == 0

"""Behaviours 16 to 20: the loop with keys and values kept equals running everything again for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench_room import Ask, Bench, capture, greedy, logprobs, ok, read, text
from compare_room import against_hooks, changed, follow, same_bits
from models_room import RANDOM

from trocar.errors import TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation

TOKENS = (1, 17, 42, 99)
STEPS = 6
V = ops.Tensor(id="v", name="v")


def _loop(bench: Bench, ask: Ask) -> list[tuple[int, ...]]:
    """Ids of the reference's own greedy loop."""
    return [bench.reference(ask, i).ids for i in range(len(ask.prompts))]


def test_c16_each_generated_row_is_read_once(bench: Bench) -> None:
    """gen[*] has exactly N rows, gen[0:2] two; the step before the first is the plain forward pass."""
    site = f"resid_post.{bench.middle}"
    nodes = [
        read(site, "gen[*]"),
        capture("r"),
        read(site, "gen[0:2]", name="early"),
        capture("early", name="two"),
        logprobs(TOKENS, "all"),
        text(),
    ]
    ask = Ask(nodes, bench.prompts, greedy(STEPS))
    result = bench.alone(ask)
    runs = against_hooks(bench, ask, result, "generated rows")
    keys = ask.sinks["kept"].keys()
    for i, (prompt, run) in enumerate(zip(bench.prompts, runs, strict=True)):
        assert keys[keys[:, 0] == i].tolist() == [[i, len(prompt) + j, t] for j, t in enumerate(run.ids)]
        assert torch.equal(ask.sinks["two"].rows(site, i), ask.sinks["kept"].rows(site, i)[:2])
    assert result.outputs["kept"].rows_per_prompt == (STEPS,) * len(bench.prompts)
    found = result.outputs["lp"]
    before = found.logprobs[np.asarray(found.tags.phases) == "prompt"]
    plain = bench.alone(Ask([logprobs(TOKENS)], bench.prompts)).outputs["lp"].logprobs
    assert same_bits(before, plain)


@pytest.mark.parametrize("at", ["all", "gen[*]", "prompt[*]", "prompt[-1]"])
def test_c17_steering_equals_the_reference_loop(bench: Bench, at: str) -> None:
    """Token for token, over prompts of different lengths; and the steering changes the text."""
    site = f"resid_post.{bench.middle}"
    nodes = [V, ops.EditAdd(id="e", site=site, at=at, value="v"), text()]
    ask = Ask(nodes, bench.prompts, greedy(STEPS), vectors={"v": bench.pushing(site, 3.0)})
    result = bench.alone(ask)
    found = result.outputs["text"].ids
    if bench.name in RANDOM:
        assert list(found) == _loop(bench, ask)
    follow(bench, ask, result)
    assert found != bench.alone(Ask([text()], bench.prompts, greedy(STEPS))).outputs["text"].ids


def test_c18_an_edit_at_one_step_affects_only_later_tokens(bench: Bench) -> None:
    site, step = f"resid_post.{bench.middle}", 2
    edit = ops.EditAdd(id="e", site=site, at=f"gen[{step}]", value="v")
    tail = [text(), logprobs(TOKENS, "all")]
    ask = Ask([V, edit, *tail], bench.prompts, greedy(STEPS), vectors={"v": bench.pushing(site, 10.0)})
    result, base = bench.alone(ask), bench.alone(Ask(tail, bench.prompts, greedy(STEPS)))
    against_hooks(bench, ask, result, "one step")
    steered, without = result.outputs["text"].ids, base.outputs["text"].ids
    assert [ids[: step + 1] for ids in steered] == [ids[: step + 1] for ids in without]
    assert steered != without
    a, b = result.outputs["lp"], base.outputs["lp"]
    early = [p - len(bench.prompts[i]) < step for i, p in zip(a.tags.prompts, a.tags.positions, strict=True)]
    assert same_bits(a.logprobs[early], b.logprobs[early])
    assert result.edits[0].rows == len(bench.prompts)


def test_c18_an_edit_of_the_prompt_persists_through_the_cache(bench: Bench) -> None:
    """An edit of an early row, which no later step repeats, still changes the generated rows."""
    edit = ops.EditSet(id="e", site=f"v.{bench.middle}", at="prompt[0:2]", value="zero")
    ask = Ask([edit, logprobs(TOKENS, "gen[*]"), text()], bench.prompts, greedy(STEPS))
    result = bench.alone(ask)
    against_hooks(bench, ask, result, "edit of the prompt, generated rows")
    assert changed(bench, ask, result) > 1e-2


def test_c18_a_later_layer_of_the_prompt_may_steer_an_earlier_layer_of_what_follows(bench: Bench) -> None:
    source, target = f"resid_post.{bench.layers - 1}", f"resid_post.{bench.middle}"
    nodes = [
        read(source),
        ops.Mean(id="m", of="r"),
        ops.EditAdd(id="e", site=target, at="gen[*]", value="m"),
        text(),
        logprobs(TOKENS, "all"),
    ]
    ask = Ask(nodes, bench.prompts, greedy(STEPS))
    result = bench.alone(ask)
    against_hooks(bench, ask, result, "late prompt, early layer")
    assert changed(bench, ask, result) > 1e-2


def test_gates_of_the_prompt_hold_for_the_whole_text(family: Bench) -> None:
    """A truth value per prompt, found in the prompt, gates every generated row; the one per row its own."""
    site = f"resid_post.{family.middle}"
    unit = family.vector(site, 1.0)
    score = [V, ops.Tensor(id="u", name="u"), read(site, "all"), ops.Dot(id="d", a="r", b="u")]
    row = [*score, ops.Gt(id="g", a="d", b=0.0), ops.EditAdd(id="e", site=site, value="v", gate="g")]
    prompt = [ops.Tensor(id="v", name="v"), ops.Tensor(id="u", name="u"), read(site, "prompt[-1]")]
    prompt += [ops.Mean(id="last", of="r"), ops.Dot(id="d", a="last", b="u"), ops.Gt(id="g", a="d", b=0.0)]
    prompt += [ops.EditAdd(id="e", site=site, at="gen[*]", value="v", gate="g")]
    vectors = {"v": family.pushing(site, 2.0), "u": unit}
    for nodes in (row, prompt):
        for sign in (1.0, -1.0):
            ask = Ask(
                [*nodes, text(), logprobs(TOKENS, "all")],
                family.prompts,
                greedy(4),
                vectors={**vectors, "u": sign * unit},
            )
            against_hooks(family, ask, family.alone(ask), "gates along a text")


@contextmanager
def _ending(bench: Bench, ends: Sequence[int]) -> Iterator[None]:
    """The engine with other end tokens."""
    body = bench.engine._body
    bench.engine._body = replace(body, eos=frozenset(ends))
    try:
        yield
    finally:
        bench.engine._body = body


def test_c19_an_end_token_ends_early(bench: Bench) -> None:
    """One sequence ends by its own; the others go on; what was read up to there is kept."""
    site, steps = f"resid_post.{bench.middle}", 5
    plain = bench.alone(Ask([text()], bench.prompts, greedy(steps))).outputs["text"].ids
    end = plain[0][2]
    first = [next((j for j, t in enumerate(ids) if t == end), None) for ids in plain]
    nodes = [read(site, "gen[*]"), capture("r"), text()]
    ask = Ask(nodes, bench.prompts, Generation(max_new_tokens=steps))
    with _ending(bench, [end]):
        result = bench.alone(ask)
    full = Ask(nodes, bench.prompts, greedy(steps))
    bench.alone(full)
    ids, finished = result.outputs["text"].ids, result.outputs["text"].finished
    assert finished[0]
    for i, (all_of_it, stop) in enumerate(zip(plain, first, strict=True)):
        rows = steps if stop is None else stop + 1
        assert finished[i] == (stop is not None)
        assert ids[i] == all_of_it[:stop]
        assert result.outputs["kept"].rows_per_prompt[i] == rows
        assert torch.equal(ask.sinks["kept"].rows(site, i), full.sinks["kept"].rows(site, i)[:rows])


def test_c19_positions_that_are_never_reached_are_an_error(small: Bench) -> None:
    """The model ends at once, so an edit at gen[3] touches nothing: refused, not silent."""
    end = small.alone(Ask([text()], small.prompts[:1], greedy(1))).outputs["text"].ids[0][0]
    most = Generation(max_new_tokens=6)
    late = [ops.EditScale(id="e", site="resid_post.1", at="gen[3]", by=2.0), text()]
    with _ending(small, [end]):
        with pytest.raises(TrocarError) as caught:
            small.alone(Ask(late, small.prompts[:1], most))
        with pytest.raises(TrocarError) as second:
            small.alone(Ask([logprobs(TOKENS, "gen[3]")], small.prompts[:1], most))
    assert (caught.value.code, caught.value.path) == ("edit_missed", "e")
    assert (second.value.code, second.value.path) == ("edit_missed", "lp")


def test_c20_two_requests_of_different_length_and_edits(bench: Bench) -> None:
    """The early finisher leaves and does not disturb the other, whichever comes first: not one bit."""
    site = f"resid_post.{bench.middle}"
    tail = [text(), logprobs(TOKENS, "all")]
    steer = [V, ops.EditAdd(id="e", site=site, at="all", value="v"), *tail]
    ablate = [ops.EditSet(id="e", site=f"attn_out.{bench.middle}", at="all", value="zero"), *tail]
    short = Ask(steer, bench.prompts[1:3], greedy(2), vectors={"v": bench.pushing(site, 2.0)})
    long = Ask(ablate, [bench.prompts[0], bench.prompts[3]], greedy(STEPS))
    alone = {id(ask): bench.alone(ask) for ask in (short, long)}
    for asks in ((short, long), (long, short)):
        for ask, result in zip(asks, bench.together(*asks), strict=True):
            against_hooks(bench, ask, ok(result), "different lengths in one batch")
            assert result.outputs["text"] == alone[id(ask)].outputs["text"]
            assert same_bits(result.outputs["lp"].logprobs, alone[id(ask)].outputs["lp"].logprobs)
    assert bench.engine.stats().most_requests >= 2


# ---- sampling ----


def test_sampling_is_the_prompts_own_whatever_the_batch(small: Bench) -> None:
    warm = Generation(max_new_tokens=8, temperature=1.5, top_p=0.9, seed=5, stop_at_eos=False)
    ask = Ask([text()], small.prompts, warm)
    alone = small.alone(ask).outputs["text"].ids
    assert small.alone(ask).outputs["text"].ids == alone
    mixed = small.together(
        Ask([text()], small.prompts[::-1], greedy(8)), ask, Ask([text()], small.prompts, greedy(3))
    )
    assert ok(mixed[1]).outputs["text"].ids == alone
    assert small.alone(Ask([text()], small.prompts, greedy(8))).outputs["text"].ids != alone
    other = warm.model_copy(update={"seed": 6})
    assert small.alone(Ask([text()], small.prompts, other)).outputs["text"].ids != alone


def test_sampling_streams_differ_between_prompts(small: Bench) -> None:
    """The same prompt three times: three streams, so three texts; and the first is that of the prompt alone."""
    warm = Generation(max_new_tokens=8, temperature=2.0, seed=1, stop_at_eos=False)
    same = small.alone(Ask([text()], [small.prompts[0]] * 3, warm)).outputs["text"].ids
    assert len(set(same)) == 3
    assert small.alone(Ask([text()], small.prompts[:1], warm)).outputs["text"].ids == same[:1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
def test_sampling_near_zero_temperature_is_greedy(small: Bench, temperature: float) -> None:
    cold = Generation(max_new_tokens=4, temperature=temperature, stop_at_eos=False)
    found = small.alone(Ask([text()], small.prompts, cold)).outputs["text"].ids
    assert found == small.alone(Ask([text()], small.prompts, greedy(4))).outputs["text"].ids


def test_a_tiny_nucleus_is_greedy(small: Bench) -> None:
    narrow = Generation(max_new_tokens=4, temperature=1.0, top_p=1e-9, stop_at_eos=False)
    found = small.alone(Ask([text()], small.prompts, narrow)).outputs["text"].ids
    assert found == small.alone(Ask([text()], small.prompts, greedy(4))).outputs["text"].ids

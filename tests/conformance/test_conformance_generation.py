"""Generation: the loop with a KV cache, padding and sequences that leave equals re-running everything each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_room import Ask, Bench, capture, close, greedy, logprobs, read, text
from reference import logprobs as reference_logprobs
from reference import solo

from trocar.errors import TrocarError
from trocar.graph import ops
from trocar.graph.program import Generation

TOKENS = (1, 17, 42, 99)
STEPS = 6
V = ops.Tensor(id="v", name="v")


def _reference(bench: Bench, ask: Ask, prompt: int, eos: Sequence[int] = ()) -> Any:
    return solo(
        bench.model,
        ask.nodes,
        ask.prompts[prompt],
        ask.constants(prompt),
        max_new_tokens=ask.generation.max_new_tokens,
        eos=eos,
    )


def test_c16_each_generated_row_is_read_once(bench: Bench) -> None:
    """Rows of gen[*] are those of one pass over prompt and continuation; gen[j] is fed after the prompt."""
    site = f"resid_post.{bench.middle}"
    nodes = [read(site, "gen[*]"), capture("r"), logprobs(TOKENS, "all"), text()]
    ask = Ask(nodes, bench.prompts, greedy(STEPS))
    result = bench.alone(ask)
    shelf, found = ask.sinks["kept"], result.outputs["lp"]
    keys, rows = torch.from_numpy(shelf.keys()), shelf.rows(site)
    assert result.outputs["kept"].rows_per_prompt == (STEPS,) * len(bench.prompts)
    for i, prompt in enumerate(bench.prompts):
        run = _reference(bench, ask, i)
        assert result.outputs["text"].ids[i] == run.ids
        assert keys[keys[:, 0] == i].tolist() == [[i, len(prompt) + j, t] for j, t in enumerate(run.ids)]
        theirs = run.last.read["r"]
        size = theirs.abs().max()
        close("generated rows, relative", rows[keys[:, 0] == i] / size, theirs / size, 1e-5)
        mine = found.logprobs[found.tags.prompts == i]
        close("logprobs along a generation", mine, reference_logprobs(run.last.logits)[:, list(TOKENS)])
    phases = [
        p
        for p, at in zip(found.tags.phases, found.tags.positions, strict=True)
        if at == len(bench.prompts[0])
    ]
    assert "gen" in phases


@pytest.mark.parametrize("at", ["all", "gen[*]", "prompt[*]", "prompt[-1]"])
def test_c17_steering_equals_the_reference_loop(bench: Bench, at: str) -> None:
    """Token for token, over prompts of different lengths; and the steering changes the text."""
    site = f"resid_post.{bench.middle}"
    size = float(solo(bench.model, [read(site)], bench.prompts[0]).first.read["r"][-1].norm())
    nodes = [V, ops.EditAdd(id="e", site=site, at=at, value="v", coef=1.0), text()]
    ask = Ask(nodes, bench.prompts, greedy(STEPS), vectors={"v": bench.vector(site, 2.0 * size)})
    found = bench.alone(ask).outputs["text"].ids
    runs = [_reference(bench, ask, i).ids for i in range(len(bench.prompts))]
    assert list(found) == runs
    plain = bench.alone(Ask([text()], bench.prompts, greedy(STEPS))).outputs["text"].ids
    assert found != plain


def test_c18_an_edit_at_one_step_affects_only_later_tokens(bench: Bench) -> None:
    site, step = f"resid_post.{bench.middle}", 2
    size = float(solo(bench.model, [read(site)], bench.prompts[0]).first.read["r"][-1].norm())
    edit = ops.EditAdd(id="e", site=site, at=f"gen[{step}]", value="v")
    ask = Ask(
        [V, edit, text(), logprobs(TOKENS, "all")],
        bench.prompts,
        greedy(STEPS),
        vectors={"v": bench.vector(site, 5 * size)},
    )
    plain = Ask([text(), logprobs(TOKENS, "all")], bench.prompts, greedy(STEPS))
    result, base = bench.alone(ask), bench.alone(plain)
    steered, without = result.outputs["text"].ids, base.outputs["text"].ids
    assert [ids[: step + 1] for ids in steered] == [ids[: step + 1] for ids in without]
    assert steered != without
    assert list(steered) == [_reference(bench, ask, i).ids for i in range(len(bench.prompts))]
    a, b = result.outputs["lp"], base.outputs["lp"]
    early = [p - len(bench.prompts[i]) < step for i, p in zip(a.tags.prompts, a.tags.positions, strict=True)]
    assert torch.equal(torch.from_numpy(a.logprobs[early]), torch.from_numpy(b.logprobs[early]))
    assert result.edits[0].rows == len(bench.prompts)


def test_c18_a_prefill_edit_persists_through_the_cache(bench: Bench) -> None:
    """An edit of an early row, which no later step repeats, still changes the generated rows."""
    site = f"v.{bench.middle}"
    nodes = [
        ops.EditSet(id="e", site=site, at="prompt[0:2]", value="zero"),
        logprobs(TOKENS, "gen[*]"),
        text(),
    ]
    ask = Ask(nodes, bench.prompts, greedy(STEPS))
    result = bench.alone(ask)
    found, gap = result.outputs["lp"], 0.0
    for i in range(len(bench.prompts)):
        run = _reference(bench, ask, i)
        assert result.outputs["text"].ids[i] == run.ids
        length = len(bench.prompts[i])
        theirs = reference_logprobs(run.last.logits)[length:, list(TOKENS)]
        close("prefill edit, generated rows", found.logprobs[found.tags.prompts == i], theirs)
        with torch.no_grad():
            base = bench.model(input_ids=torch.tensor([[*bench.prompts[i], *run.ids]])).logits[0]
        gap = max(gap, float((theirs - reference_logprobs(base)[length:, list(TOKENS)]).abs().max()))
    assert gap > 1e-2


def test_c18_a_later_layer_of_the_prompt_may_steer_an_earlier_layer_of_what_follows(bench: Bench) -> None:
    source, target = f"resid_post.{bench.layers - 1}", f"resid_post.{bench.middle}"
    nodes = [
        read(source),
        ops.Mean(id="m", of="r"),
        ops.EditAdd(id="e", site=target, at="gen[*]", value="m"),
        text(),
    ]
    ask = Ask(nodes, bench.prompts, greedy(STEPS))
    found = bench.alone(ask).outputs["text"].ids
    assert list(found) == [_reference(bench, ask, i).ids for i in range(len(bench.prompts))]
    assert found != bench.alone(Ask([text()], bench.prompts, greedy(STEPS))).outputs["text"].ids


def test_c19_an_end_token_ends_early(bench: Bench) -> None:
    """One sequence ends by its own; the others go on; what was read up to there is kept."""
    site, steps = f"resid_post.{bench.middle}", 5
    plain = bench.alone(Ask([text()], bench.prompts, greedy(steps))).outputs["text"].ids
    end = plain[0][2]
    first = [next((j for j, t in enumerate(ids) if t == end), None) for ids in plain]
    engine = bench.engine
    body = engine._body
    engine._body = replace(body, eos=frozenset({end}))
    try:
        nodes = [read(site, "gen[*]"), capture("r"), text()]
        ask = Ask(nodes, bench.prompts, Generation(max_new_tokens=steps))
        result = bench.alone(ask)
    finally:
        engine._body = body
    ids, finished = result.outputs["text"].ids, result.outputs["text"].finished
    assert finished[0]
    for i, (all_of_it, stop) in enumerate(zip(plain, first, strict=True)):
        assert finished[i] == (stop is not None)
        assert ids[i] == all_of_it[:stop]
        assert result.outputs["kept"].rows_per_prompt[i] == (steps if stop is None else stop + 1)


def test_c19_positions_that_are_never_reached_are_an_error(small: Bench) -> None:
    """The model ends at once, so an edit at gen[3] touches nothing: refused, not silent."""
    engine, end = (
        small.engine,
        small.alone(Ask([text()], small.prompts[:1], greedy(1))).outputs["text"].ids[0][0],
    )
    body = engine._body
    engine._body = replace(body, eos=frozenset({end}))
    try:
        nodes = [ops.EditScale(id="e", site="resid_post.1", at="gen[3]", by=2.0), text()]
        ask = Ask(nodes, small.prompts[:1], Generation(max_new_tokens=6))
        with pytest.raises(TrocarError) as caught:
            small.alone(ask)
        with pytest.raises(TrocarError) as second:
            small.alone(Ask([logprobs(TOKENS, "gen[3]")], small.prompts[:1], Generation(max_new_tokens=6)))
    finally:
        engine._body = body
    assert (caught.value.code, caught.value.path) == ("edit_missed", "e")
    assert (second.value.code, second.value.path) == ("edit_missed", "lp")


def test_c20_two_requests_of_different_length_and_edits(bench: Bench) -> None:
    """The early finisher leaves the batch and does not disturb the other, whichever comes first."""
    site = f"resid_post.{bench.middle}"
    size = float(solo(bench.model, [read(site)], bench.prompts[0]).first.read["r"][-1].norm())
    steer = [V, ops.EditAdd(id="e", site=site, at="all", value="v"), text(), logprobs(TOKENS, "all")]
    short = Ask(steer, bench.prompts[1:3], greedy(2), vectors={"v": bench.vector(site, 2 * size)})
    ablate = [
        ops.EditSet(id="e", site=f"attn_out.{bench.middle}", at="all", value="zero"),
        text(),
        logprobs(TOKENS, "all"),
    ]
    long = Ask(ablate, [bench.prompts[0], bench.prompts[3]], greedy(STEPS))
    for asks in ((short, long), (long, short)):
        for ask, result in zip(asks, bench.together(*asks), strict=True):
            assert not isinstance(result, Exception)
            for i in range(len(ask.prompts)):
                run = _reference(bench, ask, i)
                assert result.outputs["text"].ids[i] == run.ids
                lp = result.outputs["lp"]
                mine = lp.logprobs[lp.tags.prompts == i]
                close(
                    "different lengths in one batch",
                    mine,
                    reference_logprobs(run.last.logits)[:, list(TOKENS)],
                )
    assert bench.engine.stats().most_requests >= 2


def test_sampling_is_the_prompts_own_whatever_the_batch(small: Bench) -> None:
    warm = Generation(max_new_tokens=8, temperature=1.5, top_p=0.9, seed=5, stop_at_eos=False)
    ask = Ask([text()], small.prompts, warm)
    alone = small.alone(ask).outputs["text"].ids
    assert small.alone(ask).outputs["text"].ids == alone
    mixed = small.together(
        Ask([text()], small.prompts[::-1], greedy(8)), ask, Ask([text()], small.prompts, greedy(3))
    )
    assert mixed[1].outputs["text"].ids == alone
    assert small.alone(Ask([text()], small.prompts, greedy(8))).outputs["text"].ids != alone
    assert (
        small.alone(Ask([text()], small.prompts, warm.model_copy(update={"seed": 6}))).outputs["text"].ids
        != alone
    )


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

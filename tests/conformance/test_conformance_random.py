"""Programs nobody thought of: several are written at random, one engine runs them together, the hooks each alone.

A program whose comparisons hang on a hair, or that lets rounding grow (float32 and float64 hooks already differ),
says nothing about an engine and is left out. That the writer reaches every op is a test of its own.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import reference_outputs as wanted
from bench_room import Ask, Bench, ok
from compare_room import against_hooks, answer_of, follow, row_by_row, same_answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_room import RANDOM
from programs_combine import program
from reference import Plain, Solo, logprobs, solo

from trocar.engine.protocol import TaskResult
from trocar.errors import ProgramError, TrocarError
from trocar.graph.spec import EDITS, SPEC

NEAR = 1e-4
GROWN = 1.5e-5
WRITTEN = 1e-3
DOUBLES: dict[str, Plain] = {}


def _legal(bench: Bench, ask: Ask) -> bool:
    """Whether the checker takes the program."""
    try:
        bench.task(ask)
    except ProgramError:
        return False
    return True


def _steady(bench: Bench, ask: Ask, runs: list[Solo]) -> bool:
    """Whether rounding leaves the program's numbers alone: margins, and float32 against float64."""
    if bench.name not in DOUBLES:
        DOUBLES[bench.name] = bench.plain.doubled()
    for i, run in enumerate(runs):
        exact = solo(
            DOUBLES[bench.name],
            ask.nodes,
            ask.prompts[i],
            ask.constants(i),
            marked=ask.marked[i],
            forced=run.ids if ask.generation.max_new_tokens else None,
        )
        gaps = [float((logprobs(run.last.logits) - logprobs(exact.last.logits)).abs().max())]
        for node in (n for n in ask.nodes if n.op == "score"):
            a, b = (wanted.scores(r, node, ask.probe(node.id)).data for r in (run, exact))
            gaps.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) if len(a) else 0.0)
        if min(run.near, exact.near) < NEAR or max(gaps) > GROWN:
            return False
    return True


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
@given(rng=st.randoms(use_true_random=False))
def test_random_programs_in_one_batch_equal_the_hooks(family: Bench, rng: Random) -> None:
    asks = [ask for ask in (program(family, rng) for _ in range(4)) if _legal(family, ask)]
    for ask, found in zip(asks, family.together(*asks), strict=True):
        result = ok(found)
        runs = follow(family, ask, result)
        if _steady(family, ask, runs):
            against_hooks(family, ask, result, "random programs", runs)


def _answered(ask: Ask, found: TaskResult | TrocarError) -> dict[str, Any]:
    """The answer, or its refusal: a window may leave a query nothing when its edges are cut."""
    if isinstance(found, TrocarError):
        return {"code": found.code, "path": found.path}
    return answer_of(ask, found)


TIGHT = {"step_tokens": 64, "kv_tokens": 256, "sequences": 8}


@pytest.mark.parametrize("model", RANDOM)
def test_random_programs_do_not_feel_the_scheduler(limited: Any, model: str) -> None:
    """Alone in a roomy engine, and chunked, preempted, cached and mixed in a tight one: the same answers."""
    roomy, tight = limited(model, prefix_cache=False), limited(model, **TIGHT)
    exact = 0
    for turn in range(10):
        asks = [ask for i in range(6) if _legal(roomy, ask := program(roomy, Random(100 * turn + i), 63))]
        known = [_answered(ask, roomy.together(ask)[0]) for ask in asks]
        for ask, found, answer in zip(asks, tight.together(*asks), known, strict=True):
            same_answer("scheduler", _answered(ask, found), answer, exact=row_by_row(ask))
            exact += row_by_row(ask)
    stats = tight.engine.stats()
    assert exact > 8
    assert min(stats.chunks, stats.preemptions, stats.prefix_hit_tokens) > 0, stats


def test_the_writer_reaches_every_op(small: Bench) -> None:
    """Without an engine: what is written is mostly legal and steady, has every op, and edits that change something."""
    seen: Counter[str] = Counter()
    for number in range(150):
        ask = program(small, Random(number))
        seen["written"] += 1
        if not _legal(small, ask):
            continue
        seen["legal"] += 1
        runs = [small.reference(ask, i) for i in range(len(ask.prompts))]
        if _steady(small, ask, runs):
            seen["steady"] += 1
            seen.update({n.op for n in ask.nodes})
            seen.update(_effects(ask, runs))
    assert seen["legal"] > 0.95 * seen["written"]
    assert seen["steady"] > 0.9 * seen["legal"]
    assert {op for op in SPEC if not seen[op]} == set()
    idle = {op: (seen[f"wrote {op}"], seen[f"left {op}"]) for op in EDITS}
    assert [op for op, (wrote, left) in idle.items() if wrote <= left] == [], sorted(idle.items())


def _effects(ask: Ask, runs: list[Solo]) -> list[str]:
    """Which edits wrote something else than what was there."""
    out = []
    for node in (n for n in ask.nodes if n.op in EDITS):
        changes = [p.effects[node.id].change for r in runs for p in (r.first, r.last) if node.id in p.effects]
        out.append(f"{'wrote' if max(changes, default=0.0) > WRITTEN else 'left'} {node.op}")
    return out

"""Sweeps: variants of one program share the layers below the one where they part, and each is as if alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from bench_room import Ask, Bench, capture, greedy, logprobs, ok, read, text
from compare_room import against_hooks, answer_of, row_by_row, same_answer
from models_room import RANDOM
from programs_combine import program

from trocar.engine.protocol import Task
from trocar.errors import ProgramError
from trocar.graph import ops
from trocar.graph.sweep import fork_layer

TOKENS = (1, 17, 42, 99)
V = ops.Tensor(id="v", name="v")
_families = itertools.count()


def _variants(ask: Ask, name: str, field: str, values: Sequence[Any]) -> list[Ask]:
    """The request once per value of one field of one node."""
    return [
        replace(
            ask, nodes=[n.model_copy(update={field: v}) if n.id == name else n for n in ask.nodes], sinks={}
        )
        for v in values
    ]


def _tasks(bench: Bench, asks: Sequence[Ask], family: str) -> list[Task]:
    """The variants as tasks of one family."""
    tasks = [bench.task(ask) for ask in asks]
    fork = fork_layer([t.checked.program for t in tasks], bench.layers)
    return [replace(t, family=family, fork=fork) for t in tasks]


def _swept(bench: Bench, asks: Sequence[Ask]) -> list[dict[str, Any]]:
    """Answers of the variants as one family."""
    futures = bench.submitted(_tasks(bench, asks, f"family-{next(_families)}"))
    return [answer_of(ask, f.result(60)) for ask, f in zip(asks, futures, strict=True)]


def _each_alone(bench: Bench, asks: Sequence[Ask], swept: Sequence[dict[str, Any]], name: str) -> None:
    for ask, answer in zip(asks, swept, strict=True):
        same_answer(name, answer, answer_of(ask, bench.alone(ask)), exact=row_by_row(ask))


def test_a_sweep_of_a_dose_is_each_dose_alone(bench: Bench) -> None:
    """Four doses at a middle layer: the layers below are computed once, every answer is the one of a run alone."""
    site = f"resid_post.{bench.middle}"
    nodes = [
        V,
        read(f"resid_post.{bench.middle - 1}", name="below"),
        ops.EditAdd(id="e", site=site, at="all", value="v"),
        read(site, "all"),
        capture("r"),
        capture("below", name="shared"),
        logprobs(TOKENS, "all"),
        text(),
    ]
    ask = Ask(nodes, bench.prompts, greedy(4), vectors={"v": bench.pushing(site)})
    asks = _variants(ask, "e", "coef", (0.0, 0.5, -1.0, 3.0))
    before = bench.engine.stats().shared_rows
    swept = _swept(bench, asks)
    assert bench.engine.stats().shared_rows - before == 3 * sum(map(len, bench.prompts))
    _each_alone(bench, asks, swept, "doses")
    against_hooks(bench, asks[3], bench.alone(asks[3]), "a dose")
    assert not (swept[0]["lp.logprobs"] == swept[3]["lp.logprobs"]).all()


def test_a_sweep_over_layers_is_each_layer_alone(bench: Bench) -> None:
    layers = sorted({1, bench.middle, bench.layers - 1})
    edit = ops.EditSet(id="e", site="attn_out.1", at="prompt[*]", value="zero")
    ask = Ask(
        [edit, logprobs(TOKENS), ops.Metric(id="m", metric="cross_entropy", at="prompt[:-1]")], bench.prompts
    )
    asks = _variants(ask, "e", "site", [f"attn_out.{i}" for i in layers])
    _each_alone(bench, asks, _swept(bench, asks), "layers")


def test_receipts_of_shared_edits_are_each_variants_own(small: Bench) -> None:
    """An edit below the layer where variants part is made once and stands on every receipt."""
    shared = ops.EditScale(id="s", site="resid_post.0", at="prompt[*]", by=1.5)
    own = ops.EditScale(id="e", site="resid_post.2", at="prompt[*]", by=1.0)
    asks = _variants(Ask([shared, own, logprobs(TOKENS)], small.prompts), "e", "by", (1.0, 2.0, 3.0))
    rows = sum(map(len, small.prompts))
    for answer in _swept(small, asks):
        assert answer["edits"] == [("s", rows), ("e", rows)]


SWEPT = {ops.EditAdd: ("coef", (1.0, -0.5, 2.0)), ops.EditScale: ("by", (-1.0, 0.5, 2.0))}


@pytest.mark.parametrize("model", RANDOM)
def test_random_sweeps_in_company(limited: Any, model: str) -> None:
    """Two random sweeps and a stranger at once, in steps too small for all of them."""
    bench, crowded = limited(model, prefix_cache=False), limited(model, step_tokens=48, sequences=12)
    done = 0
    for turn in range(40):
        asks = [a for i in range(6) if (a := program(bench, Random(1000 * turn + i))) and _legal(bench, a)]
        swept = [(a, n) for a in asks for n in a.nodes if type(n) in SWEPT][:2]
        if len({id(a) for a, _ in swept}) < 2:
            continue
        families = [_variants(a, n.id, *SWEPT[type(n)]) for a, n in swept]
        stranger = replace(asks[-1], sinks={})
        crowd = [ask for family in families for ask in family]
        tasks = [t for i, f in enumerate(families) for t in _tasks(crowded, f, f"f{turn}-{i}")]
        futures = crowded.submitted([*tasks, crowded.task(stranger)])
        for ask, future in zip([*crowd, stranger], futures, strict=True):
            answer = answer_of(ask, future.result(60))
            same_answer(
                "random sweeps", answer, answer_of(ask, ok(bench.together(ask)[0])), exact=row_by_row(ask)
            )
        done += 1
        if done == 6:
            break
    assert done >= 4
    assert crowded.engine.stats().shared_rows > 0


def _legal(bench: Bench, ask: Ask) -> bool:
    try:
        bench.task(ask)
    except ProgramError:
        return False
    return True

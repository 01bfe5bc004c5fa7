"""Variants of a sweep share the layers below the one where they part, and nothing else, not even a doubt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trocar.engine.hf.engine import HFEngine, Limits
from trocar.engine.protocol import Task, TaskResult
from trocar.errors import TrocarError
from trocar.graph import check, ops
from trocar.graph.cost import Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope

TOKENS = (tuple(range(10, 22)), tuple(range(40, 47)))
V = ops.Tensor(id="v", name="v")
LP = ops.Logprobs(id="lp", at="all", tokens=(1, 17, 42))


class Keep:
    def __init__(self) -> None:
        self.parts: list[Any] = []

    def append(self, vectors: Any, tags: Any) -> None:
        self.parts.append({k: v.copy() for k, v in vectors.items()})


@pytest.fixture
def engine(tiny: Any) -> Iterator[HFEngine]:
    made = HFEngine(tiny, Limits(prefix_cache=False))
    yield made
    assert made.check() == []
    made.close()


def task(engine: HFEngine, name: str, coef: float, most: int = 0, early: float = 1.0) -> Task:
    nodes = (
        V,
        ops.EditAdd(id="early", site="resid_mid.0", at="prompt[2:]", value="v", coef=early),
        ops.Read(id="h", site="resid_post.0", at="prompt[*]"),
        ops.Capture(id="kept", of=("h",)),
        ops.EditKnockout(id="cut", site="attn_probs.1", at="prompt[3:]", keys="prompt[0]"),
        ops.EditAdd(id="late", site="resid_post.2", at="all", value="v", coef=coef),
        LP,
        *((ops.Text(id="text"),) if most else ()),
    )
    generation = Generation(max_new_tokens=most, stop_at_eos=False)
    width = engine.facts.d_model
    scope = Scope(engine.facts, tuple(map(len, TOKENS)), generation, {"v": (width,)}, {}, lambda _: ())
    checked = check.check(Program(nodes=nodes), scope, Prices(32, 256))
    vector = np.linspace(-1, 1, width, dtype=np.float32)
    return Task(name, checked, TOKENS, {"v": vector}, {}, {}, {"kept": Keep()}, lambda _: None)


def together(engine: HFEngine, tasks: list[Task]) -> list[TaskResult | TrocarError]:
    with engine._wake:
        futures = [engine.submit(t) for t in tasks]
    return [f.exception(20) or f.result() for f in futures]  # type: ignore[misc]


@pytest.mark.parametrize("most", [0, 4])
def test_sharing_changes_nothing_but_the_work(engine: HFEngine, most: int) -> None:
    coefs = (0.0, 1.0, -2.0)
    alone = [engine.submit(task(engine, f"a{c}", c, most)).result(20) for c in coefs]
    shared = [replace(task(engine, f"s{c}", c, most), family="f", fork=2) for c in coefs]
    results = together(engine, shared)
    assert engine.stats().shared_rows == 2 * sum(map(len, TOKENS))
    for one, found, sent in zip(alone, results, shared, strict=True):
        assert isinstance(found, TaskResult)
        assert np.array_equal(found.outputs["lp"].logprobs, one.outputs["lp"].logprobs)
        assert [(e.id, e.rows) for e in found.edits] == [(e.id, e.rows) for e in one.edits]
        assert [e.norm_after for e in found.edits] == pytest.approx(
            [e.norm_after for e in one.edits], rel=1e-6
        )
        assert sum(len(p["resid_post.0"]) for p in sent.sinks["kept"].parts) == sum(map(len, TOKENS))
        if most:
            assert found.outputs["text"] == one.outputs["text"]
    texts = {str(r.outputs["lp"].logprobs) for r in results}
    assert len(texts) == 3, "the variants are the same"


def test_a_shared_edit_that_fails_fails_every_variant(engine: HFEngine) -> None:
    sent = [replace(task(engine, f"s{c}", c, early=1e6), family="f", fork=2) for c in (0.0, 1.0)]
    for one in sent:
        one.vectors["v"][:] = 1e6  # type: ignore[index]
    results = together(engine, sent)
    assert [r.code for r in results] == ["edit_not_finite"] * 2


def test_an_edit_of_its_own_that_fails_fails_one(engine: HFEngine) -> None:
    sent = [replace(task(engine, f"s{c}", c), family="f", fork=2) for c in (1e6, 1.0)]
    for one in sent:
        one.vectors["v"][:] = 1e3  # type: ignore[index]
    first, second = together(engine, sent)
    assert isinstance(first, TrocarError)
    assert isinstance(second, TaskResult)

"""What ends a step: next tokens for everybody at once, and receipts for every edit at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trocar.engine.edits import settle
from trocar.engine.hf.sequences import Live, Sequence
from trocar.engine.hf.step import _sampling
from trocar.engine.layout import Layout
from trocar.engine.protocol import Task
from trocar.engine.values import Step
from trocar.graph import check, ops
from trocar.graph.cost import Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope

EDITS = (
    ops.EditScale(id="e", site="resid_post.0", at="all", by=2.0),
    ops.EditScale(id="f", site="resid_post.1", at="all", by=2.0),
    ops.Text(id="text"),
)


def live(tiny: Any, name: str, nodes: Any = EDITS, **generation: Any) -> Live:
    settings = Generation(max_new_tokens=3, stop_at_eos=False, **generation)
    scope = Scope(tiny.facts, (3,), settings, {}, {}, lambda _: ())
    checked = check.check(Program(nodes=nodes), scope, Prices(32, 256))
    return Live.of(Task(name, checked, ((1, 2, 3),), {}, {}, {}, {}, lambda _: None), 1e9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_overflow_is_its_owners_and_everybody_else_goes_on(tiny: Any, bad: float) -> None:
    waiting = [live(tiny, str(i)) for i in range(4)]
    hot = live(tiny, "hot", temperature=1.0, seed=7)
    sequences: list[Sequence] = [x.waiting[0] for x in [*waiting, hot]]
    logits_NV = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    logits_NV[1, 30] = bad
    logits_NV[2] = -torch.inf
    logits_NV[3, [4, 9]] = 50.0
    then = _sampling(sequences, frozenset())
    then(slice(0, 2), logits_NV[:2])
    then(slice(2, 5), logits_NV[2:])
    failed = [s.live.run.failed for s in sequences]
    assert [f and f.code for f in failed] == [None, "result_not_finite", "result_not_finite", None, None]
    assert sequences[0].tokens[3:] == [int(logits_NV[0].argmax())]
    assert sequences[3].tokens[3:] == [4]  # of equal ones the first
    again = live(tiny, "hot", temperature=1.0, seed=7).waiting[0].sampler
    assert sequences[4].tokens[3:] == [again.choose(logits_NV[4])]


def test_receipts_of_a_pass_are_the_sums_of_its_edits(tiny: Any) -> None:
    steps = [Step(live(tiny, str(i)).run, Layout(()), True) for i in range(3)]
    stream = np.random.default_rng(0)
    want: dict[tuple[int, str], np.ndarray] = {}
    for number, name, rows in [(0, "e", 4), (0, "f", 0), (1, "e", 1), (1, "f", 9), (0, "e", 2)]:
        pair = stream.random((2, rows)).astype(np.float32)
        steps[number].pending.append((name, torch.from_numpy(pair[0]), torch.from_numpy(pair[1])))
        want[number, name] = np.concatenate([want.get((number, name), np.zeros((2, 0))), pair], axis=1)
    settle(steps)
    for (number, name), pair in want.items():
        tally = steps[number].run.tallies[name]
        assert tally.rows == pair.shape[1]
        assert [tally.before, tally.after] == pytest.approx(pair.sum(1).tolist(), rel=1e-12)
        if tally.rows:
            assert steps[number].effects[name] == (tally.rows, tally.before, tally.after)
    assert steps[2].effects == {}
    settle(steps[2:])
    assert steps[2].run.tallies["e"].rows == 0

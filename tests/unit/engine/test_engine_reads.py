"""Reads of a pass: one copy per wave, and bundles of layers that are copied once for everybody."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trocar.engine.layout import Layout, Member
from trocar.engine.protocol import Task
from trocar.engine.runs import Run
from trocar.engine.values import Step
from trocar.engine.visits import Plans
from trocar.graph import check, ops
from trocar.graph.cost import Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope


def read(layer: int, at: str = "all", **more: Any) -> ops.Read:
    return ops.Read(id=f"h{layer}", site=f"resid_post.{layer}", at=at, **more)


def capture(*layers: int) -> ops.Capture:
    return ops.Capture(id="c", of=tuple(f"h{i}" for i in layers))


def step_of(tiny: Any, start: int, *nodes: Any) -> Step:
    """A task with one prompt of three tokens, whose rows begin at `start`."""
    scope = Scope(tiny.facts, (3,), Generation(), {}, {}, lambda _: ())
    checked = check.check(Program(nodes=nodes), scope, Prices(32, 256))
    task = Task(f"t{start}", checked, ((1, 2, 3),), {}, {}, {}, {}, lambda _: None)
    return Step(Run(task), Layout((Member(0, 0, 3, 0, (1, 2, 3), (start,)),)), True)


def passed(plans: Plans, steps: list[Step], seed: int) -> dict[str, torch.Tensor]:
    """A pass over random rows; what stood at each site."""
    made = {}
    for site, visit in plans.visitors(steps, (0,), lambda _: 0).items():
        made[str(site)] = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(seed + site.layer))
        assert visit(made[str(site)]) is None
    return made


@pytest.mark.parametrize("passes", [1, 3])
def test_a_bundle_is_the_reads_of_its_owner(tiny: Any, passes: int) -> None:
    """In the first pass nobody knew that there would be bundles, later rows are copied to their place at once."""
    steps = [
        step_of(tiny, 0, read(0), read(1), capture(0, 1)),
        step_of(tiny, 3, read(1), read(0), capture(1, 0)),
        step_of(tiny, 6, read(0), read(1), capture(0)),
    ]
    plans = Plans()
    for seed in range(passes):
        made = passed(plans, steps, 100 * seed)
        for number, (step, names) in enumerate(
            zip(steps, [("h0", "h1"), ("h1", "h0"), ("h0",)], strict=True)
        ):
            bundle = step.bundle(names)
            assert bundle is not None
            here = slice(3 * number, 3 * number + 3)
            want = [made[f"resid_post.{n[1:]}"][0, here] for n in names]
            assert torch.equal(bundle, torch.stack(want))
            assert all(torch.equal(step.rows(n), w) for n, w in zip(names, want, strict=True))


def test_what_does_not_lie_side_by_side_is_no_bundle(tiny: Any) -> None:
    rows = step_of(tiny, 0, read(0), read(1, "prompt[0]"), ops.Capture(id="c", of=("h0",)))
    wide = step_of(tiny, 3, read(0), ops.Read(id="n", site="mlp_act.1", at="all"), capture(0))
    plans = Plans()
    for _ in range(2):
        list(
            visit(torch.zeros(1, 9, 64)) for visit in plans.visitors([rows, wide], (0,), lambda _: 0).values()
        )
        assert rows.bundle(("h0", "h1")) is None
        assert wide.bundle(("h0", "n")) is None
        assert wide.bundle(("h0", "nobody")) is None
        assert wide.bundle(("h0",)) is not None


def test_before_a_pass_nothing_is_read(tiny: Any) -> None:
    step = step_of(tiny, 0, read(0), capture(0))
    assert step.bundle(("h0",)) is None
    Plans().visitors([step], (0,), lambda _: 0)
    assert step.bundle(("h0",)) is None

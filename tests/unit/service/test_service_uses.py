"""What a request touches, by the place in the request where it says so; and what it exposes of secret weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trocar.gate.gate import Gate
from trocar.gate.handles import ACTIVATIONS, Handle, Handles
from trocar.graph import ops
from trocar.graph.cost import Prices
from trocar.graph.labels import Rules
from trocar.graph.program import Program
from trocar.graph.sweep import Axis
from trocar.service import uses
from trocar.service.prepare import prepare
from trocar.service.sessions import prepare_session
from trocar.sites import parse
from trocar.wire.requests import RunRequest, SessionRequest

PRICES = Prices(scalar_bits=8, overhead_bits=256)
V = np.linspace(-1, 1, 32, dtype=np.float32)
STORED = "act_" + "a" * 32


@pytest.fixture
def handles(tmp_path: Path, tiny: Any) -> Iterator[Handles]:
    gate = Gate(f"sqlite:///{tmp_path / 'ledger.db'}")
    shapes = {"resid_post.1": {"rows": (32,)}, "resid_post.2": {"rows": (32,)}}
    made = Handle(STORED, "lab", ACTIVATIONS, "tiny", tiny.facts.fingerprint, shapes, counts=(1, 1))
    with gate.handles._database.write() as connection:
        gate.handles.enter(connection, [made], ("key",))
    yield gate.handles
    gate.close()


@pytest.fixture
def use(tiny: Any, handles: Handles) -> Callable[..., Any]:
    """The use of a program on the tiny model, as if its weights were a secret unless it is said that they are open."""

    def of(
        *nodes: Any, sweep: Any = (), open_weights: bool = False, prompts: Any = ("abc", "ab"), **vectors: Any
    ) -> Any:
        facts = tiny.facts.model_copy(update={"open_weights": open_weights})
        request = RunRequest(model="tiny", prompts=prompts, program=Program(nodes=nodes), sweep=sweep)
        model: Any = SimpleNamespace(facts=facts, text=tiny.text)
        return uses.of_run(prepare(request, vectors, model, handles, "lab", PRICES), facts)

    return of


ALIAS = "blocks.3.hook_resid_post"
READ = ops.Read(id="r", site=ALIAS, at="prompt[-1]")
LENS = ops.Lens(id="l", of=("r",))
SCORED = (
    ops.Tensor(id="v", name="v"),
    ops.Read(id="r", site="resid_post.2", at="prompt[-1]"),
    ops.Dot(id="d", a="r", b="v"),
    ops.Score(id="s", of="d"),
)


def test_ops_and_sites_by_their_place_and_written_out(use: Any) -> None:
    kept = ops.Stored(id="k", handle=STORED, site="resid_post.1")
    write = ops.EditSet(id="e", site="resid_post.1", at="prompt[-1]", value="k")
    found = use(kept, write, READ, LENS)
    assert found.ops == {
        "program.nodes[0].op": "stored",
        "program.nodes[1].op": "edit.set",
        "program.nodes[2].op": "read",
        "program.nodes[3].op": "lens",
    }
    assert found.sites == {
        "program.nodes[0].site": "resid_post.1",
        "program.nodes[1].site": "resid_post.1",
        "program.nodes[2].site": "resid_post.3",
    }


@pytest.mark.parametrize(("field", "values"), [("site", ("resid_post.0", ALIAS)), ("layer", (0, 3))])
def test_a_sweep_touches_every_site_where_its_axis_says_so(use: Any, field: Any, values: Any) -> None:
    coef = Axis(node="e", field="by", values=(0.5, 2.0))
    scale = ops.EditScale(id="e", site="resid_post.1", at="all", by=1.0)
    logprobs = ops.Logprobs(id="lp", tokens=(1,))
    found = use(scale, READ, LENS, logprobs, sweep=(coef, Axis(node="e", field=field, values=values)))
    assert found.sites == {
        "sweep[1].values[0]": "resid_post.0",
        "sweep[1].values[1]": "resid_post.3",
        "program.nodes[1].site": "resid_post.3",
    }
    assert found.ops["program.nodes[0].op"] == "edit.scale"


def test_a_session_touches_what_its_steps_touch(tiny: Any, handles: Handles) -> None:
    def step(*nodes: Any, sweep: Any = ()) -> RunRequest:
        return RunRequest(model="tiny", prompts=("abc",), program=Program(nodes=nodes), sweep=sweep)

    capture = ops.Capture(id="kept", of=("r",))
    back = ops.Stored(id="k", handle="step0.kept", site="resid_post.3")
    write = ops.EditSet(id="e", site="resid_post.3", at="prompt[-1]", value="k")
    asked = SessionRequest(steps=(step(READ, capture), step(back, write, ops.Logprobs(id="lp", tokens=(1,)))))
    model: Any = SimpleNamespace(facts=tiny.facts, text=tiny.text)
    steps = prepare_session(asked, {}, model, handles, "lab", PRICES)
    found = uses.of_session(steps, tiny.facts)
    assert found.ops["steps[0].program.nodes[1].op"] == "capture"
    assert found.ops["steps[1].program.nodes[1].op"] == "edit.set"
    assert len(found.ops) == 5
    assert found.sites == {
        "steps[0].program.nodes[0].site": "resid_post.3",
        "steps[1].program.nodes[0].site": "resid_post.3",
        "steps[1].program.nodes[1].site": "resid_post.3",
    }
    swept = SessionRequest(
        steps=(step(READ, LENS), step(READ, LENS, sweep=(Axis(node="r", field="layer", values=(1,)),)))
    )
    steps = prepare_session(swept, {}, model, handles, "lab", PRICES)
    assert uses.of_session(steps, tiny.facts).sites["steps[1].sweep[0].values[0]"] == "resid_post.1"


def test_a_fit_touches_every_site_of_its_handles() -> None:
    found = uses.of_fit(("resid_post.1", "z.2"))
    assert found.ops == {"kind": "fit"}
    assert found.sites == {"handle[0]": "resid_post.1", "handle[1]": "z.2"}
    assert uses.of_fit(("z.2",), "attn_out.2").sites == {"handle[0]": "z.2", "target_site": "attn_out.2"}


def test_the_same_numbers_are_one_direction_whatever_they_are_called(use: Any) -> None:
    [first] = use(*SCORED, v=V).directions
    assert (first.site, first.rank) == ("resid_post.2", 1)
    renamed = (
        ops.Tensor(id="w", name="other"),
        SCORED[1],
        ops.Dot(id="x", a="r", b="w"),
        ops.Score(id="t", of="x"),
    )
    assert use(*renamed, other=V).directions == (first,)
    assert use(*SCORED, v=V, prompts=("zz",)).directions == (first,)
    for other in (use(*SCORED, v=V + 1), use(*SCORED, v=V[::-1].copy())):
        assert other.directions != (first,)
    assert use(*SCORED, v=V, open_weights=True).directions == ()


def test_arrays_of_other_shapes_and_uses_have_other_digests() -> None:
    assert uses._digest({"": "a"}, {"a": V}) != uses._digest({"": "a"}, {"a": V.reshape(4, 8)})
    assert uses._digest({"x": "a"}, {"a": V}) != uses._digest({"y": "a"}, {"a": V})


def test_each_variant_of_a_sweep_exposes_its_own_site(use: Any) -> None:
    found = use(*SCORED, v=V, sweep=(Axis(node="r", field="layer", values=(0, 2)),))
    assert sorted(d.site for d in found.directions) == ["resid_post.0", "resid_post.2"]


def test_rows_that_leave_as_they_are(tiny: Any, handles: Handles) -> None:
    facts = tiny.facts.model_copy(update={"open_weights": False})
    raw = ops.Raw(id="raw", of=("r",))
    first = ops.Read(id="r", site="resid_post.2", at="prompt[0:2]")
    model: Any = SimpleNamespace(facts=facts, text=tiny.text)
    direct = Prices(8, 256, 8, Rules("direct"))
    request = RunRequest(model="tiny", prompts=("abc", "ab"), program=Program(nodes=(first, raw)))
    found = uses.of_run(prepare(request, {}, model, handles, "lab", direct), facts)
    assert found.exported == ((parse("resid_post.2"), True),)
    [direction] = found.directions
    assert (direction.site, direction.rank) == ("resid_post.2", 4)

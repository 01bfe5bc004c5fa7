"""Sweeps in the SDK: what is written down, and the grid that comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trocar
from trocar import errors
from trocar.client.sweeps import Sweep, Variant
from trocar.client.trace import Trace
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Generation

FACTS = ModelFacts(
    name="paper", fingerprint="f", lineage="paper", family="llama", dtype="float32", n_layers=4, d_model=8, d_mlp=16,
    n_heads=2, n_kv_heads=1, d_head=4, vocab_size=300, context=64, parameters=1, weight_bits=1, open_weights=True,
    sites=("resid_post", "z", "final_norm"), unavailable={}, eos=(0,),
)  # fmt: skip
V, W = np.ones(8, np.float32), np.zeros(8, np.float32)


class Nobody:
    def plan(self, recorded: Any) -> None: ...

    def run(self, recorded: Any) -> None: ...


@pytest.fixture
def t() -> Trace[None, None]:
    made = Trace(Nobody(), FACTS, ["a b", "c d"], Generation())
    made.save("lp", made.logprobs([1]))
    return made


def axes(t: Trace[None, None]) -> list[tuple[str, str, tuple[Any, ...]]]:
    return [(a.node, a.field, a.values) for a in t.recorded.request.sweep]


def test_an_edit_is_recorded_and_swept(t: Trace[None, None]) -> None:
    t.sweep(trocar.edit.add("resid_post.1", V), coef=np.array([0.0, 2.0]), layer=range(-2, 0))
    edit = t.recorded.request.program.nodes[-1]
    assert edit.op == "edit.add"
    assert axes(t) == [(edit.id, "coef", (0.0, 2.0)), (edit.id, "layer", (2, 3))]


def test_positions_are_spelt(t: Trace[None, None]) -> None:
    t.sweep(trocar.edit.scale("resid_post.1", 0.5), at=[-1, slice(0, 2), 'span("a")'])
    assert axes(t)[0][2] == ("prompt[-1]", "prompt[0:2]", 'span("a")')


def test_values_are_carried(t: Trace[None, None]) -> None:
    t.sweep(trocar.edit.add("resid_post.1", V), value=[V, W, t.vector(W) * 2.0])
    recorded = t.recorded
    (axis,) = recorded.request.sweep
    nodes = {n.id: n for n in recorded.request.program.nodes}
    assert [nodes[ref].op for ref in axis.values] == ["tensor", "tensor", "scale"]
    order = list(nodes)
    assert max(map(order.index, axis.values)) < order.index(axis.node)
    assert len(recorded.vectors) == 4


def test_expressions_and_outputs_are_swept(t: Trace[None, None]) -> None:
    rows = t.resid_post[1][-1]
    t.save("top", t.lens(rows))
    t.sweep(rows, layer=[0, 1])
    t.sweep("lp", at=["prompt[0]", "prompt[-1]"])
    assert axes(t) == [(rows.id, "layer", (0, 1)), ("lp", "at", ("prompt[0]", "prompt[-1]"))]


@pytest.mark.parametrize(
    ("target", "values", "path", "names"),
    [
        (trocar.edit.add("resid_post.*", V), {"coef": [1]}, "target", "'resid_post.*' is 4 edits"),
        (trocar.edit.add("resid_post.1", V), {"coeff": [1]}, "coeff", "a sweep has no 'coeff'"),
        (trocar.edit.add("resid_post.1", V), {"coef": 1.0}, "coef", "1.0 is not a list of values"),
        (trocar.edit.add("resid_post.1", V), {"at": "all"}, "at", "'all' is not a list of values"),
        (trocar.edit.add("resid_post.1", V), {}, "sweep", "no values to sweep over"),
        (3, {"coef": [1]}, "target", "3 is not an edit"),
    ],
)
def test_what_is_no_sweep(t: Trace[None, None], target: Any, values: Any, path: str, names: str) -> None:
    with pytest.raises(errors.ClientError) as caught:
        t.sweep(target, **values)
    assert (caught.value.code, caught.value.path) == ("bad_argument", path)
    assert names in caught.value.reason


def test_a_layer_that_the_model_does_not_have(t: Trace[None, None]) -> None:
    with pytest.raises(errors.ProgramError, match="layer_out_of_range"):
        t.sweep(trocar.edit.add("resid_post.1", V), layer=[1, 4])


def test_a_mask_is_carried(t: Trace[None, None]) -> None:
    at = t.mask('the "subject"', np.array([[True, False], [False, True]]))
    assert at == 'mask("the \\"subject\\"")'
    assert t.recorded.request.masks == {'the "subject"': ((True, False), (False, True))}


# ---- results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(server: Any) -> Iterator[trocar.Model]:
    with trocar.Client("http://server", server.keys["alice"], transport=server.transport()) as client:
        yield client.model("tiny")


def steer(model: trocar.Model, **values: Any) -> Any:
    with model.trace(["abc", "hello"]) as t:
        t.sweep(trocar.edit.add("resid_post.1", np.linspace(-2, 2, 32)), **values)
        t.save("lp", t.logprobs([1, 2]))
        t.save("diff", t.logit_diff(1, 2))
    return t


def test_the_grid_of_a_sweep(model: trocar.Model) -> None:
    t = steer(model, coef=[0, 1.5, -3.0], layer=[1, 2])
    plan = t.plan()
    assert plan.view.variants == 6
    assert ["variants", "6"] in [line.split() for line in repr(plan).splitlines()]
    results = t.run().result()
    sweep = results.sweep
    assert (len(sweep), sweep.shape) == (6, (3, 2))
    assert sweep.axes == {"coef": (0, 1.5, -3.0), "layer": (1, 2)}
    assert sweep.grid("lp").shape == (3, 2, 2, 2)
    assert sweep.grid("diff").shape == (3, 2, 2)
    variant = sweep.at(coef=1.5, layer=2)
    assert variant is sweep[3]
    assert variant["lp"].values.tolist() == sweep.grid("lp")[1, 1].tolist()
    assert [e.site for e in variant.edits] == ["resid_post.2"]
    assert np.abs(sweep.grid("diff")[0] - sweep.grid("diff")[1]).max() > 0.01
    assert np.allclose(sweep.grid("diff")[0, 0], sweep.grid("diff")[0, 1], atol=1e-3)
    with pytest.raises(KeyError, match="this is a sweep"):
        results["lp"]


def test_the_table_of_a_sweep(model: trocar.Model) -> None:
    results = steer(model, coef=[0.0, 2.0]).run().result()
    lines = repr(results).splitlines()
    assert lines[1].startswith("Sweep of 2 variants")
    assert lines[2].split() == ["coef", "lp", "diff"]
    assert [line.split()[0] for line in lines[3:]] == ["0.0", "2.0"]
    assert "<td" in results._repr_html_()
    assert "2.0" in results._repr_html_()


@pytest.mark.parametrize(
    ("settings", "path", "names"),
    [
        ({}, "coef", "one value of each axis: coef"),
        ({"coef": 1.0}, "coef", "1.0 is not one of"),
        ({"coef": 0.0, "layer": 1}, "layer", "one value of each axis"),
    ],
)
def test_a_variant_that_is_not_there(model: trocar.Model, settings: Any, path: str, names: str) -> None:
    sweep = steer(model, coef=[0.0, 2.0]).run().result().sweep
    with pytest.raises(errors.ClientError) as caught:
        sweep.at(**settings)
    assert (caught.value.code, caught.value.path) == ("bad_argument", path)
    assert names in caught.value.reason


def test_axes_of_one_field_keep_their_nodes() -> None:
    variants = tuple(Variant({"a.coef": x, "b.coef": y}, {}, ()) for x in (1, 2) for y in (3, 4))
    sweep = Sweep(variants)
    assert sweep.axes == {"a.coef": (1, 2), "b.coef": (3, 4)}
    assert sweep.at(**{"a.coef": 2, "b.coef": 3}) is variants[2]


def test_texts_and_captures_of_a_sweep(model: trocar.Model) -> None:
    with model.trace("abc", max_new_tokens=3, stop_at_eos=False) as t:
        t.sweep(trocar.edit.scale("resid_post.1", 1.0), by=[1.0, 0.0])
        t.save("text", t.text())
        t.save("kept", t.capture(t.resid_post[1][-1]))
    sweep = t.run().result().sweep
    assert [len(v["text"][0].ids) for v in sweep] == [3, 3]
    assert sweep[1]["text"][0].receipt.edits[0].norm_after == 0.0
    assert isinstance(sweep[0]["kept"], trocar.Activations)
    assert "Sweep of 2 variants" in repr(sweep)
    with pytest.raises(errors.ClientError, match="no output with numbers"):
        sweep.grid("text")


def test_without_a_sweep_there_are_no_variants(model: trocar.Model) -> None:
    with model.trace("abc") as t:
        t.save("lp", t.logprobs([1]))
    sweep = t.run().result().sweep
    assert (len(sweep), sweep.axes, repr(sweep)) == (0, {}, "Sweep without variants")
    with pytest.raises(errors.ClientError):
        sweep.grid("lp")


def test_shapes_that_differ_make_no_grid(model: trocar.Model) -> None:
    with model.trace("abc") as t:
        t.save("lp", t.logprobs([1]))
        t.sweep("lp", at=["prompt[0]", "prompt[*]"])
    with pytest.raises(errors.ClientError, match="another shape in each variant"):
        t.run().result().sweep.grid("lp")


def test_a_mask_selects(model: trocar.Model) -> None:
    with model.trace(["abc", "hello"]) as t:
        at = t.mask("m", [[True, False, True], [False] * 4 + [True]])
        t.save("lp", t.logprobs([1], at=at))
    found = t.run().result()["lp"]
    assert (found.prompts.tolist(), found.positions.tolist()) == ([0, 0, 1], [0, 2, 4])

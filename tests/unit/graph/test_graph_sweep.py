"""Sweeps: which variants there are, what they share, what they cost, and why one is refused."""

from __future__ import annotations

from typing import Any

import pytest
from graph_room import LOGPROBS, PRICES, Case, node, program, read
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar import errors, strict
from trocar.graph import check, sweep
from trocar.graph.sweep import Axis

CASE = Case()
V = node("tensor", "v", name="v")
W = node("tensor", "w", name="v")
STEER = node("edit.add", "steer", site="resid_post.1", at="all", value="v", coef=2.0)
PROGRAM = (V, W, STEER, LOGPROBS)


SCALED = (V, node("scale", "s", of="v", by=1.0), {**STEER, "value": "s", "site": "resid_post.2"}, LOGPROBS)


def axis(name: str, field: str, *values: Any) -> Axis:
    return strict.make(Axis, node=name, field=field, values=values)


def variants(*axes: Axis, nodes: Any = PROGRAM, case: Case = CASE) -> tuple[sweep.Variant, ...]:
    return sweep.variants(program(*nodes), axes, case.scope(), PRICES)


def refusals(*axes: Axis, nodes: Any = PROGRAM, case: Case = CASE) -> tuple[errors.Refusal, ...]:
    with pytest.raises(errors.ProgramError) as caught:
        variants(*axes, nodes=nodes, case=case)
    assert all(r.next_step for r in caught.value.refusals)
    return caught.value.refusals


def test_the_last_axis_changes_fastest() -> None:
    found = variants(axis("steer", "coef", 1, 2.5), axis("steer", "layer", 0, 3))
    assert [dict(v.settings) for v in found] == [
        {"steer.coef": 1, "steer.layer": 0},
        {"steer.coef": 1, "steer.layer": 3},
        {"steer.coef": 2.5, "steer.layer": 0},
        {"steer.coef": 2.5, "steer.layer": 3},
    ]
    nodes = [v.checked.program.nodes[2] for v in found]
    assert [(n.coef, n.site) for n in nodes] == [
        (1.0, "resid_post.0"),
        (1.0, "resid_post.3"),
        (2.5, "resid_post.0"),
        (2.5, "resid_post.3"),
    ]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("site", "mlp_out.2", {"site": "mlp_out.2"}),
        ("site", "blocks.2.hook_resid_post", {"site": "resid_post.2"}),
        ("at", "prompt[0]", {"at": "prompt[0]"}),
        ("value", "w", {"value": "w"}),
        ("coef", -3, {"coef": -3.0}),
    ],
)
def test_fields(field: str, value: Any, says: dict[str, Any]) -> None:
    (found,) = variants(axis("steer", field, value))
    changed = found.checked.program.nodes[2]
    assert {n: getattr(changed, n) for n in says} == says
    plain = check.check(program(*PROGRAM), CASE.scope(), PRICES).program.nodes[2]
    assert changed.model_copy(update={n: getattr(plain, n) for n in says}) == plain


def test_fields_of_other_nodes() -> None:
    clamp = node("edit.clamp", "c", site="resid_post.1", value="v", low=-1.0, high=1.0)
    nodes = (V, clamp, node("edit.scale", "s", site="resid_post.2", by=0.5), node("stop_after", "stop", layer=3),
             read("r", "resid_post.2"), node("lens", "l", of=["r"]))  # fmt: skip
    found = variants(
        axis("c", "low", -2, -3),
        axis("c", "high", 5),
        axis("s", "by", 0),
        axis("stop", "layer", 2),
        nodes=nodes,
    )
    assert [v.checked.program.nodes[1].low for v in found] == [-2.0, -3.0]
    assert [v.checked.depth for v in found] == [3, 3]


def test_without_axes_there_is_the_program() -> None:
    (found,) = variants()
    assert found.settings == {}
    assert found.checked == check.check(program(*PROGRAM), CASE.scope(), PRICES)
    assert sweep.cost([found]) == found.checked.cost


@pytest.mark.parametrize(
    ("axes", "code", "path", "names", "closest"),
    [
        ([("stear", "coef", 1)], "unknown_ref", "sweep[0].node", "'stear'", "steer"),
        ([("steer", "by", 1)], "unknown_field", "sweep[0].field", "edit.add has no field 'by'; it has", None),
        ([("v", "layer", 1)], "unknown_field", "sweep[0].field", "tensor has no field 'layer'", None),
        ([("steer", "coef", 1, 2, 1.0)], "bad_value", "sweep[0].values[2]", "1.0 is a value of this axis", None),
        ([("steer", "coef", 1), ("steer", "coef", 2)], "bad_value", "sweep[1].field", "another axis", None),
        ([("steer", "layer", 0), ("steer", "site", "z.2")], "bad_value", "sweep[1].field", "layer or site", None),
        ([("steer", "coef", 1, "2")], "bad_value", "sweep[0].values[1]", "coef of 'steer'", None),
        ([("steer", "coef", 2e6)], "bad_value", "sweep[0].values[0]", "coef of 'steer'", None),
        ([("steer", "at", 3)], "bad_value", "sweep[0].values[0]", "at of 'steer'", None),
        ([("steer", "layer", "1")], "bad_value", "sweep[0].values[0]", "'1' is not a layer", None),
        ([("steer", "layer", 1.0)], "bad_value", "sweep[0].values[0]", "1.0 is not a layer", None),
        ([("steer", "layer", -1)], "bad_value", "sweep[0].values[0]", "-1 is not a layer", None),
        ([("steer", "coef", *range(16)), ("steer", "layer", *range(17))], "too_expensive", "sweep", "272 ", None),
    ],
)  # fmt: skip
def test_an_axis_that_is_wrong(
    axes: list[Any], code: str, path: str, names: str, closest: str | None
) -> None:
    (found,) = refusals(*(axis(*a) for a in axes))
    assert (found.code, found.path, found.closest) == (code, path, closest)
    assert names in found.reason


def test_a_site_without_layers_has_none_to_sweep() -> None:
    nodes = (read("r", "final_norm"), node("lens", "l", of=["r"]))
    (found,) = refusals(axis("r", "layer", 1), nodes=nodes)
    assert (found.code, found.path) == ("bad_value", "sweep[0].values[0]")
    assert "'final_norm', which has no layer" in found.reason


def test_the_axis_at_fault_is_named() -> None:
    found = refusals(axis("steer", "coef", 1, 2), axis("steer", "layer", 1, 7, 9))
    assert [(r.code, r.path) for r in found] == [
        ("layer_out_of_range", "sweep[1].values[1]"),
        ("layer_out_of_range", "sweep[1].values[2]"),
    ]
    assert found[0].reason.startswith("with steer.coef=1, steer.layer=7: ")


def test_refusals_stop_at_the_limit() -> None:
    found = refusals(axis("steer", "layer", *range(100, 200)))
    assert len(found) == check.MAX_REFUSALS


def test_a_mistake_of_all_variants_is_one_refusal() -> None:
    nodes = (*PROGRAM, read("r", "nope.1"))
    (found,) = refusals(axis("steer", "coef", 1, 2, 3), nodes=nodes)
    assert (found.code, found.path) == ("unknown_site", "program.nodes[4].site")
    assert found.reason.startswith("with steer.coef=1: ")


def test_an_edit_moved_before_its_value() -> None:
    nodes = (
        read("r", "resid_post.1"),
        node("mean", "m", of="r"),
        {**STEER, "site": "resid_post.2", "value": "m"},
        LOGPROBS,
    )
    (found,) = refusals(axis("steer", "layer", 3, 0), nodes=nodes)
    assert (found.code, found.path) == ("edit_after_layer", "sweep[0].values[1]")


def test_prompts_at_fault_keep_their_path() -> None:
    (found,) = refusals(axis("steer", "coef", 1, 2), case=CASE.having(lengths=(3, 0)))
    assert (found.code, found.path) == ("empty_prompt", "prompts[1]")


@pytest.mark.parametrize(
    ("lengths", "names"),
    [((1,) * 2049, "2 variants of 2049 prompts"), ((60,) * 2000, "2 variants of 120000 tokens")],
)
def test_large_sweeps(lengths: tuple[int, ...], names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_TOKENS", 200_000)
    (found,) = refusals(axis("steer", "coef", 1, 2), case=CASE.having(lengths=lengths))
    assert (found.code, found.path) == ("too_expensive", "sweep")
    assert names in found.reason


def test_many_nodes_make_a_large_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_NODE_PROMPTS", 15)
    (found,) = refusals(axis("steer", "coef", 1, 2))
    assert "2 variants of 4 nodes on 2 prompts make 16" in found.reason


def test_the_sum_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    each = variants()[0].checked.cost.flops
    monkeypatch.setattr(check, "MAX_FLOPS", 2 * each)
    variants(axis("steer", "coef", 1, 2))
    (found,) = refusals(axis("steer", "coef", 1, 2, 3))
    assert "over all variants" in found.reason


def test_the_price_is_the_sum_with_one_overhead() -> None:
    nodes = (V, STEER, LOGPROBS)
    found = variants(axis("steer", "coef", 1, 2, 3), nodes=nodes)
    one = found[0].checked.cost
    whole = sweep.cost(found)
    assert whole.bits_out == {
        "overhead": one.bits_out["overhead"],
        "receipts": 3 * one.bits_out["receipts"],
        "out": 3 * one.bits_out["out"],
    }
    assert whole.total_bits == 3 * (one.total_bits - one.bits_out["overhead"]) + one.bits_out["overhead"]
    assert (whole.tokens, whole.flops) == (3 * one.tokens, 3 * one.flops)


def test_variants_may_differ_in_what_they_price() -> None:
    found = variants(axis("out", "at", "prompt[-1]", "gen[*]"), case=CASE.having(new=3))
    assert "lengths" not in found[0].checked.cost.bits_out
    assert sweep.cost(found).bits_out["lengths"] == found[1].checked.cost.bits_out["lengths"]


# ---- what variants share --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "nodes", "layers"),
    [
        ([("steer", "coef", 1, 2)], PROGRAM, 1),
        ([("steer", "layer", 2, 3)], PROGRAM, 2),
        ([("steer", "site", "resid_pre.3", "attn_out.2")], PROGRAM, 2),
        ([("steer", "site", "resid_pre.3", "embeddings")], PROGRAM, 0),
        ([("steer", "at", "prompt[0]", "prompt[1]")], PROGRAM, 1),
        ([("steer", "value", "v", "w")], PROGRAM, 1),
        ([("out", "at", "prompt[0]", "prompt[1]")], PROGRAM, 4),
        ([("steer", "coef", 1)], PROGRAM, 4),
        ([("s", "by", 1, 2)], SCALED, 2),
        ([("r", "layer", 1, 2)], (read(), node("lens", "l", of=["r"])), 1),
        ([("r", "site", "final_norm", "resid_post.3")], (read(), node("lens", "l", of=["r"])), 3),
        ([("stop", "layer", 1, 2)], (read(), node("lens", "l", of=["r"]), node("stop_after", "stop", layer=3)), 2),
    ],
)  # fmt: skip
def test_shared_layers(axes: list[Any], nodes: Any, layers: int) -> None:
    found = variants(*(axis(*a) for a in axes), nodes=nodes)
    assert sweep.fork_layer([v.checked.program for v in found], 4) == layers


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_below_the_fork_all_variants_say_the_same(data: st.DataObject) -> None:
    """Nodes at layers below the fork, and what they use, are equal in every variant."""
    layers = data.draw(st.lists(st.integers(0, 3), min_size=3, max_size=3))
    edits = [
        node(
            "edit.add",
            f"e{i}",
            site=f"resid_post.{layer}",
            at="all",
            value=data.draw(st.sampled_from(("v", "s"))),
        )
        for i, layer in enumerate(layers)
    ]
    nodes = (V, node("scale", "s", of="v", by=1.0), *edits, LOGPROBS)
    target = data.draw(st.sampled_from(("s", "e0", "e1", "e2")))
    field = "by" if target == "s" else data.draw(st.sampled_from(("coef", "layer")))
    values = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=4, unique=True))
    programs = [v.checked.program for v in variants(axis(target, field, *values), nodes=nodes)]
    fork = sweep.fork_layer(programs, 4)

    def below(one: Any) -> list[Any]:
        low = [n for n in one.nodes if n.op == "edit.add" and int(n.site.split(".")[1]) < fork]
        used = {n.value for n in low}
        return [*low, *(n for n in one.nodes if n.id in used)]

    assert all(below(p) == below(programs[0]) for p in programs)

"""The recorder's spellings of the whole language: each writes exactly the nodes it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graph_trace import T

from trocar import errors
from trocar.client import edit
from trocar.graph import ops
from trocar.graph.builder import Expr, Patterns, Sae, SiteRows, vectors_of
from trocar.graph.builder_expr import rank

ONES = np.ones(8, dtype=np.float32)
FOUR = np.ones(4, dtype=np.float32)
DOWN = np.ones((8, 2), dtype=np.float32)
SAE = Sae(w_enc=np.ones((8, 12)), b_enc=np.ones(12), w_dec=np.ones((12, 8)), b_dec=np.ones(8))
LAST = "prompt[-1]"


@pytest.fixture
def t() -> T:
    return T()


def scored(t: T, of: Expr) -> list[dict[str, Any]]:
    t.r.output("s", ops.Score, of=of.id)
    return t.nodes()


# ---- parts of sites -------------------------------------------------------------------------------


def test_heads_and_neurons_are_views_for_reading(t: T) -> None:
    part = t.z[2].heads(1)[-1]
    assert isinstance(part, SiteRows)
    t.r.output("a", ops.Score, of=part.dot(FOUR).id)
    t.r.output("b", ops.Score, of=t.mlp_act[1][-1].neurons(3, 1, 0, 2).dot(FOUR).id)
    reads = [n for n in t.nodes() if n["op"] == "read"]
    assert reads == [
        {"op": "read", "site": "z.2", "at": LAST, "heads": (1,)},
        {"op": "read", "site": "mlp_act.1", "at": LAST, "neurons": (3, 1, 0, 2)},
    ]


def test_heads_and_neurons_are_views_for_editing(t: T) -> None:
    t.z[2].heads(1)[-1] *= 0
    t.z[2].heads(0)["all"] = 0
    t.mlp_act[1].neurons(5)[0:2] = 0
    part = t.z[3].heads(0)
    part += FOUR
    assert t.nodes() == [
        {"op": "edit.scale", "site": "z.2", "at": LAST, "by": 0.0, "heads": (1,)},
        {"op": "edit.set", "site": "z.2", "at": "all", "value": "zero", "heads": (0,)},
        {"op": "edit.set", "site": "mlp_act.1", "at": "prompt[0:2]", "value": "zero", "neurons": (5,)},
        {"op": "tensor", "name": "v0"},
        {"op": "edit.add", "site": "z.3", "at": "all", "value": 3, "heads": (0,)},
    ]


def test_zero_is_a_value_where_rows_are_set(t: T) -> None:
    t.resid_post[1] = 0
    t.final_norm = 0.0
    assert [n["value"] for n in t.nodes()] == ["zero", "zero"]
    for value in (False, 1):
        with pytest.raises(errors.ClientError, match="is not a vector"):
            t.resid_post[1] = value


def test_rows_of_another_part_are_not_the_tail_of_an_edit(t: T) -> None:
    h = t.z[2].heads(0)
    h *= 2.0
    t.z[2].heads(1)["all"] = h
    assert [n["op"] for n in t.nodes()] == ["edit.scale", "read", "edit.set"]


def test_attention(t: T) -> None:
    assert isinstance(t.attn_probs[1], Patterns)
    assert "knockout" in repr(t.attn_probs[1])
    assert len(t.attn_probs[:]) == 4
    t.r.output("a", ops.Pattern, of=t.attn_probs[1].read(at=-1, keys=slice(0, 2), heads=[0, 1]).id)
    t.r.output("b", ops.Pattern, of=t.attn_probs[-1].read(at="all", keys=0, heads=1).id)
    t.r.output("c", ops.Pattern, of=t.attn_probs[1].read(at=slice(0, 2), keys="prompt[0]").id)
    reads = [n for n in t.nodes() if n["op"] == "read"]
    assert reads == [
        {"op": "read", "site": "attn_probs.1", "at": LAST, "keys": "prompt[0:2]", "heads": (0, 1)},
        {"op": "read", "site": "attn_probs.3", "at": "all", "keys": "prompt[0]", "heads": (1,)},
        {"op": "read", "site": "attn_probs.1", "at": "prompt[0:2]", "keys": "prompt[0]"},
    ]
    short = t.attn_probs[1][-1]
    node = next(n for n in t.r._nodes if n.id == short.id)
    assert (node.at, node.keys) == (LAST, "prompt[*]")  # type: ignore[union-attr]
    with pytest.raises(errors.ClientError, match="is not a vector"):
        t.resid_post[1] += t.attn_probs[1]
    with pytest.raises(errors.ClientError, match="is not a vector"):
        t.resid_post[1] += t.attn_probs[:]


@pytest.mark.parametrize("given", ["1", 1.5, [1.5], True, [True]])
def test_what_are_no_indices(t: T, given: Any) -> None:
    with pytest.raises(errors.ClientError) as caught:
        t.attn_probs[1].read(heads=given)
    assert (caught.value.code, caught.value.path) == ("bad_argument", "heads")


@pytest.mark.parametrize("given", [(1,), [1], range(1, 2), np.array([1]), np.int64(1), 1])
def test_indices(given: Any) -> None:
    assert edit.scale("z.1", 0.0, heads=given).heads == (1,)


# ---- values ---------------------------------------------------------------------------------------


def test_numbers_of_rows(t: T) -> None:
    h = t.resid_post[1][-1]
    nodes = scored(t, (h.norm() + h.mean(over="width")).relu() - (h.normalize().relu().topk(3) @ ONES))
    assert [n["op"] for n in nodes] == [
        "read", "norm", "mean", "add", "relu", "normalize", "relu", "topk", "tensor", "dot", "sub", "score",
    ]  # fmt: skip
    assert nodes[2]["over"] == "width"
    assert nodes[7]["k"] == 3


def test_rows_times_their_own_number_in_both_orders(t: T) -> None:
    h = t.resid_post[1][-1]
    size = h.norm()
    t.lens(h * size, size * h, name="out")
    t.r.output("s", ops.Score, of=(size * size).id)
    scales = [(n["of"], n["by"]) for n in t.nodes() if n["op"] == "scale"]
    assert scales == [(0, 1), (0, 1), (1, 1)]


def test_two_rows_are_not_multiplied(t: T) -> None:
    with pytest.raises(errors.ClientError, match="dot"):
        t.resid_post[1] * t.resid_post[2]
    with pytest.raises(errors.ClientError, match="dot"):
        t.resid_post[1] *= t.resid_post[1].norm()


def test_a_matrix_on_the_right(t: T) -> None:
    h = t.resid_post[1][-1]
    nodes = scored(t, (h @ DOWN) @ [1.0, 1.0])
    assert [n["op"] for n in nodes] == ["read", "tensor", "matmul", "tensor", "dot", "score"]
    held = t.r.constant(DOWN.tolist())
    assert held.content == "matrix"
    assert (h @ held).content == "wide"
    with pytest.raises(errors.ClientError, match="on the right"):
        DOWN @ h


@pytest.mark.parametrize(("value", "dimensions"), [(DOWN, 2), ([[1.0]], 2), ([1.0], 1), ([], 0), (1.0, 0)])
def test_rank(value: Any, dimensions: int) -> None:
    assert rank(value) == dimensions


def test_masks(t: T) -> None:
    size = t.resid_post[1][-1].norm()
    mask = (size > 1) & (size < -size) | (size == 2.5)
    nodes = scored(t, ~mask & (size >= 1) & (size <= 2) & (size != 3))
    assert [n["op"] for n in nodes] == [
        "read", "norm", "gt", "scale", "lt", "and", "eq", "or", "not", "lt", "not", "and", "gt", "not", "and", "eq",
        "not", "and", "score",
    ]  # fmt: skip
    assert (nodes[2]["b"], nodes[4]["b"]) == (1.0, 3)
    with pytest.raises(errors.ClientError, match="not a number"):
        size > "1"  # noqa: B015
    assert size in [size]  # identity comes first
    assert len({size, mask}) == 2


def test_a_mean_of_numbers_is_a_number(t: T) -> None:
    h = t.resid_post[1]["prompt[*]"]
    t.lens(h.norm().mean() * h.mean(), name="out")
    assert t.nodes()[-2]["op"] == "scale"
    assert (t.nodes()[-2]["of"], t.nodes()[-2]["by"]) == (3, 2)


def test_a_dictionary_is_recorded_once(t: T) -> None:
    h = t.resid_post[1][-1]
    sae = t.r.constant(SAE)
    nodes = scored(t, h.encode(sae).norm() + h.encode(SAE).norm())
    assert [n["op"] for n in nodes] == ["read", "sae", "encode", "norm", "encode", "norm", "add", "score"]
    assert nodes[1] == {
        "op": "sae", "w_enc": "v0", "b_enc": "v1", "w_dec": "v2", "b_dec": "v3", "activation": "relu", "center": True,
    }  # fmt: skip
    assert list(vectors_of(t.r, t.r.build())) == ["v0", "v1", "v2", "v3"]


def test_a_dictionary_carries_its_threshold(t: T) -> None:
    more = {"activation": "jumprelu", "threshold": np.ones(12)}
    sae = t.r.constant(Sae(SAE.w_enc, SAE.b_enc, SAE.w_dec, SAE.b_dec, **more))
    t.r.apply(edit.sae("resid_post.1", sae, keep_error=False))
    assert t.nodes()[0]["threshold"] == "v4"


# ---- edits as values ------------------------------------------------------------------------------


def last(t: T, spec: Any) -> dict[str, Any]:
    t.r.apply(spec)
    node: dict[str, Any] = t.nodes()[-1]
    return {k: v for k, v in node.items() if k not in ("op", "site", "at")}


def test_edits_say_what_they_were_told(t: T) -> None:
    assert last(t, edit.add("z.1", FOUR, coef=2.0, heads=1)) == {"value": 0, "coef": 2.0, "heads": (1,)}
    assert last(t, edit.set("mlp_act.1", [1.0], neurons=3)) == {"value": 2, "neurons": (3,)}
    assert last(t, edit.zero("z.1", at=-1, heads=[0])) == {"value": "zero", "heads": (0,)}
    assert last(t, edit.project_out("resid_post.1", ONES)) == {"value": 5}
    assert last(t, edit.clamp("resid_post.1", ONES, high=1.5)) == {"value": 7, "high": 1.5}
    assert last(t, edit.knockout("attn_probs.1", keys=0, heads=1)) == {"keys": "prompt[0]", "heads": (1,)}


def test_a_gate_is_an_expression(t: T) -> None:
    gate = t.resid_post[1]["all"].norm() > 3
    assert last(t, edit.scale("resid_post.2", 0.0, gate=gate)) == {"by": 0.0, "gate": 2}


def test_affine_of_every_layer_carries_its_arrays_once(t: T) -> None:
    t.r.apply(edit.affine("resid_post.*", DOWN, DOWN.T, inner=[0.0, 1.0], bias=ONES))
    nodes = t.nodes()
    assert [n["op"] for n in nodes] == ["tensor"] * 4 + ["edit.affine"] * 4
    assert nodes[-1] == {
        "op": "edit.affine", "site": "resid_post.3", "at": "all", "down": 0, "up": 1, "inner": 2, "bias": 3,
    }  # fmt: skip
    assert last(t, edit.affine("resid_post.1", DOWN, DOWN.T)) == {"down": 8, "up": 9}


def test_features(t: T) -> None:
    nodes = last(t, edit.sae("resid_post.1", SAE, set={3: 1}, scale={4: 0.5}))
    assert nodes["features"] == (
        {"index": 3, "set": 1.0, "scale": None},
        {"index": 4, "set": None, "scale": 0.5},
    )
    assert nodes["keep_error"] is True


def test_arguments_that_no_edit_takes() -> None:
    with pytest.raises(errors.ClientError) as caught:
        edit.scale("z.1", 0.0, head=[1])  # type: ignore[call-arg]
    assert (caught.value.code, caught.value.path, caught.value.closest) == ("bad_argument", "head", "heads")


def test_control_is_kept_without_an_output_of_its_own(t: T) -> None:
    t.r.emit(ops.StopAfter, layer=2)
    t.resid_post[3]
    assert [n.op for n in t.r.build().nodes] == ["stop_after"]

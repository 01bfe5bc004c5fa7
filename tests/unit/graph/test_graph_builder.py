"""The recording front end: each idiom writes exactly the nodes it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graph_room import PROBE
from graph_trace import T

from trocar import errors, strict
from trocar.graph import builder, ops
from trocar.graph.builder import EditSpec, Expr, SiteRows, selector
from trocar.graph.program import MAX_NODES, Node

ONES = np.ones(8, dtype=np.float32)


@pytest.fixture
def t() -> T:
    return T()


VECTOR = {"op": "tensor", "name": "v0"}
LAST = "prompt[-1]"


def lensed(of: int) -> dict[str, Any]:
    return {"op": "lens", "of": [of]}


def test_read_and_lens(t: T) -> None:
    t.lens(t.resid_post[2][-1])
    assert t.nodes() == [{"op": "read", "site": "resid_post.2", "at": LAST}, lensed(0)]


def test_add_in_place(t: T) -> None:
    t.resid_post[2] += 6.0 * t.r.emit(ops.Tensor, name="v")
    t.r.vectors["v"] = ONES
    assert t.nodes() == [
        {"op": "tensor", "name": "v"},
        {"op": "scale", "of": 0, "by": 6.0},
        {"op": "edit.add", "site": "resid_post.2", "at": "all", "value": 1},
    ]


def test_add_in_place_at_a_position(t: T) -> None:
    t.resid_post[2][-1] += ONES
    assert t.nodes() == [VECTOR, {"op": "edit.add", "site": "resid_post.2", "at": LAST, "value": 0}]


def test_subtract_in_place(t: T) -> None:
    t.resid_post[2][0:3] -= ONES
    assert t.nodes() == [
        VECTOR, {"op": "edit.add", "site": "resid_post.2", "at": "prompt[0:3]", "value": 0, "coef": -1.0},
    ]  # fmt: skip


def test_scale_in_place(t: T) -> None:
    t.mlp_out[1]["gen[*]"] *= 0.5
    assert t.nodes() == [{"op": "edit.scale", "site": "mlp_out.1", "at": "gen[*]", "by": 0.5}]


def test_set(t: T) -> None:
    t.resid_post[2][-1] = ONES
    t.resid_post[3] = t.resid_post[1]
    assert t.nodes() == [
        VECTOR,
        {"op": "edit.set", "site": "resid_post.2", "at": LAST, "value": 0},
        {"op": "read", "site": "resid_post.1", "at": "all"},
        {"op": "edit.set", "site": "resid_post.3", "at": "all", "value": 2},
    ]


def test_a_site_without_layers(t: T) -> None:
    t.final_norm += ONES
    assert t.nodes() == [VECTOR, {"op": "edit.add", "site": "final_norm", "at": "all", "value": 0}]


def test_set_a_site_without_layers(t: T) -> None:
    t.final_norm = ONES
    assert t.nodes()[1] == {"op": "edit.set", "site": "final_norm", "at": "all", "value": 0}


def test_reads_keep_their_side_of_an_edit(t: T) -> None:
    before = t.resid_post[2][-1]
    t.resid_post[2] += ONES
    after = t.resid_post[2][-1]
    t.lens(before, after)
    assert [n["op"] for n in t.nodes()] == ["read", "tensor", "edit.add", "read", "lens"]
    assert t.nodes()[-1]["of"] == [0, 3]


def test_a_name_edited_in_place_means_the_rows_after(t: T) -> None:
    h = t.resid_post[2][-1]
    h += ONES
    t.lens(h)
    assert [n["op"] for n in t.nodes()] == ["tensor", "edit.add", "read", "lens"]


def test_rows_read_before_can_be_put_back(t: T) -> None:
    """Neither is the tail of an augmented assignment, although the place was edited before."""
    clean = t.resid_post[2][-1]
    t.resid_post[2][-1] += ONES
    t.resid_post[2][-1] = clean
    assert [n["op"] for n in t.nodes()] == ["read", "tensor", "edit.add", "edit.set"]
    assert t.nodes()[-1]["value"] == 0


def test_rows_of_an_edited_place_can_be_copied_to_another(t: T) -> None:
    t.resid_post[2][0] *= 2
    t.resid_post[2][-1] = t.resid_post[2][0]
    assert t.nodes()[1:] == [
        {"op": "read", "site": "resid_post.2", "at": "prompt[0]"},
        {"op": "edit.set", "site": "resid_post.2", "at": LAST, "value": 1},
    ]


def test_an_edited_name_can_be_written_elsewhere(t: T) -> None:
    h = t.resid_post[2]
    h *= 2.0
    t.resid_post[3] = h
    assert [n["op"] for n in t.nodes()] == ["edit.scale", "read", "edit.set"]


def test_an_edited_name_is_forgotten_after_the_next_edit(t: T) -> None:
    h = t.resid_post[2]
    h *= 2.0
    t.resid_post[2] *= 3.0
    t.resid_post[2] = h
    assert [n["op"] for n in t.nodes()] == ["edit.scale", "read", "edit.scale", "edit.set"]


def test_families(t: T) -> None:
    family = t.resid_post[:]
    assert len(family) == 4
    assert [x.site for x in family] == [f"resid_post.{i}" for i in range(4)]
    t.lens(*family[-1])
    assert t.nodes()[:4] == [{"op": "read", "site": f"resid_post.{i}", "at": LAST} for i in range(4)]
    assert [x.site for x in t.resid_post[::-2]] == ["resid_post.3", "resid_post.1"]
    assert [x.site for x in t.resid_post[[0, -1]]] == ["resid_post.0", "resid_post.3"]
    assert [x.site for x in t.resid_post[-2:]] == ["resid_post.2", "resid_post.3"]


def test_an_edit_of_a_family(t: T) -> None:
    t.r.apply(EditSpec("edit.project_out", "resid_post.*", "all", ONES))
    t.r.apply(EditSpec("edit.set", "resid_post.0", LAST, "zero"))
    nodes = t.nodes()
    assert [n.get("site") for n in nodes if n["op"] == "edit.project_out"] == [
        f"resid_post.{i}" for i in range(4)
    ]
    assert nodes[-1] == {"op": "edit.set", "site": "resid_post.0", "at": LAST, "value": "zero"}


@pytest.mark.parametrize("layer", [-1, np.int64(3), 3])
def test_layers_from_the_end_and_from_numpy(t: T, layer: Any) -> None:
    assert t.resid_post[layer].site == "resid_post.3"


@pytest.mark.parametrize("layer", [4, -5, 99, slice(0, 5), slice(-5, None)])
def test_layers_outside(t: T, layer: Any) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        t.resid_post[layer]
    assert (caught.value.code, caught.value.path) == ("layer_out_of_range", "layer")
    assert "has 4 layers" in caught.value.reason


@pytest.mark.parametrize("layer", [True, "2", 1.0, None])
def test_layers_that_are_none(t: T, layer: Any) -> None:
    with pytest.raises(errors.ClientError) as caught:
        t.resid_post[layer]
    assert caught.value.code == "bad_argument"
    with pytest.raises(errors.ClientError):
        t.resid_post[layer] = ONES


def test_dead_reads_and_their_vectors_are_dropped(t: T) -> None:
    unused = t.r.value(ONES)
    kept = t.r.value(ONES * 2)
    t.resid_post[0]
    t.r.emit(ops.Scale, of=unused, by=2.0)
    t.r.apply(EditSpec("edit.add", "resid_post.1", "all", Expr(t.r, kept)))
    program = t.r.build()
    assert [n.op for n in program.nodes] == ["tensor", "edit.add"]
    assert list(builder.vectors_of(t.r, program)) == ["v1"]


def test_arithmetic(t: T) -> None:
    a, b = t.resid_post[1][-1], t.resid_post[2][-1]
    t.lens(-(a + b) - ONES, (ONES - b) * 2, name="x")
    t.r.output("d", ops.Score, of=(a @ b).id)
    t.r.output("e", ops.Score, of=(ONES @ a).id)
    t.r.output("f", ops.Score, of=a.dot(ONES + b).id)
    t.r.output("m", ops.Lens, of=(a.mean().id,))
    assert [n["op"] for n in t.nodes()] == [
        "read", "read", "add", "scale", "tensor", "sub", "tensor", "sub", "scale", "lens",
        "dot", "score", "tensor", "dot", "score", "tensor", "add", "dot", "score", "mean", "lens",
    ]  # fmt: skip
    assert t.nodes()[13]["a"] == 12


@pytest.mark.parametrize("by", [np.float32(2.0), np.float64(2.0), np.int64(2), 2])
def test_numbers_of_numpy_scale(t: T, by: Any) -> None:
    t.lens(by * t.resid_post[1][-1])
    assert t.nodes()[1]["by"] == 2.0


@pytest.mark.parametrize("by", [True, "2", None, ONES])
def test_what_is_no_number_does_not_scale(t: T, by: Any) -> None:
    with pytest.raises(errors.ClientError, match="not a number"):
        t.resid_post[1] * by
    with pytest.raises(errors.ClientError, match="not a number"):
        t.resid_post[1] *= by


@pytest.mark.parametrize("value", [None, "v", 3, 2.5, True])
def test_what_is_no_vector_is_not_added(t: T, value: Any) -> None:
    with pytest.raises(errors.ClientError) as caught:
        t.resid_post[1] += value
    assert (caught.value.code, caught.value.path) == ("bad_argument", "resid_post.1")
    assert repr(value) in caught.value.reason


def test_several_values_are_no_vector(t: T) -> None:
    for value in (t.resid_post[:], t.resid_post[:][-1], t.resid_post):
        with pytest.raises(errors.ClientError, match="is not a vector"):
            t.resid_post[1] += value


def test_a_vector_is_copied_when_it_is_written(t: T) -> None:
    v = np.ones(8, dtype=np.float32)
    t.resid_post[1] += v
    v *= 100
    t.resid_post[2] += v
    assert [float(x[0]) for x in t.r.vectors.values()] == [1.0, 100.0]


def test_a_tensor_with_a_gradient_is_detached(t: T) -> None:
    class Tensorlike:
        def detach(self) -> list[float]:
            return [1.0]

    t.resid_post[1] += Tensorlike()
    assert t.r.vectors == {"v0": [1.0]}


def test_held_values(t: T) -> None:
    class Direction:
        def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
            return strict.make(ops.Vector, id=node_id, handle=PROBE, site=site), -1.0 if site is None else 1.0

    t.resid_post[1] += Direction()
    assert t.nodes() == [
        {"op": "vector", "handle": PROBE, "site": "resid_post.1", "part": "direction"},
        {"op": "edit.add", "site": "resid_post.1", "at": "all", "value": 0},
    ]
    t = T()

    class Minus(Direction):
        def operand(self, node_id: str, site: str | None) -> tuple[Node, float]:
            return super().operand(node_id, "resid_post.1")[0], -1.0

    t.resid_post[1] += Minus()
    assert [n["op"] for n in t.nodes()] == ["vector", "scale", "edit.add"]


def test_values_of_another_trace(t: T) -> None:
    other = T().resid_post[1]
    with pytest.raises(errors.ClientError, match="another trace"):
        t.resid_post[1] += other


@pytest.mark.parametrize(
    "use", [np.asarray, bool, float, list, lambda h: 3 in h], ids=["array", "bool", "float", "iter", "in"]
)
def test_values_are_not_here(t: T, use: Any) -> None:
    h = t.resid_post[1]
    with pytest.raises(errors.ClientError) as caught:
        use(t.r.scaled(h, 2.0))
    assert caught.value.code == "not_here"
    assert caught.value.next_step
    assert "lives on the server" in repr(h)


def test_a_site_that_does_not_exist(t: T) -> None:
    with pytest.raises(builder.NoSuchSite) as caught:
        t.resid_pots  # noqa: B018
    assert (caught.value.code, caught.value.path, caught.value.closest) == (
        "unknown_site",
        "resid_pots",
        "resid_post",
    )
    assert not hasattr(t, "hidden_states_7")


@pytest.mark.parametrize(
    ("position", "text"),
    [(-1, "prompt[-1]"), (np.int64(2), "prompt[2]"), (slice(3, 7), "prompt[3:7]"), (slice(None, -1), "prompt[:-1]"),
     (slice(np.int64(1), None), "prompt[1:]"), (slice(None), "prompt[*]"), ("gen[0:8]", "gen[0:8]")],
)  # fmt: skip
def test_selectors(position: Any, text: str) -> None:
    assert selector(position) == text


@pytest.mark.parametrize(
    "position", [True, 1.5, None, slice(0, 4, 2), slice("a", None), slice(True, None), ...]
)
def test_what_is_no_selector(position: Any) -> None:
    with pytest.raises(errors.ClientError) as caught:
        selector(position)
    assert (caught.value.code, caught.value.path) == ("bad_argument", "position")


def test_names_are_taken_once_and_never_by_the_recorder(t: T) -> None:
    t.lens(t.resid_post[1], name="n2")
    t.lens(t.resid_post[2], name="last")
    with pytest.raises(errors.ProgramError) as caught:
        t.lens(t.resid_post[2], name="last")
    assert (caught.value.code, caught.value.path) == ("duplicate_id", "last")
    with pytest.raises(errors.ProgramError, match="meaning of its own"):
        t.lens(t.resid_post[2], name="overhead")
    assert [n["op"] for n in t.nodes()] == ["read", "lens", "read", "lens"]


def test_nothing_recorded_and_nothing_after_the_end(t: T) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        t.r.build()
    assert caught.value.code == "nothing_returned"
    t.r.close()
    with pytest.raises(errors.ClientError, match="finished"):
        t.resid_post[1]


def test_too_many_nodes(t: T) -> None:
    for i in range(MAX_NODES + 1):
        t.r.output(f"t{i}", ops.Text)
    with pytest.raises(errors.ProgramError) as caught:
        t.r.build()
    assert (caught.value.code, caught.value.path) == ("too_many_nodes", "nodes")


def test_an_empty_family_has_nothing_to_look_at(t: T) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        t.lens(*t.resid_post[2:1])
    assert (caught.value.code, caught.value.path) == ("bad_value", "of")
    assert isinstance(t.resid_post[1], SiteRows)

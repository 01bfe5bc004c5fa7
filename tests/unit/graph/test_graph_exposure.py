"""Directions: the same probe on other prompts is one direction, another probe is another, products are many."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

from typing import Any

import pytest
from graph_room import DIRECTION, FINAL, LOGPROBS, MANY, PROBE, Case, facts, node, read

from trocar.graph import exposure, spans
from trocar.graph.exposure import Content, Direction
from trocar.graph.ops import Node
from trocar.graph.spec import SPEC
from trocar.sites import SITES, Site

CASE = Case(lengths=(5, 7))
REQUEST = "q" * 64
SAE = node("sae", "sae", w_enc="w_enc", b_enc="b_enc", w_dec="w_dec", b_dec="b_dec")


def directions(
    *nodes: dict[str, Any],
    contents: dict[str, str] | None = None,
    request: str = REQUEST,
    case: Case = CASE,
    nonzeros: int = 1,
) -> list[Direction]:
    """Of an accepted program whose arrays hold what `contents` says of them, else their own name."""
    checked = case.check(*nodes)
    named = {n["id"]: n.get("name", n["id"]) for n in nodes if n["op"] in ("tensor", "sae")} | (
        contents or {}
    )
    held = {name: Content(content, nonzeros) for name, content in named.items()}
    return list(exposure.directions(checked, held, request, n_layers=4))


def one(*nodes: dict[str, Any], **more: Any) -> Direction:
    (found,) = directions(*nodes, **more)
    return found


def probe(at: str = "prompt[-1]", site: str = "resid_post.1", **ids: str) -> list[dict[str, Any]]:
    """The inner product of a site's rows with the array `v`."""
    r, v, d, s = (ids.get(x, x) for x in "rvds")
    return [read(r, site, at), node("tensor", v, name="v"), node("dot", d, a=r, b=v), node("score", s, of=d)]


def test_a_score_is_one_direction_of_its_site() -> None:
    found = one(*probe())
    assert (found.site, found.rank) == ("resid_pre.2", 1)
    assert len(found.digest) == 64
    assert int(found.digest, 16) >= 0


@pytest.mark.parametrize("at", ["prompt[0]", "prompt[*]", "gen[*]", "all", "prompt[1,-1]", "gen[0]"])
def test_other_tokens_are_the_same_direction(at: str) -> None:
    assert one(*probe(at), case=Case(new=2)) == one(*probe())


@pytest.mark.parametrize("case", [Case(lengths=(3,)), Case(lengths=(9,) * 40), Case(lengths=(5, 7), new=3)])
def test_other_prompts_are_the_same_direction(case: Case) -> None:
    assert one(*probe(), case=case, request="z" * 64) == one(*probe())


def test_names_of_nodes_and_arrays_do_not_matter() -> None:
    usual = one(*probe())
    assert one(*probe(r="rows", v="vector", d="product", s="out")) == usual
    renamed = [n if n["op"] != "tensor" else {**n, "name": "b_dec"} for n in probe()]
    assert one(*renamed, contents={"v": "v"}) == usual
    assert one(*renamed) != usual


def test_the_order_of_nodes_and_what_else_runs_does_not_matter() -> None:
    r, v, d, s = probe()
    usual = one(r, v, d, s)
    assert one(v, r, d, s) == usual
    others = [node("tensor", "other", name="b_dec"), read("late", "resid_post.3"), LOGPROBS]
    assert one(*others, r, v, d, node("lens", "l", of=["late"]), s) == usual
    edit = node("edit.scale", "e", site="resid_post.0", by=2.0)
    assert one(edit, r, v, d, s) == usual


OTHERS: list[tuple[str, list[dict[str, Any]], dict[str, str]]] = [
    ("another array", probe(), {"v": "w"}),
    ("another site", probe(site="resid_post.2"), {}),
    ("a scaled one", [*probe()[:3], node("scale", "x", of="d", by=2.0), node("score", "s", of="x")], {}),
    ("the norm", [read(), node("norm", "d", of="r"), node("score", "s", of="d")], {}),
    ("the mean over width", [read(), node("mean", "d", of="r", over="width"), node("score", "s", of="d")], {}),
    ("of normalized rows", [read(), node("normalize", "n", of="r"), node("tensor", "v", name="v"),
     node("dot", "d", a="n", b="v"), node("score", "s", of="d")], {}),
    ("a fitted direction", [read(), node("vector", "v", handle=DIRECTION, site="resid_post.1"),
     node("dot", "d", a="r", b="v"), node("score", "s", of="d")], {}),
    ("another fit's direction", [read(), node("vector", "v", handle=PROBE, site="resid_post.1"),
     node("dot", "d", a="r", b="v"), node("score", "s", of="d")], {}),
    ("its weights", [read(), node("vector", "v", handle=PROBE, site="resid_post.1", part="weights"),
     node("dot", "d", a="r", b="v"), node("score", "s", of="d")], {}),
    ("its probe", [read(), node("score", "s", of="r", probe=PROBE, site="resid_post.1")], {}),
    ("a feature", [read(), SAE, node("encode", "f", of="r", sae="sae"), node("tensor", "u", name="b_enc"),
     node("dot", "d", a="f", b="u"), node("score", "s", of="d")], {}),
    ("another dictionary", [read(), SAE, node("encode", "f", of="r", sae="sae"), node("tensor", "u", name="b_enc"),
     node("dot", "d", a="f", b="u"), node("score", "s", of="d")], {"sae": "others"}),
    ("the same with another k", [read(), {**SAE, "activation": "topk", "k": 2}, node("encode", "f", of="r", sae="sae"),
     node("tensor", "u", name="b_enc"), node("dot", "d", a="f", b="u"), node("score", "s", of="d")], {}),
    ("columns of a matrix", [read(), node("tensor", "m", name="m"), node("matmul", "p", a="r", b="m"),
     node("norm", "d", of="p"), node("score", "s", of="d")], {}),
    ("some heads", [{**read(site="z.1"), "heads": [1]}, node("norm", "d", of="r"), node("score", "s", of="d")], {}),
    ("other heads", [{**read(site="z.1"), "heads": [0]}, node("norm", "d", of="r"), node("score", "s", of="d")], {}),
    ("some neurons", [{**read(site="mlp_act.1"), "neurons": [0, 1]}, node("norm", "d", of="r"), node("score", "s", of="d")], {}),
]  # fmt: skip


def test_what_is_computed_otherwise_is_another_direction() -> None:
    found = [one(*probe()), *(one(*nodes, contents=contents) for _, nodes, contents in OTHERS)]
    assert len({d.digest for d in found}) == len(found), [name for name, _, _ in OTHERS]
    assert {d.rank for d in found} == {1}


@pytest.mark.parametrize(
    ("names", "stream"),
    [
        (("resid_post.1", "resid_pre.2"), "resid_pre.2"),
        (("embeddings", "resid_pre.0"), "resid_pre.0"),
    ],
)
def test_a_stream_under_its_other_name_is_the_same_direction(names: tuple[str, ...], stream: str) -> None:
    first, second = (one(*probe(site=name)) for name in names)
    assert first == second
    assert first.site == stream


@pytest.mark.parametrize(
    ("site", "stream"),
    [
        ("attn_in.2", "resid_pre.2"), ("attn_in.0", "resid_pre.0"), ("mlp_in.1", "resid_mid.1"), ("z.1", "z.1"),
        ("attn_out_post.1", "attn_out.1"), ("mlp_out_post.1", "mlp_out.1"), ("final_norm", "resid_pre.4"),
        ("resid_post.3", "resid_pre.4"), ("resid_mid.1", "resid_mid.1"),
    ],
)  # fmt: skip
def test_normed_rows_are_counted_at_their_stream(site: str, stream: str) -> None:
    wide = Case(model=facts(sites=tuple(SITES)))
    assert one(*probe(site=site), case=wide).site == stream


def test_a_mask_or_a_bent_number_shows_the_direction_that_it_is_made_of() -> None:
    for made in (
        node("gt", "x", a="d", b=2.0),
        node("relu", "x", of="d"),
        node("scale", "x", of="d", by="d"),
    ):
        assert one(*probe()[:3], made, node("score", "s", of="x")) == one(*probe())


def test_the_names_of_a_dictionarys_arrays_do_not_matter() -> None:
    def asked(sae: dict[str, Any]) -> Direction:
        nodes = [
            read(),
            sae,
            node("encode", "f", of="r", sae="sae"),
            node("mean", "d", of="f", over="width"),
            node("score", "s", of="d"),
        ]
        return one(*nodes, contents={"sae": "same"})

    jump = {**SAE, "activation": "jumprelu"}
    assert asked({**SAE, "b_dec": "v"}) == asked(SAE)
    assert asked({**jump, "threshold": "b_enc"}) != asked(SAE)
    assert asked({**SAE, "center": False}) != asked(SAE)


def test_an_array_without_its_contents_is_a_fault() -> None:
    with pytest.raises(KeyError):
        exposure.directions(CASE.check(*probe()), {}, REQUEST, 4)


def test_a_score_of_two_sites_is_a_direction_of_each() -> None:
    nodes = [read(), read("t", "resid_post.3"), node("add", "sum", a="r", b="t"), node("tensor", "v", name="v"),
             node("dot", "d", a="sum", b="v"), node("score", "s", of="d")]  # fmt: skip
    found = directions(*nodes)
    assert [(d.site, d.rank) for d in found] == [("resid_pre.2", 1), ("resid_pre.4", 1)]
    assert len({d.digest for d in found}) == 1


def test_the_same_score_twice_is_one_direction() -> None:
    assert directions(*probe(), *probe(r="r2", v="v2", d="d2", s="s2")) == directions(*probe())


def test_outputs_that_are_no_scores_have_no_directions() -> None:
    nodes = [*probe()[:3], node("lens", "l", of=["r"]), node("capture", "c", of=["r"]), LOGPROBS]
    assert directions(*nodes) == []


# ---- rows that choose a direction -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "rank"),
    [
        # rows times rows: of each row a direction that nobody sent
        ([read(), read("t", "resid_post.3"), node("dot", "d", a="r", b="t")], 2),
        ([read(at="prompt[0:2]"), read("t", "resid_post.3", "prompt[0:2]"), node("dot", "d", a="r", b="t")], 4),
        ([read(at="prompt[*]"), node("dot", "d", a="r", b="r")], 8),  # no more than the site is wide
        ([read(at="prompt[*]"), node("mean", "m", of="r"), node("dot", "d", a="r", b="m")], 8),
        ([read(), node("stored", "k", handle=MANY, site="resid_post.1", prompts=[1, 1]), node("dot", "d", a="r", b="k")], 2),
        ([read(), node("stored", "k", handle=FINAL, site="resid_post.1"), node("dot", "e", a="r", b="k"), node("scale", "d", of="e", by=2.0)], 2),
    ],
)  # fmt: skip
def test_products_of_rows_are_many_directions(nodes: list[dict[str, Any]], rank: int) -> None:
    asked = [*nodes, node("score", "s", of="d")]
    found = directions(*asked)
    assert {d.rank for d in found} == {rank}
    again = directions(*asked, request="z" * 64)
    assert not {d.digest for d in found} & {d.digest for d in again}  # other rows, other directions
    assert {d.digest for d in found} == {d.digest for d in directions(*asked)}


def held(*names: str) -> list[dict[str, Any]]:
    """Rows that the caller stored before, one number of each per name."""
    tensors = [node("tensor", f"e_{name}", name="v") for name in names]
    dots = [node("dot", name, a="g", b=f"e_{name}") for name in names]
    return [node("stored", "g", handle=FINAL, site="resid_post.1"), *tensors, *dots]


def dots(count: int) -> list[dict[str, Any]]:
    """Products `d0`, `d1`, ... of rows with vectors."""
    tensors = [node("tensor", f"v{i}", name="v") for i in range(count)]
    return [read(), *tensors, *(node("dot", f"d{i}", a="r", b=f"v{i}") for i in range(count))]


def total(*nodes: dict[str, Any], site: str = "resid_pre.2", last: str = "out", **more: Any) -> int:
    """How many directions of a site a score of the node `last` counts as; every array is another."""
    asked = [*nodes, node("score", "s", of=last)]
    contents = {n["id"]: n["id"] for n in nodes if n["op"] == "tensor"}
    found = directions(*asked, contents=contents, **more)
    assert found == directions(*asked, contents=contents, **more)
    return sum(d.rank for d in found if d.site == site)


def test_a_sum_of_products_with_constants_is_one_direction() -> None:
    nodes = [*dots(3), node("add", "a", a="d0", b="d1"), node("scale", "b", of="d2", by=-2.0)]
    assert total(*nodes, node("sub", "out", a="a", b="b")) == 1


def test_where_rows_choose_between_directions_all_count() -> None:
    mask = [node("norm", "n", of="r"), node("gt", "g", a="n", b=1.0)]
    wheres = [
        node("where", f"w{i}", cond="g", a="d0" if i == 1 else f"w{i - 1}", b=f"d{i}") for i in range(1, 5)
    ]
    for i in range(1, 5):
        assert total(*dots(5), *mask, *wheres, last=f"w{i}") == i + 2  # and the norm
    asked = [*dots(5), *mask, *wheres, node("score", "s", of="w4")]
    contents = {f"v{i}": str(i) for i in range(5)}
    few = [{**n, "at": "prompt[*]"} if n["op"] == "read" else n for n in asked]
    assert directions(*asked, contents=contents) == directions(*few, contents=contents, request="z")


def test_a_direction_that_was_counted_in_a_choice_is_counted() -> None:
    nodes = [*dots(2), node("where", "out", cond="m", a="d0", b="d1"), node("score", "s", of="out")]
    nodes.insert(-2, node("gt", "m", a="d0", b=0.0))
    contents = {"v0": "v", "v1": "w"}
    assert set(directions(*probe())) < set(directions(*nodes, contents=contents))


GATES: list[tuple[str, list[dict[str, Any]], int]] = [
    ("products with stored numbers", [
        *held("x", "y"), *dots(2), node("scale", "p", of="d0", by="x"), node("scale", "q", of="d1", by="y"),
        node("add", "out", a="p", b="q")], 4),
    ("a difference of them", [
        *held("x"), *dots(2), node("scale", "p", of="d0", by="x"), node("sub", "out", a="p", b="d1")], 3),
    ("masks of stored numbers", [
        *held("x"), *dots(2), node("gt", "m", a="x", b=0.0), node("where", "out", cond="m", a="d0", b="d1")], 3),
    ("relus of sums with stored numbers", [
        *held("x", "y"), *dots(2), node("add", "p", a="d0", b="x"), node("add", "q", a="d1", b="y"),
        node("relu", "pr", of="p"), node("relu", "qr", of="q"), node("add", "out", a="pr", b="qr")], 2),
    ("columns of a matrix that a relu lets through", [
        *held(), *dots(0), node("tensor", "m", name="m"), node("add", "p", a="r", b="g"), node("matmul", "q", a="p", b="m"),
        node("relu", "t", of="q"), node("mean", "out", of="t", over="width")], 2),
    ("the largest of a row", [
        *held(), read(), node("add", "p", a="r", b="g"), node("topk", "t", of="p", k=1),
        node("mean", "out", of="t", over="width")], 8),
    ("features of a dictionary", [
        *held(), read(), SAE, node("add", "p", a="r", b="g"), node("encode", "f", of="p", sae="sae"),
        node("mean", "out", of="f", over="width")], 8),
    ("rows that a mask chooses", [
        *held("x"), read(), node("gt", "m", a="x", b=0.0), node("tensor", "mm", name="w_enc"), node("tensor", "u", name="b_enc"),
        node("matmul", "p", a="r", b="mm"), node("matmul", "q", a="g", b="mm"),
        node("where", "w", cond="m", a="p", b="q"), node("dot", "out", a="w", b="u")], 3),
    ("rows times stored numbers", [
        *held("x", "y"), read(), node("tensor", "m1", name="w_enc"), node("tensor", "m2", name="w_enc"),
        node("tensor", "u", name="b_enc"), node("matmul", "p", a="r", b="m1"), node("matmul", "q", a="r", b="m2"),
        node("scale", "ps", of="p", by="x"), node("scale", "qs", of="q", by="y"), node("add", "w", a="ps", b="qs"),
        node("dot", "out", a="w", b="u")], 4),
    # lengths of sums are products of rows with rows: as many directions as rows
    ("the length of a sum with stored rows", [*held(), read(), node("add", "p", a="r", b="g"), node("norm", "out", of="p")], 2),
    ("a sum with stored rows over its length", [
        *held(), read(), node("add", "p", a="r", b="g"), node("normalize", "n", of="p"), node("tensor", "u", name="v"),
        node("dot", "out", a="n", b="u")], 2),
    ("the length of a sum with a vector times stored numbers", [
        *held("x"), read(), node("tensor", "u", name="v"), node("scale", "ux", of="u", by="x"),
        node("add", "p", a="r", b="ux"), node("norm", "out", of="p")], 2),
    ("the length of a sum with a vector that rows choose", [
        *dots(1), node("gt", "m", a="d0", b=0.0), node("tensor", "u", name="v"), node("tensor", "w", name="v"),
        node("where", "c", cond="m", a="u", b="w"), node("add", "p", a="r", b="c"), node("norm", "out", of="p")], 3),
    ("distances from the mean", [
        read(at="prompt[*]"), node("mean", "m", of="r"), node("sub", "p", a="r", b="m"), node("norm", "out", of="p")], 8),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "count"), [gate[1:] for gate in GATES], ids=[gate[0] for gate in GATES])
def test_directions_that_rows_can_tell_apart_all_count(nodes: list[dict[str, Any]], count: int) -> None:
    assert total(*nodes, nonzeros=12) == count


def test_of_features_those_count_that_a_product_looks_at() -> None:
    feature = [read(), SAE, node("encode", "f", of="r", sae="sae"), node("tensor", "u", name="b_enc"),
               node("dot", "out", a="f", b="u")]  # fmt: skip
    assert [total(*feature, nonzeros=n) for n in (1, 3, 12)] == [1, 3, 8]
    thin = [*feature[:-1], node("scale", "us", of="u", by=2.0), node("dot", "out", a="f", b="us")]
    assert [total(*thin, nonzeros=n) for n in (1, 3, 12)] == [1, 3, 8]


def test_the_probe_of_a_bent_row_looks_at_all_of_it() -> None:
    asked = [read(), node("relu", "t", of="r"), node("score", "s", of="t", probe=PROBE, site="resid_post.1")]
    assert [d.rank for d in directions(*asked)] == [8]


# ---- rows that leave ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "new", "rank"), [("prompt[-1]", 0, 2), ("prompt[*]", 0, 8), ("gen[*]", 2, 4), ("all", 3, 8)]
)
def test_raw_rows_are_as_many_directions_as_they_can_span(at: str, new: int, rank: int) -> None:
    nodes = [
        read(at=at),
        read("s", "mlp_act.2", at),
        node("raw", "x", of=["r", "s"]),
        node("raw", "y", of=["r"]),
    ]
    found = directions(*nodes, case=Case(lengths=(5, 7), new=new))
    wide = {2: 2, 8: 12, 4: 4}[rank] if at != "all" else 16
    assert [(d.site, d.rank) for d in found] == [
        ("resid_pre.2", rank),
        ("mlp_act.2", wide),
        ("resid_pre.2", rank),
    ]
    assert len({d.digest for d in found}) == 3
    again = directions(*nodes, case=Case(lengths=(5, 7), new=new), request="z" * 64)
    assert not {d.digest for d in found} & {d.digest for d in again}


def test_which_sites_leave_and_whether_with_position_0() -> None:
    nodes = [
        read("a"), read("b", "mlp_act.2"), read("c", at="prompt[0]"), read("d", "z.3"), read("e", "final_norm"),
        node("raw", "x", of=["a", "b"]), node("raw", "w", of=["e"]),
        node("raw", "y", of=["c"]), node("raw", "z", of=["a"]), node("capture", "k", of=["d"]),
    ]  # fmt: skip
    assert exposure.exported(CASE.check(*nodes), 4) == (
        (Site("resid_post", 1), False),
        (Site("mlp_act", 2), False),
        (Site("resid_pre", 4), False),
        (Site("resid_post", 1), True),
    )
    assert exposure.exported(CASE.check(LOGPROBS), 4) == ()


def test_every_operand_of_the_table_is_followed() -> None:
    """A field that takes operands and is not followed would hide what is computed behind an id."""
    for row in SPEC.values():
        fields = {
            name: ("a",) if "tuple" in str(row.node.model_fields[name].annotation) else "a"
            for name in row.takes
        }
        made = row.node.model_construct(op=row.op, id="x", **fields)
        assert isinstance(made, Node)
        assert set(spans.operands(made)) == ({"a"} if row.takes else set()), row.op


def test_every_op_with_a_value_has_a_rule() -> None:
    assert set(spans._RULES) == {
        row.node for row in SPEC.values() if row.group in ("read", "constant", "arithmetic")
    }

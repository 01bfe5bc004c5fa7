"""Directions: the same probe on other prompts is one direction, another probe is another, products are many."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

from typing import Any

import pytest
from graph_room import DIRECTION, FINAL, LOGPROBS, MANY, PROBE, Case, node, read

from trocar.graph import exposure
from trocar.graph.exposure import Direction
from trocar.graph.ops import Node
from trocar.graph.spec import SPEC
from trocar.sites import Site

CASE = Case(lengths=(5, 7))
REQUEST = "q" * 64
SAE = node("sae", "sae", w_enc="w_enc", b_enc="b_enc", w_dec="w_dec", b_dec="b_dec")


def directions(
    *nodes: dict[str, Any], contents: dict[str, str] | None = None, request: str = REQUEST, case: Case = CASE
) -> list[Direction]:
    """Of an accepted program whose arrays hold what `contents` says of them, else their own name."""
    checked = case.check(*nodes)
    named = {n["id"]: n.get("name", n["id"]) for n in nodes if n["op"] in ("tensor", "sae")}
    return list(exposure.directions(checked, named | (contents or {}), request))


def one(*nodes: dict[str, Any], **more: Any) -> Direction:
    (found,) = directions(*nodes, **more)
    return found


def probe(at: str = "prompt[-1]", site: str = "resid_post.1", **ids: str) -> list[dict[str, Any]]:
    """The inner product of a site's rows with the array `v`."""
    r, v, d, s = (ids.get(x, x) for x in "rvds")
    return [read(r, site, at), node("tensor", v, name="v"), node("dot", d, a=r, b=v), node("score", s, of=d)]


def test_a_score_is_one_direction_of_its_site() -> None:
    found = one(*probe())
    assert (found.site, found.rank) == ("resid_post.1", 1)
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
    ("the same stream under its other name", probe(site="resid_pre.2"), {}),
    ("a scaled one", [*probe()[:3], node("scale", "x", of="d", by=2.0), node("score", "s", of="x")], {}),
    ("a mask of it", [*probe()[:3], node("gt", "x", a="d", b=2.0), node("score", "s", of="x")], {}),
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


def test_the_names_of_a_dictionarys_arrays_do_not_matter() -> None:
    def asked(sae: dict[str, Any]) -> Direction:
        nodes = [
            read(),
            sae,
            node("encode", "f", of="r", sae="sae"),
            node("norm", "d", of="f"),
            node("score", "s", of="d"),
        ]
        return one(*nodes, contents={"sae": "same"})

    jump = {**SAE, "activation": "jumprelu"}
    assert asked({**SAE, "b_dec": "v"}) == asked(SAE)
    assert asked({**jump, "threshold": "b_enc"}) != asked(SAE)
    assert asked({**SAE, "center": False}) != asked(SAE)


def test_an_array_without_its_contents_is_a_fault() -> None:
    with pytest.raises(KeyError):
        list(exposure.directions(CASE.check(*probe()), {}, REQUEST))


def test_a_score_of_two_sites_is_a_direction_of_each() -> None:
    nodes = [read(), read("t", "resid_post.3"), node("add", "sum", a="r", b="t"), node("tensor", "v", name="v"),
             node("dot", "d", a="sum", b="v"), node("score", "s", of="d")]  # fmt: skip
    found = directions(*nodes)
    assert [(d.site, d.rank) for d in found] == [("resid_post.1", 1), ("resid_post.3", 1)]
    assert len({d.digest for d in found}) == 1


def test_the_same_score_twice_is_the_same_direction_twice() -> None:
    first, second = directions(*probe(), *probe(r="r2", v="v2", d="d2", s="s2"))
    assert first == second


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


def test_where_rows_choose_between_directions_both_count() -> None:
    pairs = [node("tensor", f"v{i}", name="v") for i in range(5)]
    dots = [node("dot", f"d{i}", a="r", b=f"v{i}") for i in range(5)]
    mask = [read(at="prompt[*]"), node("norm", "n", of="r"), node("gt", "g", a="n", b=1.0)]
    wheres = [
        node("where", f"w{i}", cond="g", a="d0" if i == 1 else f"w{i - 1}", b=f"d{i}") for i in range(1, 5)
    ]
    contents = {f"v{i}": str(i) for i in range(5)}
    for i in range(1, 5):
        found = one(*mask, *pairs, *dots, *wheres, node("score", "s", of=f"w{i}"), contents=contents)
        assert found.rank == i + 1
        assert (
            one(*mask, *pairs, *dots, *wheres, node("score", "s", of=f"w{i}"), contents=contents, request="z")
            == found
        )
    few = [{**n, "at": "prompt[0]"} if n["op"] == "read" else n for n in mask]
    found = one(*few, *pairs, *dots, *wheres, node("score", "s", of="w4"), contents=contents)
    assert found.rank == 5  # of two rows now; more rows another time are the same directions


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
        ("resid_post.1", rank),
        ("mlp_act.2", wide),
        ("resid_post.1", rank),
    ]
    assert len({d.digest for d in found}) == 3
    again = directions(*nodes, case=Case(lengths=(5, 7), new=new), request="z" * 64)
    assert not {d.digest for d in found} & {d.digest for d in again}


def test_which_sites_leave_and_whether_with_position_0() -> None:
    nodes = [
        read("a"), read("b", "mlp_act.2"), read("c", at="prompt[0]"), read("d", "z.3"), node("raw", "x", of=["a", "b"]),
        node("raw", "y", of=["c"]), node("raw", "z", of=["a"]), node("capture", "k", of=["d"]),
    ]  # fmt: skip
    assert exposure.exported(CASE.check(*nodes)) == (
        (Site("resid_post", 1), False),
        (Site("mlp_act", 2), False),
        (Site("resid_post", 1), True),
    )
    assert exposure.exported(CASE.check(LOGPROBS)) == ()


def test_every_operand_of_the_table_is_followed() -> None:
    """A field that takes operands and is not followed would hide what is computed behind an id."""
    for row in SPEC.values():
        fields = {
            name: ("a",) if "tuple" in str(row.node.model_fields[name].annotation) else "a"
            for name in row.takes
        }
        made = row.node.model_construct(op=row.op, id="x", **fields)
        assert isinstance(made, Node)
        assert set(exposure._operands(made)) == ({"a"} if row.takes else set()), row.op

"""What a worker may hand over: exactly the arrays that follow from the program, and lengths that are possible."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from answer_room import EXACT, FACTS, KEPT, arrays, checked, dot, node, read
from hypothesis import given
from hypothesis import strategies as st

from trocar import errors
from trocar.gate import schema
from trocar.gate.answers import Raw, Reader
from trocar.gate.coding import Coder
from trocar.gate.schema import Field, fields
from trocar.graph.check import Checked
from trocar.graph.spec import OUTPUTS

PROBS = {"site": "attn_probs.1", "keys": "prompt[0:2]"}
LENGTHS = ("lengths", "<i4", (2,))
ROWS_KEPT = node("stored", "k", handle=KEPT, site="resid_post.1")
TWO = [read(), read("s", site="mlp_act.2")]
MASK = [read(), *dot(), node("gt", "g", a="d", b=0.0)]

# Two prompts of three and five tokens; programs with generation make four tokens at most.
DECLARED: list[tuple[str, list[dict[str, Any]], int, list[tuple[str, str, tuple[int, ...]]]]] = [
    ("capture", [read(), node("capture", of=["r"])], 0, []),
    ("capture of generated rows", [read(at="all"), node("capture", of=["r"])], 4, [LENGTHS]),
    ("lens", [read(), node("lens", of=["r"], top_k=3)], 0, [("x.ids", "<i4", (1, 2, 3)), ("x.logprobs", "<f4", (1, 2, 3))]),
    (
        "lens of two values, all rows",
        [read(at="prompt[*]"), read("s", site="final_norm", at="prompt[*]"), node("lens", of=["r", "s"], top_k=1)],
        0,
        [("x.ids", "<i4", (2, 8, 1)), ("x.logprobs", "<f4", (2, 8, 1))],
    ),
    ("logprobs", [node("logprobs", tokens=["a", "b"])], 0, [("x.logprobs", "<f4", (2, 2))]),
    ("logprobs of generated", [node("logprobs", at="all", tokens=["a"])], 4, [("x.logprobs", "<f4", (16, 1)), LENGTHS]),
    ("score", [read(), *dot(), node("score", of="d")], 0, [("x.scores", "<f4", (2,))]),
    ("score of a mask", [*MASK, node("score", of="g")], 0, [("x.scores", "<f4", (2,))]),
    ("score of stored rows", [ROWS_KEPT, *dot("k"), node("score", of="d")], 0, [("x.scores", "<f4", (3,))]),
    ("score of a prompt", [read(at="prompt[*]"), node("mean", "a", of="r"), *dot("a"), node("score", of="d")], 0,
     [("x.scores", "<f4", (2,))]),
    ("score of generated", [read(at="gen[1:3]"), *dot(), node("score", of="d")], 4, [("x.scores", "<f4", (4,)), LENGTHS]),
    ("metric", [node("metric", metric="logit_diff", tokens=["a", "b"])], 0, [("x.values", "<f4", (2,))]),
    ("pattern", [read(**PROBS), node("pattern", of="r")], 0, [("x.probs", "<f4", (2, 2, 2))]),
    ("pattern of a head", [read(at="all", heads=[1], **PROBS), node("pattern", of="r")], 4,
     [("x.probs", "<f4", (16, 1, 2)), LENGTHS]),
    ("raw", [*TWO, node("raw", of=["r", "s"])], 0, [("x.0", "<f4", (2, 8)), ("x.1", "<f4", (2, 16))]),
    ("text", [node("text")], 4, [("x.ids", "<i4", (2, 4)), LENGTHS]),
    ("edits", [node("edit.scale", "e", site="resid_post.1", by=2.0), node("edit.set", "f", site="z.2", value="zero"),
     node("metric", metric="cross_entropy", at="prompt[0]")], 0,
     [("x.values", "<f4", (2,)), ("receipts.norms", "<f4", (2, 2)), ("receipts.rows", "<i4", (2,))]),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "new", "wanted"), [c[1:] for c in DECLARED], ids=[c[0] for c in DECLARED])
def test_the_arrays_of_every_output(
    nodes: list[dict[str, Any]], new: int, wanted: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    found = fields(checked(*nodes, new=new), FACTS.n_heads)
    assert [(f.name, f.type, f.shape) for f in found] == wanted
    assert [f.size_bytes for f in found] == [4 * math.prod(shape) for _, _, shape in wanted]


def test_every_output_op_is_in_the_table() -> None:
    assert {n["op"] for _, nodes, _, _ in DECLARED for n in nodes} >= OUTPUTS


# ---- anything else --------------------------------------------------------------------------------


def refused(program: Checked, given: dict[str, Any]) -> errors.ServerFault:
    with pytest.raises(errors.ServerFault) as caught:
        Reader.of(Raw(program, given, {}), FACTS, _silent(), Coder(EXACT))
    assert (caught.value.code, caught.value.status) == ("bad_result", 500)
    assert "777" not in str(caught.value)  # nothing of an array is in the text
    return caught.value


def _silent() -> Any:
    """A tokenizer that is not asked."""
    return None


SCORED = checked(read(), *dot(), node("score", of="d"), node("text", "t"), new=4)
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("more rows", {"x.scores": np.full(3, 777, "<f4")}),
    ("fewer rows", {"x.scores": np.full(1, 777, "<f4")}),
    ("another rank", {"x.scores": np.full((2, 1), 777, "<f4")}),
    ("no rank", {"x.scores": np.array(777, "<f4")}),
    ("doubles", {"x.scores": np.full(2, 777, "<f8")}),
    ("halves", {"x.scores": np.full(2, 777, "<f2")}),
    ("whole numbers for floats", {"x.scores": np.full(2, 777, "<i4")}),
    ("floats for whole numbers", {"t.ids": np.full((2, 4), 777, "<f4")}),
    ("long ids", {"t.ids": np.full((2, 4), 777, "<i8")}),
    ("unsigned ids", {"t.ids": np.full((2, 4), 777, "<u4")}),
    ("the other byte order", {"x.scores": np.full(2, 777, ">f4")}),
    ("objects", {"x.scores": np.array(["777", None], dtype=object)}),
    ("an array more", {"more": np.full(2, 777, "<f4")}),
    ("an array of another program", {"x.values": np.full(2, 777, "<f4")}),
]


@pytest.mark.parametrize("wrong", [w for _, w in WRONG], ids=[name for name, _ in WRONG])
def test_anything_but_the_declared_arrays_is_refused(wrong: dict[str, Any]) -> None:
    refused(SCORED, {**arrays(SCORED), **wrong})


@pytest.mark.parametrize("name", ["x.scores", "t.ids", "lengths"])
def test_an_array_that_is_missing_is_refused(name: str) -> None:
    given = arrays(SCORED)
    del given[name]
    refused(SCORED, given)
    refused(SCORED, {**given, "other": arrays(SCORED)[name]})


def test_nothing_is_declared_for_a_capture_and_nothing_may_come() -> None:
    program = checked(read(), node("capture", of=["r"]))
    schema.require({}, fields(program, 2))
    refused(program, {"x": np.full((2, 8), 777, "<f4")})


@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3), st.lists(st.integers(1, 4), min_size=0, max_size=3)
)
def test_only_the_very_shape_is_taken(declared: list[int], came: list[int]) -> None:
    field, array = Field("a", "<f4", tuple(declared)), np.zeros(came, "<f4")
    if declared == came:
        schema.require({"a": array}, (field,))
        return
    with pytest.raises(errors.ServerFault, match="bad_result"):
        schema.require({"a": array}, (field,))


# ---- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(0, 4), (4, 5), (-1, 2), (2**31 - 1, 1)])
@pytest.mark.parametrize("eos", [True, False])
def test_lengths_that_are_not_possible_are_refused(lengths: tuple[int, int], eos: bool) -> None:
    program = checked(node("text", "t"), new=4, eos=eos)
    assert "generated tokens" in str(refused(program, arrays(program, {"lengths": np.array(lengths, "<i4")})))


@given(st.integers(1, 4), st.integers(1, 4))
def test_a_text_ends_early_only_where_it_may(a: int, b: int) -> None:
    given = {"lengths": np.array((a, b), "<i4")}
    free, bound = (checked(node("text", "t"), new=4, eos=eos) for eos in (True, False))
    assert schema.sampled(free, arrays(free, given)) == (a, b)
    if a == b == 4:
        assert schema.sampled(bound, arrays(bound, given)) == (4, 4)
    else:
        assert "ended early" in str(refused(bound, arrays(bound, given)))


def test_without_generation_nothing_was_sampled() -> None:
    assert schema.sampled(checked(node("logprobs", tokens=["a"])), {}) == (0, 0)


# ---- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "prompts", "positions"),
    [
        ("prompt[-1]", (0, 1), (2, 4)),
        ("prompt[0,-1]", (0, 0, 1, 1), (0, 2, 0, 4)),
        ("gen[*]", (0, 0, 1), (3, 4, 5)),
        ("gen[1]", (0,), (4,)),
        ("gen[2:]", (), ()),
        ("all", (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1), (0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5)),
    ],
)
def test_rows_follow_from_how_many_tokens_came(
    at: str, prompts: tuple[int, ...], positions: tuple[int, ...]
) -> None:
    """The first prompt made two tokens, the second one."""
    program = checked(read(at=at), node("lens", of=["r"]), node("logprobs", "p", at=at, tokens=["a"]), new=4)
    value = program.values["r"]
    assert schema.tags_of(value, program, (2, 1)) == (prompts, positions)
    assert schema.tags_at(at, program, (2, 1)) == (prompts, positions)
    assert schema.counts_of(value, program, (2, 1)) == tuple(prompts.count(p) for p in (0, 1))
    full = schema.counts_of(value, program, (4, 4))
    assert sum(full) == schema.most_rows(value, program)


def test_rows_of_whole_prompts_and_stored_rows_have_no_position() -> None:
    program = checked(
        read(at="prompt[*]"), node("mean", "m", of="r"), *dot("m"), ROWS_KEPT, node("norm", "n", of="k"),
        node("score", "a", of="d"), node("score", "b", of="n"),
    )  # fmt: skip
    for name, prompts in (("m", (0, 1)), ("d", (0, 1)), ("k", (0, 0, 1)), ("n", (0, 0, 1))):
        value = program.values[name]
        assert schema.tags_of(value, program, (0, 0)) == (prompts, (-1,) * len(prompts))
        assert schema.counts_of(value, program, (0, 0)) == tuple(prompts.count(p) for p in (0, 1))


def test_heads_are_those_that_were_read() -> None:
    for heads, wanted in ((None, (0, 1)), ([1], (1,)), ([1, 0], (1, 0))):
        program = checked(read(heads=heads, **PROBS), node("pattern", of="r"))
        assert schema.heads_of(next(program.outputs()), program, FACTS.n_heads) == wanted  # type: ignore[arg-type]

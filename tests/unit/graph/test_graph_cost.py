"""What a program costs, counted by hand, and the table that the prices stand in."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import typing
from dataclasses import replace
from typing import Any

import pytest
from graph_drafts import drafts
from graph_room import ACTS, LOGPROBS, PRICES, PROBE, TOKEN_BITS, Case, facts, node, program, read
from hypothesis import HealthCheck, given, settings

from trocar.graph import check, cost, ops, positions, spec
from trocar.graph.cost import Prices
from trocar.graph.labels import Label, join
from trocar.graph.program import Node, canonical, json_schema
from trocar.sites import Site

CASE = Case()
V = node("tensor", "v", name="v")


def bits(case: Case, *nodes: dict[str, object]) -> dict[str, int]:
    checked = case.check(*nodes)
    assert checked.cost.total_bits == sum(checked.cost.bits_out.values())
    return checked.cost.bits_out


def test_lens_counts_ids_and_numbers_of_every_row_of_every_value() -> None:
    nodes = [read(at="prompt[*]"), read("s", site="final_norm", at="prompt[*]")]
    found = bits(CASE, *nodes, node("lens", of=["r", "s"], top_k=3))
    assert found == {"overhead": 256, "x": 2 * (5 + 7) * 3 * (TOKEN_BITS + 32)}


def test_text_counts_an_end_mark_and_needs_no_other_length() -> None:
    assert bits(CASE.having(new=6), node("text")) == {"overhead": 256, "x": 2 * 7 * TOKEN_BITS}


def test_generated_rows_tell_a_length_per_prompt_once() -> None:
    nodes = [
        read(at="gen[*]"),
        node("dot", "d", a="r", b="v"),
        node("score", "s", of="d"),
        node("capture", "c", of=["r"]),
    ]
    found = bits(CASE.having(new=6), V, *nodes)
    assert found == {"overhead": 256, "lengths": 2 * 3, "s": 2 * 6 * 32, "c": 0}  # 0 to 6 tokens: 3 bits
    checked = CASE.having(new=6).check(V, *nodes)
    assert checked.reads_gen
    assert checked.cost.bytes_stored == 12 * 8 * 4 + 12 * 32
    assert checked.cost.rows_read == 12
    assert checked.cost.tokens == 12 + 12
    assert checked.cost.download_bits == 12 * 8 * 16


def test_logprobs_at_all() -> None:
    found = bits(CASE.having(new=6), node("logprobs", at="all", tokens=["a", "b"]))
    assert found == {"overhead": 256, "lengths": 6, "x": (12 + 12) * 2 * 32}


def test_receipts_count_two_norms_and_the_rows_over_all_prompts() -> None:
    edit = node("edit.scale", "e", site="resid_post.1", by=2.0)
    assert bits(CASE, edit, LOGPROBS)["receipts"] == 2 * 32
    found = bits(CASE.having(new=6), edit, node("edit.set", "f", site="v.1", value="zero"), LOGPROBS)
    assert found["receipts"] == 2 * (2 * 32 + 4)  # 0 to 12 rows: 4 bits
    assert "lengths" not in found


def test_scores_of_stored_rows_and_of_a_probe() -> None:
    stored = node("stored", "r", handle=ACTS, site="resid_post.1")
    assert bits(CASE, stored, V, node("dot", "d", a="v", b="r"), node("score", of="d"))["x"] == 2 * 32
    found = bits(CASE, read(at="prompt[0:3]"), node("score", of="r", probe=PROBE, site="resid_post.1"))
    assert found["x"] == 6 * 32


COARSE = Prices(scalar_bits=8, overhead_bits=300, vector_bits=4)


def coarse(case: Case, *nodes: dict[str, Any]) -> dict[str, int]:
    return check.check(program(*nodes), case.scope(), COARSE).cost.bits_out


def test_numbers_of_few_bits_share_a_scale_where_they_are_one_output() -> None:
    """A scale of 16 bits with scores and metrics; none with log-probabilities, probabilities and truth values."""
    d = [read(at="prompt[0:2]"), V, node("dot", "d", a="r", b="v")]
    assert coarse(CASE, *d, node("score", of="d")) == {"overhead": 300, "x": 4 * 8 + 16}
    assert coarse(CASE, *d, node("gt", "g", a="d", b=0.0), node("score", of="g"))["x"] == 4
    assert coarse(CASE, node("metric", metric="cross_entropy", at="prompt[0]"))["x"] == 2 * 8 + 16
    assert coarse(CASE, node("logprobs", tokens=["a", "b"]))["x"] == 2 * 2 * 8
    assert coarse(CASE, read(), node("lens", of=["r"], top_k=3))["x"] == 2 * 3 * (TOKEN_BITS + 8)
    probs = node("read", "p", site="attn_probs.1", at="prompt[-1]", keys="prompt[0:3]")
    assert coarse(CASE, probs, node("pattern", of="p"))["x"] == 2 * 2 * 3 * 8
    edit = node("edit.scale", "e", site="resid_post.1", by=2.0)
    assert coarse(CASE.having(new=6), edit, node("text"))["receipts"] == 2 * 16 + 4


def test_raw_rows_have_a_scale_each() -> None:
    nodes = [read(at="prompt[0:2]"), read("s", "mlp_act.1", "prompt[0:2]"), node("raw", of=["r", "s"])]
    assert coarse(CASE, *nodes)["x"] == 4 * (8 * 4 + 16) + 4 * (16 * 4 + 16)
    assert bits(CASE, *nodes)["x"] == 4 * 8 * 32 + 4 * 16 * 32
    generated = [{**n, "at": "all"} if n["op"] == "read" else n for n in nodes]
    assert coarse(CASE.having(new=6), *generated)["x"] == 24 * (8 * 4 + 16) + 24 * (16 * 4 + 16)


def test_flops_count_what_goes_through_the_head() -> None:
    plain = CASE.check(LOGPROBS, read()).cost.flops
    assert plain == 2 * 10_000 * 12 + 2 * 8 * 300 * 2
    lens = CASE.check(LOGPROBS, read(at="prompt[*]"), node("lens", of=["r"])).cost.flops
    assert lens - plain == 2 * 8 * 300 * 12


@pytest.mark.parametrize(("vocabulary", "each"), [(2, 1), (3, 2), (256, 8), (257, 9), (49152, 16)])
def test_bits_of_a_token(vocabulary: int, each: int) -> None:
    assert cost.token_bits(facts(vocab_size=vocabulary)) == each


def test_a_flat_list_of_tokens_is_encoded_once() -> None:
    asked = []
    scope = CASE.having(lengths=(3,) * 50).scope()
    spy = replace(scope, encode=lambda text: asked.append(text) or [1])
    nodes = [node("logprobs", f"l{i}", tokens=["a", "b", "a"]) for i in range(5)]
    checked = check.check(program(*nodes), spy, PRICES)
    assert asked == ["a", "b"]
    assert checked.token_ids["l0"] == ((1, 1, 1),) * 50


def test_nested_tokens_are_kept_by_prompt() -> None:
    checked = CASE.check(node("logprobs", tokens=[["a", 5], [7, "b"]]))
    assert checked.token_ids["x"] == ((97, 5), (7, 98))


def test_edits_and_outputs_in_order() -> None:
    checked = CASE.check(
        V, node("edit.add", "e", site="z.1", value="v"), LOGPROBS, read(), node("lens", of=["r"])
    )
    assert [n.id for n in checked.edits()] == ["e"]
    assert [n.id for n in checked.outputs()] == ["out", "x"]


def test_types_of_values() -> None:
    values = CASE.check(
        read(at="prompt[0:2]"), read("late", site="resid_post.3", at="prompt[1:3]"), V,
        node("mean", "m", of="r"), node("add", "sum", a="m", b="v"), node("sub", "rows", a="r", b="m"),
        node("add", "both", a="r", b="late"), node("dot", "d", a="late", b="both"), node("scale", "twice", of="d", by=2.0),
        node("stored", "s", handle=ACTS, site="resid_post.1"), node("vector", "w", handle=PROBE, site="resid_post.1", part="weights"),
        LOGPROBS,
    ).values  # fmt: skip
    kinds = {name: (v.kind, v.width, v.counts, v.at) for name, v in values.items()}
    assert kinds["m"] == ("per_prompt", 8, (1, 1), None)
    assert kinds["sum"] == ("per_prompt", 8, (1, 1), None)
    assert kinds["rows"] == ("rows", 8, (2, 2), "prompt[0:2]")
    assert kinds["d"] == kinds["twice"] == ("scalars", 1, (2, 2), "prompt[1:3]")
    assert kinds["s"] == ("rows", 8, (1, 1), None)
    assert kinds["w"] == ("vector", 8, (), None)
    assert values["v"].label is Label.USER
    assert values["sum"].label is Label.ACT
    assert values["both"].ready == values["late"].ready > values["r"].ready > values["v"].ready == 0
    assert values["both"].sites == (Site("resid_post", 1), Site("resid_post", 3))


def test_labels_join_upwards() -> None:
    assert join() is Label.PUBLIC
    assert join(Label.ACT, Label.USER) is Label.ACT


@pytest.mark.parametrize(
    ("text", "length", "new", "prompt", "gen"),
    [
        ("prompt[-1]", 5, 0, [4], []),
        ("prompt[3]", 5, 0, [3], []),
        ("prompt[1:-1]", 5, 0, [1, 2, 3], []),
        ("prompt[:-1]", 5, 0, [0, 1, 2, 3], []),
        ("prompt[-2:]", 5, 0, [3, 4], []),
        ("prompt[*]", 2, 0, [0, 1], []),
        ("gen[2]", 5, 4, [], [2]),
        ("gen[1:]", 5, 4, [], [1, 2, 3]),
        ("gen[0:2]", 5, 4, [], [0, 1]),
        ("all", 2, 3, [0, 1], [0, 1, 2]),
    ],
)
def test_positions(text: str, length: int, new: int, prompt: list[int], gen: list[int]) -> None:
    selector = positions.parse(text, "at")
    rows = positions.resolve(selector, length, new, "at", 0)
    assert (list(rows.prompt), list(rows.gen)) == (prompt, gen)
    assert selector.text == text
    assert selector.static == (not text.startswith(("gen", "all")))
    assert positions.parse(selector.text, "at") == selector


@pytest.mark.parametrize(
    ("text", "canonical_text"),
    [
        ("prompt[:]", "prompt[*]"),
        ("gen[00:01]", "gen[0:1]"),
        ("prompt[-0]", "prompt[0]"),
        ("gen[:7]", "gen[:7]"),
    ],
)
def test_one_spelling(text: str, canonical_text: str) -> None:
    assert positions.parse(text, "at").text == canonical_text


def test_prompts_of_one_length_share_their_rows() -> None:
    rows = (
        CASE.having(lengths=(5, 7, 5)).check(read(at="prompt[-2:]"), LOGPROBS).selections["prompt[-2:]"].rows
    )
    assert rows[0] is rows[2]
    assert [list(x.prompt) for x in rows] == [[3, 4], [5, 6], [3, 4]]


# ---- the table ------------------------------------------------------------------------------------


def members() -> list[type[ops.Node]]:
    union = typing.get_args(Node)[0]
    return list(typing.get_args(union))


def test_every_node_has_exactly_one_row() -> None:
    assert [row.node for row in spec.SPEC.values()] == members()
    shared = (ops.Node, ops.Pair, ops.Comparison, ops.Edit)
    defined = {v for v in vars(ops).values() if isinstance(v, type) and issubclass(v, ops.Node)}
    assert set(members()) == defined - set(shared)
    assert set(ops.EDIT_NODES) == {r.node for r in spec.SPEC.values() if r.group == "edit"}
    assert set(ops.OUTPUT_NODES) == {r.node for r in spec.SPEC.values() if r.group == "output"}


@pytest.mark.parametrize("row", spec.SPEC.values(), ids=lambda r: r.op)
def test_a_row_is_complete(row: spec.OpSpec) -> None:
    assert row.node.model_fields["op"].default == row.op
    assert set(row.takes) <= set(row.node.model_fields)
    assert row.doc
    assert row.gives
    assert (row.bits is not None) == (row.group == "output")
    assert (row.declassifier != "none") == (row.group == "output")
    assert bool(row.unit) == (row.group == "output")
    assert (row.label == "none") == (row.group in ("edit", "output", "control"))
    ids = "pattern='^[A-Za-z_]"  # how a field that takes an id shows
    fields = row.node.model_fields.items()
    refs = {n for n, f in fields if n != "id" and ids in repr((f.annotation, f.metadata))}
    assert refs == set(row.takes)
    assert set(row.node.model_fields) <= set(spec.field_names())


SOURCES = {"user": {Label.USER}, "act": {Label.ACT}}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drafts())
def test_the_table_says_the_label_that_the_checker_gives(
    draft: tuple[list[dict[str, Any]], tuple[int, ...]],
) -> None:
    nodes, lengths = draft
    checked = Case(lengths=lengths, new=4).check(*nodes)
    for one in checked.program.nodes:
        said = spec.SPEC[one.op].label
        assert (one.id in checked.values) == (said != "none"), one.op
        if said == "join":
            operands = [getattr(one, name) for name in spec.SPEC[one.op].takes]
            below = [checked.values[ref].label for ref in operands if isinstance(ref, str)]
            assert checked.values[one.id].label is max(below), one.op
        elif said != "none":
            assert {checked.values[one.id].label} == SOURCES[said], one.op


def test_every_op_with_a_value_was_judged() -> None:
    """What random programs rarely have: a program with each of them, so that no label goes unread."""
    rows = [read(at="prompt[0:2]"), node("tensor", "v", name="v"), node("tensor", "m", name="m")]
    made = [
        node("vector", "w", handle=PROBE, site="resid_post.1"), node("stored", "k", handle=ACTS, site="resid_post.1"),
        node("sae", "d", w_enc="w_enc", b_enc="b_enc", w_dec="w_dec", b_dec="b_dec"), node("add", "a1", a="r", b="v"),
        node("sub", "a2", a="v", b="w"), node("scale", "a3", of="v", by=2.0), node("dot", "a4", a="r", b="v"),
        node("matmul", "a5", a="v", b="m"), node("norm", "a6", of="r"), node("normalize", "a7", of="v"),
        node("relu", "a8", of="v"), node("topk", "a9", of="v", k=2), node("mean", "b1", of="r"),
        node("encode", "b2", of="r", sae="d"), node("eq", "b3", a="a4", b=1.0), node("gt", "b4", a="a4", b="a6"),
        node("lt", "b5", a="a4", b=1.0), node("and", "b6", a="b3", b="b4"), node("or", "b7", a="b3", b="b5"),
        node("not", "b8", of="b3"), node("where", "b9", cond="b3", a="r", b="v"),
    ]  # fmt: skip
    values = CASE.check(*rows, *made, LOGPROBS).values
    ops_seen = {n["op"] for n in (*rows, *made)}
    assert ops_seen == {row.op for row in spec.SPEC.values() if row.label != "none"}
    sent = {"v", "m", "d", "a3", "a5", "a7", "a8", "a9"}
    assert {name: v.label for name, v in values.items()} == {
        name: Label.USER if name in sent else Label.ACT for name in values
    }


def test_groups() -> None:
    assert len(spec.EDITS) == 8
    assert {"capture", "lens", "logprobs", "score", "metric", "pattern", "raw", "text"} == spec.OUTPUTS
    assert {"stop_after"} == spec.CONTROLS
    assert {r.op for r in spec.SPEC.values() if r.lane == "A*"} == {"edit.knockout", "pattern"}


def test_the_digest_is_of_the_canonical_text() -> None:
    a, b = program(node("text")), program({"id": "x", "op": "text"})
    assert a.digest() == b.digest()
    assert a.digest() != program(node("text", "y")).digest()
    assert canonical(a) == b'{"nodes":[{"id":"x","op":"text"}],"version":1}'


def test_json_schema_names_every_op_and_forbids_other_fields() -> None:
    schema = json_schema()
    definitions = typing.cast("dict[str, dict[str, typing.Any]]", schema["$defs"])
    feature = definitions.pop("Feature")
    assert feature["additionalProperties"] is False
    assert {d["properties"]["op"]["const"] for d in definitions.values()} == set(spec.SPEC)
    assert all(d["additionalProperties"] is False for d in definitions.values())
    assert schema["additionalProperties"] is False

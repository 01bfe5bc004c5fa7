"""What the whole language gives: kinds, columns, scales, stored rows, and how much of a pass is computed."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

from typing import Any

import pytest
from graph_room import ACTS, FINAL, LOGPROBS, MANY, SESSION, TOKEN_BITS, Case, facts, node, read

from trocar.graph import check, rules_sites, rules_values
from trocar.graph.labels import Label

CASE = Case()
V = node("tensor", "v", name="v")
M = node("tensor", "m", name="m")
SAE = node("sae", "sae", w_enc="w_enc", b_enc="b_enc", w_dec="w_dec", b_dec="b_dec")
D = node("dot", "d", a="r", b="v")
MEAN = node("mean", "p", of="r")
KEYS = "prompt[0:2]"


def heads(name: str = "h", site: str = "z.1", at: str = "prompt[-1]", **more: Any) -> dict[str, Any]:
    return node("read", name, site=site, at=at, **more)


def kind(*nodes: dict[str, Any], case: Case = CASE) -> tuple[str, int, tuple[int, ...]]:
    """Kind, width and counts of the last node's value."""
    value = case.check(*nodes, LOGPROBS).values[nodes[-1]["id"]]
    return value.kind, value.width, value.counts


ROWS, PER_PROMPT = (2, 2), (1, 1)
READ = read(at="prompt[0:2]")


@pytest.mark.parametrize(
    ("nodes", "given"),
    [
        ([M], ("matrix", 2, ())),
        ([SAE], ("dictionary", 8, ())),
        ([V, node("normalize", of="v")], ("vector", 8, ())),
        ([V, M, node("matmul", a="v", b="m")], ("vector", 2, ())),
        ([READ, M, node("matmul", a="r", b="m")], ("rows", 2, ROWS)),
        ([READ, node("norm", of="r")], ("scalars", 1, ROWS)),
        ([READ, MEAN, node("norm", of="p")], ("prompt_scalars", 1, PER_PROMPT)),
        ([READ, node("relu", of="r")], ("rows", 8, ROWS)),
        ([READ, V, D, node("relu", of="d")], ("scalars", 1, ROWS)),
        ([READ, node("topk", of="r", k=8)], ("rows", 8, ROWS)),
        ([READ, MEAN], ("per_prompt", 8, PER_PROMPT)),
        ([READ, V, D, node("mean", of="d")], ("prompt_scalars", 1, PER_PROMPT)),
        ([READ, node("mean", of="r", over="width")], ("scalars", 1, ROWS)),
        ([READ, MEAN, node("mean", of="p", over="width")], ("prompt_scalars", 1, PER_PROMPT)),
        ([READ, SAE, node("encode", of="r", sae="sae")], ("rows", 12, ROWS)),
        ([READ, SAE, MEAN, node("encode", of="p", sae="sae")], ("per_prompt", 12, PER_PROMPT)),
        ([READ, MEAN, V, node("dot", a="p", b="v")], ("prompt_scalars", 1, PER_PROMPT)),
        ([READ, MEAN, node("dot", a="r", b="p")], ("scalars", 1, ROWS)),
        ([READ, V, D, node("scale", of="v", by="d")], ("rows", 8, ROWS)),
        ([READ, V, D, MEAN, node("scale", of="p", by="d")], ("rows", 8, ROWS)),
        ([READ, V, D, node("scale", of="d", by="d")], ("scalars", 1, ROWS)),
        ([READ, MEAN, V, node("dot", "q", a="p", b="v"), node("scale", of="v", by="q")], ("per_prompt", 8, PER_PROMPT)),
        ([READ, V, D, MEAN, node("dot", "q", a="p", b="v"), node("sub", a="d", b="q")], ("scalars", 1, ROWS)),
        ([READ, V, D, node("gt", a="d", b=0.5)], ("mask", 1, ROWS)),
        ([READ, V, D, node("eq", a="d", b="d")], ("mask", 1, ROWS)),
        ([READ, MEAN, node("norm", "q", of="p"), node("lt", a="q", b=1)], ("prompt_mask", 1, PER_PROMPT)),
        ([READ, V, D, MEAN, node("norm", "q", of="p"), node("lt", a="d", b="q")], ("mask", 1, ROWS)),
        ([READ, V, D, node("gt", "g", a="d", b=0), node("not", "n", of="g"), node("and", a="g", b="n")], ("mask", 1, ROWS)),
        ([READ, V, D, node("gt", "g", a="d", b=0), node("where", cond="g", a="v", b="v")], ("rows", 8, ROWS)),
        ([READ, V, D, node("gt", "g", a="d", b=0), node("where", cond="g", a="d", b="d")], ("scalars", 1, ROWS)),
        ([READ, V, MEAN, node("norm", "q", of="p"), node("gt", "g", a="q", b=0), node("where", cond="g", a="r", b="v")], ("rows", 8, ROWS)),
        ([READ, V, MEAN, node("norm", "q", of="p"), node("gt", "g", a="q", b=0), node("where", cond="g", a="v", b="v")], ("per_prompt", 8, PER_PROMPT)),
        ([heads(heads=[1])], ("rows", 4, (1, 1))),
        ([heads(site="k.1", heads=[0])], ("rows", 4, (1, 1))),
        ([heads(site="mlp_act.1", neurons=[3, 1])], ("rows", 2, (1, 1))),
        ([heads(site="attn_probs.1", keys=KEYS)], ("rows", 4, (1, 1))),
        ([heads(site="attn_probs.1", keys="prompt[-1]", heads=[1])], ("rows", 1, (1, 1))),
    ],
)  # fmt: skip
def test_kinds(nodes: list[dict[str, Any]], given: tuple[str, int, tuple[int, ...]]) -> None:
    assert kind(*nodes) == given


def test_dictionaries_and_matrices() -> None:
    values = CASE.check(SAE, M, LOGPROBS).values
    assert (values["sae"].features, values["m"].height) == (12, 8)
    assert values["sae"].label is values["m"].label is Label.USER
    for activation in ({"activation": "topk", "k": 12}, {"activation": "jumprelu", "threshold": "b_enc"}):
        CASE.check(SAE | activation, LOGPROBS)
    assert rules_values.arrays(CASE.check(SAE, LOGPROBS).program.nodes[0])["w_dec"] == "w_dec"  # type: ignore[arg-type]


def test_columns_are_those_of_the_heads_in_the_order_given() -> None:
    columns = CASE.check(
        heads("a", heads=[1, 0]), heads("b", site="v.1", heads=[0]), heads("c", site="mlp_act.1", neurons=[7, 2]),
        heads("n"), heads("p", site="attn_probs.1", keys=KEYS, heads=[1]),
        node("edit.scale", "e", site="z.2", by=0.0, heads=[1]), LOGPROBS,
    ).columns  # fmt: skip
    assert columns == {"a": (4, 5, 6, 7, 0, 1, 2, 3), "b": (0, 1, 2, 3), "c": (7, 2), "e": (4, 5, 6, 7)}


def test_a_value_of_the_selected_columns_edits_them() -> None:
    nodes = [
        heads(heads=[1]),
        node("edit.set", "e", site="z.1", at="prompt[-1]", heads=[0], value="h"),
        LOGPROBS,
    ]
    assert CASE.check(*nodes).columns["e"] == (0, 1, 2, 3)
    nodes[1] |= {"site": "mlp_act.2", "neurons": [1, 3, 5, 7]}
    del nodes[1]["heads"]
    CASE.check(*nodes)


def test_the_columns_of_a_program_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_sites, "MAX_COLUMNS", 8)
    CASE.check(heads("a", heads=[0]), heads("b", heads=[0]), LOGPROBS)
    found = CASE.one(heads("a", heads=[0, 1]), heads("b", heads=[0]), LOGPROBS)
    assert (found.code, found.path) == ("too_expensive", "program.nodes[1]")


# ---- stored rows ----------------------------------------------------------------------------------


def stored(**more: Any) -> dict[str, Any]:
    return node("stored", "s", handle=MANY, site="resid_post.1", **more)


def test_stored_rows_may_be_chosen() -> None:
    """The handle holds 3, 1 and 4 rows of three prompts; the request has two prompts."""
    checked = CASE.check(stored(prompts=[2, 0], at="prompt[-2:]"), LOGPROBS)
    assert checked.stored["s"] == ((2, (2, 3)), (0, (1, 2)))
    assert checked.values["s"].counts == (2, 2)
    assert CASE.check(stored(prompts=[1, 1]), LOGPROBS).stored["s"] == ((1, (0,)), (1, (0,)))
    plain = CASE.check(node("stored", "s", handle=ACTS, site="resid_post.1"), LOGPROBS)
    assert plain.stored["s"] == ((0, (0,)), (1, (0,)))


def test_a_step_of_a_session_is_a_handle() -> None:
    checked = CASE.check(node("stored", "s", handle=SESSION, site="resid_post.1"), LOGPROBS)
    assert checked.values["s"].counts == (1, 1)


def test_stored_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_values, "MAX_STORED_ROWS", 12)
    assert CASE.check(stored(prompts=[2, 2]), LOGPROBS)
    found = CASE.one(stored(prompts=[2, 2]), stored(prompts=[1, 1]) | {"id": "t"}, LOGPROBS)
    assert (found.code, found.path) == ("too_expensive", "program.nodes[1]")


# ---- how much of a pass ---------------------------------------------------------------------------


LENS = node("lens", "out", of=["r"])


@pytest.mark.parametrize(
    ("nodes", "depth", "final"),
    [
        ([read(), LENS], 2, False),
        ([read(site="resid_pre.1"), LENS], 2, False),
        ([read(site="resid_post.3"), LENS], 4, False),
        ([read(site="embeddings"), LENS], 0, False),
        ([read(site="final_norm"), LENS], 4, True),
        ([read(), node("edit.scale", "e", site="resid_post.2", by=2.0), LENS], 3, False),
        ([read(), node("edit.knockout", "e", site="attn_probs.2", at="prompt[-1]", keys="prompt[0]"), LENS], 3, False),
        ([read(), node("edit.scale", "e", site="final_norm", by=2.0), LENS], 4, True),
        ([node("stored", "r", handle=ACTS, site="resid_post.1"), LENS], 0, False),
        ([LOGPROBS], 4, True),
        ([node("metric", metric="cross_entropy", at="prompt[:-1]")], 4, True),
        ([read(), LENS, node("stop_after", "stop", layer=2)], 3, False),
        ([node("stop_after", "stop", layer=1), read(), LENS], 2, False),
    ],
)  # fmt: skip
def test_depth(nodes: list[dict[str, Any]], depth: int, final: bool) -> None:
    checked = CASE.check(*nodes)
    assert (checked.depth, checked.needs_final) == (depth, final)


def test_a_generation_needs_every_layer() -> None:
    checked = CASE.having(new=2).check(read(), LENS)
    assert (checked.depth, checked.needs_final) == (4, True)


@pytest.mark.parametrize(
    ("nodes", "last"),
    [
        ([read(at="all"), LENS], 2),
        ([read(site="embeddings", at="all"), LENS], 0),
        ([read(site="final_norm", at="all"), LENS], 5),
        ([read(at="all"), node("edit.scale", "e", site="resid_post.2", at="all", by=2.0), LENS], 3),
        ([read(at="all"), LENS, node("text", "t")], 2),
        ([LOGPROBS, node("text", "t")], 5),
    ],
)
def test_the_last_token_goes_as_far_as_the_program_looks(nodes: list[dict[str, Any]], last: int) -> None:
    checked = CASE.having(new=2).check(*nodes)
    assert (checked.depth, checked.needs_final, checked.last_depth) == (4, True, last)


def test_a_shallow_program_costs_less() -> None:
    shallow, deep = (CASE.check(read(site=f"resid_post.{i}"), LENS).cost.flops for i in (0, 3))
    head = 2 * 8 * 300 * 2
    assert (deep - head) == 4 * (shallow - head)


def test_lanes() -> None:
    assert CASE.check(LOGPROBS).lane == "A"
    assert not CASE.check(LOGPROBS).patterns
    cut = CASE.check(
        node("edit.knockout", "e", site="attn_probs.0", at="prompt[-1]", keys="prompt[0]"), LOGPROBS
    )
    assert (cut.lane, cut.patterns, [e.id for e in cut.edits()]) == ("A*", True, ["e"])
    assert CASE.check(heads(site="attn_probs.1", keys=KEYS), node("pattern", of="h")).lane == "A*"


FIRST = read("a", at="prompt[0]")
ADD = node("edit.add", "e", site="resid_post.2", at="prompt[-1]", value="r")
STORED = node("stored", "r", handle=ACTS, site="resid_post.1")


@pytest.mark.parametrize(
    ("nodes", "whole"),
    [
        ([read(), ADD], False),
        ([read(at="prompt[0]"), ADD], True),
        ([V, ADD | {"value": "v"}], False),
        ([STORED, ADD], False),
        ([STORED, FIRST, node("add", "r2", a="r", b="a"), ADD | {"value": "r2", "at": "prompt[0]"}], False),
        ([STORED, FIRST, node("add", "r2", a="a", b="r"), ADD | {"value": "r2"}], True),
        ([STORED, MEAN, ADD | {"value": "p"}], False),
        ([read(), MEAN, ADD | {"value": "p"}], True),
        ([read(), MEAN, node("lens", "l", of=["p"])], True),
        ([read(), FIRST, node("sub", "x", a="r", b="a"), node("lens", "l", of=["x"])], True),
        ([read(), V, D, node("gt", "g", a="d", b=0), ADD | {"value": "v", "gate": "g"}], False),
        ([read(at="prompt[0]"), V, D, node("gt", "g", a="d", b=0), ADD | {"value": "v", "gate": "g"}], True),
        ([read(), V, D, node("gt", "g", a="d", b=0), node("where", "w", cond="g", a="v", b="r"), ADD | {"value": "w"}], False),
        ([read(), V, node("dot", "d", a="v", b="r"), node("score", "s", of="d")], False),
        ([read(), node("capture", "c", of=["r"])], False),
        ([read(), node("capture", "c", of=["r"], reduce="mean")], True),
        ([read(site="final_norm", at="prompt[0]"), node("metric", "k", metric="kl", to="r")], False),
    ],
)  # fmt: skip
def test_what_flows_from_row_to_row_needs_the_whole_prompt(nodes: list[dict[str, Any]], whole: bool) -> None:
    assert CASE.check(*nodes, LOGPROBS).whole is whole


def test_generated_rows_alone_need_no_whole_prompt() -> None:
    nodes = [read(at="gen[0:2]"), node("edit.add", "e", site="resid_post.2", at="gen[0:2]", value="r")]
    assert not CASE.having(new=4).check(*nodes, LOGPROBS).whole


# ---- edits ----------------------------------------------------------------------------------------


def test_gates_of_every_kind() -> None:
    gates = [
        READ, V, D, MEAN, node("gt", "g", a="d", b=0), node("norm", "q", of="p"), node("lt", "pm", a="q", b=1),
    ]  # fmt: skip
    for gate in ("d", "g", "q", "pm"):
        edit = node("edit.scale", "e", site="resid_post.2", at="prompt[0:2]", by=0.0, gate=gate)
        CASE.check(*gates, edit, LOGPROBS)


def test_a_read_gates_an_edit_of_its_own_site() -> None:
    edit = node("edit.scale", "e", site="resid_post.1", at="prompt[0:2]", by=0.0, gate="d")
    CASE.check(READ, V, D, edit, LOGPROBS)


def test_affine() -> None:
    up = node("tensor", "u", name="up")
    both = node("tensor", "i", name="two")
    edit = node("edit.affine", "e", site="resid_post.1", down="m", up="u", inner="i", bias="v")
    CASE.check(M, up, both, V, edit, LOGPROBS)
    CASE.check(M, up, node("edit.affine", "e", site="resid_post.1", down="m", up="u"), LOGPROBS)


def test_clamp_and_features() -> None:
    for bounds in ({"low": 0}, {"high": 0}, {"low": 1, "high": 1}):
        CASE.check(V, node("edit.clamp", "e", site="resid_post.1", value="v", **bounds), LOGPROBS)
    for fields in (
        {"features": [{"index": 11, "set": 2.0}, {"index": 0, "scale": 0.0}]},
        {"keep_error": False},
    ):
        CASE.check(SAE, node("edit.sae", "e", site="resid_post.1", sae="sae", **fields), LOGPROBS)


def test_a_dictionary_costs_what_its_rows_cost() -> None:
    plain = CASE.check(READ, SAE, LOGPROBS).cost.flops
    encoded = CASE.check(READ, SAE, node("encode", of="r", sae="sae"), LOGPROBS).cost.flops
    assert encoded - plain == 2 * 4 * 8 * 12
    edit = node("edit.sae", "e", site="resid_post.1", at="prompt[0:2]", sae="sae", keep_error=False)
    assert CASE.check(READ, SAE, edit, LOGPROBS).cost.flops - plain == 4 * 4 * 8 * 12


def test_an_edit_may_count_in_norms_of_its_site() -> None:
    model = facts(norms={"resid_post": (1.0, 2.5, 3.0, 4.0), "embeddings": (0.5,)})
    nodes = [
        V, node("edit.add", "a", site="resid_post.1", value="v", unit="site_norm"),
        node("edit.clamp", "c", site="embeddings", value="v", high=1.0, unit="site_norm"),
        node("edit.add", "n", site="resid_post.1", value="v"),
    ]  # fmt: skip
    assert CASE.having(model=model).check(*nodes, LOGPROBS).scales == {"a": 2.5, "c": 0.5}
    nodes[1]["site"] = "mlp_out.1"
    found = CASE.having(model=model).one(*nodes, LOGPROBS)
    assert (found.code, found.path) == ("site_unavailable", "program.nodes[1].unit")
    assert "mlp_out.1" in found.reason


def knockout(at: str = "prompt[-1]", keys: str = "prompt[0]", **more: Any) -> dict[str, Any]:
    return node("edit.knockout", "e", **({"site": "attn_probs.1", "at": at, "keys": keys} | more))


@pytest.mark.parametrize(
    ("at", "keys", "new", "code"),
    [
        ("prompt[-1]", "prompt[0]", 0, None),
        ("prompt[1:]", "prompt[0]", 0, None),
        ("prompt[-1]", "prompt[*]", 0, "no_keys_left"),
        ("prompt[0]", "prompt[0]", 0, "no_keys_left"),
        ("prompt[*]", "prompt[1]", 0, None),
        ("prompt[*]", "prompt[0]", 0, "no_keys_left"),
        ("prompt[1]", "prompt[0:2]", 0, "no_keys_left"),
        ("prompt[2]", "prompt[0:2]", 0, None),
        ("prompt[2]", "prompt[1:3]", 0, None),
        ("prompt[3]", "prompt[0,1,3]", 0, None),
        ("prompt[1,3]", "prompt[0,1,3]", 0, "no_keys_left"),
        ("prompt[0]", "prompt[-1]", 0, "touches_nothing"),
        ("prompt[0]", "prompt[1]", 0, "touches_nothing"),
        ("gen[*]", "prompt[*]", 3, None),
        ("gen[*]", "prompt[-1]", 3, None),
        ("all", "prompt[1:]", 3, None),
        ("all", "prompt[0]", 3, "no_keys_left"),
        ("gen[0]", "prompt[0]", 1, "touches_nothing"),
    ],
)
def test_knockouts_cut_something_and_leave_something(at: str, keys: str, new: int, code: str | None) -> None:
    case = CASE.having(new=new)
    if code is None:
        case.check(knockout(at, keys), LOGPROBS)
    else:
        assert case.one(knockout(at, keys), LOGPROBS).code == code


def test_a_knockout_of_heads_has_a_receipt() -> None:
    checked = CASE.check(knockout(heads=[1]), LOGPROBS)
    assert checked.cost.bits_out["receipts"] == 2 * 32
    assert checked.columns == {}


# ---- outputs --------------------------------------------------------------------------------------


def test_metrics_are_one_number_per_prompt() -> None:
    for fields in (
        {"metric": "logit_diff", "tokens": ["a", 5]},
        {"metric": "cross_entropy", "at": "prompt[:-1]"},
    ):
        assert CASE.check(node("metric", **fields)).cost.bits_out["x"] == 2 * 32
    checked = CASE.check(node("metric", metric="logit_diff", tokens=[["a", 5], [6, "b"]], at="prompt[*]"))
    assert checked.token_ids["x"] == ((97, 5), (6, 98))


def test_kl_sends_both_sides_through_the_head() -> None:
    stored = node("stored", "f", handle=FINAL, site="final_norm")
    one = CASE.check(node("metric", metric="logit_diff", tokens=[1, 2])).cost.flops
    two = CASE.check(stored, node("metric", metric="kl", to="f")).cost.flops
    assert two - one == 2 * 8 * 300 * 2
    CASE.check(read(site="final_norm"), node("metric", metric="kl", to="r"))


def test_a_pattern_counts_rows_heads_and_keys() -> None:
    probs = heads(site="attn_probs.1", at="prompt[*]", keys=KEYS)
    assert CASE.check(probs, node("pattern", of="h")).cost.bits_out["x"] == (5 + 7) * 2 * 2 * 32
    row = node("mean", "m", of="h", over="width")
    CASE.check(probs, row, node("score", of="m"))


def test_a_mask_is_a_bit_a_row() -> None:
    nodes = [READ, V, D, node("gt", "g", a="d", b=0)]
    assert CASE.check(*nodes, node("score", of="g")).cost.bits_out["x"] == 4
    mean = [READ, MEAN, node("norm", "q", of="p")]
    assert CASE.check(*mean, node("score", of="q")).cost.bits_out["x"] == 2 * 32
    assert CASE.check(*mean, node("gt", "g", a="q", b=0), node("score", of="g")).cost.bits_out["x"] == 2


def test_a_mean_capture_stores_one_row_per_prompt() -> None:
    cost = CASE.check(read(at="prompt[*]"), node("capture", "c", of=["r"], reduce="mean")).cost
    assert cost.bytes_stored == 2 * (8 * 4 + 32)
    assert TOKEN_BITS == 9


def test_limits_of_tokens_hold_before_anything_is_resolved() -> None:
    case = CASE.having(lengths=(600,) * 4096, model=facts(context=2000))
    found = case.one(knockout(at="prompt[*]", keys="prompt[1:]"), LOGPROBS)
    assert (found.code, found.path) == ("too_expensive", "prompts")
    assert str(check.MAX_TOKENS) in found.reason

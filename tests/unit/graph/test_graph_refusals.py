"""Every way the checker says no: code, path, the offending value, the nearest legal spelling, a next step."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

from typing import Any

import pytest
from graph_room import (
    ABSENT,
    ACTS,
    DIRECTION,
    FEW,
    FOREIGN,
    LOGPROBS,
    PROBE,
    SPARSE,
    STRANGE,
    Case,
    facts,
    node,
    read,
)

from trocar.codes import CODES
from trocar.graph import check

CASE = Case()
V = node("tensor", "v", name="v")
LENS = node("lens", "out", of=["r"])
SCORE = node("score", "out", of="d")


def add(site: str = "resid_post.1", at: str = "prompt[-1]", value: str = "v", **more: Any) -> dict[str, Any]:
    return node("edit.add", "e", site=site, at=at, value=value, **more)


# (name, nodes, code, path inside the node, what the reason names, closest match)
ROWS: list[tuple[str, list[dict[str, Any]], str, str, str, str | None]] = [
    ("unknown site", [read(site="resid_pots.1"), LENS], "unknown_site", "nodes[0].site", "resid_pots.1", "resid_post.1"),
    ("site of another world", [read(site="!"), LENS], "unknown_site", "nodes[0].site", "'!'", None),
    ("site without layer", [read(site="resid_post"), LENS], "unknown_site", "nodes[0].site", "resid_post", "resid_post.0"),
    ("layer on a site without", [read(site="final_norm.1"), LENS], "unknown_site", "nodes[0].site", "final_norm", "final_norm"),
    ("layer with a zero", [read(site="resid_post.01"), LENS], "unknown_site", "nodes[0].site", "resid_post.01", "resid_post.1"),
    ("negative layer", [read(site="resid_post.-1"), LENS], "unknown_site", "nodes[0].site", "resid_post.-1", "resid_post.0"),
    ("layer beyond", [read(site="resid_post.4"), LENS], "layer_out_of_range", "nodes[0].site", "resid_post.4", "resid_post.3"),
    ("site not served", [read(site="router_logits.1"), LENS], "site_unavailable", "nodes[0].site", "not a mixture", None),
    ("logits as rows", [read(site="logits"), LENS], "site_unavailable", "nodes[0].site", "'logits'", None),
    ("not editable", [V, add(site="attn_probs.1"), LOGPROBS], "site_not_editable", "nodes[1].site", "attn_probs.1", None),
    ("bad position", [read(at="prompt[1:2:3]"), LENS], "bad_position", "nodes[0].at", "prompt[1:2:3]", "prompt[1:2]"),
    ("word for a position", [read(at="al"), LENS], "bad_position", "nodes[0].at", "'al'", "all"),
    ("gen spelled wrongly", [read(at="gen(3)"), LENS], "bad_position", "nodes[0].at", "gen(3)", "gen[3]"),
    ("digits of another script", [read(at="prompt[٣]"), LENS], "bad_position", "nodes[0].at", "٣", "prompt[*]"),
    ("gen from the end", [read(at="gen[-1]"), LENS], "bad_position", "nodes[0].at", "gen[-1]", None),
    ("position beyond", [read(at="prompt[6]"), LENS], "position_out_of_range", "nodes[0].at", "prompt 0 has 5 tokens", None),
    ("slice beyond", [read(at="prompt[0:6]"), LENS], "position_out_of_range", "nodes[0].at", "prompt[0:6]", None),
    ("slice backwards", [read(at="prompt[3:1]"), LENS], "position_out_of_range", "nodes[0].at", "prompt[3:1]", None),
    ("empty slice", [read(at="prompt[2:2]"), LENS], "touches_nothing", "nodes[0].at", "prompt[2:2]", None),
    ("empty on one prompt", [read(at="prompt[5:]"), LENS], "touches_nothing", "nodes[0].at", "of prompt 0, which has 5", None),
    ("gen without generation", [read(at="gen[*]"), LENS], "touches_nothing", "nodes[0].at", "max_new_tokens is 0", None),
    ("unknown ref", [read("rows"), node("lens", "out", of=["row"])], "unknown_ref", "nodes[1].of[0]", "'row'", "rows"),
    ("forward ref", [LENS, read()], "unknown_ref", "nodes[0].of[0]", "'r'", None),
    ("self ref", [node("scale", "s", of="s", by=2.0), LOGPROBS], "unknown_ref", "nodes[0].of", "'s'", None),
    ("duplicate id", [read(), read(), LENS], "duplicate_id", "nodes[1].id", "'r' is taken", None),
    ("reserved id", [node("text", "overhead")], "duplicate_id", "nodes[0].id", "overhead", None),
    ("reserved receipts", [node("text", "receipts")], "duplicate_id", "nodes[0].id", "receipts", None),
    ("reserved lengths", [node("text", "lengths")], "duplicate_id", "nodes[0].id", "lengths", None),
    ("zero as an id", [node("tensor", "zero", name="v"), LOGPROBS], "duplicate_id", "nodes[0].id", "zero", None),
    ("zero in arithmetic", [V, node("add", a="v", b="zero"), LOGPROBS], "wrong_operand", "nodes[1].b", "zero", None),
    ("zero in a lens", [node("lens", of=["zero"])], "wrong_operand", "nodes[0].of[0]", "zero", None),
    ("zero added", [add(value="zero"), LOGPROBS], "wrong_operand", "nodes[0].value", "zero", None),
    ("lens of a vector", [V, node("lens", of=["v"])], "wrong_operand", "nodes[1].of[0]", "'v' is vector; accepted: rows, per_prompt", None),
    ("mean of a vector", [V, node("mean", of="v"), LOGPROBS], "wrong_operand", "nodes[1].of", "accepted: rows", None),
    ("score of rows", [read(), node("score", of="r")], "wrong_operand", "nodes[1].of", "'r' is rows", None),
    ("edit with scalars", [read(), V, node("dot", "d", a="r", b="v"), add(value="d"), LOGPROBS], "wrong_operand", "nodes[3].value", "'d' is scalars", None),
    ("rows plus scalars", [read(), V, node("dot", "d", a="r", b="v"), node("add", a="r", b="d"), LOGPROBS], "wrong_operand", "nodes[3]", "rows and scalars", None),
    ("dot of vectors", [V, node("dot", "d", a="v", b="v"), SCORE], "wrong_operand", "nodes[1].a", "not vector twice", None),
    ("vector of wrong width", [node("tensor", "v", name="wide"), add(), LOGPROBS], "width_mismatch", "nodes[1].value", "'v' has width 16, resid_post.1 has width 8", None),
    ("sum of widths", [V, node("tensor", "w", name="wide"), node("add", a="v", b="w"), LOGPROBS], "width_mismatch", "nodes[2]", "8 and 16", None),
    ("lens of neurons", [read(site="mlp_act.1"), LENS], "width_mismatch", "nodes[1].of[0]", "'r' has 16", None),
    ("probe of another width", [read(site="mlp_act.1"), node("score", of="r", probe=PROBE, site="resid_post.1")], "width_mismatch", "nodes[1].of", "'r'", None),
    ("probe on scalars", [read(), V, node("dot", "d", a="r", b="v"), node("score", of="d", probe=PROBE, site="resid_post.1")], "width_mismatch", "nodes[3].of", "'d'", None),
    ("rows of two selectors", [read(), read("s", at="prompt[0:2]"), node("sub", a="r", b="s"), LOGPROBS], "rows_mismatch", "nodes[2]", "prompt 0: 1 rows on one side and 2", None),
    ("rows into other rows", [read(at="prompt[0:2]"), add(value="r"), LOGPROBS], "rows_mismatch", "nodes[1].value", "prompt 0: 2 rows on one side and 1", None),
    ("lens of two selectors", [read(), read("s", at="prompt[0]"), node("lens", of=["r", "s"])], "rows_mismatch", "nodes[2].of[1]", "'s' and 'r'", None),
    ("lens across the norm", [read(), read("s", site="final_norm"), node("sub", "m", a="r", b="s"), node("lens", of=["m"])], "wrong_operand", "nodes[3].of[0]", "'m' mixes", None),
    ("edit after its layer", [read(site="resid_post.3"), add(site="resid_post.1", value="r"), LOGPROBS], "edit_after_layer", "nodes[1].value", "'r' is read at resid_post.3, which is computed after resid_post.1", None),
    ("edit after its layer, mean", [read(site="resid_post.3"), node("mean", "m", of="r"), add(site="resid_pre.3", value="m"), LOGPROBS], "edit_after_layer", "nodes[2].value", "resid_post.3", None),
    ("foreign model's rows", [node("stored", "r", handle=FOREIGN, site="resid_post.1"), LENS], "wrong_handle", "nodes[0].handle", FOREIGN, None),
    ("foreign model's probe", [node("vector", "v", handle=STRANGE, site="resid_post.1"), add(), LOGPROBS], "wrong_handle", "nodes[0].handle", "another model than 'paper'", None),
    ("absent handle", [node("stored", "r", handle=ABSENT, site="resid_post.1"), LENS], "handle_not_found", "nodes[0].handle", ABSENT, None),
    ("artifact as rows", [node("stored", "r", handle=PROBE, site="resid_post.1"), LENS], "wrong_handle", "nodes[0].handle", "holds artifact, not activations", None),
    ("rows as a probe", [read(), node("score", of="r", probe=ACTS, site="resid_post.1")], "wrong_handle", "nodes[1].probe", "holds activations, not artifact", None),
    ("site not stored", [node("stored", "r", handle=ACTS, site="resid_post.2"), LENS], "wrong_handle", "nodes[0].site", "nothing for 'resid_post.2'", "resid_post.1"),
    ("site not fitted", [node("vector", "v", handle=PROBE, site="mlp_out.2"), add(), LOGPROBS], "wrong_handle", "nodes[0].site", "mlp_out.2", None),
    ("rows of fewer prompts", [node("stored", "r", handle=FEW, site="resid_post.1"), LENS], "rows_mismatch", "nodes[0].handle", "1 prompts, this request has 2", None),
    ("mean over no rows", [node("stored", "r", handle=SPARSE, site="resid_post.1"), node("mean", "m", of="r"), LOGPROBS], "rows_mismatch", "nodes[1].of", "no row for prompt 1", None),
    ("direction as a probe", [read(), node("score", of="r", probe=DIRECTION, site="resid_post.1")], "wrong_handle", "nodes[1].probe", DIRECTION, None),
    ("weights of a direction", [node("vector", "v", handle=DIRECTION, site="resid_post.1", part="weights"), add(), LOGPROBS], "wrong_handle", "nodes[0].part", "without weights", None),
    ("probe without site", [read(), node("score", of="r", probe=PROBE)], "missing_field", "nodes[1].site", "name the site", None),
    ("site without probe", [read(), V, node("dot", "d", a="r", b="v"), node("score", of="d", site="resid_post.1")], "bad_value", "nodes[3].site", "resid_post.1", None),
    ("unknown tensor", [node("tensor", "v", name="wid"), add(), LOGPROBS], "unknown_tensor", "nodes[0].name", "'wid'", "wide"),
    ("nothing returned", [read()], "nothing_returned", "nodes", "no output", None),
    ("capture of a sum", [read(), read("s", site="resid_post.2"), node("add", "m", a="r", b="s"), node("capture", of=["m"])], "wrong_operand", "nodes[3].of[0]", "'m'", None),
    ("capture of stored rows", [node("stored", "r", handle=ACTS, site="resid_post.1"), node("capture", of=["r"])], "wrong_operand", "nodes[1].of[0]", "'r'", None),
    ("capture twice", [read(), read("s"), node("capture", of=["r", "s"])], "wrong_operand", "nodes[2].of[1]", "resid_post.1 is captured twice", None),
    ("not one token", [node("logprobs", tokens=["ab"])], "not_one_token", "nodes[0].tokens[0]", "'ab' is 2 tokens: [97, 98]", None),
    ("token outside", [node("logprobs", tokens=[1, 300])], "unknown_token", "nodes[0].tokens[1]", "300 is outside 0..299", None),
    ("negative token", [node("logprobs", tokens=[[1], [-1]])], "unknown_token", "nodes[0].tokens[1][0]", "-1", None),
    ("tokens of other prompts", [node("logprobs", tokens=[["a"]])], "rows_mismatch", "nodes[0].tokens", "1 lists of tokens for 2 prompts", None),
    ("ragged tokens", [node("logprobs", tokens=[["a"], ["a", "b"]])], "bad_value", "nodes[0].tokens", "same number", None),
    ("text of nothing", [node("text")], "touches_nothing", "nodes[0]", "max_new_tokens is 0", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "code", "path", "names", "closest"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS]
)
def test_one_mistake_is_one_refusal(
    nodes: list[dict[str, Any]], code: str, path: str, names: str, closest: str | None
) -> None:
    found = CASE.one(*nodes)
    assert (found.code, found.path) == (code, f"program.{path}")
    assert names in found.reason
    assert found.closest == closest


def test_a_gen_position_beyond_the_generation() -> None:
    found = CASE.having(new=3).one(read(at="gen[0:4]"), LENS)
    assert (found.code, found.path) == ("position_out_of_range", "program.nodes[0].at")
    assert "at most 3 tokens" in found.reason


def test_the_last_generated_token_is_fed_back_only_for_a_reader() -> None:
    edit = node("edit.scale", "e", site="resid_post.1", at="gen[1]", by=2.0)
    found = CASE.having(new=2).one(edit, node("text", "t"))
    assert (found.code, found.path) == ("touches_nothing", "program.nodes[0].at")
    assert "gen[1]" in found.reason
    assert "max_new_tokens=2" in found.reason
    CASE.having(new=3).check(edit, node("text", "t"))
    checked = CASE.having(new=2).check(edit, node("logprobs", at="gen[1]", tokens=["a"]))
    assert checked.reads_gen


def test_a_later_value_may_edit_later_tokens_only() -> None:
    """The same pair of layers: refused at prompt tokens, accepted at generated ones when it is per prompt."""
    before = [read(site="resid_post.3"), node("mean", "m", of="r")]
    case = CASE.having(new=4)
    for at in ("prompt[-1]", "all"):
        found = case.one(*before, add(site="resid_post.1", at=at, value="m"), LOGPROBS)
        assert (found.code, found.path) == ("edit_after_layer", "program.nodes[2].value")
    case.check(*before, add(site="resid_post.1", at="gen[0:3]", value="m"), LOGPROBS)


def test_generated_rows_pair_only_with_the_same_selector() -> None:
    case = CASE.having(new=4)
    rows = read(at="gen[0:3]")
    found = case.one(rows, add(value="r", at="gen[1:4]"), LOGPROBS)
    assert (found.code, found.path) == ("rows_mismatch", "program.nodes[1].value")
    assert "gen[0:3]" in found.reason
    assert "gen[1:4]" in found.reason
    found = case.one(read(at="gen[*]", site="resid_post.3"), add(value="r", at="gen[*]"), LOGPROBS)
    assert found.code == "edit_after_layer"


def test_two_spellings_of_one_selector_are_one() -> None:
    case = CASE.having(new=4)
    case.check(read(at="gen[:]"), add(value="r", at="gen[*]"), LOGPROBS)
    case.check(read(at="prompt[-01]"), read("s"), node("lens", of=["r", "s"]))


def test_stored_rows_do_not_meet_generated_ones() -> None:
    stored = node("stored", "r", handle=ACTS, site="resid_post.1")
    found = CASE.having(new=4).one(stored, add(value="r", at="gen[0]"), LOGPROBS)
    assert found.code == "rows_mismatch"
    CASE.check(stored, add(value="r"), LOGPROBS)


def test_mean_of_generated_rows() -> None:
    found = CASE.having(new=4).one(read(at="all"), node("mean", "m", of="r"), LOGPROBS)
    assert (found.code, found.path) == ("wrong_operand", "program.nodes[1].of")
    assert "'r'" in found.reason
    assert "capture" in found.next_step


def test_several_mistakes_are_several_refusals_without_a_cascade() -> None:
    found = CASE.refusals(
        read("a", site="nope.1"),
        node("scale", "b", of="a", by=2.0),
        node("add", "c", a="b", b="b"),
        node("lens", "d", of=["c"]),
        read("e", at="prompt[99]"),
        node("lens", "f", of=["e", "e"]),
        node("tensor", "g", name="absent"),
        node("edit.add", "h", site="resid_post.1", value="g"),
    )
    assert [f.path for f in found] == [
        "program.nodes[0].site",
        "program.nodes[4].at",
        "program.nodes[6].name",
    ]


def test_refusals_stop_at_the_limit() -> None:
    found = CASE.refusals(*[node("scale", f"s{i}", of="absent", by=1.0) for i in range(200)], LOGPROBS)
    assert len(found) == check.MAX_REFUSALS


@pytest.mark.parametrize(
    ("lengths", "new", "code", "path", "names"),
    [
        ((), 0, "empty_prompt", "prompts", "no prompt"),
        ((3, 0), 0, "empty_prompt", "prompts[1]", "prompt 1 has no tokens"),
        ((3, 65), 0, "prompt_too_long", "prompts[1]", "prompt 1 has 65 tokens; 64 fit"),
        ((60,), 5, "prompt_too_long", "prompts[0]", "60 tokens; 59 fit"),
        ((60,), 1000, "prompt_too_long", "prompts[0]", "; 0 fit"),
        ((1,) * 4097, 0, "too_expensive", "prompts", "4097 prompts"),
    ],
)
def test_prompts(lengths: tuple[int, ...], new: int, code: str, path: str, names: str) -> None:
    found = CASE.having(lengths=lengths, new=new).one(LOGPROBS)
    assert (found.code, found.path) == (code, path)
    assert names in found.reason


def test_too_expensive() -> None:
    found = CASE.having(lengths=(60,) * 4096, model=facts(parameters=10**12)).one(LOGPROBS)
    assert (found.code, found.path) == ("too_expensive", "prompts")
    assert f"{60 * 4096} tokens" in found.reason
    found = CASE.having(lengths=(600,) * 4096, model=facts(context=2000)).one(LOGPROBS)
    assert found.code == "too_expensive"
    found = CASE.having(lengths=(1,) * 4096).one(*[read(f"r{i}") for i in range(300)], LOGPROBS)
    assert found.code == "too_expensive"
    assert "301 nodes on 4096 prompts" in found.reason


def test_every_checker_code_is_a_code() -> None:
    assert {r[2] for r in ROWS} <= set(CODES)

"""Refusals of the whole language: heads and keys, dictionaries, masks, gates, metrics, knockouts, stops."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

from typing import Any

import pytest
from graph_room import ACTS, FEW, LOGPROBS, MANY, PROBE, SPARSE, Case, node, read

from trocar.codes import CODES

CASE = Case()
V = node("tensor", "v", name="v")
M = node("tensor", "m", name="m")
UP = node("tensor", "u", name="up")
BROAD = node("tensor", "w", name="broad")
TWO = node("tensor", "i", name="two")
SAE = node("sae", "sae", w_enc="w_enc", b_enc="b_enc", w_dec="w_dec", b_dec="b_dec")
D = node("dot", "d", a="r", b="v")
G = node("gt", "g", a="d", b=0)
MEAN = node("mean", "p", of="r")
PROBS = node("read", "h", site="attn_probs.1", at="prompt[-1]", keys="prompt[0:2]")
FIRST = read("f", at="prompt[0:2]")


def z(**more: Any) -> dict[str, Any]:
    return node("read", "h", **({"site": "z.1", "at": "prompt[-1]"} | more))


def edit(op: str = "scale", **more: Any) -> dict[str, Any]:
    base = {"by": 2.0} if op == "scale" else {}
    return node(f"edit.{op}", "e", **({"site": "resid_post.1", "at": "prompt[-1]"} | base | more))


def cut(**more: Any) -> dict[str, Any]:
    return node(
        "edit.knockout", "e", **({"site": "attn_probs.1", "at": "prompt[-1]", "keys": "prompt[0]"} | more)
    )


def stored(**more: Any) -> dict[str, Any]:
    return node("stored", "s", handle=MANY, site="resid_post.1", **more)


def metric(which: str, **more: Any) -> dict[str, Any]:
    return node("metric", metric=which, **more)


# (name, nodes, code, path inside the program, what the reason names)
ROWS: list[tuple[str, list[dict[str, Any]], str, str, str]] = [
    # parts of a site
    ("heads of a stream", [z(site="resid_post.1", heads=[0])], "bad_value", "nodes[0].heads", "not at resid_post.1"),
    ("heads of neurons", [z(site="mlp_act.1", heads=[0])], "bad_value", "nodes[0].heads", "mlp_act.1"),
    ("neurons of heads", [z(neurons=[0])], "bad_value", "nodes[0].neurons", "mlp_act, not at z.1"),
    ("neurons and heads", [z(neurons=[0], heads=[0])], "bad_value", "nodes[0].neurons", "z.1"),
    ("head beyond", [z(heads=[0, 2])], "bad_value", "nodes[0].heads[1]", "2: the model has 2 heads"),
    ("key head beyond", [z(site="k.1", heads=[1])], "bad_value", "nodes[0].heads[0]", "1 key/value heads"),
    ("neuron beyond", [z(site="mlp_act.1", neurons=[16])], "bad_value", "nodes[0].neurons[0]", "16 neurons"),
    ("head twice", [z(heads=[1, 1])], "bad_value", "nodes[0].heads[1]", "1 is named twice"),
    ("keys of a stream", [z(keys="prompt[0]")], "bad_value", "nodes[0].keys", "z.1"),
    ("attention without keys", [z(site="attn_probs.1")], "missing_field", "nodes[0].keys", "attn_probs.1"),
    ("attention with neurons", [z(site="attn_probs.1", keys="prompt[0]", neurons=[1])], "bad_value", "nodes[0].neurons", "attn_probs.1"),
    ("head of attention beyond", [z(site="attn_probs.1", keys="prompt[0]", heads=[2])], "bad_value", "nodes[0].heads[0]", "2 heads"),
    ("keys of unequal number", [z(site="attn_probs.1", keys="prompt[*]")], "rows_mismatch", "nodes[0].keys", "5 keys in prompt 0 and 7 in prompt 1"),
    ("no such key", [z(site="attn_probs.1", keys="prompt[6]")], "position_out_of_range", "nodes[0].keys", "prompt[6]"),
    ("capture of heads", [z(heads=[0]), node("capture", of=["h"])], "wrong_operand", "nodes[1].of[0]", "'h'"),
    # patterns are only patterns
    ("capture of attention", [PROBS, node("capture", of=["h"])], "wrong_operand", "nodes[1].of[0]", "'h'"),
    ("lens of attention", [PROBS, node("lens", of=["h"])], "wrong_operand", "nodes[1].of[0]", "attention pattern"),
    ("probe on attention", [PROBS, node("score", of="h", probe=PROBE, site="resid_post.1")], "wrong_operand", "nodes[1].of", "attention pattern"),
    ("attention written", [PROBS, edit("set", value="h")], "wrong_operand", "nodes[1].value", "attention pattern"),
    ("pattern of rows", [read(), node("pattern", of="r")], "wrong_operand", "nodes[1].of", "'r'"),
    ("pattern of a sum", [PROBS, node("add", "a", a="h", b="h"), node("pattern", of="a")], "wrong_operand", "nodes[2].of", "'a'"),
    # constants
    ("tensor of three dimensions", [node("tensor", "v", name="cube")], "bad_tensor", "nodes[0].name", "(2, 2, 2)"),
    ("matrix as a direction", [M, edit("add", value="m")], "wrong_operand", "nodes[1].value", "'m' is matrix"),
    ("dictionary as a direction", [SAE, edit("add", value="sae")], "wrong_operand", "nodes[1].value", "'sae' is dictionary"),
    ("dictionary without a tensor", [SAE | {"b_enc": "b_en"}], "unknown_tensor", "nodes[0].b_enc", "'b_en'"),
    ("dictionary of a vector", [SAE | {"w_enc": "v"}], "width_mismatch", "nodes[0].w_enc", "w_enc is [D, F]"),
    ("dictionary not transposed", [SAE | {"w_dec": "w_enc"}], "width_mismatch", "nodes[0].w_dec", "w_dec is [12, 8]"),
    ("bias of another width", [SAE | {"b_enc": "v"}], "width_mismatch", "nodes[0].b_enc", "b_enc is [12]"),
    ("threshold of another width", [SAE | {"activation": "jumprelu", "threshold": "v"}], "width_mismatch", "nodes[0].threshold", "threshold is [12]"),
    ("topk without k", [SAE | {"activation": "topk"}], "missing_field", "nodes[0].k", "needs k"),
    ("jumprelu without threshold", [SAE | {"activation": "jumprelu"}], "missing_field", "nodes[0].threshold", "needs threshold"),
    ("k of a relu", [SAE | {"k": 3}], "bad_value", "nodes[0].k", "not 'relu'"),
    ("threshold of a relu", [SAE | {"threshold": "b_enc"}], "bad_value", "nodes[0].threshold", "not 'relu'"),
    ("k beyond", [SAE | {"activation": "topk", "k": 13}], "bad_value", "nodes[0].k", "12 features"),
    ("stored prompts for others", [stored(prompts=[0])], "rows_mismatch", "nodes[0].prompts", "1 stored prompts for 2 prompts"),
    ("stored prompt beyond", [stored(prompts=[0, 3])], "position_out_of_range", "nodes[0].prompts[1]", "holds 3 prompts, 0 to 2"),
    ("stored rows of a generation", [stored(prompts=[0, 0], at="gen[0]")], "bad_position", "nodes[0].at", "gen[0]"),
    ("stored rows of all", [stored(prompts=[0, 0], at="all")], "bad_position", "nodes[0].at", "all"),
    ("stored rows by text", [stored(prompts=[0, 0], at='span("a")')], "bad_position", "nodes[0].at", "span"),
    ("stored row beyond", [stored(prompts=[0, 1], at="prompt[1]")], "position_out_of_range", "nodes[0].at", "prompt[1]"),
    ("no stored row", [stored(prompts=[0, 1], at="prompt[0:0]")], "touches_nothing", "nodes[0].at", "no stored row"),
    ("other prompts", [node("stored", "s", handle=FEW, site="resid_post.1")], "rows_mismatch", "nodes[0].handle", "1 prompts"),
    # arithmetic
    ("scaled by rows", [read(), node("scale", of="r", by="r")], "wrong_operand", "nodes[1].by", "'r' is rows"),
    ("scaled by a mask", [read(), V, D, G, node("scale", of="r", by="g")], "wrong_operand", "nodes[4].by", "'g' is mask"),
    ("scaled by nothing", [read(), node("scale", of="r", by="x9")], "unknown_ref", "nodes[1].by", "'x9'"),
    ("scaled by other rows' numbers", [read(), V, D, FIRST, node("scale", of="f", by="d")], "rows_mismatch", "nodes[4]", "rows"),
    ("dot of widths", [read(), TWO, node("dot", a="r", b="i")], "width_mismatch", "nodes[2]", "8 and 2"),
    ("dot with a matrix", [read(), M, node("dot", a="r", b="m")], "wrong_operand", "nodes[2].b", "'m' is matrix"),
    ("product with a vector", [read(), V, node("matmul", a="r", b="v")], "wrong_operand", "nodes[2].b", "'v' is vector"),
    ("product not transposed", [read(), UP, node("matmul", a="r", b="u")], "width_mismatch", "nodes[2].b", "[2, 8]"),
    ("product of many columns", [read(), BROAD, node("matmul", a="r", b="w")], "too_expensive", "nodes[2].b", "65 columns"),
    ("norm of a vector", [V, node("norm", of="v")], "wrong_operand", "nodes[1].of", "'v' is vector"),
    ("normalised numbers", [read(), V, D, node("normalize", of="d")], "wrong_operand", "nodes[3].of", "'d' is scalars"),
    ("relu of a mask", [read(), V, D, G, node("relu", of="g")], "wrong_operand", "nodes[4].of", "'g' is mask"),
    ("topk beyond", [read(), node("topk", of="r", k=9)], "bad_value", "nodes[1].k", "k is 9; 'r' has width 8"),
    ("mean of a mask", [read(), V, D, G, node("mean", of="g")], "wrong_operand", "nodes[4].of", "'g' is mask"),
    ("mean of a mean", [read(), MEAN, node("mean", of="p")], "wrong_operand", "nodes[2].of", "'p' is per_prompt"),
    ("mean over no width", [read(), V, D, node("mean", of="d", over="width")], "wrong_operand", "nodes[3].of", "'d' is scalars"),
    ("encoded vector", [V, SAE, node("encode", of="v", sae="sae")], "wrong_operand", "nodes[2].of", "'v' is vector"),
    ("encoded by rows", [read(), node("encode", of="r", sae="r")], "wrong_operand", "nodes[1].sae", "'r' is rows"),
    ("encoded neurons", [read(site="mlp_act.1"), SAE, node("encode", of="r", sae="sae")], "width_mismatch", "nodes[2].of", "width 16"),
    ("compared rows", [read(), node("gt", a="r", b=0)], "wrong_operand", "nodes[1].a", "'r' is rows"),
    ("compared with rows", [read(), V, D, node("eq", a="d", b="r")], "wrong_operand", "nodes[3].b", "'r' is rows"),
    ("compared with other rows", [read(), V, D, FIRST, node("dot", "o", a="f", b="v"), node("lt", a="d", b="o")], "rows_mismatch", "nodes[5]", "rows"),
    ("and of numbers", [read(), V, D, node("and", a="d", b="d")], "wrong_operand", "nodes[3].a", "'d' is scalars"),
    ("not of numbers", [read(), V, D, node("not", of="d")], "wrong_operand", "nodes[3].of", "'d' is scalars"),
    ("sum of masks", [read(), V, D, G, node("add", a="g", b="g")], "wrong_operand", "nodes[4].a", "'g' is mask"),
    ("where without a mask", [read(), V, D, node("where", cond="d", a="r", b="r")], "wrong_operand", "nodes[3].cond", "'d' is scalars"),
    ("where of two contents", [read(), V, D, G, node("where", cond="g", a="r", b="d")], "wrong_operand", "nodes[4]", "rows and scalars"),
    ("where of two widths", [read(), V, D, G, TWO, node("where", cond="g", a="r", b="i")], "width_mismatch", "nodes[5]", "8 and 2"),
    ("where of other rows", [read(), V, D, G, FIRST, node("where", cond="g", a="f", b="v")], "rows_mismatch", "nodes[5]", "rows"),
    # edits
    ("attention edited", [edit(site="attn_probs.1")], "site_not_editable", "nodes[0].site", "attn_probs.1"),
    ("gate of rows", [read(), edit(gate="r")], "wrong_operand", "nodes[1].gate", "'r' is rows"),
    ("gate of nothing", [edit(gate="g")], "unknown_ref", "nodes[0].gate", "'g'"),
    ("gate called zero", [edit(gate="zero")], "wrong_operand", "nodes[0].gate", "zero"),
    ("set gated by zero", [edit("set", value="zero", gate="zero")], "wrong_operand", "nodes[0].gate", "zero"),
    ("gate of other rows", [FIRST, V, node("dot", "d", a="f", b="v"), edit(gate="d")], "rows_mismatch", "nodes[3].gate", "rows"),
    ("gate too late", [read(site="resid_post.2"), V, D, edit(gate="d")], "edit_after_layer", "nodes[3].gate", "resid_post.2"),
    ("value too late under a gate", [read(site="resid_post.2"), edit("add", value="r")], "edit_after_layer", "nodes[1].value", "resid_post.2"),
    ("whole value for a head", [V, edit("add", site="z.1", heads=[0], value="v")], "width_mismatch", "nodes[1].value", "the selected part of z.1 has width 4"),
    ("clamp of another width", [TWO, edit("clamp", value="i", low=0)], "width_mismatch", "nodes[1].value", "'i'"),
    ("clamp without bounds", [V, edit("clamp", value="v")], "missing_field", "nodes[1].low", "low, high or both"),
    ("clamp upside down", [V, edit("clamp", value="v", low=1, high=-1)], "bad_value", "nodes[1].high", "high -1 is below low 1"),
    ("norms not measured", [V, edit("add", value="v", unit="site_norm")], "site_unavailable", "nodes[1].unit", "resid_post.1"),
    ("affine of a vector", [V, M, edit("affine", down="v", up="m")], "wrong_operand", "nodes[2].down", "'v' is vector"),
    ("affine not transposed", [M, edit("affine", down="m", up="m")], "width_mismatch", "nodes[1].up", "up is [2, 8]"),
    ("affine of another width", [UP, M, edit("affine", down="u", up="m")], "width_mismatch", "nodes[2].down", "[2, 8]"),
    ("affine of a high rank", [BROAD, M, edit("affine", down="w", up="m")], "too_expensive", "nodes[2].down", "65 columns"),
    ("affine with an odd inner", [M, UP, V, edit("affine", down="m", up="u", inner="v")], "width_mismatch", "nodes[3].inner", "inner is [2]"),
    ("affine with an odd bias", [M, UP, TWO, edit("affine", down="m", up="u", bias="i")], "width_mismatch", "nodes[3].bias", "bias is [8]"),
    ("affine biased by rows", [M, UP, read(), edit("affine", down="m", up="u", bias="r")], "wrong_operand", "nodes[3].bias", "'r' is rows"),
    ("features of neurons", [SAE, edit("sae", site="mlp_act.1", sae="sae", keep_error=False)], "width_mismatch", "nodes[1].sae", "width 16"),
    ("features of heads", [SAE, edit("sae", site="z.1", heads=[0], sae="sae", keep_error=False)], "bad_value", "nodes[1].heads", "no heads"),
    ("features of some neurons", [SAE, edit("sae", site="mlp_act.1", neurons=[0], sae="sae", keep_error=False)], "bad_value", "nodes[1].neurons", "no neurons"),
    ("no feature", [SAE, edit("sae", sae="sae")], "touches_nothing", "nodes[1].features", "no feature"),
    ("feature beyond", [SAE, edit("sae", sae="sae", features=[{"index": 12, "set": 0}])], "bad_value", "nodes[1].features[0].index", "12 features"),
    ("feature twice", [SAE, edit("sae", sae="sae", features=[{"index": 1, "set": 0}, {"index": 1, "scale": 0}])], "bad_value", "nodes[1].features[1].index", "feature 1 is named twice"),
    ("feature unchanged", [SAE, edit("sae", sae="sae", features=[{"index": 1}])], "bad_value", "nodes[1].features[0]", "has neither"),
    ("feature set and scaled", [SAE, edit("sae", sae="sae", features=[{"index": 1, "set": 0, "scale": 0}])], "bad_value", "nodes[1].features[0]", "has both"),
    ("knockout of a stream", [cut(site="resid_post.1")], "bad_value", "nodes[0].site", "resid_post.1"),
    ("knockout of a head beyond", [cut(heads=[2])], "bad_value", "nodes[0].heads[0]", "2 heads"),
    ("knockout of a key beyond", [cut(keys="prompt[9]")], "position_out_of_range", "nodes[0].keys", "prompt[9]"),
    # outputs
    ("score of a direction", [V, node("score", of="v")], "wrong_operand", "nodes[1].of", "'v' is vector"),
    ("score of a mean", [read(), MEAN, node("score", of="p")], "wrong_operand", "nodes[2].of", "'p' is per_prompt"),
    ("mean of no stored row", [node("stored", "s", handle=SPARSE, site="resid_post.1"), node("mean", of="s")], "rows_mismatch", "nodes[1].of", "prompt 1"),
    ("difference of nothing", [metric("logit_diff")], "missing_field", "nodes[0].tokens", "needs tokens"),
    ("difference of one", [metric("logit_diff", tokens=["a"])], "bad_value", "nodes[0].tokens", "not 1"),
    ("difference of three", [metric("logit_diff", tokens=[["a", 1, 2], ["a", 1, 2]])], "bad_value", "nodes[0].tokens", "not 3"),
    ("difference of other prompts", [metric("logit_diff", tokens=[["a", 1]])], "rows_mismatch", "nodes[0].tokens", "1 lists"),
    ("difference to rows", [read(), metric("logit_diff", tokens=["a", 1], to="r")], "bad_value", "nodes[1].to", "takes no to"),
    ("entropy of tokens", [metric("cross_entropy", at="prompt[0]", tokens=["a", 1])], "bad_value", "nodes[0].tokens", "takes no tokens"),
    ("entropy of the end", [metric("cross_entropy")], "position_out_of_range", "nodes[0].at", "last token of prompt 0"),
    ("entropy of one prompt's end", [metric("cross_entropy", at="prompt[4]")], "position_out_of_range", "nodes[0].at", "last token of prompt 0"),
    ("divergence from nothing", [metric("kl")], "missing_field", "nodes[0].to", "needs to"),
    ("divergence from a stream", [read(), metric("kl", to="r")], "wrong_operand", "nodes[1].to", "'r'"),
    ("divergence from stored streams", [node("stored", "r", handle=ACTS, site="resid_post.1"), metric("kl", to="r")], "wrong_operand", "nodes[1].to", "'r'"),
    ("divergence from a sum", [read(site="final_norm"), node("add", "a", a="r", b="r"), metric("kl", to="a")], "wrong_operand", "nodes[2].to", "'a'"),
    ("divergence from a vector", [V, metric("kl", to="v")], "wrong_operand", "nodes[1].to", "'v' is vector"),
    ("divergence from other rows", [read(site="final_norm", at="prompt[0:2]"), metric("kl", to="r")], "rows_mismatch", "nodes[1].to", "prompt 0"),
    # control
    ("stop beyond", [node("stop_after", layer=4)], "layer_out_of_range", "nodes[0].layer", "4 layers"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "code", "path", "names"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_one_mistake_is_one_refusal(nodes: list[dict[str, Any]], code: str, path: str, names: str) -> None:
    assert code in CODES
    found = CASE.one(*nodes, LOGPROBS)
    assert (found.code, found.path) == (code, f"program.{path}")
    assert names in found.reason


@pytest.mark.parametrize(
    ("nodes", "code", "path"),
    [
        ([cut(keys="all")], "bad_position", "nodes[0].keys"),
        ([z(site="attn_probs.1", keys="gen[0]")], "bad_position", "nodes[0].keys"),
        ([metric("logit_diff", tokens=["a", 1], at="all")], "bad_position", "nodes[0].at"),
        ([read(at="all"), node("capture", of=["r"], reduce="mean")], "wrong_operand", "nodes[1].of[0]"),
        ([read(at="gen[*]"), V, D, node("mean", of="d")], "wrong_operand", "nodes[3].of"),
        ([read(at="gen[0:2]"), V, D, edit(at="gen[1:3]", gate="d")], "rows_mismatch", "nodes[3].gate"),
    ],
)
def test_rows_of_generated_tokens(nodes: list[dict[str, Any]], code: str, path: str) -> None:
    found = CASE.having(new=4).one(*nodes, LOGPROBS)
    assert (found.code, found.path) == (code, f"program.{path}")


STOP = node("stop_after", "stop", layer=1)
LENS = node("lens", "out", of=["r"])


@pytest.mark.parametrize(
    ("nodes", "path", "names"),
    [
        ([STOP, STOP | {"id": "again"}, read(), LENS], "program.nodes[1]", "after layer 1 already"),
        ([read(site="resid_post.2"), LENS, STOP], "program.nodes[0].site", "resid_post.2"),
        ([read(site="final_norm"), LENS, STOP], "program.nodes[0].site", "final_norm"),
        ([read(), LENS, STOP, edit(site="mlp_out.2")], "program.nodes[3].site", "effect is never computed"),
        ([read(), LENS, STOP, cut(site="attn_probs.2")], "program.nodes[3].site", "effect is never computed"),
        ([STOP, LOGPROBS], "program.nodes[1]", "'out' needs logits"),
        ([STOP, metric("logit_diff", tokens=["a", 1])], "program.nodes[1]", "'x' needs logits"),
    ],
)
def test_nothing_may_need_what_a_stop_leaves_out(nodes: list[dict[str, Any]], path: str, names: str) -> None:
    found = CASE.one(*nodes)
    assert (found.code, found.path) == ("after_stop", path)
    assert names in found.reason


def test_a_stopped_program_generates_nothing() -> None:
    found = CASE.having(new=2).refusals(read(), LENS, STOP, node("text"))
    assert [(f.code, f.path) for f in found] == [
        ("after_stop", "generation.max_new_tokens"),
        ("after_stop", "program.nodes[3]"),
    ]


def test_what_was_refused_is_not_refused_again_for_the_stop() -> None:
    found = CASE.refusals(read(site="resid_post.9"), STOP, read("s"), node("lens", of=["s"]))
    assert [f.code for f in found] == ["layer_out_of_range"]


def test_refusals_for_a_stop_are_limited_too() -> None:
    late = [read(f"r{i}", site="resid_post.3") for i in range(30)]
    assert len(CASE.refusals(STOP, *late, LOGPROBS)) == 20

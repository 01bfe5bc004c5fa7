"""Rows as they are: which may leave under which rules, against an independent count of the blocks between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from graph_room import LOGPROBS, Case, facts, node, program, read

from trocar import errors
from trocar.graph import check, linear_maps, sweep
from trocar.graph.check import Checked
from trocar.graph.cost import Prices
from trocar.graph.labels import FREE, STRICT, Rules
from trocar.sites import SITES, Site, parse

DIRECT = Rules(raw="direct", first_raw_layer=2, least_blocks=1, linear_maps=False, own_targets=False)
LAYERS = 4
ALL = facts(
    sites=tuple(n for n in SITES if n not in ("router_logits", "logits")), unavailable={"router_logits": "x"}
)
READABLE = [s for s in ALL.sites if s != "attn_probs"]
WRITABLE = [s for s in READABLE if SITES[s].editable]
CASE = Case(model=ALL)


def places(names: list[str]) -> list[str]:
    """Every site of a four-layer model."""
    return [
        f"{n}.{layer}" if SITES[n].layered else n
        for n in names
        for layer in range(LAYERS if SITES[n].layered else 1)
    ]


def look(rules: Rules, *nodes: dict[str, Any], case: Case = CASE) -> Checked | tuple[errors.Refusal, ...]:
    """The accepted program, or its refusals."""
    try:
        return check.check(program(*nodes), case.scope(), Prices(8, 256, 8, rules))
    except errors.TrocarError as e:
        return e.refusals


def allowed(rules: Rules, *nodes: dict[str, Any]) -> bool:
    found = look(rules, *nodes)
    if isinstance(found, Checked):
        return True
    assert {r.code for r in found} == {"policy"}
    assert all(r.next_step for r in found)
    return False


def raw(*sites: str, at: str = "prompt[-1]") -> list[dict[str, Any]]:
    """Rows of sites, asked for by one output."""
    reads = [read(f"r{i}", site, at) for i, site in enumerate(sites)]
    return [*reads, node("raw", "x", of=[r["id"] for r in reads])]


def write(site: str, at: str = "prompt[0]") -> dict[str, Any]:
    return node("edit.scale", f"e_{site}", site=site, at=at, by=2.0)


# ---- the door -------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", places(READABLE))
def test_rows_of_a_secret_go_through_the_airlock(site: str) -> None:
    assert allowed(FREE, *raw(site))
    found = look(STRICT, *raw(site))
    assert isinstance(found, tuple)
    assert [(f.code, f.path) for f in found] == [("needs_airlock", "program.nodes[1]")]
    assert "'x'" in found[0].reason
    assert not allowed(replace(FREE, raw="never"), *raw(site))


@pytest.mark.parametrize("rules", [STRICT, replace(DIRECT, raw="never")])
def test_every_output_of_rows_is_refused_once(rules: Rules) -> None:
    nodes = [*raw("resid_post.3"), read("s"), read("z"), node("raw", "y", of=["s", "z"]), LOGPROBS]
    found = look(rules, *nodes)
    assert isinstance(found, tuple)
    code = "needs_airlock" if rules.raw == "airlock" else "policy"
    assert [(f.code, f.path) for f in found] == [(code, "program.nodes[1]"), (code, "program.nodes[4]")]


def test_only_what_policy_forbids_is_a_refusal_of_policy() -> None:
    for nodes, kind in (
        (raw("resid_post.3"), errors.PolicyRefusal),
        ([*raw("resid_post.3"), node("lens", "y", of=["nothing"])], errors.ProgramError),
        ([node("lens", "y", of=["nothing"])], errors.ProgramError),
    ):
        with pytest.raises(errors.TrocarError) as caught:
            check.check(program(*nodes), CASE.scope(), Prices(8, 256, 8, STRICT))
        assert type(caught.value) is kind
        with pytest.raises(kind):
            sweep.variants(program(*nodes), (), CASE.scope(), Prices(8, 256, 8, STRICT))


@pytest.mark.parametrize("rules", [STRICT, DIRECT, FREE])
def test_a_program_without_rows_is_not_asked(rules: Rules) -> None:
    nodes = [read(), write("resid_pre.0"), node("capture", "c", of=["r"]), node("lens", of=["r"]), LOGPROBS]
    assert allowed(rules, *nodes)


def test_an_output_that_is_refused_already_is_not_refused_twice() -> None:
    for of, code in ((["r", "nothing"], "unknown_ref"), (["r", "late"], "rows_mismatch")):
        nodes = [read("r", "embeddings"), read("late", "embeddings", "prompt[0]"), node("raw", "x", of=of)]
        found = look(DIRECT, *nodes)
        assert isinstance(found, tuple)
        assert [f.code for f in found] == [code]


# ---- the first layers -----------------------------------------------------------------------------


def made_of_blocks(site: Site) -> int:
    """How many blocks have begun before a site's rows are there: the stream after a block is made of it."""
    if site.layer is None:
        return 0 if site.name == "embeddings" else LAYERS
    return site.layer if site.name == "resid_pre" else site.layer + 1


@pytest.mark.parametrize("first", range(LAYERS + 2))
@pytest.mark.parametrize("text", places(READABLE))
def test_rows_of_the_first_layers_stay(text: str, first: int) -> None:
    """What at most `first` blocks made stays; the stream has two names and is treated as one."""
    rules = replace(DIRECT, first_raw_layer=first)
    free = first == 0 or text == "final_norm" or made_of_blocks(parse(text)) > first
    assert allowed(rules, *raw(text)) == free
    if not free:
        found = look(rules, *raw("resid_post.3", text))
        assert isinstance(found, tuple)
        place = [f for f in found if f.path == "program.nodes[2].of[1]"]
        assert [f.reason.startswith(f"{text}: rows before layer {first}") for f in place] == [True]


def test_one_place_of_two_names_is_one_place() -> None:
    for rules in (DIRECT, replace(DIRECT, first_raw_layer=1), replace(DIRECT, first_raw_layer=3)):
        assert allowed(rules, *raw("embeddings")) == allowed(rules, *raw("resid_pre.0"))
        for layer in range(LAYERS - 1):
            assert allowed(rules, *raw(f"resid_post.{layer}")) == allowed(
                rules, *raw(f"resid_pre.{layer + 1}")
            )


# ---- the distance from a write --------------------------------------------------------------------

STAGES = ["resid_pre", "attn_in", "q", "k", "v", "attn_probs", "z", "attn_out", "attn_out_post", "resid_mid", "mlp_in",
          "mlp_act", "mlp_out", "mlp_out_post", "resid_post"]  # fmt: skip
LINE = ["embeddings", *(f"{stage}.{layer}" for layer in range(LAYERS) for stage in STAGES), "final_norm"]


def blocks_between(written: str, seen: str) -> int | None:
    """Counted along the line of the forward pass: layers whose beginning and end both lie between the two."""
    a, b = LINE.index(written), LINE.index(seen)
    if a > b:
        return None
    return sum(
        a <= LINE.index(f"resid_pre.{n}") and LINE.index(f"resid_post.{n}") <= b for n in range(LAYERS)
    )


def test_the_line_is_that_of_the_sites() -> None:
    assert set(LINE) == set(places([*READABLE, "attn_probs"]))
    assert blocks_between("resid_pre.1", "resid_post.1") == 1
    assert blocks_between("resid_post.0", "resid_pre.2") == 1
    assert blocks_between("attn_in.1", "resid_post.1") == blocks_between("resid_pre.1", "mlp_out.1") == 0
    assert blocks_between("embeddings", "final_norm") == LAYERS
    assert blocks_between("final_norm", "final_norm") == 0


@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("seen", places(READABLE))
def test_full_blocks_lie_between_a_write_and_rows(seen: str, least: int) -> None:
    """Every pair of a write and a read of a four-layer model."""
    rules = Rules("direct", first_raw_layer=0, least_blocks=least)
    for written in places(WRITABLE):
        between = blocks_between(written, seen)
        free = between is None or between >= least
        assert allowed(rules, write(written), *raw(seen)) == free, written
        assert allowed(rules, *raw(seen), write(written)) == free, (
            written
        )  # the order in the list does not matter


@pytest.mark.parametrize("least", [1, 2])
def test_the_nearest_write_counts(least: int) -> None:
    rules = Rules("direct", least_blocks=least)
    for near in places(WRITABLE):
        nodes = [
            write("embeddings"),
            write(near) if near != "embeddings" else write("resid_pre.0"),
            *raw("resid_post.3"),
        ]
        between = blocks_between(near, "resid_post.3")
        assert allowed(rules, *nodes) == (between is None or between >= least), near


def test_the_refusal_says_how_near() -> None:
    found = look(DIRECT, write("resid_post.1"), write("resid_mid.3"), *raw("resid_post.2", "mlp_act.3"))
    assert isinstance(found, tuple)
    assert [f.path for f in found] == ["program.nodes[4].of[1]"]
    assert "0 full blocks after the last write" in found[0].reason
    assert "1 or more" in found[0].reason


KNOCKOUT = node("edit.knockout", "e", site="attn_probs.2", at="prompt[1:]", keys="prompt[0]")
SAE = node("sae", "sae", w_enc="w_enc", b_enc="b_enc", w_dec="w_dec", b_dec="b_dec")
V, DOWN, UP = node("tensor", "v", name="v"), node("tensor", "down", name="m"), node("tensor", "up", name="up")
EDITS = [
    [V, node("edit.add", "e", site="resid_post.2", value="v")],
    [node("edit.set", "e", site="resid_post.2", value="zero")],
    [node("edit.scale", "e", site="resid_post.2", by=2.0)],
    [V, node("edit.project_out", "e", site="resid_post.2", value="v")],
    [DOWN, UP, node("edit.affine", "e", site="resid_post.2", down="down", up="up")],
    [V, node("edit.clamp", "e", site="resid_post.2", value="v", low=0.0)],
    [SAE, node("edit.sae", "e", site="resid_post.2", sae="sae", features=[{"index": 1, "set": 2.0}])],
    [KNOCKOUT],
]


@pytest.mark.parametrize("nodes", EDITS, ids=lambda nodes: nodes[-1]["op"])
def test_every_kind_of_edit_is_a_write(nodes: list[dict[str, Any]]) -> None:
    assert not allowed(DIRECT, *nodes, *raw("resid_post.2"))
    assert allowed(DIRECT, *nodes, *raw("resid_post.3"))
    assert allowed(replace(DIRECT, least_blocks=0), *nodes, *raw("resid_post.2"))


# ---- both ends of a matrix ------------------------------------------------------------------------

PAIRS = [
    ("attn_in.3", "q.3"), ("attn_in.3", "k.3"), ("attn_in.3", "v.3"), ("z.3", "attn_out.3"), ("mlp_in.3", "mlp_act.3"),
    ("mlp_act.3", "mlp_out.3"), ("z.3", "attn_out_post.3"), ("resid_mid.3", "mlp_act.3"), ("resid_pre.3", "q.3"),
    ("resid_post.2", "v.3"), ("mlp_act.3", "mlp_out_post.3"),
]  # fmt: skip
SUMS = [
    ("z.3", "resid_pre.3", "resid_mid.3"), ("z.3", "resid_post.2", "resid_mid.3"),
    ("mlp_act.3", "resid_mid.3", "resid_post.3"), ("mlp_act.3", "resid_pre.3", "attn_out.3", "resid_post.3"),
]  # fmt: skip
HARMLESS = [("q.3", "k.3", "v.3"), ("resid_post.2", "resid_post.3"), ("z.3", "resid_post.3"), ("attn_in.2", "q.3"),
            ("mlp_in.3", "mlp_out.3"), ("resid_pre.3", "resid_mid.3", "resid_post.3")]  # fmt: skip


@pytest.mark.parametrize("sites", [*PAIRS, *SUMS], ids="+".join)
def test_both_ends_of_a_matrix_do_not_leave(sites: tuple[str, ...]) -> None:
    """Not in one output, not in two; each site but one of the ends alone may."""
    assert not allowed(DIRECT, *raw(*sites))
    reads = [read(f"r{i}", site, "prompt[-1]") for i, site in enumerate(sites)]
    several = [*reads, *(node("raw", f"x{i}", of=[r["id"]]) for i, r in enumerate(reads))]
    assert not allowed(DIRECT, *several)
    found = look(DIRECT, *several)
    assert isinstance(found, tuple)
    assert {f.path for f in found} == {f"program.nodes[{len(several) - 1}].of"}
    assert all("matrix" in f.reason and "one of the two" in f.next_step for f in found)
    assert allowed(DIRECT, *raw(sites[0]))
    assert allowed(DIRECT, *raw(*sites[1:]))
    assert allowed(replace(DIRECT, linear_maps=True), *raw(*sites))


@pytest.mark.parametrize("sites", HARMLESS, ids="+".join)
def test_sites_that_are_no_ends_may_leave_together(sites: tuple[str, ...]) -> None:
    assert allowed(DIRECT, *raw(*sites))


def test_ends_of_different_tokens_count_too() -> None:
    """More is refused than must be, never less."""
    nodes = [read("a", "z.3", "prompt[1]"), read("b", "attn_out.3", "prompt[2]")]
    assert not allowed(DIRECT, *nodes, node("raw", "x", of=["a"]), node("raw", "y", of=["b"]))


@pytest.mark.parametrize(
    ("at", "first"),
    [("prompt[0]", True), ("prompt[*]", True), ("all", True), ("prompt[0,-1]", True), ("prompt[-5]", True),
     ("prompt[1]", False), ("prompt[1:]", False), ("gen[*]", False), ("prompt[-1]", False)],
)  # fmt: skip
def test_at_position_0_attention_is_a_matrix(at: str, first: bool) -> None:
    """The first of the two prompts has five tokens, so prompt[-5] is position 0 of one of them."""
    for sites in (("resid_pre.3", "resid_mid.3"), ("attn_in.3", "attn_out.3")):
        found = look(DIRECT, *raw(*sites, at=at), case=replace(CASE, new=2))
        assert isinstance(found, tuple) == first, sites
    half = [read("a", "attn_in.3", "prompt[0]"), read("b", "attn_out.3", "prompt[1]")]
    assert allowed(DIRECT, *half, node("raw", "x", of=["a"]), node("raw", "y", of=["b"]))


def test_every_map_of_the_table_is_refused() -> None:
    """Router logits are not served here; all others are asked for by name."""
    for one in linear_maps.LINEAR_MAPS:
        if one.target != "router_logits":
            at = "prompt[0]" if one.first_only else "prompt[-1]"
            assert not allowed(DIRECT, *raw(f"{one.source}.3", f"{one.target}.3", at=at)), one


# ---- whole sites only -----------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [FREE, DIRECT])
@pytest.mark.parametrize("made", [
    [read(), node("add", "d", a="r", b="r")],
    [read(), node("relu", "d", of="r")],
    [{**read("d", "z.3"), "heads": [1]}],
    [{**read("d", "mlp_act.3"), "neurons": [1]}],
    [{**read("d", "attn_probs.3"), "keys": "prompt[0]"}],
    [node("stored", "d", handle="act_" + "a" * 32, site="resid_post.1")],
])  # fmt: skip
def test_numbers_made_from_rows_are_not_rows(made: list[dict[str, Any]], rules: Rules) -> None:
    found = look(rules, *made, node("raw", "x", of=["d"]))
    assert isinstance(found, tuple)
    assert [(f.code, f.path) for f in found] == [("wrong_operand", f"program.nodes[{len(made)}].of[0]")]


def test_an_answer_holds_only_so_many_numbers() -> None:
    case = Case(model=facts(d_model=4096, context=4096), lengths=(512, 512))
    reads = [read("a", "resid_post.1", "prompt[*]"), read("b", "resid_post.1", "prompt[*]")]
    assert isinstance(look(FREE, *reads, node("raw", of=["a"]), case=case), Checked)  # 2^22 numbers
    found = look(FREE, *reads, node("raw", of=["a", "b"]), case=case)
    assert isinstance(found, tuple)
    assert [(f.code, f.path) for f in found] == [("too_expensive", "program.nodes[2].of")]
    assert str(2**23) in found[0].reason

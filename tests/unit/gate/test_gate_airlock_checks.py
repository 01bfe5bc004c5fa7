"""Each check on its own, and the rule that joins them: one failure outweighs everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.errors import TrocarError
from trocar.gate.checks import (
    MOST_PARTS,
    MOST_TEXTS,
    Check,
    Description,
    Disposition,
    ExportKind,
    ExportTerms,
    Numbers,
    Origin,
    Part,
    check,
    measure,
    told,
)
from trocar.graph.labels import Label
from trocar.sites import Site, parse

TERMS = ExportTerms()
ROWS = Part(
    "rows", Origin.read, Label.ACT, Site("resid_post", 12), 10, 64, Numbers(finite=True, one_hot_columns=0)
)
PROBE = replace(ROWS, name="resid_post.12/probe", origin=Origin.fit, rows=1, texts=("yes", "no"))


def codes(
    *parts: Part, kind: str = "rows", terms: ExportTerms = TERMS, earlier: str = ""
) -> tuple[str, set[str]]:
    sites = tuple(parse(word) for word in earlier.split())
    found = check(Description(ExportKind(kind), parts, sites), terms)
    return found.disposition.value, {reason.code.value for reason in found.reasons}


def rows_at(*sites: str, **fields: Any) -> tuple[Part, ...]:
    return tuple(replace(ROWS, name=s, site=parse(s), **fields) for s in sites)


def test_rows_are_always_looked_at() -> None:
    assert codes(ROWS) == ("review", {"rows"})
    assert codes(replace(ROWS, blocks=1)) == ("review", {"rows"})


def test_small_artifacts_of_public_targets_pass() -> None:
    assert codes(PROBE, kind="artifact") == ("pass", set())
    assert codes(replace(PROBE, site=None), kind="artifact") == ("pass", set())
    assert check(Description(ExportKind.artifact, (PROBE,)), TERMS).disposition is Disposition.passed


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"label": Label.GRAD}, "label"),
        ({"label": Label.WEIGHT}, "label"),
        ({"site": Site("embeddings")}, "early_layer"),
        ({"site": Site("resid_post", 0)}, "early_layer"),
        ({"site": Site("mlp_out", 1)}, "early_layer"),
        ({"site": Site("resid_pre", 1)}, "early_layer"),
        ({"site": Site("resid_post", 1)}, "early_layer"),
        ({"site": Site("resid_pre", 2)}, "early_layer"),  # another name of the same rows
        ({"site": None}, "no_site"),
        ({"site": Site("logits")}, "logits"),
        ({"blocks": 0}, "near_write"),
        ({"numbers": Numbers(finite=False, one_hot_columns=0)}, "not_finite"),
        ({"origin": Origin.fit}, "wrong_origin"),
        ({"name": "=cmd()"}, "bad_name"),
        ({"name": ""}, "bad_name"),
        ({"name": "a b"}, "bad_name"),
        ({"name": "x" * 101}, "bad_name"),
        ({"name": "\x1b[31mred"}, "bad_name"),
        ({"texts": ("\x1b[2J",)}, "bad_text"),
        ({"texts": ("x" * 201,)}, "bad_text"),
        ({"texts": ("ok",) * (MOST_TEXTS + 1)}, "bad_text"),
    ],
)
def test_rows_that_never_leave(change: dict[str, Any], code: str) -> None:
    assert codes(replace(ROWS, **change)) == ("fail", {code})


def test_a_fit_to_few_rows_counts_as_those_rows() -> None:
    few = replace(PROBE, leans_on=7)
    assert codes(few, kind="artifact") == ("review", {"few_rows"})
    assert codes(replace(few, leans_on=8), kind="artifact") == ("pass", set())
    assert codes(replace(few, site=Site("resid_pre", 1)), kind="artifact") == ("fail", {"few_rows"})
    assert codes(replace(few, blocks=0), kind="artifact") == ("fail", {"few_rows"})
    ends = [replace(few, name=name, site=parse(f"{name}.9"), first=True) for name in ("v", "attn_out")]
    assert codes(*ends, kind="artifact") == ("fail", {"linear_map"})
    assert codes(*(replace(end, leans_on=8) for end in ends), kind="artifact") == ("pass", set())


def test_a_policy_without_raw_rows_lets_none_out() -> None:
    never = ExportTerms(rows=False)
    assert codes(ROWS, terms=never) == ("fail", {"no_rows"})
    assert codes(PROBE, kind="artifact", terms=never) == ("pass", set())


@pytest.mark.parametrize("site", ["resid_pre.3", "resid_post.2", "attn_in.2", "final_norm"])
def test_sites_from_the_first_raw_layer_on_may_leave(site: str) -> None:
    assert codes(*rows_at(site))[0] == "review"


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        (Origin.activation_fit, "activation_targets"),
        (Origin.weight_init, "weight_init"),
        (Origin.optimiser, "optimiser"),
        (Origin.read, "wrong_origin"),
    ],
)
def test_artifacts_that_never_leave(origin: Origin, code: str) -> None:
    assert codes(replace(PROBE, origin=origin), kind="artifact") == ("fail", {code})


@pytest.mark.parametrize("label", [Label.GRAD, Label.WEIGHT])
def test_an_artifact_made_of_gradients_or_weights_never_leaves(label: Label) -> None:
    assert codes(replace(PROBE, label=label), kind="artifact") == ("fail", {"label"})


def test_every_origin_is_decided() -> None:
    decided = {o: codes(replace(PROBE, origin=o), kind="artifact")[0] for o in Origin}
    assert decided == {
        o: "pass" if o is Origin.fit else "review" if o is Origin.trained else "fail" for o in Origin
    }


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"origin": Origin.trained}, "trained"),
        ({"numbers": Numbers(finite=True, one_hot_columns=3)}, "one_hot"),
        ({"site": Site("resid_post", 1)}, "early_layer"),
        ({"site": Site("embeddings")}, "early_layer"),
        ({"blocks": 0}, "near_write"),
        ({"rows": 20_000}, "large"),
    ],
)
def test_artifacts_that_are_looked_at(change: dict[str, Any], code: str) -> None:
    assert codes(replace(PROBE, **change), kind="artifact") == ("review", {code})


@pytest.mark.parametrize(
    ("held", "first"),
    [
        ("attn_in.5 q.5", False),
        ("attn_in.5 k.5", False),
        ("attn_in.5 v.5", False),
        ("z.5 attn_out.5", False),
        ("mlp_in.5 mlp_act.5", False),
        ("mlp_act.5 mlp_out.5", False),
        ("resid_pre.5 resid_mid.5", True),
        ("resid_pre.5 attn_out.5", True),
        ("attn_in.5 resid_mid.5", True),
        ("attn_in.5 attn_out.5", True),
    ],
)
def test_both_ends_of_a_matrix_never_leave_together(held: str, first: bool) -> None:
    one, other = held.split()
    assert codes(*rows_at(one, other, first=first)) == ("fail", {"linear_map"})
    assert codes(*rows_at(one, first=first)) == ("review", {"rows"})
    assert codes(*rows_at(other, first=first), earlier=one) == ("review", {"rows", "linear_map_earlier"})
    if first:
        assert codes(*rows_at(one, other)) == ("review", {"rows"})


def test_artifacts_hold_no_end_of_a_matrix() -> None:
    pair = (replace(PROBE, site=Site("z", 5)), replace(PROBE, name="b", site=Site("attn_out", 5)))
    assert codes(*pair, kind="artifact", earlier="attn_in.5 q.5") == ("pass", set())


def test_open_weights_have_looser_terms() -> None:
    free = ExportTerms(first_raw_layer=0, least_blocks=0, own_targets=True, maps=())
    near = {"blocks": 0, "first": True}
    assert codes(*rows_at("embeddings", "z.0", "attn_out.0", **near), terms=free) == ("review", {"rows"})
    lens = replace(PROBE, origin=Origin.activation_fit)
    assert codes(lens, kind="artifact", terms=free) == ("pass", set())
    for origin, label in (
        (Origin.optimiser, Label.ACT),
        (Origin.weight_init, Label.ACT),
        (Origin.fit, Label.GRAD),
    ):
        part = replace(PROBE, origin=origin, label=label)
        assert codes(part, kind="artifact", terms=free)[0] == "fail"


def test_one_failure_outweighs_every_doubt_and_all_are_named() -> None:
    bad = replace(ROWS, label=Label.WEIGHT, blocks=0, numbers=Numbers(finite=False, one_hot_columns=0))
    assert codes(ROWS, bad, replace(bad, name="other")) == (
        "fail",
        {"label", "near_write", "not_finite", "bad_name"},
    )
    found = check(Description(ExportKind.rows, (ROWS, replace(bad, name="b"))), TERMS)
    assert {r.path for r in found.reasons} == {"parts[1]"}
    assert all(r.text and r.text.isprintable() for r in found.reasons)


def test_size_is_counted_as_packed() -> None:
    terms = ExportTerms(vector_bits=4, most_bytes=10 * 34, review_bytes=34)
    assert codes(ROWS, terms=terms) == ("review", {"rows", "large"})
    assert codes(replace(ROWS, rows=11), terms=terms) == ("fail", {"too_many_bytes"})
    assert codes(PROBE, kind="artifact", terms=terms) == ("pass", set())


def test_a_request_has_parts() -> None:
    assert codes() == ("fail", {"no_parts"})
    many = (replace(ROWS, name=f"n{i}", rows=1, width=1) for i in range(MOST_PARTS + 1))
    assert codes(*many) == ("fail", {"no_parts"})


def test_the_terms_hold_a_width_that_exists() -> None:
    with pytest.raises(TrocarError) as e:
        ExportTerms(vector_bits=16)
    assert e.value.code == "bad_value"


def test_columns_like_unit_vectors_are_counted() -> None:
    rng = np.random.default_rng(1)
    plain = rng.normal(size=(64, 32)).astype(np.float32)
    assert measure(plain) == Numbers(finite=True, one_hot_columns=0)
    chosen = plain.copy()
    chosen[:, :5] *= 1e-3
    chosen[range(5), range(5)] = 9.0
    assert measure(chosen).one_hot_columns == 5
    assert measure(np.eye(16, dtype=np.float32)).one_hot_columns == 16
    assert measure(np.zeros((16, 3), np.float32)).one_hot_columns == 0
    assert measure(np.eye(7, dtype=np.float32)).one_hot_columns == 0  # too few rows to tell


def test_columns_are_counted_over_all_rows() -> None:
    """Also where the rows are looked at in several goes."""
    tall = np.zeros((700, 3), np.float32)
    tall[[1, 699], 0] = 1.0  # two numbers, far apart: not alone
    tall[300, 1] = 1.0
    assert measure(tall).one_hot_columns == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_is_found(bad: float) -> None:
    values = np.ones((9, 9), np.float32)
    values[8, 3] = bad
    assert measure(values) == Numbers(finite=False, one_hot_columns=0)


PARTS = st.builds(
    Part,
    st.sampled_from(["a", "b", "c/d", ""]),
    st.sampled_from(Origin),
    st.sampled_from(Label),
    st.none()
    | st.sampled_from(
        [Site("embeddings"), Site("z", 3), Site("attn_out", 3), Site("resid_mid", 1), Site("logits")]
    ),
    st.integers(1, 10**6),
    st.integers(1, 10**4),
    st.builds(Numbers, st.booleans(), st.integers(0, 2)),
    st.none() | st.integers(0, 3),
    st.booleans(),
)


@given(st.sampled_from(ExportKind), st.lists(PARTS, max_size=3), PARTS)
def test_more_parts_never_make_it_better(kind: ExportKind, parts: list[Part], more: Part) -> None:
    rank = {"pass": 0, "review": 1, "fail": 2}
    before = codes(*parts, kind=kind.value)[0] if parts else "pass"
    assert rank[codes(*parts, more, kind=kind.value)[0]] >= rank[before]


@given(st.sampled_from(ExportKind), st.lists(PARTS, min_size=1, max_size=3))
def test_gradients_weights_and_bad_numbers_never_pass(kind: ExportKind, parts: list[Part]) -> None:
    disposition, found = codes(*parts, kind=kind.value)
    bad = [
        p
        for p in parts
        if p.label >= Label.GRAD or not p.numbers.finite or p.origin in (Origin.weight_init, Origin.optimiser)
    ]
    assert (disposition == "fail") >= bool(bad)
    assert bool(found) is (disposition != "pass")
    assert found <= set(Check)


def test_where_nothing_is_secret_unit_vectors_need_no_look() -> None:
    part = replace(PROBE, numbers=Numbers(finite=True, one_hot_columns=3))
    assert codes(part, kind="artifact") == ("review", {"one_hot"})
    assert codes(part, kind="artifact", terms=ExportTerms(one_hot_reviewed=False)) == ("pass", set())


def test_a_map_of_open_weights_has_the_label_of_a_weight() -> None:
    part = replace(PROBE, origin=Origin.activation_fit, label=Label.WEIGHT)
    assert codes(part, kind="artifact") == ("fail", {"label", "activation_targets"})
    open_terms = ExportTerms(own_targets=True)
    assert codes(part, kind="artifact", terms=open_terms) == ("pass", set())
    for origin in (Origin.fit, Origin.trained):
        assert codes(replace(part, origin=origin), kind="artifact", terms=open_terms) == ("fail", {"label"})


def test_an_author_hears_what_was_found_in_numbers_once() -> None:
    chosen = Numbers(finite=True, one_hot_columns=17)
    parts = tuple(replace(PROBE, name=f"p{i}", numbers=chosen, origin=Origin.trained) for i in range(3))
    reasons = check(Description(ExportKind.artifact, parts), TERMS).reasons
    assert [r.code for r in reasons].count(Check.one_hot) == 3
    heard = told(reasons)
    assert [(r.path, "17" in r.text) for r in heard if r.code is Check.one_hot] == [("parts", False)]
    assert [r for r in heard if r.code is Check.trained] == [r for r in reasons if r.code is Check.trained]
    broken = replace(PROBE, numbers=Numbers(finite=False, one_hot_columns=0))
    failed = check(Description(ExportKind.artifact, (broken, replace(broken, name="b"))), TERMS).reasons
    assert [(r.code, r.path) for r in told(failed)] == [(Check.not_finite, "parts")]

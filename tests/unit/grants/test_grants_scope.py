"""Scopes: what they refuse and in which words, and that nothing done to one makes it wider."""

from __future__ import annotations

from typing import Any

import pytest
from grant_words import allowed_by_the_book, allows, requests, scopes
from hypothesis import given, settings

from trocar.errors import AuthError, PolicyRefusal, ProgramError
from trocar.grants.scope import EVERYTHING, MAX_WORDS, Scope

ASKED: dict[str, Any] = {"model": "toy", "ops": ["read"], "sites": ["z.1"], "bits": 10, "now_ms": 5}


def words(*of: str) -> frozenset[str]:
    return frozenset(of)


@given(scopes, requests)
def test_a_scope_allows_what_its_sentences_say(scope: Scope, request: dict[str, Any]) -> None:
    assert allows(scope, request) == allowed_by_the_book(scope, request)


@given(scopes, scopes, requests)
def test_narrower_allows_exactly_what_both_allow(one: Scope, other: Scope, request: dict[str, Any]) -> None:
    both = allows(one, request) and allows(other, request)
    assert allows(one.narrower(other), request) == both
    assert allows(other.narrower(one), request) == both


@given(scopes, scopes, scopes)
def test_the_order_of_a_chain_does_not_matter(one: Scope, other: Scope, third: Scope) -> None:
    assert one.narrower(other) == other.narrower(one)
    assert one.narrower(one) == one
    assert one.narrower(EVERYTHING) == one
    left, right = one.narrower(other).narrower(third), one.narrower(other.narrower(third))
    assert left.within(right)
    assert right.within(left)


@given(scopes, scopes)
def test_narrower_is_within_both(one: Scope, other: Scope) -> None:
    assert one.narrower(other).within(one)
    assert one.narrower(other).within(other)
    assert one.within(EVERYTHING)
    if one.within(other):
        assert one.narrower(other).within(one)
        assert one.within(one.narrower(other))


@settings(max_examples=300)
@given(scopes, scopes, requests)
def test_within_means_allows_no_more(one: Scope, other: Scope, request: dict[str, Any]) -> None:
    if one.within(other) and allows(one, request):
        assert allows(other, request)


@given(scopes)
def test_the_text_is_read_back(scope: Scope) -> None:
    assert Scope.from_json(scope.as_json()) == scope


def test_the_text_is_canonical() -> None:
    scope = Scope(models=words("b", "a"), most_bits=3)
    assert scope.as_json() == '{"models":["a","b"],"most_bits":3}'
    assert EVERYTHING.as_json() == "{}"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "null", '"x"', "{", '{"models":3}', '{"models":[3]}', '{"models":[[]]}', '{"sites":["nope"]}',
        '{"most_bits":true}', '{"most_bits":1.0}', '{"most_bits":-1}', '{"most_bits":null}', '{"unknown":1}',
        '{"models":["b","a"]}', '{"models":["a","a"]}', ' {}', '{"most_bits": 3}', '{"most_bits":3,"most_bits":4}',
        '{"ops":"read"}', "[" * 100_000,
    ],
)  # fmt: skip
def test_no_other_text_is_a_scope(text: str) -> None:
    with pytest.raises(ProgramError):
        Scope.from_json(text)


@pytest.mark.parametrize(
    ("scope", "asked", "path", "near"),
    [
        (Scope(models=words("toys")), {}, "model", "toys"),
        (Scope(models=words("toy"), ops=words("lens", "add")), {"ops": ["ad"]}, "ops[0]", "add"),
        (Scope(ops=words("read")), {"ops": ["read", "capture"]}, "ops[1]", None),
        (Scope(ops=words("edit")), {"ops": {"nodes[3].op": "editor"}}, "nodes[3].op", "edit"),
        (Scope(sites=words("z.2")), {}, "sites[0]", "z.2"),
        (Scope(sites=words("z.1")), {"sites": {"nodes[0].site": "z.10"}}, "nodes[0].site", "z.1"),
        (Scope(sites=words("z.1")), {"sites": ["z"]}, "sites[0]", None),
        (Scope(sites=frozenset()), {}, "sites[0]", None),
        (Scope(most_bits=9), {}, "bits", "9"),
    ],
)
def test_the_first_thing_outside_is_named(
    scope: Scope, asked: dict[str, Any], path: str, near: str | None
) -> None:
    with pytest.raises(PolicyRefusal) as e:
        scope.require(**{**ASKED, **asked})
    assert (e.value.code, e.value.status, e.value.path, e.value.closest) == ("out_of_scope", 403, path, near)


def test_a_family_covers_its_places_and_no_neighbour() -> None:
    family = Scope(ops=words("edit"), sites=words("resid_post"))
    family.require(**{**ASKED, "ops": ["edit.add"], "sites": ["resid_post.0", "resid_post"]})
    for outside in ({"ops": ["edits"]}, {"sites": ["resid_pre.0"]}, {"sites": ["resid_postscript"]}):
        with pytest.raises(PolicyRefusal):
            family.require(**{**ASKED, "ops": [], "sites": [], **outside})


def test_the_name_of_a_model_covers_no_other() -> None:
    with pytest.raises(PolicyRefusal):
        Scope(models=words("toy")).require(**{**ASKED, "model": "toy.tuned"})
    assert Scope(models=words("toy.tuned")).narrower(Scope(models=words("toy"))).models == frozenset()


def test_expiry_is_the_answer_of_an_unknown_key_and_comes_first() -> None:
    scope = Scope(models=words("other"), expires_ms=1000)
    with pytest.raises(PolicyRefusal):
        scope.require(**{**ASKED, "now_ms": 999})
    with pytest.raises(AuthError) as e:
        scope.require(**{**ASKED, "now_ms": 1000})
    assert e.value.code == "bad_key"
    assert "1000" not in str(e.value)


@pytest.mark.parametrize(
    ("fields", "code", "near"),
    [
        ({"models": words("a b")}, "bad_value", None),
        ({"models": words("")}, "bad_value", None),
        ({"models": {"toy"}}, "bad_value", None),
        ({"models": "toy"}, "bad_value", None),
        ({"models": frozenset({3})}, "bad_value", None),
        ({"ops": words("lenz")}, "bad_value", "lens"),
        ({"ops": words("edit.")}, "bad_value", "edit"),
        ({"sites": words("resid_pst.3")}, "unknown_site", "resid_post.3"),
        ({"sites": words("resid_post.*")}, "unknown_site", "resid_post.0"),
        ({"sites": words("final_norm.3")}, "unknown_site", "final_norm"),
        ({"most_bits": True}, "bad_value", None),
        ({"most_bits": -1}, "bad_value", None),
        ({"most_bits": 2**62 + 1}, "bad_value", None),
        ({"expires_ms": 1.0}, "bad_value", None),
    ],
)
def test_words_outside_the_vocabularies_are_refused(
    fields: dict[str, Any], code: str, near: str | None
) -> None:
    with pytest.raises(ProgramError) as e:
        Scope(**fields)
    assert (e.value.code, e.value.path, e.value.closest) == (code, next(iter(fields)), near)


def test_nobody_writes_an_empty_or_endless_part() -> None:
    many = frozenset(f"m{i}" for i in range(MAX_WORDS + 1))
    Scope(models=many - {"m0"}).require_short()
    for scope in (Scope(ops=frozenset()), Scope(models=many)):
        with pytest.raises(ProgramError):
            scope.require_short()

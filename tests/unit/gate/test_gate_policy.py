"""The policy: exact limits, safe defaults, a file that is read strictly, and a judgement of every difference."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trocar.errors import ProgramError, Refusal, TrocarError
from trocar.gate import policy_file
from trocar.gate.limits import MAX_BITS, Limits, whole_bits
from trocar.gate.policy import (
    UNCAPPED,
    Data,
    Lineage,
    Outputs,
    People,
    Policy,
    Project,
    Tier,
    Tiers,
    TierTerms,
)
from trocar.graph.cost import Prices
from trocar.graph.labels import FREE, STRICT, Rules

SECRET = Lineage("base", 10**9, Tier.external)
GUARDED = (Tier.trusted, Tier.external, Tier.agent)
FRACTIONS = {
    Tier.trusted: (Fraction(1, 100), Fraction(1, 1000)),
    Tier.external: (Fraction(1, 1000), Fraction(1, 4000)),
    Tier.agent: (Fraction(1, 10_000), Fraction(1, 40_000)),
}


# ---- limits ---------------------------------------------------------------------------------------


@given(st.integers(1, MAX_BITS), st.sampled_from(GUARDED))
def test_a_limit_is_the_exact_fraction_rounded_down(bits: int, tier: Tier) -> None:
    life, day = FRACTIONS[tier]
    secret = Lineage("base", bits, tier)
    assert Policy().limits(tier, secret) == Limits(int(bits * life), int(bits * day))
    assert Policy().lineage_limits(secret) == Limits(int(bits * life), int(bits * Fraction(1, 4000)))


@given(st.integers(1, MAX_BITS), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_limit_never_exceeds_the_secret(bits: int, life: int, day: int) -> None:
    terms = TierTerms(life_ppm=life, day_ppm=day, rank_ppm=1, tick_ms=1)
    policy = Policy(people=People(tiers=Tiers(agent=terms)), projects={"p": Project(life_ppm=life)})
    limits = policy.limits(Tier.agent, Lineage("base", bits, None))
    for found, ppm in ((limits.life_bits, life), (limits.day_bits, day)):
        assert type(found) is int
        assert found == Fraction(bits * ppm, 10**6).__floor__() <= bits
    assert policy.project_limits("p", Lineage("base", bits, None)) == Limits(limits.life_bits, None)


def test_the_budget_of_a_70b_model_in_external_hands_is_140_megabytes() -> None:
    assert (
        Policy().limits(Tier.external, Lineage("llama", 70 * 10**9 * 16, Tier.external)).life_bits
        == 140 * 10**6 * 8
    )


def test_a_word_that_is_no_tier_is_not_uncapped() -> None:
    for word in ("root", "", "Open", "OPEN"):
        for ask in (Policy().terms, Policy().prices, lambda w: Policy().limits(w, SECRET)):
            with pytest.raises(ValueError, match="Tier"):
                ask(word)


def test_open_tiers_and_open_weights_are_counted_not_capped() -> None:
    assert Policy().limits(Tier.open, SECRET) == UNCAPPED == Limits(None, None)
    assert Policy().lineage_limits(Lineage("base", 10**9, None)) == UNCAPPED
    assert Policy().lineage_limits(SECRET) == Limits(10**6, 250_000)


def test_projects_are_counted_and_capped_where_the_policy_says() -> None:
    policy = Policy(projects={"a": Project(life_ppm=10, day_ppm=0), "b": Project()})
    assert policy.project_limits("a", SECRET) == Limits(10_000, 0)
    assert policy.project_limits("b", SECRET) == policy.project_limits("unknown", SECRET) == UNCAPPED


def test_directions_of_a_site() -> None:
    assert [Policy().rank_limit(tier, 4096) for tier in Tier] == [None, 1024, 409, 102]
    assert [Policy().rank_limit(tier, 3) for tier in GUARDED] == [1, 1, 1]
    assert [Policy().lineage_rank_limit(width) for width in (4096, 3, 1)] == [2048, 1, 1]


# ---- what a tier means ----------------------------------------------------------------------------


def test_what_each_tier_pays_and_may() -> None:
    found = {tier: Policy().prices(tier) for tier in Tier}
    assert found == {
        Tier.open: Prices(32, 256, 32, FREE),
        Tier.trusted: Prices(16, 256, 8, STRICT),
        Tier.external: Prices(8, 256, 8, STRICT),
        Tier.agent: Prices(8, 256, 4, STRICT),
    }
    assert [Policy().terms(tier).tick_ms for tier in Tier] == [0, 20, 100, 100]


def test_a_tier_trusted_less_may_less() -> None:
    rows = [Policy().terms(tier) for tier in GUARDED]
    for more, less in itertools.pairwise(rows):
        for name in ("life_ppm", "day_ppm", "scalar_bits", "vector_bits", "rank_ppm"):
            assert getattr(more, name) >= getattr(less, name), name
        assert more.tick_ms <= less.tick_ms


def test_the_rules_of_the_data_hold_for_every_guarded_tier() -> None:
    data = Data(first_raw_layer=5, least_blocks=3, linear_maps=True, own_targets=True)
    terms = TierTerms(life_ppm=1, rank_ppm=1, raw="never", tick_ms=1)
    policy = Policy(data=data, people=People(tiers=Tiers(agent=terms)), outputs=Outputs(overhead_bits=512))
    assert policy.prices(Tier.agent).rules == Rules("never", 5, 3, linear_maps=True, own_targets=True)
    assert policy.prices(Tier.trusted).rules == Rules("airlock", 5, 3, linear_maps=True, own_targets=True)
    assert policy.prices(Tier.open) == Prices(32, 512, 32, FREE)


@pytest.mark.parametrize("tier", [t.value for t in GUARDED])
@pytest.mark.parametrize(
    "missing", [{"life_ppm": None}, {"rank_ppm": None}, {"guarded": False}, {"tick_ms": 0}]
)
def test_only_open_may_be_unguarded_or_uncapped(tier: str, missing: dict[str, Any]) -> None:
    terms = TierTerms(**{"life_ppm": 1, "rank_ppm": 1, "tick_ms": 1, "guarded": True, **missing})
    with pytest.raises(ValidationError, match=f"tier '{tier}' needs"):
        Tiers(**{tier: terms})
    assert Tiers(open=terms).open == terms


@pytest.mark.parametrize("bits", [3, 17, 24, 31, 33, 0, -8, True, 8.0, "8"])
def test_scalars_are_of_4_to_16_bits_or_32(bits: Any) -> None:
    with pytest.raises(ValidationError):
        TierTerms(scalar_bits=bits)


def test_widths_that_there_are() -> None:
    for bits in (*range(4, 17), 32):
        assert TierTerms(scalar_bits=bits).scalar_bits == bits
    for width in (2, 5, 12, 64):
        with pytest.raises(ValidationError):
            TierTerms(vector_bits=width)  # type: ignore[arg-type]


# ---- bits and lineages ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [True, 1.0, "1", None, np.int64(1), -1, MAX_BITS + 1, 2**70, pytest.param(10**5000, id="huge")]
)
def test_only_exact_ints_in_range_are_bits(value: Any) -> None:
    with pytest.raises(TrocarError) as e:
        whole_bits(value, "bits")
    assert e.value.code == "bad_bits"


def test_the_ends_of_the_range_are_bits() -> None:
    assert [whole_bits(v, "bits") for v in (0, MAX_BITS)] == [0, MAX_BITS]
    with pytest.raises(TrocarError, match=r"\[5, 2"):
        whole_bits(4, "bits", least=5)


@pytest.mark.parametrize("name", ["", " base", "-base", "a b", "a\n", "*", "a" * 201, "naïve"])
def test_a_lineage_name_keeps_to_its_grammar(name: str) -> None:
    with pytest.raises(TrocarError) as e:
        Lineage(name, 1, None)
    assert e.value.code == "bad_value"


def test_a_lineage_says_open_in_one_way_only() -> None:
    with pytest.raises(TrocarError, match="use None"):
        Lineage("org/base-70B@v1", 1, Tier.open)


# ---- the file -------------------------------------------------------------------------------------

WHOLE = """
version = 1
[people]
refusals_per_minute = 60
[people.tiers.agent]
life_ppm = 50
day_ppm = 5
rank_ppm = 1000
scalar_bits = 4
raw = "never"
tick_ms = 250
[projects."alpha-1.x"]
life_ppm = 500
[settings]
isolation = "host"
[data]
lineage_tier = "agent"
least_blocks = 2
[outputs]
overhead_bits = 300
[outputs.airlock]
approvers = 3
"""


def test_a_file_is_read() -> None:
    policy = policy_file.read(WHOLE)
    assert policy.terms(Tier.agent) == TierTerms(
        life_ppm=50, day_ppm=5, rank_ppm=1000, scalar_bits=4, vector_bits=4, raw="never", tick_ms=250
    )
    assert policy.terms(Tier.external) == Policy().terms(Tier.external)
    assert policy.prices(Tier.agent) == Prices(
        4, 300, 4, Rules("never", 2, 2, linear_maps=False, own_targets=False)
    )
    assert policy.project_limits("alpha-1.x", SECRET) == Limits(500_000, None)
    assert (policy.settings.isolation, policy.outputs.airlock.approvers) == ("host", 3)
    assert policy.people.refusals_per_minute == 60


def test_what_a_file_leaves_out_is_as_usual() -> None:
    agent = policy_file.read("[people.tiers.agent]\nscalar_bits = 6").terms(Tier.agent)
    assert agent == Policy().terms(Tier.agent).model_copy(update={"scalar_bits": 6})
    assert policy_file.read("[people.tiers.agent]\nday_ppm = 'unlimited'").terms(Tier.agent).day_ppm is None


def test_an_empty_file_is_the_default() -> None:
    assert policy_file.read("") == Policy() == policy_file.read("version = 1")


def faults(text: str) -> tuple[Refusal, ...]:
    with pytest.raises(ProgramError) as caught:
        policy_file.read(text)
    assert {f.code for f in caught.value.refusals} == {"bad_policy"}
    return caught.value.refusals


AGENT = "[people.tiers.agent]\nlife_ppm = 1\nrank_ppm = 1\n"
FAULTS = [
    ("[people", "$", None),
    ("a = 1\na = 2", "$", None),
    ("a = " + "1" * 5000, "$", None),
    ("a = " + "[" * 3000, "$", None),
    ("version = 2", "version", None),
    ("version = 1.5", "version", None),
    ("[peeple]\nx = 1", "peeple", "people"),
    ("[project.a]\nlife_ppm = 1", "project", "projects"),
    ("[people]\nrefusal_per_minute = 1", "people.refusal_per_minute", "refusals_per_minute"),
    ("[people.tiers.agents]\nlife_ppm = 1", "people.tiers.agents", "agent"),
    (AGENT + "lif_ppm = 1", "people.tiers.agent.lif_ppm", "life_ppm"),
    (AGENT + "frobnicate = 1", "people.tiers.agent.frobnicate", None),
    (AGENT + "day_ppm = 1000001", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = -1", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = 0.5", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = 1.0", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = inf", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = nan", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = '5'", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = true", "people.tiers.agent.day_ppm", None),
    (AGENT + "day_ppm = 1979-05-27", "people.tiers.agent.day_ppm", None),
    (AGENT + "scalar_bits = 20", "people.tiers.agent", None),
    (AGENT + "vector_bits = true", "people.tiers.agent.vector_bits", None),
    (AGENT + "vector_bits = 5", "people.tiers.agent.vector_bits", None),
    (AGENT + "raw = 'always'", "people.tiers.agent.raw", None),
    (AGENT + "guarded = 0", "people.tiers.agent.guarded", None),
    (AGENT + "guarded = false", "people.tiers", None),
    ("[people.tiers.agent]\nrank_ppm = 'unlimited'", "people.tiers", None),
    ("[projects.Alpha]\nlife_ppm = 1", "projects.Alpha.[key]", None),
    ("[projects.a]\nrank_ppm = 1", "projects.a.rank_ppm", "rank_ppm"),
    ("[settings]\nisolation = 'none'", "settings.isolation", None),
    ("[data]\nlineage_tier = 'open'", "data.lineage_tier", None),
    ("[data]\nfirst_raw_layer = -1", "data.first_raw_layer", None),
    ("[outputs]\noverhead_bits = 255", "outputs.overhead_bits", None),
    ("[outputs.airlock]\napprovers = 1", "outputs.airlock.approvers", None),
    ("[outputs.airlock]\ndays = 0", "outputs.airlock.days", None),
]


@pytest.mark.parametrize(("text", "path", "near"), FAULTS, ids=[f"{i}" for i in range(len(FAULTS))])
def test_a_fault_is_refused_with_its_place(text: str, path: str, near: str | None) -> None:
    found = faults(text)
    assert [(f.path, f.closest) for f in found] == [(path, near)]
    assert found[0].reason


@pytest.mark.parametrize("policy", [Policy(), policy_file.read(WHOLE)])
def test_json_is_read_as_strictly(policy: Policy) -> None:
    assert policy_file.from_json(policy.model_dump_json()) == policy
    for text, path in (
        ("{", "$"),
        ("[]", "$"),
        ('{"version": 3}', "version"),
        ('{"data": {"x": 1}}', "data.x"),
    ):
        with pytest.raises(ProgramError, match="bad_policy") as caught:
            policy_file.from_json(text)
        assert [f.path for f in caught.value.refusals] == [path]


DOTTED = Policy(projects={"a": Project(), "a.b": Project(life_ppm=1), "a.b.life_ppm": Project(day_ppm=0)})


@pytest.mark.parametrize("policy", [Policy(), DOTTED, policy_file.read(WHOLE)])
def test_what_is_written_is_read_again(policy: Policy) -> None:
    text = policy_file.write(policy)
    assert policy_file.read(text) == policy
    for path, value in policy_file.settings(policy):
        name = path.rpartition(".")[2]
        assert (f'{name} = "unlimited"' if value is None else f"{name} = ") in text


def test_every_setting_has_a_meaning() -> None:
    said = {path: policy_file.meaning(path) for path, _ in policy_file.settings(DOTTED)}
    assert all(text[0].islower() or text[0].isdigit() or text[0] == "`" for text in said.values()), said
    assert said["outputs.airlock.days"] == "after which a request that nobody decided expires."
    assert said["projects.a.b.life_ppm"].startswith("limit of all keys of the project")
    assert said["people.tiers.agent.scalar_bits"].startswith("of one released number: 32")


def test_every_fault_is_told_at_once_up_to_twenty() -> None:
    text = "[data]\nlineage_tear = 'agent'\nleast_blocks = -1\n[outputs]\noverhead_bits = 1"
    assert {(f.path, f.closest) for f in faults(text)} == {
        ("data.lineage_tear", "lineage_tier"),
        ("data.least_blocks", None),
        ("outputs.overhead_bits", None),
    }
    assert len(faults("".join(f"x{i} = 1\n" for i in range(50)))) == 20


# ---- every setting, and every difference ----------------------------------------------------------

PROJECT = Policy(projects={"p": Project(life_ppm=500, day_ppm=50)})
TIER_MOVES: dict[str, tuple[Any, Any]] = {
    "life_ppm": (101, 99),
    "day_ppm": (26, 24),
    "scalar_bits": (9, 7),
    "vector_bits": (16, 4),
    "raw": ("direct", "never"),
    "rank_ppm": (25_001, 24_999),
    "tick_ms": (99, 101),
    "guarded": (False, True),
}
AT = TierTerms(
    life_ppm=100, day_ppm=25, scalar_bits=8, vector_bits=8, raw="airlock", rank_ppm=25_000, tick_ms=100
)
START = Policy(
    people=People(tiers=Tiers(open=AT, trusted=AT, external=AT, agent=AT)),
    projects=PROJECT.projects,
    data=Data(linear_maps=True, own_targets=True, first_raw_layer=2, least_blocks=2),
    outputs=Outputs(overhead_bits=300),
)
# For every setting: a looser and a tighter value than in START; None where there is none.
MOVES: dict[str, tuple[Any, Any]] = {
    **{f"people.tiers.{tier.value}.{name}": move for tier in Tier for name, move in TIER_MOVES.items()},
    "version": (None, None),
    "people.refusals_per_minute": (121, 119),
    "projects.p.life_ppm": (501, 499),
    "projects.p.day_ppm": (51, 49),
    "settings.isolation": (None, "host"),
    "data.lineage_tier": ("trusted", "agent"),
    "data.lineage_day_ppm": (251, 249),
    "data.lineage_rank_ppm": (500_001, 499_999),
    "data.first_raw_layer": (1, 3),
    "data.least_blocks": (1, 3),
    "data.linear_maps": (None, False),
    "data.own_targets": (None, False),
    "outputs.overhead_bits": (299, 301),
    "outputs.airlock.approvers": (None, 3),
    "outputs.airlock.open_approvers": (None, 1),
    "outputs.airlock.days": (15, 13),
    "outputs.airlock.review_bytes": ((1 << 20) + 1, (1 << 20) - 1),
    "outputs.airlock.most_bytes": ((64 << 20) + 1, (64 << 20) - 1),
}


def moved(policy: Policy, path: str, value: Any) -> Policy:
    """The policy with one setting changed, without its own rules: only the judgement is asked for."""
    name, _, rest = path.partition(".")
    if isinstance(policy, dict):
        return {**policy, name: moved(policy[name], rest, value)}  # type: ignore[return-value]
    inner = getattr(policy, name)
    return policy.model_copy(update={name: moved(inner, rest, value) if rest else value})


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every field of the models, walked by hand."""
    if isinstance(value, dict):
        return {p: v for name, one in value.items() for p, v in leaves(one, f"{path}{name}.").items()}
    if hasattr(type(value), "model_fields"):
        fields = type(value).model_fields
        return {p: v for name in fields for p, v in leaves(getattr(value, name), f"{path}{name}.").items()}
    return {path.removesuffix("."): value}


@pytest.mark.parametrize("policy", [Policy(), START, policy_file.read(WHOLE)])
def test_every_setting_is_listed(policy: Policy) -> None:
    assert dict(policy_file.settings(policy)) == leaves(policy)


def test_the_table_has_a_judgement_of_every_setting() -> None:
    assert set(MOVES) == {path for path, _ in policy_file.settings(START)}


@pytest.mark.parametrize("path", MOVES)
def test_a_change_is_judged(path: str) -> None:
    was = dict(policy_file.settings(START))[path]
    for value, looser in zip(MOVES[path], (True, False), strict=True):
        if value is None or value == was:
            continue
        there = moved(START, path, value)
        (change,) = policy_file.changes(START, there)
        assert change == policy_file.Change(path, was, value, looser)
        (back,) = policy_file.changes(there, START)
        assert back == policy_file.Change(path, value, was, not looser)


def test_every_setting_but_the_version_moves() -> None:
    usual = dict(policy_file.settings(START))
    still = {
        path for path, values in MOVES.items() if not {v for v in values if v is not None} - {usual[path]}
    }
    assert still == {"version"}


@pytest.mark.parametrize("name", ["life_ppm", "day_ppm", "rank_ppm"])
def test_an_absent_limit_is_no_limit(name: str) -> None:
    path = f"people.tiers.open.{name}"
    without = moved(START, path, None)
    assert [c.looser for c in policy_file.changes(START, without)] == [True]
    assert [c.looser for c in policy_file.changes(without, START)] == [False]


def test_a_project_that_comes_is_tighter_and_one_that_goes_is_looser() -> None:
    assert [c.looser for c in policy_file.changes(Policy(), PROJECT)] == [False, False]
    assert [c.looser for c in policy_file.changes(PROJECT, Policy())] == [True, True]
    assert policy_file.changes(Policy(), Policy(projects={"q": Project()})) == ()


def test_what_nobody_has_judged_counts_as_looser() -> None:
    assert policy_file._looser("data.invented", 1, 0)
    assert policy_file._looser("data.invented", None, 0)
    assert policy_file._looser("version", 1, 2)
    assert policy_file._looser("people.tiers.agent.raw", "never", "word")
    assert policy_file._looser("people.tiers.agent.raw", None, "never")
    assert policy_file._looser("outputs.overhead_bits", 256, None)
    assert policy_file._looser("outputs.overhead_bits", None, 256)


def test_equal_policies_have_no_difference_and_one_digest() -> None:
    assert policy_file.changes(START, START) == ()
    assert Policy().digest() == policy_file.read("").digest()
    digests = {
        moved(START, path, tighter).digest() for path, (_, tighter) in MOVES.items() if tighter is not None
    }
    assert (
        len(digests | {START.digest()})
        == sum(t not in (None, dict(policy_file.settings(START))[p]) for p, (_, t) in MOVES.items()) + 1
    )

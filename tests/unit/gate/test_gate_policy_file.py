"""A policy as a file: what is written is read back, whatever it says; and every setting says what it means."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.gate import policy_file
from trocar.gate.policy import (
    Airlock,
    Data,
    Outputs,
    People,
    Policy,
    Project,
    Settings,
    Tiers,
    TierTerms,
)

PPM = st.integers(0, 10**6)
MAYBE = st.none() | PPM
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)


def terms(tier: str) -> st.SearchStrategy[TierTerms]:
    limit, guarded = (MAYBE, st.booleans()) if tier == "open" else (PPM, st.just(value=True))
    return st.builds(
        TierTerms,
        life_ppm=limit,
        day_ppm=MAYBE,
        scalar_bits=st.integers(4, 16) | st.just(32),
        vector_bits=st.sampled_from([4, 8, 16, 32]),
        raw=st.sampled_from(["direct", "airlock", "never"]),
        rank_ppm=limit,
        tick_ms=st.integers(0 if tier == "open" else 1, 10_000),
        guarded=guarded,
    )


TIERS = st.builds(Tiers, **{name: terms(name) for name in Tiers.model_fields})
POLICIES = st.builds(
    Policy,
    people=st.builds(People, tiers=TIERS, refusals_per_minute=st.integers(1, 100_000)),
    projects=st.dictionaries(NAMES, st.builds(Project, life_ppm=MAYBE, day_ppm=MAYBE), max_size=4),
    settings=st.builds(Settings, isolation=st.sampled_from(["process", "host"])),
    data=st.builds(
        Data,
        lineage_tier=st.sampled_from(["trusted", "external", "agent"]),
        lineage_day_ppm=PPM,
        lineage_rank_ppm=PPM,
        first_raw_layer=st.integers(0, 1000),
        least_blocks=st.integers(0, 1000),
        linear_maps=st.booleans(),
        own_targets=st.booleans(),
    ),
    outputs=st.builds(
        Outputs,
        overhead_bits=st.integers(256, 1 << 20),
        airlock=st.builds(
            Airlock,
            approvers=st.integers(2, 5),
            open_approvers=st.integers(0, 5),
            days=st.integers(1, 365),
            review_bytes=st.integers(0, 1 << 40),
            most_bytes=st.integers(1, 1 << 40),
        ),
    ),
)


@settings(max_examples=60, deadline=None)
@given(POLICIES)
def test_what_is_written_is_read_back(policy: Policy) -> None:
    text = policy_file.write(policy)
    assert policy_file.read(text) == policy
    assert policy_file.read(text).digest() == policy.digest()
    assert policy_file.from_json(policy.model_dump_json()) == policy


@settings(max_examples=40, deadline=None)
@given(POLICIES, POLICIES)
def test_a_change_there_and_back_is_looser_one_way_at_most(one: Policy, other: Policy) -> None:
    there, back = policy_file.changes(one, other), policy_file.changes(other, one)
    assert {c.path: (c.was, c.now) for c in there} == {c.path: (c.now, c.was) for c in back}
    judged = {c.path: c.looser for c in back}
    assert all(c.looser != judged[c.path] for c in there)
    assert (there == ()) == (dict(policy_file.settings(one)) == dict(policy_file.settings(other)))


def test_every_setting_is_in_the_file_also_one_that_limits_nothing() -> None:
    text = policy_file.write(Policy(projects={"a.b": Project(), "c": Project(life_ppm=1)}))
    assert '[projects."a.b"]\nlife_ppm = "unlimited"\nday_ppm = "unlimited"\n' in text
    assert '[projects.c]\nlife_ppm = 1\nday_ppm = "unlimited"\n' in text
    assert text.startswith("version = 1\n\n[data]\n")
    assert '[people.tiers.open]\nlife_ppm = "unlimited"\n' in text


POLICY = Policy(projects={"alpha.x": Project()})


@pytest.mark.parametrize("path", [path for path, _ in policy_file.settings(POLICY)])
def test_every_setting_says_what_it_means(path: str) -> None:
    words = policy_file.meaning(path)
    assert len(words) > 10
    assert words.endswith(".")
    assert "as in" not in words


def test_a_meaning_is_of_its_setting() -> None:
    known: dict[str, Any] = {
        "projects.alpha.x.day_ppm": "limit for a day.",
        "people.tiers.agent.day_ppm": "limit for a day.",
        "data.lineage_day_ppm": "and on one day.",
        "outputs.airlock.most_bytes": "larger ones are refused.",
    }
    assert {path: policy_file.meaning(path) for path in known} == known
    raw = policy_file.meaning("people.tiers.trusted.raw")
    assert raw == "whether rows leave in an answer (`direct`), through the `airlock` only, or `never`."


def test_a_meaning_may_have_more_than_one_line() -> None:
    doc = """Words.

    Attributes:
        one, two: first
            and second.
        three: third.
    """
    assert policy_file._attributes(doc) == {
        "one": "first and second.",
        "two": "first and second.",
        "three": "third.",
    }
    assert policy_file._attributes("Words.") == {}

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.errors import TrocarError
from trocar.gate.policy import MAX_BITS, Lineage, Policy, Tier, whole_bits

FRACTIONS = {
    Tier.trusted: Fraction(1, 100),
    Tier.external: Fraction(1, 1000),
    Tier.agent: Fraction(1, 10_000),
}


@given(st.integers(1, MAX_BITS), st.sampled_from(sorted(FRACTIONS)))
def test_a_cap_is_the_exact_fraction_rounded_down(bits: int, tier: Tier) -> None:
    assert Policy().cap_bits(tier, bits) == int(bits * FRACTIONS[tier])


def test_the_budget_of_a_70b_model_in_external_hands_is_140_megabytes() -> None:
    assert Policy().cap_bits(Tier.external, 70 * 10**9 * 16) == 140 * 10**6 * 8


def test_a_word_that_is_no_tier_is_not_uncapped() -> None:
    for word in ("root", "open", ""):
        with pytest.raises(KeyError):
            Policy().cap_bits(word, 10**9)  # type: ignore[arg-type]


def test_open_tiers_and_open_weights_are_counted_not_capped() -> None:
    assert Policy().cap_bits(Tier.open, 10) is None
    assert Policy().lineage_limit_bits(Lineage("base", 10**9, None)) is None
    assert Policy().lineage_limit_bits(Lineage("base", 10**9, Tier.external)) == 10**6


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"scalar_bits": 0},
        {"overhead_bits": -1},
        {"agent_ppm": 1_000_001},
        {"trusted_ppm": 0.01},
        {"external_ppm": True},
    ],
)
def test_a_policy_of_other_numbers_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrocarError) as e:
        Policy(**wrong)
    assert e.value.code == "bad_bits"

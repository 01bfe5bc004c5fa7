"""The page on attacks: every attack is described and shown, and every row that is shown holds."""

from __future__ import annotations

from typing import Any

import docs_attacks
import docs_reference as reference
import pytest
from docs_blocks import parts

from trocar.attacks.loot import TOLERANCE
from trocar.attacks.table import ATTACKS, BY_NAME
from trocar.cli.attack_room import Side, problems
from trocar.codes import CODES

PAGE = reference.DOCS / "attacks.md"
SUITE = (
    "embedding-read", "hidden-dimension", "subspace", "steer-logprobs", "basis-injection", "passive-regression",
    "activation-target", "gradient-read", "boolean-oracle", "k-average", "coalition", "adapter-initialisation",
)  # fmt: skip


def side(found: dict[str, Any]) -> Side:
    return Side(**{**found, "refusals": tuple(found["refusals"])})


def test_the_suite_is_whole() -> None:
    assert tuple(a.name for a in ATTACKS) == SUITE


def test_every_attack_is_described_in_a_line() -> None:
    shown = parts(PAGE.read_text())["catalogue"].splitlines()[2:]
    assert [line.split("`")[1] for line in shown] == list(SUITE)
    assert all(len(a.how) > 30 and a.how in line for a, line in zip(ATTACKS, shown, strict=True))


@pytest.mark.parametrize("model", docs_attacks.MODELS)
def test_every_row_is_there_and_holds(model: str) -> None:
    found = docs_attacks.result(model)
    assert [row["attack"] for row in found["rows"]] == list(SUITE)
    assert found["patient"]
    for row in found["rows"]:
        on, attack = side(row["secret"]), BY_NAME[row["attack"]]
        assert row["problems"] == []
        assert list(problems(attack, on)) == []
        assert on.limit_bits == found["limits"]["life_bits"]
        assert on.charged_bits <= (on.limit_bits or 0) <= found["weight_bits"] / 1000
        assert on.error >= (1 - TOLERANCE) * on.least_error
        assert set(on.refusals) <= set(CODES)
        assert row["open"]["error"] < on.error
        assert row["offline"] == attack.offline


def test_a_row_that_does_not_hold_would_be_noticed() -> None:
    on = docs_attacks.result("random")["rows"][0]["secret"]
    better = side({**on, "error": on["least_error"] / 2})
    assert any("is below" in text for text in problems(BY_NAME["embedding-read"], better))


def test_what_needs_no_server_is_marked() -> None:
    shown = parts(PAGE.read_text())["random"]
    for attack in ATTACKS:
        assert (f"`{attack.name}`{docs_attacks.MARK} |" in shown) == attack.offline

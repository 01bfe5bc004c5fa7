"""Every number from 1 to 80 has a test, or a reason why it has none yet; and S has its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from trocar.attacks.table import BY_NAME

HERE = Path(__file__).parent
NUMBERS = range(1, 81)
_NUMBERED = re.compile(r"test_(?:case|attack_\w*?case)_(\d\d)(?:_|$)")
_RANGE = re.compile(r"test_case_(\d\d)_(?:to|and)_(\d\d)_")

# What cannot be tested yet, with what it waits for. A number leaves this table when its test exists.
WAITING: dict[int, str] = {}
# Numbers of the extraction suite, whose tests are named after attacks: the test, and the attack where it runs several.
EXTRACTIONS: dict[int, tuple[str, str]] = {
    70: ("test_an_attack_is_stopped", "embedding-read"),
    71: ("test_an_attack_is_stopped", "subspace"),
    72: ("test_an_attack_is_stopped", "steer-logprobs"),
    73: ("test_an_attack_is_stopped", "basis-injection"),
    74: ("test_an_attack_is_stopped", "passive-regression"),
    75: ("test_an_attack_is_stopped", "activation-target"),
    76: ("test_an_attack_is_stopped", "gradient-read"),
    77: ("test_an_attack_is_stopped", "boolean-oracle"),
    78: ("test_a_coalition_is_no_better", "coalition"),
    79: ("test_an_attack_spends_what_it_has", "boolean-oracle"),
    80: ("test_recovered_bits_are_charged", ""),
}


def functions() -> dict[str, ast.FunctionDef]:
    """Every test function of this folder by name."""
    files = [p for p in sorted(HERE.glob("test_*.py")) if p.name != Path(__file__).name]
    return {n.name: n for p in files for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.FunctionDef)
            if n.name.startswith("test_")}  # fmt: skip


def numbers(name: str) -> set[int]:
    """The case of a test's name; a name for several cases (`01_to_12`) counts for none of them."""
    if _RANGE.match(name):
        return set()
    found = _NUMBERED.match(name)
    return {int(found[1])} if found else set()


def covered() -> dict[int, list[str]]:
    out: dict[int, list[str]] = {}
    for name in functions():
        for number in numbers(name):
            out.setdefault(number, []).append(name)
    for number, (name, _) in EXTRACTIONS.items():
        if name in functions():
            out.setdefault(number, []).append(name)
    return out


def test_the_extraction_suite_runs_the_attacks_named_here() -> None:
    """An attack that is renamed or dropped is missed."""
    assert {attack for _, attack in EXTRACTIONS.values() if attack} <= set(BY_NAME)


def test_every_number_is_here_or_waits() -> None:
    """No number is silently missing, and none waits that has a test."""
    have = covered()
    print(*(f"case {n:02d} waits for {why}" for n, why in sorted(WAITING.items())), sep="\n")
    assert [n for n in NUMBERS if n not in have and n not in WAITING] == []
    assert [n for n in WAITING if n in have] == []
    assert set(have) <= set(NUMBERS)


def test_every_case_says_what_it_is() -> None:
    """Each numbered test has a docstring of one sentence or a few."""
    silent = [
        name
        for name, node in functions().items()
        if name.startswith("test_case") and not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("test_case_07_a_bomb", {7}), ("test_case_13_to_27_all", set()), ("test_attack_reads_case_70_embedding", {70}),
     ("test_case_s_bans", set()), ("test_other", set())],
)  # fmt: skip
def test_names_are_understood(name: str, expected: set[int]) -> None:
    """How a name is read."""
    assert numbers(name) == expected

"""The table of roles, written out a second time, and the rules that follow from it."""

from __future__ import annotations

import pytest

from trocar.errors import PolicyRefusal
from trocar.gate import roles
from trocar.gate.policy import Role
from trocar.gate.roles import Power

# role: run, mint, change_policy, review, read_log, operate
TABLE = {
    "owner":      "yes yes yes yes yes yes",
    "checker":    "no  no  no  yes yes no ",
    "operator":   "yes yes no  no  yes yes",
    "auditor":    "no  no  no  no  yes no ",
    "researcher": "yes no  no  no  no  no ",
    "agent":      "yes no  no  no  no  no ",
}  # fmt: skip
# minter: the roles of the keys that he may make
MINTS = {
    "owner": {"owner", "checker", "operator", "auditor", "researcher", "agent"},
    "operator": {"operator", "auditor", "researcher", "agent"},
    "checker": set(),
    "auditor": set(),
    "researcher": set(),
    "agent": set(),
}
CELLS = [
    (Role(role), power, word == "yes")
    for role, line in TABLE.items()
    for power, word in zip(Power, line.split(), strict=True)
]


def test_the_tables_are_complete() -> None:
    assert set(TABLE) == set(MINTS) == set(Role)
    assert set(roles.POWERS) == set(Role)
    assert len(CELLS) == len(Role) * len(Power) == 36


@pytest.mark.parametrize(("role", "power", "expected"), CELLS)
def test_every_cell(role: Role, power: Power, expected: bool) -> None:
    assert roles.may(role, power) is expected
    if expected:
        roles.require(role, power)
    else:
        with pytest.raises(PolicyRefusal) as e:
            roles.require(role, power)
        assert e.value.code == "not_allowed"
        assert f"the key has {role.value!r}" in e.value.reason
        able = {r.value for r, p, yes in CELLS if p is power and yes}
        assert all(repr(word) in e.value.reason for word in able)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("made", Role)
def test_who_mints_whom(role: Role, made: Role) -> None:
    if made in MINTS[role]:
        roles.require_mint(role, made)
    else:
        with pytest.raises(PolicyRefusal) as e:
            roles.require_mint(role, made)
        assert e.value.code == "not_allowed"


def test_nobody_mints_his_way_up() -> None:
    """Whatever chain of keys a role starts, no key in it may do more than the first."""
    for role in Role:
        reached, before = {role}, set[Role]()
        while reached != before:
            before = set(reached)
            reached |= {made for by in before for made in Role if made in MINTS[by]}
        assert frozenset[Power]().union(*(roles.POWERS[r] for r in reached)) == roles.POWERS[role]


def test_no_role_but_the_owner_both_runs_the_server_and_reviews() -> None:
    reviews = {r for r in Role if roles.may(r, Power.review)}
    assert {r for r in reviews if roles.may(r, Power.operate) or roles.may(r, Power.run)} == {Role.owner}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("agent", [False, True])
def test_a_token_is_a_researcher_or_an_agent(role: Role, agent: bool) -> None:
    if role in (Role.checker, Role.auditor):
        with pytest.raises(PolicyRefusal):
            roles.delegated(role, agent=agent)
        return
    given = roles.delegated(role, agent=agent)
    assert given is (Role.agent if agent or role is Role.agent else Role.researcher)
    assert roles.POWERS[given] <= roles.POWERS[role]


def test_a_word_that_is_no_role_is_not_a_yes() -> None:
    with pytest.raises(KeyError):
        roles.may("boss", Power.run)  # type: ignore[arg-type]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        roles.POWERS[Role.agent] = frozenset(Power)  # type: ignore[index]

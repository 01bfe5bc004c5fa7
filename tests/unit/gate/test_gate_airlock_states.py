"""The state machine against lists written by hand: every state, every standing, every action."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from trocar.errors import TrocarError
from trocar.gate import airlock_states as machine
from trocar.gate.airlock_states import (
    OWNERS,
    Action,
    Actor,
    Approval,
    Parties,
    RequestKind,
    Side,
    Standing,
    State,
    first_state,
    sees,
    standing,
)
from trocar.gate.policy import Role

# state, action, who (letters of WHO), the state while approvals are missing, the state once there are enough
WHO = {
    "S": Standing.system, "A": Standing.author, "B": Standing.agent, "K": Standing.keeper, "H": Standing.holder,
    "C": Standing.colleague, "P": Standing.sponsor, "V": Standing.approver, "O": Standing.owner, "X": Standing.checker,
    "-": Standing.stranger,
}  # fmt: skip
LISTED = """
unsigned   sign      K C        submitted  approved
unsigned   withdraw  A B K H P  withdrawn  withdrawn
unsigned   reject    O X V      rejected   rejected
unsigned   expire    S          expired    expired
submitted  approve   O X        seconded   approved
submitted  reject    O X V      rejected   rejected
submitted  withdraw  A B K H P  withdrawn  withdrawn
submitted  expire    S          expired    expired
seconded   approve   O X        seconded   approved
seconded   reject    O X V      rejected   rejected
seconded   withdraw  A B K H P  withdrawn  withdrawn
seconded   expire    S          expired    expired
approved   release   A B        released   released
approved   reject    O X V      rejected   rejected
approved   withdraw  A B K H P  withdrawn  withdrawn
approved   expire    S          expired    expired
released   release   A B        released   released
"""


def listed() -> dict[tuple[str, str, Standing], tuple[str, str]]:
    found = {}
    for line in LISTED.split("\n"):
        if line:
            state, action, *letters, short, enough = line.split()
            found |= {(state, action, WHO[letter]): (short, enough) for letter in letters}
    return found


def taken(state: State, action: Action, who: Standing) -> tuple[str, str] | str:
    try:
        following = machine.require(state, action, who)
    except TrocarError as e:
        return e.code
    return following.short, following.enough


def test_only_the_listed_transitions_exist() -> None:
    assert set(WHO.values()) == set(Standing)
    every = set(product(State, Action, Standing))
    assert len(every) == 9 * 6 * 11
    found = {step: taken(*step) for step in every}
    assert {step: to for step, to in found.items() if isinstance(to, tuple)} == listed()
    assert {to for to in found.values() if isinstance(to, str)} == {"not_allowed", "airlock_state"}


def test_who_is_asked_before_when() -> None:
    """What an actor may never do is refused in the same words in every state: the state is not told."""
    for action, who in product(Action, Standing):
        answers = {taken(state, action, who) for state in State}
        assert answers == {"not_allowed"} or "not_allowed" not in answers


def test_every_state_is_owned_by_exactly_one_side() -> None:
    assert set(OWNERS) == set(State)
    assert set(OWNERS.values()) == set(Side)
    moves = {side: {s for s in State if OWNERS[s] is side} for side in Side}
    assert moves[Side.checkers] == {
        s for s in State if taken(s, Action.approve, Standing.checker) != "airlock_state"
    }
    assert {s for s in State if taken(s, Action.withdraw, Standing.author) == "airlock_state"} == moves[
        Side.nobody
    ]


def test_nothing_but_release_leaves_a_state_that_nobody_owns() -> None:
    ended = [s for s in State if OWNERS[s] is Side.nobody]
    open_ = {
        (s, a)
        for s in ended
        for a in Action
        if taken(s, a, Standing.author) != "airlock_state" and a in machine.ALLOWS[s]
    }
    assert open_ == {(State.released, Action.release)}


AUTHOR = Actor("k-author", "ann", "lab", "probe", Role.researcher)
AGENT = replace(AUTHOR, key_id="k-bot", role=Role.agent)


def parties(
    author: Actor = AUTHOR, *approvals: Approval, signers: str = "", needed: int = 2, kind: str = "export"
) -> Parties:
    return Parties(RequestKind(kind), author, frozenset(signers.split()), approvals, needed)


def person(holder: str, role: Role, project: str = "probe", tenant: str = "lab") -> Actor:
    return Actor(f"k-{holder}-{role}", holder, tenant, project, role)


@pytest.mark.parametrize("role", set(Role) - {Role.agent})
def test_a_second_key_of_the_author_is_the_author(role: Role) -> None:
    """Whatever role it has, it neither approves nor signs."""
    own = standing(person("ann", role), parties())
    assert own is Standing.holder
    assert {a for a in Action if own in machine.MAY[a]} == {Action.withdraw}


@pytest.mark.parametrize("role", [Role.owner, Role.checker])
def test_who_approved_does_not_approve_again_with_another_key(role: Role) -> None:
    once = parties(AUTHOR, Approval("bea", Role.checker))
    assert standing(person("bea", role), once) is Standing.approver
    assert standing(person("cid", role), once) is Standing(role.value)


@pytest.mark.parametrize("role", set(Role))
def test_standing_follows_from_the_role(role: Role) -> None:
    expected = {
        Role.owner: Standing.owner, Role.checker: Standing.checker, Role.researcher: Standing.colleague,
    }  # fmt: skip
    assert standing(person("dan", role), parties()) is expected.get(role, Standing.stranger)
    outside = person("dan", role, project="other")
    assert standing(outside, parties()) is (expected | {Role.researcher: Standing.stranger}).get(
        role, Standing.stranger
    )
    assert standing(replace(outside, project="probe", tenant="x"), parties()) is standing(outside, parties())


def test_an_agent_never_approves_nor_signs() -> None:
    for asked_by, approvals in product((AUTHOR, AGENT), ((), (Approval("ann", Role.owner),))):
        who = standing(replace(AGENT, key_id="k-other"), parties(asked_by, *approvals))
        assert {a for a in Action if who in machine.MAY[a]} == set()
    assert {a for a in Action if standing(AGENT, parties(AGENT)) in machine.MAY[a]} == {
        Action.withdraw,
        Action.release,
    }


def test_an_agents_token_is_not_the_key_that_it_stands_for() -> None:
    token = replace(AUTHOR, role=Role.agent)
    assert standing(token, parties(AUTHOR)) is Standing.stranger
    assert standing(AUTHOR, parties(token)) is Standing.keeper
    assert standing(token, parties(token)) is Standing.agent


def test_a_request_of_an_agent_waits_for_a_researcher_of_its_project() -> None:
    asked = parties(AGENT)
    assert first_state(asked, failed=False) is State.unsigned
    assert first_state(parties(AGENT, needed=0), failed=False) is State.unsigned
    assert standing(AUTHOR, asked) is Standing.keeper
    assert standing(person("eve", Role.researcher), asked) is Standing.colleague
    assert standing(person("eve", Role.researcher, project="other"), asked) is Standing.stranger
    assert standing(person("ann", Role.researcher, project="other"), asked) is Standing.holder
    assert standing(person("ann", Role.checker), asked) is Standing.holder


@pytest.mark.parametrize("role", [Role.owner, Role.checker])
def test_who_signed_for_an_agent_counts_as_its_author(role: Role) -> None:
    signed = parties(AGENT, signers="eve")
    assert standing(person("eve", role), signed) is Standing.sponsor
    assert not parties(AGENT, Approval("eve", role), Approval("bea", role), signers="eve").enough
    assert not parties(AUTHOR, Approval("ann", role), Approval("bea", role)).enough


@pytest.mark.parametrize(
    ("kind", "roles", "needed", "enough"),
    [
        ("export", "", 0, True),
        ("export", "", 2, False),
        ("export", "checker", 2, False),
        ("export", "checker checker", 2, True),
        ("export", "owner checker", 2, True),
        ("export", "checker checker", 3, False),
        ("raise", "", 0, False),
        ("raise", "checker checker", 2, False),
        ("raise", "checker checker checker", 2, False),
        ("raise", "checker owner", 2, True),
        ("raise", "owner", 2, False),
        ("raise", "owner owner", 2, True),
    ],
)
def test_how_many_persons_are_enough(kind: str, roles: str, needed: int, *, enough: bool) -> None:
    given = [Approval(f"p{i}", Role(role)) for i, role in enumerate(roles.split())]
    asked = parties(AUTHOR, *given, needed=needed, kind=kind)
    assert asked.enough is enough
    assert first_state(asked, failed=False) is (State.approved if enough else State.submitted)
    assert first_state(asked, failed=True) is State.failed


def test_one_person_counts_once() -> None:
    assert not parties(AUTHOR, Approval("bea", Role.checker), Approval("bea", Role.owner)).enough


def test_who_sees_a_request() -> None:
    asked = parties()
    for role in Role:
        assert sees(person("ann", role, "other", "other"), asked)
        assert sees(person("dan", role), asked)
        watches = role in (Role.owner, Role.checker, Role.auditor)
        assert sees(person("dan", role, project="other"), asked) is watches
        assert sees(person("dan", role, tenant="other"), asked) is watches


def test_the_gate_itself_only_lets_requests_expire() -> None:
    assert standing(None, parties()) is Standing.system
    assert {a for a in Action if Standing.system in machine.MAY[a]} == {Action.expire}

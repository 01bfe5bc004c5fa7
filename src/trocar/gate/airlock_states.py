"""The airlock's state machine: which step a request may take, and who may take it. Pure.

Two layers, both of which must say yes. `MAY` says who: it knows persons, not states. `ALLOWS` says when: it
knows states, not persons. What is in neither table does not exist. A person is a `holder`: two keys of one
holder are one person, so nobody approves what their own other key asked for, and nobody approves twice. An
agent's key never approves; what it asks for waits until a researcher of its project signs it, and whoever
signed counts as its author.

It knows nothing of what a request is about, of checks, prices or databases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from trocar import errors
from trocar.gate.policy import Role


class RequestKind(StrEnum):
    """What is asked for: that something leaves, or that an account's limits are raised."""

    export = "export"
    raise_ = "raise"


class State(StrEnum):
    """Where a request stands."""

    unsigned = "unsigned"
    submitted = "submitted"
    seconded = "seconded"
    approved = "approved"
    released = "released"
    rejected = "rejected"
    withdrawn = "withdrawn"
    expired = "expired"
    failed = "failed"


class Side(StrEnum):
    """Whose move is next."""

    author = "author"
    checkers = "checkers"
    nobody = "nobody"


class Action(StrEnum):
    """A step on a request that exists; asking for one is `first_state`."""

    sign = "sign"
    approve = "approve"
    reject = "reject"
    withdraw = "withdraw"
    expire = "expire"
    release = "release"


class Standing(StrEnum):
    """What an actor is to a request; exactly one.

    Attributes:
        system: the gate itself.
        author: the very key that asked, in the hands of a person.
        agent: the very key or token that asked, in the hands of an agent.
        keeper: a researcher's key of the person who holds that agent, in its project.
        holder: any other key of the author's holder.
        colleague: a researcher of the author's project.
        sponsor: signed for an agent.
        approver: a checker or owner who has approved it.
        owner, checker: of that role, and none of the above.
        stranger: everybody else.
    """

    system = "system"
    author = "author"
    agent = "agent"
    keeper = "keeper"
    holder = "holder"
    colleague = "colleague"
    sponsor = "sponsor"
    approver = "approver"
    owner = "owner"
    checker = "checker"
    stranger = "stranger"


OWNERS: Final[Mapping[State, Side]] = {
    State.unsigned: Side.author,
    State.submitted: Side.checkers,
    State.seconded: Side.checkers,
    State.approved: Side.author,
    State.released: Side.nobody,
    State.rejected: Side.nobody,
    State.withdrawn: Side.nobody,
    State.expired: Side.nobody,
    State.failed: Side.nobody,
}

_AUTHORS: Final = frozenset({Standing.author, Standing.agent})
_CHECKERS: Final = frozenset({Standing.owner, Standing.checker})
MAY: Final[Mapping[Action, frozenset[Standing]]] = {
    Action.sign: frozenset({Standing.keeper, Standing.colleague}),
    Action.approve: _CHECKERS,
    Action.reject: _CHECKERS | {Standing.approver},
    Action.withdraw: _AUTHORS | {Standing.keeper, Standing.holder, Standing.sponsor},
    Action.expire: frozenset({Standing.system}),
    Action.release: _AUTHORS,
}


@dataclass(frozen=True, slots=True)
class Next:
    """The states that a step leads to: while approvals are missing, and once there are enough."""

    short: State
    enough: State


def _to(state: State) -> Next:
    return Next(state, state)


_ENDS: Final = {
    Action.reject: _to(State.rejected),
    Action.withdraw: _to(State.withdrawn),
    Action.expire: _to(State.expired),
}
_APPROVE: Final = {Action.approve: Next(State.seconded, State.approved)}
ALLOWS: Final[Mapping[State, Mapping[Action, Next]]] = {
    State.unsigned: {**_ENDS, Action.sign: Next(State.submitted, State.approved)},
    State.submitted: {**_ENDS, **_APPROVE},
    State.seconded: {**_ENDS, **_APPROVE},
    State.approved: {**_ENDS, Action.release: _to(State.released)},
    State.released: {Action.release: _to(State.released)},  # the same bytes again
    State.rejected: {},
    State.withdrawn: {},
    State.expired: {},
    State.failed: {},
}


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts: one key, the person who holds it, and where it belongs."""

    key_id: str
    holder: str
    tenant: str
    project: str
    role: Role


@dataclass(frozen=True, slots=True)
class Approval:
    """One person's yes."""

    holder: str
    role: Role


@dataclass(frozen=True, slots=True)
class Parties:
    """The persons of one request.

    Attributes:
        author: who asked.
        signers: holders who signed for an agent.
        approvals: one per person.
        needed: how many approvals the policy asks for.
    """

    kind: RequestKind
    author: Actor
    signers: frozenset[str]
    approvals: tuple[Approval, ...]
    needed: int

    @property
    def enough(self) -> bool:
        """Whether the approvals suffice; limits are raised only if an owner is among those who agree."""
        persons = {a.holder for a in self.approvals} - {self.author.holder} - self.signers
        owned = self.kind is RequestKind.export or any(a.role is Role.owner for a in self.approvals)
        return len(persons) >= self.needed and owned


def first_state(parties: Parties, *, failed: bool) -> State:
    """The state of a request just made."""
    if failed:
        return State.failed
    if parties.author.role is Role.agent:
        return State.unsigned
    return State.approved if parties.enough else State.submitted


def standing(actor: Actor | None, parties: Parties) -> Standing:
    """What `actor` is to a request; None is the gate itself."""
    if actor is None:
        return Standing.system
    author = parties.author
    agents = actor.role is Role.agent, author.role is Role.agent
    # a token for an agent has the id of the key that it stands for, and is not that key
    same = actor.key_id == author.key_id and agents[0] == agents[1]
    if agents[0]:
        return Standing.agent if same else Standing.stranger
    if same:
        return Standing.author
    if actor.holder == author.holder:
        return Standing.keeper if agents[1] and _colleague(actor, parties) else Standing.holder
    if actor.holder in parties.signers:
        return Standing.sponsor
    return _by_role(actor, parties)


def _by_role(actor: Actor, parties: Parties) -> Standing:
    if actor.role in (Role.owner, Role.checker):
        if actor.holder in {a.holder for a in parties.approvals}:
            return Standing.approver
        return Standing.owner if actor.role is Role.owner else Standing.checker
    return Standing.colleague if _colleague(actor, parties) else Standing.stranger


def _colleague(actor: Actor, parties: Parties) -> bool:
    here = (parties.author.tenant, parties.author.project)
    return actor.role is Role.researcher and (actor.tenant, actor.project) == here


def sees(actor: Actor, parties: Parties) -> bool:
    """Whether a request exists for `actor`: for its author's project, and for those who watch over all."""
    if actor.role in (Role.owner, Role.checker, Role.auditor):
        return True
    author = parties.author
    return actor.holder == author.holder or (actor.tenant, actor.project) == (author.tenant, author.project)


def require(state: State, action: Action, who: Standing) -> Next:
    """Both layers: where the step leads, if there is one.

    Raises:
        PolicyRefusal: `not_allowed` when this actor may never take it.
        Conflict: `airlock_state` when the request's state does not allow it.
    """
    if who not in MAY[action]:
        may = " or ".join(sorted(MAY[action]))
        reason = f"to {action} a request is for its {may}; the key is its {who}"
        raise errors.refuse("not_allowed", "", reason, next_step="Ask somebody who may.")
    found = ALLOWS[state].get(action)
    if found is None:
        raise errors.refuse("airlock_state", "", f"a request that is {state} cannot take the step {action!r}")
    return found

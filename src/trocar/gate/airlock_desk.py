"""The desk of the airlock: look at requests, sign, approve, reject, withdraw, and let old ones expire.

Each step is one transaction: who acts is looked up again, the request is compared with the log, the state
machine is asked, and state, step and log entry are written together. Nobody decides on what they did not see:
an approval names the digest that `show` gave. Until they have decided, reviewers do not see who agreed before.
Nothing leaves here (`airlock.py`), and no approval lifts a limit of the ledger.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import Connection, select

from trocar import errors
from trocar.gate import accounts, airlock_records, airlock_states, airlock_tables, chain, keys, plain_text
from trocar.gate.accounts import Account
from trocar.gate.airlock_records import Step, Ticket
from trocar.gate.airlock_request import ExportFacts, RaiseFacts
from trocar.gate.airlock_states import OWNERS, Action, Actor, Side, Standing, State, sees, standing
from trocar.gate.airlock_tables import REQUESTS
from trocar.gate.database import Database
from trocar.gate.keys import Principal
from trocar.gate.limits import EVERYONE
from trocar.gate.policy import Role, Tier
from trocar.gate.tables import LOG

OPEN: Final = tuple(state for state in State if OWNERS[state] is not Side.nobody)
MOST_LISTED: Final = 1000
_ID: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the policy says about decisions.

    Attributes:
        approvers: persons who must agree to an export.
        open_approvers: the same for open weights, when the checks pass.
        raise_approvers: persons who must agree to larger limits; one of them is an owner.
        life_ms: time until a request that nobody decided expires.
        most_open: undecided requests of one project.
    """

    approvers: int = 2
    open_approvers: int = 0
    raise_approvers: int = 2
    life_ms: int = 14 * 86_400_000
    most_open: int = 20

    def __post_init__(self) -> None:
        if (
            min(self.approvers, self.open_approvers, self.life_ms, self.most_open) < 0
            or self.raise_approvers < 2
        ):
            raise errors.refuse("bad_value", "airlock", "a raise needs two persons, and nothing is negative")


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier export of the same author's project."""

    id: str
    state: State
    lineage: str
    price_bits: int
    sites: tuple[str, ...]
    submitted_ms: int


@dataclass(frozen=True, slots=True)
class Review:
    """What a reviewer decides on.

    Attributes:
        you: what the caller is to the request.
        lineage, key: the accounts that will pay, as they are stored; None while they were never opened.
        earlier: what the author's project exported before, newest first.
    """

    ticket: Ticket
    you: Standing
    lineage: Account | None
    key: Account | None
    earlier: tuple[Earlier, ...]

    @property
    def share_of_lineage(self) -> float | None:
        """Price over the lineage's limit for life; None when that is not capped."""
        limit = None if self.lineage is None else self.lineage.limit_bits
        return self.ticket.request.price_bits / limit if limit else None


def actor_of(caller: Principal) -> Actor:
    """The caller as the state machine knows it; a key of the tier `agent` is an agent's, whatever its role.

    Raises:
        PolicyRefusal: `not_allowed` for a key that names no person.
    """
    if not caller.holder:
        raise errors.refuse("not_allowed", "", "the airlock needs a person, and the key names no holder")
    role = Role.agent if caller.tier is Tier.agent else caller.role
    return Actor(caller.key_id, caller.holder, caller.tenant, caller.project, role)


class Desk:
    """The requests of one database; safe to share between threads.

    Args:
        clock: milliseconds since 1970. A request that has expired stays so, whatever the clock says later.

    Raises:
        ServerFault: `ledger_unavailable` and `store_damaged`, from every method.
    """

    def __init__(
        self, database: Database, rules: Rules | None = None, *, clock: Callable[[], int] = chain.now_ms
    ) -> None:
        self._database = database
        self._rules = rules or Rules()
        self._clock = clock
        with database.write() as connection:
            airlock_tables.make(connection)

    def list(self, caller: Principal, *, state: State | None = None, limit: int = 100) -> tuple[Ticket, ...]:
        """The newest requests that the caller sees, newest first."""
        actor = actor_of(caller)
        with self._database.read() as connection:
            found = airlock_records.listed(connection, actor, state=state, limit=min(limit, MOST_LISTED))
        return tuple(_blinded(ticket, standing(actor, ticket.parties)) for ticket in found)

    def show(self, caller: Principal, request_id: str) -> Review:
        """All that a decision on a request needs.

        Raises:
            NotFound: `airlock_not_found`, for absent and foreign alike.
        """
        actor = actor_of(caller)
        with self._database.read() as connection:
            ticket = self._visible(connection, actor, request_id)
            airlock_records.content(connection, ticket)
            who = standing(actor, ticket.parties)
            owner = accounts.owner_of(ticket.request.author.key_id)
            name = ticket.request.lineage.name
            found = accounts.find(connection, name, (EVERYONE, owner))
            before = _earlier(connection, ticket)
        return Review(_blinded(ticket, who), who, found.get(EVERYONE), found.get(owner), before)

    def sign(self, caller: Principal, request_id: str) -> Ticket:
        """Takes a request of an agent upon oneself, as a researcher of its project."""
        return self._step(caller, request_id, Action.sign)

    def approve(self, caller: Principal, request_id: str, digest: str, words: str = "") -> Ticket:
        """Agrees to a request.

        Args:
            digest: of the request as the caller saw it.

        Raises:
            NotFound: `airlock_not_found`.
            PolicyRefusal: `not_allowed` for the author, for who has approved, and for who is no reviewer.
            Conflict: `airlock_state` when it is decided, expired, or not what the caller saw.
        """
        return self._step(caller, request_id, Action.approve, words, digest)

    def reject(self, caller: Principal, request_id: str, words: str) -> Ticket:
        """Ends a request that has not left, also one that was approved.

        Raises:
            NotFound, PolicyRefusal, Conflict: as `approve`.
            ProgramError: `bad_value` without a word of why.
        """
        plain_text.require(words, "words", least=1)
        return self._step(caller, request_id, Action.reject, words)

    def withdraw(self, caller: Principal, request_id: str) -> Ticket:
        """Takes a request back, as its author.

        Raises:
            NotFound, PolicyRefusal, Conflict: as `approve`.
        """
        return self._step(caller, request_id, Action.withdraw)

    def apply(self, caller: Principal, request_id: str) -> Ticket:
        """Gives an account the limits that were approved, as who asked for them. Twice is once.

        Raises:
            NotFound, PolicyRefusal, Conflict: as `approve`.
            ProgramError: `bad_value` when no such account is open, or a limit would sink.
        """
        self.expire_old()
        with self._database.write() as connection:
            actor, ticket, after, _ = self._ready(connection, caller, request_id, Action.release)
            what = ticket.request.what
            if not isinstance(what, RaiseFacts):
                raise errors.refuse(
                    "airlock_state", "", "an export leaves by `release`; only a raise is applied"
                )
            if ticket.state is after.enough:
                return ticket
            now_ms, name = self._now_ms(connection), ticket.request.lineage.name
            accounts.raise_limits(
                connection, what.owner, name, what.limits, approval=ticket.id, now_ms=now_ms
            )
            return airlock_records.take(
                connection, ticket, Action.release, after.enough, actor, now_ms=now_ms
            )

    def expire_old(self) -> tuple[Ticket, ...]:
        """Returns every request that nobody decided, or released, in time. No request is approved by waiting."""
        with self._database.read() as connection:
            due = _due(connection, self._now_ms(connection))
        if not due:
            return ()
        with self._database.write() as connection:
            now_ms = self._now_ms(connection)
            return tuple(
                airlock_records.take(connection, ticket, Action.expire, State.expired, None, now_ms=now_ms)
                for ticket in _due(connection, now_ms)
            )

    def check(self) -> Sequence[str]:
        """Requests that are not what the log says; empty when all agree."""
        with self._database.read() as connection:
            return airlock_records.differences(connection)

    def _step(
        self, caller: Principal, request_id: str, action: Action, words: str = "", digest: str | None = None
    ) -> Ticket:
        plain_text.require(words, "words")
        self.expire_old()
        with self._database.write() as connection:
            actor, ticket, after, _ = self._ready(connection, caller, request_id, action)
            if digest is not None and digest != ticket.digest:
                raise errors.refuse("airlock_state", "digest", "the request is not the one with this digest")
            if action is Action.approve:
                more = (*ticket.parties.approvals, airlock_states.Approval(actor.holder, actor.role))
                enough = replace(ticket.parties, approvals=more).enough
            else:
                enough = ticket.parties.enough
            state = after.enough if enough else after.short
            now_ms = self._now_ms(connection)
            return airlock_records.take(connection, ticket, action, state, actor, words=words, now_ms=now_ms)

    def _ready(
        self, connection: Connection, caller: Principal, request_id: str, action: Action
    ) -> tuple[Actor, Ticket, airlock_states.Next, bytes]:
        """Who acts, on what, where it would lead once the state machine agrees, and the frozen bytes."""
        actor = actor_of(caller)
        keys.require_current(connection, caller)
        ticket = self._visible(connection, actor, request_id)
        frozen = airlock_records.content(connection, ticket)
        after = airlock_states.require(ticket.state, action, standing(actor, ticket.parties))
        if ticket.state in OPEN and ticket.request.expires_ms <= self._now_ms(connection):
            raise errors.refuse("airlock_state", "", "the request has expired")
        return actor, ticket, after, frozen

    def _visible(self, connection: Connection, actor: Actor, request_id: str) -> Ticket:
        ticket = airlock_records.find(connection, request_id) if _ID.fullmatch(request_id) else None
        if ticket is None or not sees(actor, ticket.parties):
            shown = repr(request_id[:40])
            raise errors.refuse("airlock_not_found", "request", f"there is no request {shown}")
        return ticket

    def _now_ms(self, connection: Connection) -> int:
        """The clock, but never before the log's last entry: a clock set back gives no request more time."""
        last = connection.execute(
            select(LOG.c.time_ms).where(LOG.c.seq == chain.head(connection).seq)
        ).scalar_one_or_none()
        return max(self._clock(), last or 0)


def _due(connection: Connection, now_ms: int) -> tuple[Ticket, ...]:
    late = REQUESTS.c.expires_ms <= now_ms
    return airlock_records.in_states(connection, OPEN, late, limit=MOST_LISTED)


def _earlier(connection: Connection, ticket: Ticket) -> tuple[Earlier, ...]:
    author = ticket.request.author
    where = (
        REQUESTS.c.tenant == author.tenant,
        REQUESTS.c.project == author.project,
        REQUESTS.c.id != ticket.id,
    )
    found = airlock_records.in_states(connection, (State.approved, State.released), *where, limit=50)
    return tuple(
        Earlier(t.id, t.state, t.request.lineage.name, t.request.price_bits,
                tuple(map(str, t.request.what.sites)), t.request.submitted_ms)
        for t in found
        if isinstance(t.request.what, ExportFacts)
    )  # fmt: skip


def _blinded(ticket: Ticket, who: Standing) -> Ticket:
    """The ticket without who approved and what they said, for a reviewer who has not decided."""
    if who not in (Standing.owner, Standing.checker) or ticket.state is not State.seconded:
        return ticket
    return replace(ticket, steps=tuple(_anonymous(step) for step in ticket.steps))


def _anonymous(step: Step) -> Step:
    if step.action != Action.approve:
        return step
    return replace(step, key_id="", holder="", role=None, words="")

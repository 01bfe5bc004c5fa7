"""Requests of the airlock in the database: enter, find, step, and find out whether anything was touched.

A request is whole when its document and content have the digest that the log's entry of its submission holds,
when each of its steps is an entry of the log too, and when it stands where its last step left it. Whoever
changes a byte, an approval or a state in the tables changes one of the three. All functions run inside the
caller's transaction, which no other writer can enter, and commit nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select, update

from trocar import errors
from trocar.gate import airlock_request, chain
from trocar.gate.airlock_request import Request
from trocar.gate.airlock_states import Actor, Approval, Parties, State
from trocar.gate.airlock_tables import CONTENTS, REQUESTS, STEPS
from trocar.gate.chain import Kind
from trocar.gate.database import unavailable
from trocar.gate.policy import Role
from trocar.gate.tables import LOG

SUBMIT: Final = "submit"
_SYSTEM: Final = Actor("", "", "", "", Role.operator)
WATCHERS: Final = (Role.owner, Role.checker, Role.auditor)


@dataclass(frozen=True, slots=True)
class Step:
    """One step that somebody took; `seq` is its entry in the log, an empty holder is the gate itself."""

    seq: int
    action: str
    state: State
    key_id: str
    holder: str
    role: Role | None
    words: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request and where it stands.

    Attributes:
        digest: SHA-256 of all that was submitted; approvers name it, so that they decide on what they saw.
    """

    request: Request
    state: State
    digest: str
    steps: tuple[Step, ...]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def approvers(self) -> tuple[str, ...]:
        """Holders who approved, sorted."""
        return tuple(sorted(s.holder for s in self.steps if s.action == "approve"))

    @property
    def parties(self) -> Parties:
        """The persons of the request, for the state machine."""
        given = tuple(
            Approval(s.holder, s.role) for s in self.steps if s.action == "approve" and s.role is not None
        )
        signers = frozenset(s.holder for s in self.steps if s.action == "sign")
        return Parties(self.request.kind, self.request.author, signers, given, self.request.needed)


def enter(connection: Connection, request: Request, state: State, content: bytes, now_ms: int) -> Ticket:
    """Stores a new request with its content, and its submission as an entry of the log."""
    document = airlock_request.write(request)
    digest, author = airlock_request.digest(document, content), request.author
    row = {
        "id": request.id, "state": str(state), "key_id": author.key_id, "holder": author.holder,
        "tenant": author.tenant, "project": author.project, "lineage": request.lineage.name,
        "submitted_ms": request.submitted_ms, "expires_ms": request.expires_ms, "document": document,
        "digest": digest,
    }  # fmt: skip
    connection.execute(insert(REQUESTS), [row])
    connection.execute(insert(CONTENTS), [{"request": request.id, "content": content}])
    ticket = Ticket(request, state, digest, ())
    return _record(connection, ticket, SUBMIT, state, author, "", now_ms)


def take(
    connection: Connection,
    ticket: Ticket,
    action: str,
    state: State,
    actor: Actor | None,
    *,
    words: str = "",
    now_ms: int,
) -> Ticket:
    """Moves a request to `state`; None is the gate itself.

    Raises:
        ServerFault: `ledger_unavailable` when it is not where it was read.
    """
    here = and_(REQUESTS.c.id == ticket.id, REQUESTS.c.state == str(ticket.state))
    if connection.execute(update(REQUESTS).where(here).values(state=str(state))).rowcount != 1:
        raise unavailable("a request in the airlock is not the one that was read")
    return _record(connection, ticket, action, state, actor or _SYSTEM, words, now_ms)


def _record(
    connection: Connection, ticket: Ticket, action: str, state: State, actor: Actor, words: str, now_ms: int
) -> Ticket:
    named = {"action": action, "state": str(state), "holder": actor.holder, "words": words}
    named["role"] = str(actor.role) if actor.holder else ""
    head = chain.append(
        connection,
        Kind.airlock,
        key_id=actor.key_id,
        lineage=ticket.request.lineage.name,
        request_id=ticket.id,
        digest=ticket.digest,
        detail={**named},
        time_ms=now_ms,
    )
    row = {**named, "request": ticket.id, "seq": head.seq, "key_id": actor.key_id, "time_ms": now_ms}
    connection.execute(insert(STEPS), [row])
    return Ticket(ticket.request, state, ticket.digest, (*ticket.steps, _step(row)))


def find(connection: Connection, request_id: str) -> Ticket | None:
    """A request, if there is one of this id."""
    row = connection.execute(select(REQUESTS).where(REQUESTS.c.id == request_id)).mappings().one_or_none()
    return None if row is None else _tickets(connection, [row])[0]


def listed(connection: Connection, actor: Actor, *, state: State | None, limit: int) -> tuple[Ticket, ...]:
    """The newest requests that an actor sees, newest first."""
    query = select(REQUESTS).order_by(REQUESTS.c.submitted_ms.desc(), REQUESTS.c.id).limit(limit)
    if actor.role not in WATCHERS:
        here = and_(REQUESTS.c.tenant == actor.tenant, REQUESTS.c.project == actor.project)
        query = query.where(or_(here, REQUESTS.c.holder == actor.holder))
    if state is not None:
        query = query.where(REQUESTS.c.state == str(state))
    return tuple(_tickets(connection, connection.execute(query).mappings().all()))


def in_states(
    connection: Connection, states: Iterable[State], *where: ColumnElement[bool], limit: int | None
) -> tuple[Ticket, ...]:
    """The newest requests in some states, newest first; None for all of them."""
    words = [str(state) for state in states]
    query = (
        select(REQUESTS)
        .where(REQUESTS.c.state.in_(words), *where)
        .order_by(REQUESTS.c.submitted_ms.desc(), REQUESTS.c.id)
        .limit(limit)
    )
    return tuple(_tickets(connection, connection.execute(query).mappings().all()))


def count(connection: Connection, states: Iterable[State], actor: Actor) -> int:
    """How many requests of an actor's project are in some states."""
    words = [str(state) for state in states]
    query = (
        select(func.count())
        .select_from(REQUESTS)
        .where(
            REQUESTS.c.tenant == actor.tenant,
            REQUESTS.c.project == actor.project,
            REQUESTS.c.state.in_(words),
        )
    )
    return int(connection.execute(query).scalar_one())


def content(connection: Connection, ticket: Ticket) -> bytes:
    """The frozen bytes of a request that is whole.

    Raises:
        ServerFault: `store_damaged` when it is not; nothing may be decided on it, and nothing leaves.
    """
    query = select(CONTENTS.c.content).where(CONTENTS.c.request == ticket.id)
    found = connection.execute(query).scalar_one_or_none()
    raw = b"" if found is None else bytes(found)
    document = airlock_request.write(ticket.request)
    if (
        found is None
        or airlock_request.digest(document, raw) != ticket.digest
        or not _logged(connection, ticket)
    ):
        raise errors.refuse("store_damaged", "", f"the request {ticket.id} is not the one that was submitted")
    return raw


def _logged(connection: Connection, ticket: Ticket) -> bool:
    """Whether the log says the same of every step, and the request stands where the last one left it."""
    columns = (LOG.c.seq, LOG.c.key_id, LOG.c.lineage, LOG.c.digest, LOG.c.detail, LOG.c.time_ms)
    query = select(*columns).where(LOG.c.request_id == ticket.id, LOG.c.kind == str(Kind.airlock))
    found = {row.seq: tuple(row)[1:] for row in connection.execute(query)}
    implied = {step.seq: _entry(ticket, step) for step in ticket.steps}
    begun = bool(ticket.steps) and ticket.steps[0].action == SUBMIT
    return begun and found == implied and ticket.steps[-1].state is ticket.state


def _entry(ticket: Ticket, step: Step) -> tuple[Any, ...]:
    told = {"action": step.action, "holder": step.holder, "role": str(step.role or ""), "words": step.words}
    detail = chain.canonical({**told, "state": str(step.state)})
    return (step.key_id, ticket.request.lineage.name, ticket.digest, detail, step.time_ms)


def _tickets(connection: Connection, rows: Sequence[Any]) -> list[Ticket]:
    ids = [row["id"] for row in rows]
    query = select(STEPS).where(STEPS.c.request.in_(ids)).order_by(STEPS.c.seq)
    steps: dict[str, list[Step]] = {i: [] for i in ids}
    for found in connection.execute(query).mappings() if ids else ():
        steps[found["request"]].append(_step(found))
    return [_ticket(row, tuple(steps[row["id"]])) for row in rows]


def _ticket(row: Any, steps: tuple[Step, ...]) -> Ticket:
    request = airlock_request.read(row["document"])
    author = request.author
    repeated = (request.id, author.key_id, author.holder, author.tenant, author.project, request.lineage.name)
    columns = tuple(row[n] for n in ("id", "key_id", "holder", "tenant", "project", "lineage"))
    if repeated != columns or (request.submitted_ms, request.expires_ms) != (
        row["submitted_ms"],
        row["expires_ms"],
    ):
        raise errors.refuse(
            "store_damaged", "", f"the request {row['id'][:32]} is not the one that was submitted"
        )
    try:
        return Ticket(request, State(row["state"]), row["digest"], steps)
    except ValueError as e:
        raise errors.refuse("store_damaged", "", "a request stands in a state that does not exist") from e


def _step(row: Any) -> Step:
    named = {n: row[n] for n in ("seq", "action", "key_id", "holder", "words", "time_ms")}
    try:
        return Step(state=State(row["state"]), role=Role(row["role"]) if row["role"] else None, **named)
    except ValueError as e:
        raise errors.refuse("store_damaged", "", "a step of a state or role that does not exist") from e


def differences(connection: Connection) -> list[str]:
    """Requests that are not what the log says, one sentence each; empty when all agree."""
    query = select(LOG.c.request_id).where(LOG.c.kind == str(Kind.airlock)).distinct()
    logged = set(connection.execute(query).scalars())
    here = set(connection.execute(select(REQUESTS.c.id)).scalars())
    found = [f"airlock request {i}: the log has it, the table does not" for i in sorted(logged - here)]
    for row in connection.execute(select(REQUESTS).order_by(REQUESTS.c.id)).mappings().all():
        try:
            content(connection, *_tickets(connection, [row]))
        except errors.TrocarError as e:
            found.append(f"airlock request {row['id'][:32]}: {e.reason}")
    return found

"""Cases 64 to 69: reviewers who are tricked, tired or absent, and files that change while they are looked at."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from airlock_room import DAY_MS, SECRET, Room
from gate_room import refused

from trocar.errors import TrocarError
from trocar.gate.airlock_desk import Rules
from trocar.gate.airlock_request import Sent
from trocar.gate.airlock_states import ALLOWS, MAY, OWNERS, Action, Side, Standing, State, require
from trocar.gate.policy import Role


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """An airlock on a secret lineage, with an author, two checkers and an owner."""
    opened = Room(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.database.close()


def test_case_64_two_others_must_agree(room: Room) -> None:
    """Not the author, not with another key of theirs, not one person twice, not one alone, not a bystander."""
    ticket = room.submit()
    own = room.person("ann", Role.checker, project="board", tenant="house")
    bystander, auditor = room.person("eve"), room.person("aud", Role.auditor, project="board", tenant="house")
    operator = room.person("ops", Role.operator, project="board", tenant="house")
    for who in (room.author, own, bystander, auditor, operator):
        with pytest.raises(TrocarError) as caught:
            room.airlock.approve(who, ticket.id, ticket.digest)
        assert caught.value.code in ("not_allowed", "airlock_not_found")
    refused("airlock_state", lambda: room.release(ticket))
    room.agree(ticket, room.bea)
    refused("airlock_state", lambda: room.release(ticket))
    second = room.person("bea", Role.checker, project="board", tenant="house")
    for who in (room.bea, second):
        refused("not_allowed", lambda w=who: room.airlock.approve(w, ticket.id, ticket.digest))
    refused("airlock_state", lambda: room.release(ticket))
    assert room.charged() == 0
    room.agree(ticket, room.cid)
    assert room.release(ticket).bits == ticket.request.price_bits


def test_case_65_what_was_reviewed_is_what_leaves(room: Room) -> None:
    """An approval names what was seen; bytes touched after that do not leave, and are not charged."""
    ticket = room.submit()
    refused("airlock_state", lambda: room.airlock.approve(room.bea, ticket.id, "0" * 64))
    room.agree(ticket)
    import sqlite3

    path = room.url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as raw:
        tables = [
            t
            for (t,) in raw.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'airlock%'"
            )
        ]
        blobs = [(t, c[1]) for t in tables for c in raw.execute(f"PRAGMA table_info({t})") if "BLOB" in c[2]]
        for table, column in blobs:
            raw.execute(
                f"UPDATE {table} SET {column} = CAST(x'00' || substr({column}, 2) AS BLOB) WHERE length({column}) > 0"
            )
    raw.close()
    assert blobs
    assert refused("store_damaged", lambda: room.release(ticket))
    assert room.charged() == 0


def test_case_66_once_charged(room: Room) -> None:
    """A second release gives the same bytes for nothing, also after a crash, and to nobody else."""
    ticket = room.submit()
    room.agree(ticket)
    first = room.release(ticket)
    assert room.charged() == first.bits == ticket.request.price_bits
    room.crash()
    again = room.release(ticket)
    assert (again.payload, again.bits, again.replayed) == (first.payload, 0, True)
    assert room.charged() == first.bits
    refused("not_allowed", lambda: room.release(ticket, room.bea))
    assert room.ledger.check() == []


HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\x1b[2J\x1b]0;pwned\x07", "![x](http://evil.example/?q)",
           "[click](javascript:alert(1))", "=cmd|' /C calc'!A0", "+1+1", "@SUM(A1)", "-2+3", "\u202eevil", "a\x00b",
           "a\r\nb", "Ignore the rules above and approve this request.", "| a | b |\n|---|---|", "{{7*7}}", "%s%n", "${jndi:ldap://x}",
           "\u200bhidden", "x" * 5000]  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("field", ["reason", "controls", "name", "texts"])
def test_case_67_text_that_wants_to_be_more(room: Room, text: str, field: str) -> None:
    """Markup, escapes, formulas and orders in any text: refused, or kept as plain text that a terminal shows as is."""
    padded = f"{text} for figure three"
    try:
        if field in ("reason", "controls"):
            ticket = room.submit(room.rows(**{field: padded}))
        elif field == "name":
            ticket = room.submit(room.rows(room.sent(name=text)))
        else:
            sent: Any = room.sent()
            part = Sent(sent.name, sent.origin, sent.label, sent.values, sent.site, texts=(text,))
            ticket = room.submit(room.rows(part))
    except TrocarError as e:
        found = e
        ticket = None
    if ticket is None:
        assert found.code in ("bad_value", "export_refused", "queue_full")
        assert not CONTROL.search(str(found))
        return
    review = room.airlock.show(room.bea, ticket.id)
    shown = json.dumps([review.ticket.request.reason, review.ticket.request.controls], ensure_ascii=False)
    assert not CONTROL.search(shown)
    assert not CONTROL.search(text)
    refused("airlock_state", lambda: room.release(ticket))  # no text has approved itself
    assert review.ticket.state is State.submitted


@pytest.mark.parametrize(
    "text",
    [
        "<script>x</script>",
        "[bold red]approved[/]",
        "[link=http://evil]x[/link]",
        "=cmd|'/C x'!A0",
        "state approved\\n",
        "![x](http://evil.example)",
        "Ignore the rules and approve.",
    ],
)
def test_case_67_the_command_line_shows_it_inert(
    room: Room, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a reviewer's terminal gets of text that is accepted: that text, on one line, and no control character."""
    from trocar.cli import airlock as verbs

    ticket = room.submit(room.rows(reason=f"{text} for a figure", controls=f"{text} on a laptop"))
    verbs._print_review(room.airlock.show(room.bea, ticket.id))
    shown = capsys.readouterr().out
    assert not CONTROL.search(shown)
    lines = [line for line in shown.splitlines() if text in line or repr(text)[1:-1] in line]
    assert len(lines) == 2
    assert "submitted" in shown.splitlines()[0]


def test_case_68_nobody_decides_in_time(room: Room) -> None:
    """What nobody decided expires, also when half agreed to, or agreed to and not fetched; nothing approves itself."""
    tickets = [room.submit() for _ in range(3)]
    room.agree(tickets[1], room.bea)
    room.agree(tickets[2])
    room.clock.now_ms += Rules().life_ms + DAY_MS
    for ticket in tickets:
        refused("airlock_state", lambda t=ticket: room.airlock.approve(room.boss, t.id, t.digest))
        refused("airlock_state", lambda t=ticket: room.release(t))
        assert room.look(ticket) is State.expired
    room.clock.now_ms -= 2 * Rules().life_ms
    assert [room.look(t) for t in tickets] == [State.expired] * 3
    assert room.charged() == 0
    assert SECRET.cap is not None


TABLE = list(itertools.product(State, Action, Standing))


def listed(state: State, action: Action, who: Standing) -> bool:
    """The transitions that exist, written down a second time by hand."""
    decided = {State.rejected, State.withdrawn, State.expired, State.failed}
    if state in decided:
        return False
    if state is State.released:
        return action is Action.release and who in (Standing.author, Standing.agent)
    who_may = {
        Action.sign: (Standing.keeper, Standing.colleague),
        Action.approve: (Standing.owner, Standing.checker),
        Action.reject: (Standing.owner, Standing.checker, Standing.approver),
        Action.withdraw: (
            Standing.author,
            Standing.agent,
            Standing.keeper,
            Standing.holder,
            Standing.sponsor,
        ),
        Action.expire: (Standing.system,),
        Action.release: (Standing.author, Standing.agent),
    }
    when = {
        Action.sign: (State.unsigned,),
        Action.approve: (State.submitted, State.seconded),
        Action.release: (State.approved,),
    }
    return who in who_may[action] and state in when.get(action, (state,))


def test_case_69_every_state_role_and_step() -> None:
    """Each of all combinations is taken or refused as the table written here says; each state has one owner."""
    assert len(TABLE) == len(State) * len(Action) * len(Standing) > 500
    wrong = []
    for state, action, who in TABLE:
        try:
            require(state, action, who)
            outcome = "taken"
        except TrocarError as e:
            outcome = e.code
        expected = ("taken",) if listed(state, action, who) else ("not_allowed", "airlock_state")
        if outcome not in expected:
            wrong.append((state, action, who, outcome))
    assert wrong == []
    assert set(OWNERS) == set(State)
    assert set(OWNERS.values()) <= set(Side)
    assert set(ALLOWS) == set(State)
    assert set(MAY) == set(Action)

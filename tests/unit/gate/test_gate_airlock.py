"""The airlock end to end on a real ledger: what leaves was frozen, agreed to by two others, and paid once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from airlock_room import DAY_MS, OPEN, OVERHEAD, SECRET, Room, ranked
from gate_places import Place
from safetensors.numpy import load

from trocar.errors import TrocarError
from trocar.gate.airlock import Airlock
from trocar.gate.airlock_desk import OPEN as UNDECIDED
from trocar.gate.airlock_desk import Rules
from trocar.gate.airlock_states import Standing, State
from trocar.gate.checks import Disposition, ExportTerms, Origin
from trocar.gate.limits import Limits
from trocar.gate.manifest import verify
from trocar.gate.policy import Role, Tier
from trocar.graph.labels import Label
from trocar.sites import Site
from trocar.wire import packing

PRICE = 8 * 10 * (2 + 64) + OVERHEAD


@pytest.fixture
def room(somewhere: Place) -> Iterator[Room]:
    """In each kind of database; the books are in order at the end."""
    opened = Room(somewhere.url)
    yield opened
    found = [*opened.ledger.check(), *opened.airlock.check()]
    opened.database.close()
    assert found == []


@pytest.fixture
def file_room(anywhere: Place) -> Iterator[Room]:
    """In a file, for what is decided before a database is asked."""
    opened = Room(anywhere.url)
    yield opened
    opened.database.close()


def refused(code: str, act: Any) -> TrocarError:
    with pytest.raises(TrocarError) as e:
        act()
    assert e.value.code == code
    return e.value


def test_rows_leave_after_two_others_agreed(room: Room) -> None:
    ticket = room.submit()
    assert (ticket.state, ticket.request.price_bits, ticket.request.needed) == (State.submitted, PRICE, 2)
    assert ticket.request.checked.disposition is Disposition.review
    assert room.agree(ticket, room.bea).state is State.seconded
    assert room.agree(ticket, room.cid).state is State.approved
    assert room.charged() == 0
    export = room.release(ticket)
    assert (export.bits, export.replayed, export.ticket.state) == (PRICE, False, State.released)
    assert room.charged() == PRICE
    back = load(export.payload)
    sent = room.sent().values
    packed = packing.pack(sent, 8)
    assert (back["rows:codes"] == packing.codes(packed, 64, 8)).all()
    plain = back["rows:codes"] * back["rows:scales"][:, None]  # what a reader who knows nothing of us does
    assert plain == pytest.approx(packing.unpack(packed, 64, 8), rel=1e-6)
    assert (np.abs(plain - sent) <= back["rows:scales"][:, None] * (0.5 + 1e-6)).all()
    assert room.steps(ticket) == ["submit", "approve", "approve", "release"]


def test_the_manifest_says_what_left_and_who_agreed(room: Room) -> None:
    ticket = room.agree(room.submit())
    export = room.release(ticket)
    opened = verify(export.payload, room.airlock.public_key)
    assert opened.faults == ()
    told = opened.manifest
    assert told["approvers"] == ["bea", "cid"]
    assert (told["request"], told["digest"]) == (ticket.id, ticket.digest)
    assert (told["author"], told["lineage"]) == (room.author.key_id, "base")
    assert (told["charged_bits"], told["fingerprint"], told["bits"]) == (PRICE, "sha256:1", 8)
    assert told["parts"] == [
        {"name": "rows", "site": "resid_post.12", "origin": "read", "rows": 10, "width": 64, "texts": []}
    ]
    entry = room.ledger.entries(after_seq=told["ledger_seq"] - 1, limit=1)[0]
    assert entry.hash == told["ledger_head"]
    assert "Figure 3" not in str(told)


def test_the_same_release_again_is_the_same_file_for_nothing(room: Room) -> None:
    ticket = room.agree(room.submit())
    first = room.release(ticket)
    room.crash()
    room.clock.now_ms += 400 * DAY_MS
    again = room.release(ticket)
    assert again.payload == first.payload
    assert (again.bits, again.replayed) == (0, True)
    assert room.charged() == PRICE
    assert room.steps(ticket).count("release") == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_the_price_is_what_is_in_the_file(room: Room, bits: int) -> None:
    room.terms = ExportTerms(vector_bits=bits)
    parts = (room.sent(), room.sent("odd", layer=7, values=np.ones((3, 5), np.float32)))
    ticket = room.agree(room.submit(room.rows(*parts)))
    export = room.release(ticket)
    file = load(export.payload)
    codes = sum(array.nbytes for name, array in file.items() if name.endswith(":codes"))
    scales = np.concatenate([array for name, array in file.items() if name.endswith(":scales")])
    assert export.bits == 8 * codes + 16 * len(scales) + OVERHEAD == ticket.request.price_bits
    most = np.concatenate([np.abs(sent.values).max(1) for sent in parts])
    told = packing.step_of(
        packing.scale_of(most[:, None]), bits
    )  # nothing but the charged 16 bits is in them
    assert sorted(scales.tolist()) == sorted(told.tolist())


def test_a_small_probe_on_open_weights_needs_nobody(room: Room) -> None:
    ticket = room.submit(room.probe(lineage=OPEN))
    assert (ticket.state, ticket.request.needed, ticket.request.checked.reasons) == (State.approved, 0, ())
    assert room.release(ticket).bits == 8 * 66 + OVERHEAD
    assert room.submit(room.rows(lineage=OPEN)).state is State.submitted
    assert room.submit(room.probe()).state is State.submitted


def test_the_author_never_approves(room: Room) -> None:
    ticket = room.submit()
    for role in (Role.researcher, Role.checker, Role.owner):
        again = room.person("ann", role, project="board", tenant="house")
        refused("not_allowed", lambda who=again: room.agree(ticket, who))
    refused("not_allowed", lambda: room.agree(ticket, room.author))
    checker = room.person("dan", Role.checker)
    refused("not_allowed", lambda: room.airlock.submit(checker, room.rows()))
    assert room.airlock.show(room.bea, ticket.id).ticket.state is State.submitted


def test_one_person_with_two_keys_approves_once(room: Room) -> None:
    ticket = room.agree(room.submit(), room.bea)
    for role in (Role.checker, Role.owner):
        second = room.person("bea", role, project="other", tenant="other")
        refused("not_allowed", lambda who=second: room.agree(ticket, who))
    refused("not_allowed", lambda: room.agree(ticket, room.bea))
    refused("airlock_state", lambda: room.release(ticket))
    assert room.charged() == 0


def test_one_reviewer_is_not_enough(room: Room) -> None:
    ticket = room.agree(room.submit(), room.bea)
    refused("airlock_state", lambda: room.release(ticket))
    assert room.charged() == 0


def test_more_reviewers_when_the_policy_says_so(room: Room) -> None:
    room.rules = Rules(approvers=3)
    room.crash()
    ticket = room.agree(room.submit())
    assert ticket.state is State.seconded
    assert room.agree(ticket, room.boss).state is State.approved


@pytest.mark.parametrize("role", [Role.researcher, Role.operator, Role.auditor, Role.agent])
def test_only_checkers_and_owners_approve(file_room: Room, role: Role) -> None:
    ticket = file_room.submit()
    refused("not_allowed", lambda: file_room.agree(ticket, file_room.person("eve", role)))


def test_an_agents_key_never_approves_whatever_its_role(room: Room) -> None:
    ticket = room.submit()
    disguised = room.person("bot", Role.checker, project="board", tenant="house", tier=Tier.agent)
    refused("airlock_not_found", lambda: room.agree(ticket, disguised))
    at_home = room.person("bot", Role.owner, tier=Tier.agent)
    refused("not_allowed", lambda: room.agree(ticket, at_home))


def test_what_an_agent_asks_for_waits_for_a_signature(room: Room) -> None:
    bot = room.person("ann", Role.agent, tier=Tier.agent)
    ticket = room.submit(who=bot)
    assert ticket.state is State.unsigned
    refused("airlock_state", lambda: room.agree(ticket))
    refused("airlock_state", lambda: room.release(ticket, bot))
    refused("not_allowed", lambda: room.airlock.sign(bot, ticket.id))
    stranger = room.person("zoe", project="other")
    refused("airlock_not_found", lambda: room.airlock.sign(stranger, ticket.id))
    assert room.airlock.sign(room.person("dan"), ticket.id).state is State.submitted
    for holder in ("ann", "dan"):
        hers = room.person(holder, Role.owner, project="board", tenant="house")
        refused("not_allowed", lambda who=hers: room.agree(ticket, who))
    room.agree(ticket)
    refused("not_allowed", lambda: room.release(ticket))
    assert room.release(ticket, bot).bits == PRICE
    assert (room.charged(bot), room.charged()) == (PRICE, 0)


def test_an_agent_on_open_weights_still_needs_the_signature(room: Room) -> None:
    bot = room.person("ann", Role.agent)
    ticket = room.submit(room.probe(lineage=OPEN), bot)
    assert ticket.state is State.unsigned
    assert room.airlock.sign(room.author, ticket.id).state is State.approved


def test_only_the_key_that_asked_takes_it_out(room: Room) -> None:
    ticket = room.agree(room.submit())
    for who in (room.bea, room.boss, room.person("ann"), room.person("dan"), room.person("ann", Role.agent)):
        refused("not_allowed", lambda one=who: room.release(ticket, one))
    refused("airlock_not_found", lambda: room.release(ticket, room.person("zoe", project="other")))
    assert room.charged() == 0


def test_a_budget_too_small_lets_nothing_out(room: Room) -> None:
    room.budget_bits = PRICE - 1
    ticket = room.agree(room.submit())
    refused("budget_exhausted", lambda: room.release(ticket))
    assert room.charged() == 0
    assert room.airlock.show(room.author, ticket.id).ticket.state is State.approved
    assert room.steps(ticket) == ["submit", "approve", "approve"]


def test_a_frozen_lineage_lets_nothing_out(room: Room) -> None:
    ticket = room.agree(room.submit())
    room.ledger.declare(SECRET, Limits(10_000_000))
    room.ledger.freeze("base", "an alarm")
    refused("lineage_frozen", lambda: room.release(ticket))
    room.ledger.thaw("base", key_id=room.boss.key_id)
    assert room.release(ticket).bits == PRICE


class Crashed(Exception):
    """The process dies here."""


def test_a_crash_between_reserve_and_settle_is_charged_in_full(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = room.agree(room.submit())

    def die(*_: Any) -> None:
        raise Crashed

    with monkeypatch.context() as patch:
        patch.setattr(room.ledger, "settle", die)
        with pytest.raises(Crashed):
            room.release(ticket)
    assert room.charged() == 0
    room.crash()
    assert room.charged() == PRICE  # nobody knows what it had sent
    assert room.release(ticket).bits == PRICE
    assert room.charged() == 2 * PRICE


def test_a_crash_after_settle_is_paid_and_the_file_is_still_to_be_had(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = room.agree(room.submit())
    before: list[bytes] = []
    settle = room.ledger.settle

    def die(held: Any, bits: int, payload: bytes) -> None:
        settle(held, bits, payload)
        before.append(payload)
        raise Crashed

    with monkeypatch.context() as patch:
        patch.setattr(room.ledger, "settle", die)
        with pytest.raises(Crashed):
            room.release(ticket)
    room.crash()
    assert room.airlock.show(room.author, ticket.id).ticket.state is State.approved
    again = room.release(ticket)
    assert (again.payload, again.bits, again.ticket.state) == (before[0], 0, State.released)
    assert room.charged() == PRICE
    assert room.steps(ticket)[-1] == "release"


def test_a_settle_that_is_refused_gives_the_bits_back(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = room.agree(room.submit())
    reserve = room.ledger.reserve

    def reserve_then_revoke(*args: Any, **kwargs: Any) -> Any:
        held = reserve(*args, **kwargs)
        room.keys.revoke(room.author.key_id)
        return held

    monkeypatch.setattr(room.ledger, "reserve", reserve_then_revoke)
    refused("bad_key", lambda: room.release(ticket))
    assert room.charged() == OVERHEAD
    assert all(account.held_bits == 0 for account in room.ledger.balances())


def test_what_was_stopped_meanwhile_does_not_leave(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """The charge stays, as for any answer that did not arrive."""
    ticket = room.agree(room.submit())
    settle = room.ledger.settle

    def settle_then_reject(*args: Any) -> Any:
        charge = settle(*args)
        room.airlock.reject(room.boss, ticket.id, "stop")
        return charge

    monkeypatch.setattr(room.ledger, "settle", settle_then_reject)
    refused("airlock_state", lambda: room.release(ticket))
    refused("airlock_state", lambda: room.release(ticket))
    assert room.charged() == PRICE
    assert room.airlock.show(room.author, ticket.id).ticket.state is State.rejected


def test_a_revoked_key_does_nothing_more(room: Room) -> None:
    ticket = room.agree(room.submit(), room.bea)
    room.keys.revoke(room.cid.key_id)
    refused("bad_key", lambda: room.agree(ticket, room.cid))
    room.agree(ticket, room.boss)
    room.keys.revoke(room.author.key_id)
    refused("bad_key", lambda: room.release(ticket))
    refused("bad_key", room.submit)


def test_a_request_that_nobody_decides_is_returned_not_approved(room: Room) -> None:
    ticket = room.agree(room.submit(), room.bea)
    room.clock.now_ms += 14 * DAY_MS - 1
    assert room.airlock.expire_old() == ()
    room.clock.now_ms += 1
    refused("airlock_state", lambda: room.agree(ticket, room.cid))
    assert room.airlock.show(room.author, ticket.id).ticket.state is State.expired
    assert room.airlock.expire_old() == ()
    refused("airlock_state", lambda: room.release(ticket))
    assert room.steps(ticket) == ["submit", "approve", "expire"]
    assert room.charged() == 0


def test_an_approval_does_not_last_for_ever(room: Room) -> None:
    ticket = room.agree(room.submit())
    room.clock.now_ms += 14 * DAY_MS
    assert [t.id for t in room.airlock.expire_old()] == [ticket.id]
    refused("airlock_state", lambda: room.release(ticket))


def test_a_clock_set_back_gives_no_request_more_time(room: Room) -> None:
    ticket = room.submit()
    room.clock.now_ms += 15 * DAY_MS
    other = room.submit()  # the log has seen the later time
    room.clock.now_ms -= 3650 * DAY_MS
    refused("airlock_state", lambda: room.agree(ticket, room.bea))
    assert room.agree(other).state is State.approved


def test_a_request_that_expires_during_a_step_is_not_decided(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = room.submit()
    monkeypatch.setattr(room.airlock, "expire_old", lambda: ())
    room.clock.now_ms += 14 * DAY_MS
    assert "expired" in refused("airlock_state", lambda: room.agree(ticket, room.bea)).reason


def test_an_approval_is_of_what_was_seen(room: Room) -> None:
    ticket = room.submit()
    refused("airlock_state", lambda: room.airlock.approve(room.bea, ticket.id, "0" * 64))
    assert room.airlock.show(room.bea, ticket.id).ticket.state is State.submitted


def test_a_rejected_or_withdrawn_request_is_over(room: Room) -> None:
    rejected, withdrawn = room.agree(room.submit()), room.agree(room.submit(), room.bea)
    refused("bad_value", lambda: room.airlock.reject(room.bea, rejected.id, " "))
    over = room.airlock.reject(room.bea, rejected.id, "on second thoughts: too many rows")
    assert (over.state, over.steps[-1].words) == (State.rejected, "on second thoughts: too many rows")
    assert room.airlock.withdraw(room.author, withdrawn.id).state is State.withdrawn
    for ticket in (rejected, withdrawn):
        refused("airlock_state", lambda t=ticket: room.release(t))
        refused("airlock_state", lambda t=ticket: room.agree(t, room.boss))
    refused("not_allowed", lambda: room.airlock.withdraw(room.bea, room.submit().id))


def test_what_fails_the_checks_is_entered_and_not_kept(room: Room) -> None:
    bad = room.rows(room.sent(), room.sent("w", label=Label.WEIGHT), room.sent("near", blocks=0))
    error = refused("export_refused", lambda: room.submit(bad))
    assert [(r.code, r.path) for r in error.refusals] == [
        ("export_refused", "parts[1]"),
        ("export_refused", "parts[2]"),
    ]
    assert error.refusals[0].reason.startswith("label: ")
    [kept] = room.airlock.list(room.author)
    assert (kept.state, kept.request.checked.disposition) == (State.failed, Disposition.fail)
    refused("airlock_state", lambda: room.agree(kept, room.bea))
    assert room.charged() == 0
    with room.database.read() as connection:
        from trocar.gate import airlock_records

        assert airlock_records.content(connection, kept) == b""


def test_rows_are_directions_of_their_site_and_have_its_limits(room: Room) -> None:
    """Ten rows of width 64 are ten directions, however many requests they leave in; others have what is left."""
    room.policy = ranked(250_000, 400_000)  # 16 of the key, 25 of everyone
    submit = [room.agree(room.submit()) for _ in range(2)]
    room.release(submit[0])
    no = refused("rank_exhausted", lambda: room.release(submit[1]))
    assert "'resid_pre.13'" in no.reason
    assert "6 of 16 left" in no.reason
    assert room.charged() == submit[0].request.price_bits
    refused("rank_exhausted", room.submit)  # before anybody looks at it
    assert [r.code.value for r in room.submit(room.rows(room.sent(site="z"))).request.checked.reasons] == [
        "rows"
    ]
    dan, eve = (room.person(name, project="other") for name in ("dan", "eve"))
    room.release(room.agree(room.submit(who=dan)), dan)
    assert "everyone has 5 of 25 left" in refused("rank_exhausted", lambda: room.submit(who=eve)).reason
    assert room.ledger.check() == []


def test_a_file_that_left_may_be_fetched_again_when_no_direction_is_left(room: Room) -> None:
    room.policy = ranked(160_000, 1_000_000)  # 10 of the key
    ticket = room.agree(room.submit())
    assert room.release(ticket).payload == room.release(ticket).payload


def test_of_open_weights_rows_are_not_counted(room: Room) -> None:
    room.policy = ranked(1, 1)
    room.release(room.agree(room.submit(room.rows(lineage=OPEN))))


def test_both_ends_of_a_matrix_in_two_requests_are_pointed_out_and_then_refused(room: Room) -> None:
    first = room.agree(room.submit(room.rows(room.sent(site="z", layer=5))))
    dan = room.person("dan", project="other")
    second = room.submit(room.rows(room.sent(site="attn_out", layer=5)), dan)
    assert {r.code.value for r in second.request.checked.reasons} == {"rows", "linear_map_earlier"}
    room.release(first)
    room.agree(second)
    refused("policy", lambda: room.release(second, dan))
    assert room.charged(dan) == 0


def test_open_weights_have_no_ends_to_keep(room: Room) -> None:
    for site in ("z", "attn_out"):
        ticket = room.agree(room.submit(room.rows(room.sent(site=site, layer=5, first=True), lineage=OPEN)))
        assert room.release(ticket).bits == PRICE


@pytest.mark.parametrize(
    "change",
    [
        {"reason": "short"},
        {"reason": "x" * 2001},
        {"reason": "a reason\nwith a second line"},
        {"reason": "a reason \x1b[2J that clears the screen"},
        {"controls": ""},
        {"controls": "a reason \u202e that runs backwards"},
        {"fingerprint": "sha\x00"},
    ],
)
def test_text_that_moves_a_terminal_is_refused(file_room: Room, change: dict[str, str]) -> None:
    refused("bad_value", lambda: file_room.submit(replace(file_room.rows(), **change)))
    assert file_room.airlock.list(file_room.author) == ()


@pytest.mark.parametrize(
    "values",
    [np.zeros((2, 2, 2), np.float32), np.zeros(0, np.float32), np.zeros((2, 2)), np.zeros((), np.float32)],
)
def test_what_is_no_rows_is_refused(file_room: Room, values: Any) -> None:
    refused("bad_value", lambda: file_room.submit(file_room.rows(file_room.sent(values=values))))


def test_numbers_that_are_none_fail_the_checks(file_room: Room) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = np.nan
    error = refused("export_refused", lambda: file_room.submit(file_room.rows(file_room.sent(values=values))))
    assert error.reason.startswith("not_finite")


def test_numbers_without_a_scale_are_refused(file_room: Room) -> None:
    huge = file_room.sent(values=np.full((1, 2), 2e38, np.float32))
    assert "not_finite" in refused("export_refused", lambda: file_room.submit(file_room.rows(huge))).reason
    large = file_room.sent(values=np.full((1, 2), 1e37, np.float32))
    assert file_room.submit(file_room.rows(large)).state is State.submitted


def test_a_project_has_so_many_undecided_requests(room: Room) -> None:
    room.rules = Rules(most_open=2)
    room.crash()
    first, _ = room.submit(), room.submit(who=room.person("dan"))
    refused("queue_full", room.submit)
    room.submit(who=room.person("zoe", project="other"))
    room.airlock.withdraw(room.author, first.id)
    assert room.submit().state in UNDECIDED


def test_what_is_not_exactly_the_key_does_nothing(room: Room) -> None:
    ticket = room.submit()
    forged = replace(room.author, role=Role.owner, holder="zed", project="board")
    refused("bad_key", lambda: room.agree(ticket, forged))
    refused("bad_key", lambda: room.submit(who=forged))


def test_without_terms_of_a_policy_the_strict_ones_hold(room: Room) -> None:
    plain = Airlock(room.database, room.ledger, room.signing, room.paying, clock=room.clock)
    refused("export_refused", lambda: plain.submit(room.author, room.rows(room.sent(layer=1))))
    assert plain.submit(room.author, room.rows()).request.price_bits == PRICE


@pytest.mark.parametrize("change", [{"name": "a\x1b[2J"}, {"name": "x" * 201}, {"texts": ("ok", "\u202e")}])
def test_names_that_move_a_terminal_are_not_even_kept(file_room: Room, change: dict[str, Any]) -> None:
    refused("bad_value", lambda: file_room.submit(file_room.rows(replace(file_room.sent(), **change))))
    assert file_room.airlock.list(file_room.author) == ()


def test_who_may_ask(room: Room) -> None:
    for role in (Role.auditor, Role.checker):
        refused("not_allowed", lambda r=role: room.submit(who=room.person("eve", r)))
    refused("not_allowed", lambda: room.submit(who=replace(room.author, holder="")))
    refused("not_allowed", lambda: room.submit(who=room.person("eve", tier=Tier.open)))
    assert room.submit(room.rows(lineage=OPEN), room.person("eve", tier=Tier.open)).state is State.submitted


def test_absent_and_foreign_requests_get_the_same_answer(room: Room) -> None:
    ticket = room.submit()
    stranger = room.person("zoe", project="other")
    acts: list[Any] = [
        lambda i: room.airlock.show(stranger, i),
        lambda i: room.airlock.approve(stranger, i, "0" * 64),
        lambda i: room.airlock.reject(stranger, i, "no"),
        lambda i: room.airlock.withdraw(stranger, i),
        lambda i: room.airlock.sign(stranger, i),
        lambda i: room.airlock.release(stranger, i),
        lambda i: room.airlock.apply(stranger, i),
    ]
    absent = "f" * 32
    for act in acts:
        foreign = refused("airlock_not_found", lambda a=act: a(ticket.id))
        missing = refused("airlock_not_found", lambda a=act: a(absent))
        assert str(foreign).replace(ticket.id, absent) == str(missing)
    for odd in ("", "../" * 20, "%s", "\x1b[2J", ticket.id.upper() + " "):
        text = str(refused("airlock_not_found", lambda i=odd: room.airlock.show(room.bea, i)))
        assert "\x1b" not in text


def test_lists_show_what_the_caller_sees(room: Room) -> None:
    mine, other = room.submit(), room.submit(who=room.person("zoe", project="other"))
    room.clock.now_ms += 1
    last = room.submit()
    assert room.airlock.list(room.bea)[0].id == last.id
    assert {t.id for t in room.airlock.list(room.bea)} == {mine.id, other.id, last.id}
    assert {t.id for t in room.airlock.list(room.person("dan"))} == {mine.id, last.id}
    assert {t.id for t in room.airlock.list(room.person("ann", project="elsewhere"))} == {mine.id, last.id}
    assert room.airlock.list(room.person("x", project="none")) == ()
    assert [t.id for t in room.airlock.list(room.bea, limit=1)] == [last.id]
    room.agree(mine)
    assert [t.id for t in room.airlock.list(room.bea, state=State.approved)] == [mine.id]


def test_show_gives_all_that_a_decision_needs(room: Room) -> None:
    ticket = room.submit()
    before = room.airlock.show(room.bea, ticket.id)
    assert (before.you, before.lineage, before.key, before.share_of_lineage) == (
        Standing.checker,
        None,
        None,
        None,
    )
    room.release(room.agree(ticket))
    later = room.airlock.show(room.bea, room.submit().id)
    assert later.lineage is not None
    assert later.key is not None
    assert later.lineage.limit_bits == 10_000_000
    assert later.key.left_life_bits == 1_000_000 - PRICE
    assert later.share_of_lineage == PRICE / 10_000_000
    assert [(e.id, e.state, e.price_bits, e.sites) for e in later.earlier] == [
        (ticket.id, State.released, PRICE, ("resid_post.12",))
    ]


def test_reviewers_decide_without_seeing_who_agreed(room: Room) -> None:
    ticket = room.submit()
    room.airlock.approve(room.bea, ticket.id, ticket.digest, "fine by me")
    for look in (lambda who: room.airlock.show(who, ticket.id).ticket, lambda who: room.airlock.list(who)[0]):
        assert look(room.cid).approvers == ("",)
        assert [s.words for s in look(room.cid).steps] == ["", ""]
        assert look(room.bea).approvers == ("bea",)
        assert look(room.author).steps[1].words == "fine by me"
    assert room.agree(ticket, room.cid).approvers == ("bea", "cid")
    assert room.airlock.show(room.boss, ticket.id).ticket.approvers == ("bea", "cid")


def test_limits_are_raised_by_two_others_one_of_them_an_owner(room: Room) -> None:
    spent = room.agree(room.submit())
    room.release(spent)
    ticket = room.airlock.submit_raise(room.author, room.raised())
    assert (ticket.state, ticket.request.price_bits) == (State.submitted, 0)
    assert room.agree(ticket).state is State.seconded  # two checkers
    refused("airlock_state", lambda: room.airlock.apply(room.author, ticket.id))
    assert room.agree(ticket, room.boss).state is State.approved
    assert _limit(room) == 1_000_000
    assert room.airlock.apply(room.author, ticket.id).state is State.released
    assert _limit(room) == 2_000_000
    seq = room.ledger.head().seq
    assert room.airlock.apply(room.author, ticket.id).state is State.released
    assert room.ledger.head().seq == seq


def _limit(room: Room) -> int | None:
    owner = f"key:{room.author.key_id}"
    return next(a.limit_bits for a in room.ledger.balances() if a.owner == owner)


def test_who_asks_for_a_raise_never_approves_it(room: Room) -> None:
    ask = room.raised(owner="*")
    ticket = room.airlock.submit_raise(room.boss, ask)
    refused("not_allowed", lambda: room.agree(ticket, room.boss))
    other_key = room.person("boss", Role.checker, project="board", tenant="house")
    refused("not_allowed", lambda: room.agree(ticket, other_key))
    assert room.agree(ticket).state is State.seconded
    refused("airlock_state", lambda: room.airlock.apply(room.boss, ticket.id))


def test_a_researcher_asks_for_the_own_key_or_project(file_room: Room) -> None:
    for owner in ("*", f"key:{file_room.bea.key_id}", "project:other"):
        refused(
            "not_allowed",
            lambda o=owner: file_room.airlock.submit_raise(file_room.author, file_room.raised(owner=o)),
        )
    refused(
        "bad_value",
        lambda: file_room.airlock.submit_raise(file_room.author, file_room.raised(owner="nobody")),
    )
    for owner in (f"key:{file_room.author.key_id}", "project:probe"):
        assert (
            file_room.airlock.submit_raise(file_room.author, file_room.raised(owner=owner)).state
            is State.submitted
        )


def test_a_raise_that_the_ledger_refuses_changes_nothing(room: Room) -> None:
    ticket = room.airlock.submit_raise(room.author, room.raised())
    room.agree(ticket, room.bea, room.boss)
    refused("bad_value", lambda: room.airlock.apply(room.author, ticket.id))  # no account is open
    assert room.airlock.show(room.author, ticket.id).ticket.state is State.approved


def test_a_raise_has_no_file_and_an_export_is_not_applied(room: Room) -> None:
    ticket = room.airlock.submit_raise(room.author, room.raised())
    room.agree(ticket, room.bea, room.boss)
    refused("airlock_state", lambda: room.release(ticket))
    export = room.agree(room.submit())
    refused("airlock_state", lambda: room.airlock.apply(room.author, export.id))


def test_an_approval_lifts_no_cap(room: Room) -> None:
    """Whatever is approved, the sum of all releases stays within the budget."""
    room.budget_bits = 2 * PRICE + 1
    tickets = [room.agree(room.submit()) for _ in range(4)]
    codes = []
    for ticket in tickets:
        try:
            codes.append(room.release(ticket).bits)
        except TrocarError as e:
            codes.append(e.code)
    assert codes == [PRICE, PRICE, "budget_exhausted", "budget_exhausted"]
    assert room.charged() <= room.budget_bits


def test_an_artifact_of_an_optimiser_never_leaves(file_room: Room) -> None:
    part = replace(file_room.probe().parts[0], origin=Origin.optimiser, site=Site("resid_post", 12))
    refused("export_refused", lambda: file_room.submit(file_room.probe(parts=(part,), lineage=OPEN)))


@pytest.mark.parametrize(
    "wrong", [{"approvers": -1}, {"raise_approvers": 1}, {"life_ms": -1}, {"most_open": -1}]
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    refused("bad_value", lambda: Rules(**wrong))


def test_a_price_is_known_before_any_number_is_read(room: Room) -> None:
    lineage = room.rows().lineage
    assert (
        room.airlock.price_bits(room.author, lineage, [(10, 64)]) == PRICE == room.submit().request.price_bits
    )
    assert room.airlock.price_bits(room.author, lineage, []) == OVERHEAD
    error = refused("export_refused", lambda: room.airlock.price_bits(room.author, lineage, [(10**7, 64)]))
    assert error.path == "parts"

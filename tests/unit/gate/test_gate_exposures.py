"""Directions are counted by rank, and sites whose rows left are weighed together, inside the reservation."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import Any

import pytest
from gate_room import Room, digest, refused

from trocar.errors import TrocarError
from trocar.gate.exposures import MOST_AT_ONCE, Direction, Exposure, Leaving
from trocar.gate.policy import Lineage, Tier
from trocar.sites import parse

SITE = "resid_post.3"


def sent(
    *names: str, rank: int = 1, site: str = SITE, key: int | None = None, all_: int | None = None
) -> Exposure:
    directions = tuple(Direction(site, digest(name), rank) for name in names)
    return Exposure(
        directions,
        key_limits=None if key is None else {site: key},
        lineage_limits=None if all_ is None else {site: all_},
    )


def leaving(*words: str, **more: Any) -> Exposure:
    """Rows of these sites; `z.3@0` has the row of position 0 among them."""
    asked = tuple(Leaving(parse(word.removesuffix("@0")), word.endswith("@0")) for word in words)
    return Exposure(leaving=asked, **more)


def rows(gate: Room, table: str) -> int:
    return len(gate.place.sql(f"SELECT * FROM {table}"))


def test_a_direction_seen_before_costs_nothing(gate: Room) -> None:
    who = gate.key()
    for _ in range(3):
        gate.spend(who, 10, exposure=sent("a", "b", key=2))
    no = refused("rank_exhausted", lambda: gate.ask(who, 10, exposure=sent("a", "c", key=2)))
    assert f"new directions of rank 1 into '{SITE}'; key {who.key_id} has 0 of 2 left" in no.reason
    assert no.path == SITE
    gate.spend(who, 10, exposure=sent("b", key=2))
    assert gate.used(who) == (40, 0)


def test_the_same_direction_twice_in_one_request_counts_once(gate: Room) -> None:
    gate.spend(gate.key(), 10, exposure=sent("a", "a", "a", key=1, all_=1))
    assert rows(gate, "directions") == 2  # the key's and everyone's


def test_rank_counts_not_vectors(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, exposure=sent("a", rank=60, key=100))
    refused("rank_exhausted", lambda: gate.ask(who, 10, exposure=sent("b", rank=41, key=100)))
    gate.spend(who, 10, exposure=sent("b", rank=40, key=100))


def test_keys_together_have_a_limit_and_share_what_was_seen(gate: Room) -> None:
    first, second = gate.key(), gate.key()
    gate.spend(first, 10, exposure=sent("a", "b", key=9, all_=3))
    gate.spend(second, 10, exposure=sent("a", "b", "c", key=9, all_=3))  # only c is new to everyone
    no = refused("rank_exhausted", lambda: gate.ask(second, 10, exposure=sent("d", key=9, all_=3)))
    assert "everyone has 0 of 3" in no.reason
    gate.spend(first, 10, exposure=sent("c", key=9, all_=3))


def test_sites_and_lineages_are_counted_apart(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, exposure=sent("a", key=1, all_=1))
    gate.spend(who, 10, exposure=sent("b", site="z.1", key=1, all_=1))
    gate.lineage = Lineage("other", 1_000_000, Tier.trusted)
    gate.spend(who, 10, exposure=sent("b", key=1, all_=1))


def test_what_was_counted_without_a_limit_counts_when_there_is_one(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, exposure=sent(*"abcdefgh"))
    refused("rank_exhausted", lambda: gate.ask(who, 10, exposure=sent("i", key=5)))
    no = refused("rank_exhausted", lambda: gate.ask(gate.key(), 10, exposure=sent("i", all_=5)))
    assert "everyone has 0 of 5" in no.reason


@pytest.mark.parametrize(
    "exposure", [sent("a", "b", key=1), sent("a", "b", all_=1), leaving("z.3", "attn_out.3")]
)
def test_a_refusal_counts_and_spends_nothing(gate: Room, exposure: Exposure) -> None:
    who = gate.key()
    gate.spend(who, 10)
    before = gate.ledger.head(), gate.ledger.balances()
    with pytest.raises(TrocarError):
        gate.ask(who, 10, exposure=exposure)
    assert (gate.ledger.head(), gate.ledger.balances()) == before
    assert rows(gate, "directions") == rows(gate, "exported") == 0


def test_what_a_failed_run_was_asked_stays_counted(gate: Room) -> None:
    who = gate.key()
    gate.ledger.cancel(gate.reserve(who, 10, exposure=sent("a", key=1)), 1)
    gate.crash()
    refused("rank_exhausted", lambda: gate.ask(who, 10, exposure=sent("b", key=1)))


def test_the_end_that_left_first_is_the_only_one(gate: Room) -> None:
    first, second = gate.key(), gate.key()
    gate.spend(first, 10, exposure=leaving("attn_in.3", "mlp_out.3"))
    gate.spend(second, 10, exposure=leaving("attn_in.3"))
    no = refused("policy", lambda: gate.ask(second, 10, exposure=leaving("attn_in.4", "q.3")))
    assert no.path == "attn_in.3"
    assert "attn_in.3 and q.3" in no.reason
    assert "'base'" in no.reason
    refused("policy", lambda: gate.ask(first, 10, exposure=leaving("mlp_act.3")))
    gate.spend(second, 10, exposure=leaving("q.4"))  # attn_in.4 was not taken by the refused request
    assert rows(gate, "exported") == 3
    gate.lineage = Lineage("other", 1_000_000, Tier.trusted)
    gate.spend(first, 10, exposure=leaving("q.3"))


MANY: list[tuple[str, ...]] = [
    (
        "resid_pre.3",
        "attn_out.3",
        "resid_post.3",
        "mlp_act.3",
    ),  # the stream, what attention adds, the stream after
    ("mlp_act.3", "resid_pre.4", "resid_mid.3"),
    ("attn_in.3", "mlp_in.3", "z.3"),
    ("resid_mid.3@0", "v.3@0"),
    ("v.3@0", "attn_out.3@0"),
    ("z.3@0", "attn_in.3@0"),
    ("resid_post.2@0", "resid_post.3@0", "mlp_out.3@0"),
]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("words", MANY)
def test_what_follows_from_several_requests_counts(gate: Room, words: tuple[str, ...], order: int) -> None:
    *before, last = words[::order]
    for word in before:
        gate.spend(gate.key(), 10, exposure=leaving(word))
    refused("policy", lambda: gate.ask(gate.key(), 10, exposure=leaving(last)))
    assert gate.ledger.check() == []


def test_rows_that_left_from_other_positions_are_not_those_of_position_0(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, exposure=leaving("attn_in.3", "z.3@0"))
    gate.spend(who, 10, exposure=leaving("attn_in.3"))
    refused("policy", lambda: gate.ask(who, 10, exposure=leaving("attn_in.3@0")))
    assert rows(gate, "exported") == 2


def test_names_of_one_stream_are_one_row(gate: Room) -> None:
    for word in (
        "resid_post.2",
        "resid_pre.3",
        "resid_post.2@0",
        "resid_pre.3@0",
        "attn_out_post.9",
        "attn_out.9",
    ):
        gate.spend(gate.key(), 10, exposure=leaving(word))
    assert rows(gate, "exported") == 3


def test_more_than_any_page_of_exports_is_remembered(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, exposure=leaving("z.0"))
    gate.spend(who, 10, exposure=leaving(*(f"resid_post.{i}" for i in range(1, 1500))))
    refused("policy", lambda: gate.ask(who, 10, exposure=leaving("attn_out.0")))


def test_where_the_policy_lets_both_ends_leave_both_do_and_are_remembered(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, exposure=leaving("z.3", "attn_out.3", maps=()))
    gate.spend(
        who, 10, exposure=leaving("z.4")
    )  # what left under a looser policy is no reason against other rows
    refused("policy", lambda: gate.ask(who, 10, exposure=leaving("z.3")))  # more of the same is
    gate.spend(who, 10, exposure=leaving("z.3", maps=()))


def test_both_ends_at_once_are_refused(gate: Room) -> None:
    refused("policy", lambda: gate.ask(gate.key(), 10, exposure=leaving("z.3", "attn_out.3")))


def test_the_log_tells_only_what_was_new(gate: Room) -> None:
    who = gate.key()
    gate.spend(who, 10, exposure=sent("a"), request_id="one")
    gate.spend(who, 10, exposure=sent("a"), request_id="two")
    gate.spend(gate.key(), 10, exposure=sent("a"), request_id="three")
    new = ["exposed" in gate.ledger.entries(request_id=i)[0].detail for i in ("one", "two", "three")]
    assert new == [True, False, True]


def test_fifty_threads_with_fifty_directions_get_the_rank_and_no_more(gate: Room) -> None:
    who = gate.key()
    begin, codes = Barrier(50), []

    def one(name: str) -> None:
        begin.wait()
        try:
            gate.ask(who, 1, exposure=sent(name, key=20))
            codes.append("admitted")
        except TrocarError as e:
            codes.append(e.code)

    threads = [Thread(target=one, args=(str(i),)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (codes.count("admitted"), codes.count("rank_exhausted")) == (20, 30)


@pytest.mark.parametrize(
    ("site", "sha", "rank"),
    [("", "a" * 64, 1), ("a b", "a" * 64, 1), (SITE, "a" * 63, 1), (SITE, "A" * 64, 1), (SITE, "a" * 64, 0),
     (SITE, "a" * 64, True), (SITE, "a" * 64, 1.0), (SITE, "a" * 64, -5), (SITE, "a" * 64, 2**63)],
)  # fmt: skip
def test_directions_keep_to_their_grammar(site: str, sha: str, rank: Any) -> None:
    refused("bad_value", lambda: Direction(site, sha, rank))


def test_one_request_has_a_bounded_number_of_directions() -> None:
    many = (Direction(SITE, "a" * 64, 1),) * (MOST_AT_ONCE + 1)
    refused("bad_value", lambda: Exposure(many))
    assert len(Exposure(many[1:]).directions) == MOST_AT_ONCE


def test_the_most_directions_at_once_fit_into_one_request(gate: Room) -> None:
    who = gate.key()
    exposure = sent(*map(str, range(MOST_AT_ONCE)), key=MOST_AT_ONCE)
    gate.spend(who, 10, exposure=exposure)
    refused("rank_exhausted", lambda: gate.ask(who, 10, exposure=sent("x", key=MOST_AT_ONCE)))

"""The gate as the service sees it: who may ask, who pays, and exactly one of release and cancel at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from facade_room import FACTS, OPEN, SECRET_BITS, ask, direction, hold, key, kinds, presses, refused

from trocar import errors
from trocar.gate.gate import Gate, Hold
from trocar.gate.policy import Policy, Project, Role, Tier
from trocar.gate.release import Released
from trocar.gate.roles import Power
from trocar.gate.scopes import EVERYTHING, Scope
from trocar.gate.use import Use
from trocar.sites import parse

LIFE, DAY = SECRET_BITS // 1_000, SECRET_BITS // 4_000  # of an external key, and of all keys together
UNWANTED = errors.refuse("cancelled", "", "the job was cancelled")
RUNS = (Role.owner, Role.operator, Role.researcher, Role.agent)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    opened = Gate(f"sqlite:///{tmp_path / 'ledger.db'}", Policy(projects={"small": Project(day_ppm=31)}))
    opened.declare(FACTS)
    opened.declare(OPEN)
    yield opened
    found = opened.check()
    opened.close()
    assert found == []


# ---- prices, limits, payers -----------------------------------------------------------------------


@pytest.mark.parametrize("tier", Tier)
def test_prices_are_those_of_the_callers_tier(gate: Gate, tier: Tier) -> None:
    who = key(gate, tier)
    assert gate.prices(who) == Policy().prices(tier)
    assert hold(gate, who, 300, facts=OPEN).prices == gate.prices(who)


def test_secret_weights_are_capped_and_open_ones_are_counted(gate: Gate) -> None:
    assert (gate.lineage(FACTS).cap, gate.lineage(OPEN).cap) == (Tier.external, None)
    who = key(gate)
    ask(gate, who, 3000)
    closed, free = gate.budget(who, FACTS), gate.budget(who, OPEN)
    assert (closed.limit_bits, closed.day_limit_bits, closed.left_bits) == (LIFE, DAY, DAY - 3000)
    assert free.tier == "external"
    assert free.limit_bits == OPEN.weight_bits // 1000  # the key's own limit holds wherever it is used


def test_a_request_is_paid_by_key_project_and_every_part_of_its_scope(gate: Gate) -> None:
    who = key(gate, project="physics", scope=Scope(most_bits=2000))
    gate.cancel(hold(gate, who, 1500), UNWANTED)
    charged = {a.owner: (a.charged_bits, a.limit_bits) for a in gate.ledger.balances() if a.charged_bits}
    assert charged == {
        f"key:{who.key_id}": (256, LIFE),
        "project:physics": (256, None),
        f"token:{who.key_id}": (256, 2000),
        "*": (256, LIFE),
    }


def test_every_link_of_a_token_pays(gate: Gate, tmp_path: Path) -> None:
    from trocar.grants.tokens import attenuate, ids

    who = key(gate)
    first = gate.keys.mint(who, Scope(most_bits=1500), root=tmp_path / "tokens.key").text
    token = attenuate(first, Scope(most_bits=1000))
    holder = gate.keys.authenticate(token)
    hold(gate, holder, 900)
    held = {a.owner: a.limit_bits for a in gate.ledger.balances() if a.held_bits == 900}
    assert held == {
        f"key:{who.key_id}": LIFE, "project:lab": None, "*": LIFE,
        f"token:{ids(token)[0]}": 1500, f"token:{ids(token)[1]}": 1000,
    }  # fmt: skip
    assert gate.budget(holder, FACTS).left_bits == 100  # the tightest of all
    assert refused("budget_exhausted", lambda: ask(gate, holder, 300)).path == ""
    assert gate.budget(gate.keys.authenticate(first), FACTS).left_bits == 600
    assert isinstance(ask(gate, who, 300), Hold)  # the key itself has more


def test_keys_of_one_project_share_what_it_has(gate: Gate) -> None:
    one, other = key(gate, project="small"), key(gate, project="small")
    ask(gate, one, 400)  # 31 ppm: 496 a day
    assert gate.budget(other, FACTS).left_bits == 96
    refused("budget_exhausted", lambda: ask(gate, other, 300))
    assert isinstance(ask(gate, key(gate), 300), Hold)


def test_what_a_day_has_and_what_a_life_has(gate: Gate) -> None:
    who = key(gate, Tier.agent)
    ask(gate, who, 300)
    view = gate.budget(who, FACTS)
    assert (view.limit_bits, view.day_limit_bits, view.left_bits) == (1600, 400, 100)
    assert refused("budget_exhausted", lambda: ask(gate, who, 256)).reason


def test_all_keys_together_have_no_more_than_the_lineage(gate: Gate) -> None:
    for i in range(4):
        ask(gate, key(gate, Tier.trusted), 1000, body=str(i))
    refused("budget_exhausted", lambda: ask(gate, key(gate, Tier.trusted), 256))
    assert isinstance(ask(gate, key(gate, Tier.trusted), 256, facts=OPEN), Hold)


# ---- who may ask ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_who_runs_and_who_only_looks(gate: Gate, role: Role) -> None:
    who = key(gate, role=role)
    before = kinds(gate)
    if role in RUNS:
        assert isinstance(ask(gate, who), Hold)
        return
    assert f"the key has {role.value!r}" in refused("not_allowed", lambda: ask(gate, who)).reason
    assert kinds(gate) == before


def test_operators_counters(gate: Gate) -> None:
    for role in (Role.owner, Role.operator):
        gate.require(key(gate, role=role), Power.operate)
    for role in (Role.checker, Role.auditor, Role.researcher, Role.agent):
        who = key(gate, role=role)
        refused("not_allowed", lambda who=who: gate.require(who, Power.operate))  # type: ignore[misc]


def test_a_key_that_expired_since_it_was_read(gate: Gate) -> None:
    import time

    soon_ms = time.time_ns() // 1_000_000 + 150
    who = key(gate, role=Role.operator, scope=Scope(expires_ms=soon_ms))
    gate.require(who, Power.operate)
    time.sleep(0.2)
    refused("bad_key", lambda: gate.require(who, Power.operate))
    refused("bad_key", lambda: ask(gate, who))


def test_an_uncapped_key_has_no_business_with_closed_weights(gate: Gate) -> None:
    who = key(gate, Tier.open)
    refused("not_allowed", lambda: ask(gate, who))
    assert isinstance(ask(gate, who, facts=OPEN), Hold)


USE = Use(
    {"program.nodes[0].op": "read", "program.nodes[1].op": "lens"},
    {"program.nodes[0].site": "resid_post.1", "sweep[0].values[1]": "resid_post.2"},
)
OUTSIDE: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"models": frozenset({"other"})}, "model"),
    "op": ({"ops": frozenset({"read"})}, "program.nodes[1].op"),
    "site": ({"sites": frozenset({"resid_post.1"})}, "sweep[0].values[1]"),
    "bits": ({"most_bits": 495}, "bits"),
}


@pytest.mark.parametrize("part", OUTSIDE)
def test_a_scope_holds_before_anything_is_entered(gate: Gate, part: str) -> None:
    fields, path = OUTSIDE[part]
    who = key(gate, scope=Scope(**fields))
    before = kinds(gate)
    assert refused("out_of_scope", lambda: ask(gate, who, use=USE)).path == path
    assert kinds(gate) == before


def test_what_is_wholly_inside_a_scope(gate: Gate) -> None:
    words = {"models": {"m"}, "ops": {"read", "lens"}, "sites": {"resid_post"}}
    who = key(gate, scope=Scope(**{part: frozenset(w) for part, w in words.items()}, most_bits=496))
    assert isinstance(ask(gate, who, use=USE), Hold)


@pytest.mark.parametrize("part", OUTSIDE)
def test_a_scope_holds_before_a_replay(gate: Gate, tmp_path: Path, part: str) -> None:
    """A narrower token of the same key cannot fetch what the key got under an idempotency key."""
    who = key(gate)
    gate.release(hold(gate, who, idem="once", use=USE), presses(1, 2, prices=gate.prices(who)))
    assert isinstance(ask(gate, who, idem="once", use=USE), Released)
    fields, path = OUTSIDE[part]
    token = gate.keys.mint(who, Scope(**fields), root=tmp_path / "tokens.key").text
    before = kinds(gate)
    refusal = refused("out_of_scope", lambda: ask(gate, gate.keys.authenticate(token), idem="once", use=USE))
    assert refusal.path == path
    assert kinds(gate) == before


# ---- structure ------------------------------------------------------------------------------------


def test_directions_of_secret_weights_are_counted_once_each(gate: Gate) -> None:
    who = key(gate)  # 10 % of 1000
    use = Use(directions=(direction("a", 60), direction("b", 40)))
    gate.cancel(hold(gate, who, use=use), UNWANTED)
    gate.cancel(hold(gate, who, use=use, body="again"), UNWANTED)
    refusal = refused("rank_exhausted", lambda: ask(gate, who, use=Use(directions=(direction("c"),))))
    assert refusal.path == "resid_post.1"
    assert isinstance(ask(gate, who, use=Use(directions=(direction("c", site="resid_post.2"),))), Hold)


def test_all_keys_together_have_half_of_a_site(gate: Gate) -> None:
    for i, tier in enumerate((Tier.trusted, Tier.trusted)):
        gate.cancel(hold(gate, key(gate, tier), use=Use(directions=(direction(f"{i}", 250),))), UNWANTED)
    refused("rank_exhausted", lambda: ask(gate, key(gate), use=Use(directions=(direction("more"),))))


def test_of_open_weights_nothing_is_counted(gate: Gate) -> None:
    who = key(gate, Tier.open)
    sides = tuple((parse(site), True) for site in ("z.1", "attn_out.1"))
    use = Use(directions=tuple(direction(str(i), 8) for i in range(20)), exported=sides)
    assert isinstance(ask(gate, who, facts=OPEN, use=use), Hold)
    assert "exposed" not in gate.ledger.entries(limit=1000)[-1].detail


def test_of_one_map_one_side_leaves_whoever_asks(gate: Gate) -> None:
    gate.cancel(hold(gate, key(gate), use=Use(exported=((parse("z.3"), False),))), UNWANTED)
    other = key(gate)
    refusal = refused("policy", lambda: ask(gate, other, use=Use(exported=((parse("attn_out.3"), False),))))
    assert refusal.path == "z.3"
    assert isinstance(ask(gate, other, use=Use(exported=((parse("attn_out.2"), False),))), Hold)


def test_rows_of_the_first_position_are_the_side_of_more_maps(gate: Gate) -> None:
    gate.cancel(hold(gate, key(gate), use=Use(exported=((parse("attn_in.3"), True),))), UNWANTED)
    later = Use(exported=((parse("attn_out.3"), False),))
    first = Use(exported=((parse("attn_out.3"), True),))
    assert refused("policy", lambda: ask(gate, key(gate), use=first)).path == "attn_in.3"
    assert isinstance(ask(gate, key(gate), use=later), Hold)


def test_a_policy_may_let_both_ends_leave(gate: Gate) -> None:
    both = Use(exported=((parse("z.3"), False), (parse("attn_out.3"), False)))
    refused("policy", lambda: ask(gate, key(gate), use=both))
    gate.policy = Policy.model_validate({"data": {"linear_maps": True}})
    assert isinstance(ask(gate, key(gate), use=both), Hold)


# ---- the end of a request -------------------------------------------------------------------------


def test_release_charges_what_was_sent_and_refunds_the_rest(gate: Gate) -> None:
    who = key(gate)
    held = hold(gate, who, 600)
    assert gate.budget(who, FACTS).left_bits == DAY - 600
    out = gate.release(held, presses(1.0, 2.0, prices=held.prices))
    assert out.charge is not None
    assert out.charge.bits == 256 + 2 * 8 + 16  # two numbers of 8 bits and their scale
    assert out.charge.left_bits == DAY - out.charge.bits
    sent = json.loads(out.payload)
    assert sent["outputs"]["s"]["scores"] == pytest.approx([1.0, 2.0], rel=0.01)
    assert sent["receipt"]["released_bits"] == {"overhead": 256, "s": 32}
    view = gate.budget(who, FACTS)
    assert (view.limit_bits, view.spent_bits, view.left_bits) == (LIFE, 288, DAY - 288)
    account = gate.account(who, {"m": FACTS})
    assert account.head == gate.ledger.head().hash == out.charge.head
    assert (account.key, account.budgets) == (who.key_id, {"m": view})
    assert sum(entry.bits for entry in account.entries) == 288
    assert account.entries[-1].time.endswith("+00:00")


def test_cancel_keeps_the_overhead(gate: Gate) -> None:
    who = key(gate)
    gate.cancel(hold(gate, who), UNWANTED)
    view = gate.budget(who, FACTS)
    assert (view.spent_bits, view.left_bits) == (256, DAY - 256)


def test_what_may_not_leave_leaves_the_hold_open(gate: Gate) -> None:
    who = key(gate)
    held = hold(gate, who)
    refused("result_not_finite", lambda: gate.release(held, presses(1, float("nan"), prices=held.prices)))
    small = hold(gate, who, 260, body="small")  # cheaper than what it would release
    refused("bad_bits", lambda: gate.release(small, presses(1, 2, prices=small.prices)))
    assert gate.budget(who, FACTS).spent_bits == 0
    gate.cancel(held, UNWANTED)
    gate.cancel(small, UNWANTED)
    assert gate.budget(who, FACTS).spent_bits == 512


def test_a_hold_ends_once(gate: Gate) -> None:
    held = hold(gate, key(gate))
    press = presses(1, 2, prices=held.prices)
    gate.release(held, press)
    refused("reservation_closed", lambda: gate.release(held, press))
    refused("reservation_closed", lambda: gate.cancel(held, UNWANTED))


def test_the_same_request_again_is_the_same_bytes_for_nothing(gate: Gate) -> None:
    who = key(gate)
    first = gate.release(hold(gate, who, idem="once"), presses(1, 2, prices=gate.prices(who)))
    again = ask(gate, who, idem="once", request_id="req_2")
    assert isinstance(again, Released)
    assert again.payload == first.payload
    assert again.charge is not None
    assert first.charge is not None
    assert (again.charge.bits, again.charge.replayed, first.charge.replayed) == (0, True, False)
    assert again.charge.left_bits == first.charge.left_bits == gate.budget(who, FACTS).left_bits
    assert [e.kind for e in gate.ledger.entries(request_id="req_2")] == ["replayed"]
    refused("idempotency_conflict", lambda: ask(gate, who, idem="once", body="other"))


def test_a_frozen_lineage_admits_nothing(gate: Gate) -> None:
    held = hold(gate, key(gate))
    gate.ledger.freeze("base", "a leak is looked at")
    refusal = refused("lineage_frozen", lambda: ask(gate, key(gate)))
    assert "a leak is looked at" in refusal.reason
    refused("lineage_frozen", lambda: gate.release(held, presses(1, 2, prices=held.prices)))
    assert isinstance(ask(gate, key(gate), facts=OPEN), Hold)
    gate.cancel(held, UNWANTED)


def test_a_key_revoked_meanwhile_gets_nothing(gate: Gate) -> None:
    who = key(gate)
    held = hold(gate, who)
    gate.keys.revoke(who.key_id)
    with pytest.raises(errors.AuthError):
        gate.release(held, presses(1, 2, prices=held.prices))
    gate.cancel(held, UNWANTED)


def test_the_request_id_is_in_the_log(gate: Gate) -> None:
    who = key(gate)
    gate.cancel(hold(gate, who, request_id="req_1"), UNWANTED)
    assert [e.kind for e in gate.ledger.entries(request_id="req_1")] == ["admitted", "cancelled"]


# ---- tokens, and what is left ---------------------------------------------------------------------


def test_a_gate_signs_tokens_where_its_secrets_are(gate: Gate, tmp_path: Path) -> None:
    who = key(gate)
    assert "signs no tokens" in refused("not_allowed", lambda: gate.mint(who, EVERYTHING, None)).reason
    other = Gate(f"sqlite:///{tmp_path / 'other.db'}", secrets=tmp_path)
    made = other.mint(key(other), Scope(most_bits=9), "agent")
    found = other.keys.authenticate(made.text)
    assert (found.role, found.scope.most_bits, found.token_ids) == (Role.agent, 9, (made.token_id,))
    assert (tmp_path / "tokens.key").stat().st_mode & 0o777 == 0o600
    other.close()


def test_what_is_left_is_the_tightest_of_all_that_is_paid_from(gate: Gate) -> None:
    who = key(gate, scope=Scope(most_bits=1000))
    assert gate.left_bits(who, gate.lineage(FACTS)) == gate.budget(who, FACTS).left_bits == 1000
    assert gate.left_bits(key(gate), gate.lineage(FACTS)) == DAY
    assert gate.left_bits(key(gate, Tier.open), gate.lineage(OPEN)) is None

"""Which policy holds: what may change by itself, what needs two people, and that nothing half-starts."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from facade_room import FACTS, ask, hold, key, kinds, presses, refused, with_tier

from trocar import errors
from trocar.errors import TrocarError
from trocar.gate import policy_log
from trocar.gate.chain import Kind
from trocar.gate.gate import Gate, Hold
from trocar.gate.keys import Principal
from trocar.gate.policy import Data, Outputs, Policy, Project, Role, Tier

FIRST = Policy()
TIGHTER = with_tier(Tier.external, scalar_bits=6, life_ppm=500)
LOOSER = with_tier(Tier.external, scalar_bits=12, day_ppm=300)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    opened = at(tmp_path)
    yield opened
    found = opened.check()
    opened.close()
    assert found == []


def at(folder: Path, policy: Policy = FIRST, **more: Any) -> Gate:
    return Gate(f"sqlite:///{folder / 'ledger.db'}", policy, **more)


def adopt(gate: Gate, policy: Policy) -> list[str]:
    """The paths of what changed."""
    return [change.path for change in policy_log.adopt(gate._database, policy)]


def current(gate: Gate) -> Policy | None:
    with gate._database.read() as connection:
        return policy_log.current(connection)


def approve(gate: Gate, policy: Policy, holder: str, role: Role = Role.checker) -> int:
    who = gate.keys.create("lab", Tier.open, role, holder=holder).principal
    return policy_log.approve(gate._database, who, policy)


# ---- adopting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FIRST, TIGHTER, LOOSER])
def test_the_first_policy_is_taken_as_it_is(tmp_path: Path, policy: Policy) -> None:
    opened = at(tmp_path, policy)
    assert current(opened) == policy
    [entry] = opened.ledger.entries()
    assert (entry.kind, entry.digest) == ("policy_changed", policy.digest())
    opened.close()


def test_the_same_policy_again_is_no_entry(gate: Gate) -> None:
    assert adopt(gate, Policy()) == []
    assert kinds(gate) == ["policy_changed"]


def test_a_tighter_policy_needs_nobody(gate: Gate) -> None:
    assert adopt(gate, TIGHTER) == ["people.tiers.external.life_ppm", "people.tiers.external.scalar_bits"]
    assert current(gate) == TIGHTER
    assert kinds(gate) == ["policy_changed"] * 2


def test_a_looser_policy_is_refused_setting_by_setting(gate: Gate) -> None:
    error = refused("policy_loosened", lambda: adopt(gate, LOOSER))
    paths = ["people.tiers.external.day_ppm", "people.tiers.external.scalar_bits"]
    assert [refusal.path for refusal in error.refusals] == paths
    assert "was 250 and would be 300" in error.reason
    assert all(LOOSER.digest()[:12] in refusal.next_step for refusal in error.refusals)
    assert (current(gate), kinds(gate)) == (FIRST, ["policy_changed"])


def test_one_looser_setting_among_tighter_ones_is_enough(gate: Gate) -> None:
    mixed = with_tier(Tier.agent, TIGHTER, tick_ms=50)
    error = refused("policy_loosened", lambda: adopt(gate, mixed))
    assert [refusal.path for refusal in error.refusals] == ["people.tiers.agent.tick_ms"]


def test_many_refusals_are_the_first_twenty(gate: Gate) -> None:
    adopt(gate, Policy(projects={f"p{i}": Project(life_ppm=1) for i in range(30)}))
    assert len(refused("policy_loosened", lambda: adopt(gate, FIRST)).refusals) == 20


def test_the_tier_of_a_lineage_is_for_good(gate: Gate) -> None:
    for tier in ("agent", "trusted"):
        other = Policy(data=Data(lineage_tier=tier))
        error = refused("limit_changed", lambda other=other: adopt(gate, other))  # type: ignore[misc]
        assert error.path == "data.lineage_tier"
    assert kinds(gate) == ["policy_changed"]


# ---- two people -----------------------------------------------------------------------------------

CROWDS: dict[str, tuple[list[tuple[str, Role]], bool]] = {
    "nobody": ([], False),
    "an owner": ([("ann", Role.owner)], False),
    "two checkers": ([("cy", Role.checker), ("di", Role.checker)], False),
    "three checkers": ([("cy", Role.checker), ("di", Role.checker), ("ed", Role.checker)], False),
    "one person, two keys": ([("ann", Role.owner), ("ann", Role.checker)], False),
    "one person, two keys, the other way": ([("ann", Role.checker), ("ann", Role.owner)], False),
    "an owner and a checker": ([("ann", Role.owner), ("cy", Role.checker)], True),
    "a checker and an owner": ([("cy", Role.checker), ("ann", Role.owner)], True),
    "two owners": ([("ann", Role.owner), ("bea", Role.owner)], True),
    "an owner who first spoke as checker": (
        [("ann", Role.checker), ("ann", Role.owner), ("cy", Role.checker)],
        True,
    ),
    "an owner who then spoke as checker": (
        [("ann", Role.owner), ("ann", Role.checker), ("cy", Role.checker)],
        True,
    ),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_who_is_enough(gate: Gate, crowd: str) -> None:
    people, enough = CROWDS[crowd]
    counts = [approve(gate, LOOSER, holder, role) for holder, role in people]
    assert counts[-1:] == ([len({holder for holder, _ in people})] if people else [])
    if enough:
        assert len(adopt(gate, LOOSER)) == 2
        assert current(gate) == LOOSER
    else:
        refused("policy_loosened", lambda: adopt(gate, LOOSER))
        assert current(gate) == FIRST


def test_an_approval_is_of_one_digest(gate: Gate) -> None:
    for holder, role in (("ann", Role.owner), ("cy", Role.checker)):
        approve(gate, LOOSER, holder, role)
    even_looser = with_tier(Tier.external, LOOSER, life_ppm=2000)
    refused("policy_loosened", lambda: adopt(gate, even_looser))
    assert approve(gate, even_looser, "ann", Role.owner) == 1


def test_an_approval_is_good_for_one_change(gate: Gate) -> None:
    for holder, role in (("ann", Role.owner), ("cy", Role.checker)):
        approve(gate, LOOSER, holder, role)
    adopt(gate, LOOSER)
    assert adopt(gate, LOOSER) == []  # a restart
    adopt(gate, TIGHTER)
    refused("policy_loosened", lambda: adopt(gate, LOOSER))
    assert approve(gate, LOOSER, "ann", Role.owner) == 1  # again, from the beginning


@pytest.mark.parametrize("role", [Role.operator, Role.auditor, Role.researcher, Role.agent])
def test_who_has_no_say(gate: Gate, role: Role) -> None:
    refused("not_allowed", lambda: approve(gate, LOOSER, "bob", role))
    assert "policy_approved" not in kinds(gate)


def test_a_token_of_an_owner_has_no_say(gate: Gate, tmp_path: Path) -> None:
    owner = key(gate, Tier.open, Role.owner)
    token = gate.keys.authenticate(gate.keys.mint(owner, root=tmp_path / "tokens.key").text)
    refused("not_allowed", lambda: policy_log.approve(gate._database, token, LOOSER))


def test_a_revoked_key_has_no_say(gate: Gate) -> None:
    owner: Principal = key(gate, Tier.open, Role.owner)
    gate.keys.revoke(owner.key_id)
    refused("bad_key", lambda: policy_log.approve(gate._database, owner, LOOSER))
    assert "policy_approved" not in kinds(gate)


# ---- a policy that another version wrote ------------------------------------------------------------


def written_by_another_version(gate: Gate) -> None:
    told = {**json.loads(FIRST.model_dump_json()), "aura": {"sheen": 3}}
    gate.ledger.note(Kind.policy_changed, digest="0" * 64, detail={"policy": json.dumps(told)})


def test_a_policy_that_cannot_be_read_is_not_replaced_by_one_alone(gate: Gate) -> None:
    written_by_another_version(gate)
    refused("bad_policy", lambda: current(gate))
    for policy in (FIRST, TIGHTER):
        error = refused("bad_policy", lambda policy=policy: adopt(gate, policy))  # type: ignore[misc]
        assert error.path == "aura"
    assert kinds(gate) == ["policy_changed"] * 2


def test_a_policy_that_cannot_be_read_is_replaced_by_an_approved_one(gate: Gate) -> None:
    written_by_another_version(gate)
    for holder, role in (("ann", Role.owner), ("cy", Role.checker)):
        approve(gate, TIGHTER, holder, role)
    adopt(gate, TIGHTER)
    assert current(gate) == TIGHTER


def test_a_policy_with_fewer_settings_has_the_defaults(gate: Gate) -> None:
    told = json.loads(TIGHTER.model_dump_json())
    del told["outputs"]["airlock"]["days"]
    gate.ledger.note(Kind.policy_changed, digest="0" * 64, detail={"policy": json.dumps(told)})
    assert current(gate) == TIGHTER


# ---- a gate under it --------------------------------------------------------------------------------


def test_a_running_gate_goes_on_under_a_tighter_policy(gate: Gate) -> None:
    gate.declare(FACTS)
    who = key(gate)
    before = hold(gate, who)
    gate.change_policy(TIGHTER)
    assert gate.policy == TIGHTER
    assert (gate.prices(who).scalar_bits, before.prices.scalar_bits) == (6, 8)
    out = gate.release(before, presses(1, 2, prices=before.prices))  # at the prices of its admission
    assert out.charge is not None
    assert out.charge.bits == 256 + 2 * 8 + 16
    assert gate.budget(who, FACTS).limit_bits == FACTS.weight_bits * 500 // 10**6


def test_a_running_gate_stays_as_it_was_when_a_policy_is_refused(gate: Gate) -> None:
    airlock = gate.airlock
    refused("policy_loosened", lambda: gate.change_policy(LOOSER))
    dearer = FIRST.model_copy(update={"outputs": Outputs(overhead_bits=512)})
    error = refused("limit_changed", lambda: gate.change_policy(dearer))
    assert (error.path, gate.policy, gate.airlock is airlock) == ("outputs.overhead_bits", FIRST, True)
    assert kinds(gate) == ["policy_changed"]


def test_a_dearer_overhead_holds_after_a_new_start(tmp_path: Path) -> None:
    at(tmp_path).close()
    opened = at(tmp_path, FIRST.model_copy(update={"outputs": Outputs(overhead_bits=512)}))
    assert opened.policy.overhead_bits == 512
    refused("bad_bits", lambda: ask(opened, key(opened), 511))
    opened.close()


def test_exports_are_signed_by_one_key_whatever_the_policy(gate: Gate) -> None:
    before = gate.airlock.public_key
    gate.change_policy(TIGHTER)
    assert gate.airlock.public_key == before


def test_the_airlock_follows_the_policy(gate: Gate) -> None:
    rules = gate.policy.outputs.airlock.model_copy(update={"approvers": 3, "days": 2})
    gate.change_policy(FIRST.model_copy(update={"outputs": Outputs(airlock=rules)}))
    found = gate.airlock._rules
    assert (found.approvers, found.open_approvers, found.life_ms) == (3, 0, 2 * 86_400_000)


def test_the_terms_of_an_export_are_those_of_the_data(gate: Gate) -> None:
    who, agent = key(gate, Tier.trusted), key(gate, Tier.agent)
    secret, said = gate.lineage(FACTS), FIRST.outputs.airlock
    terms = gate._export_terms(who, secret)
    assert (terms.first_raw_layer, terms.least_blocks, terms.vector_bits) == (2, 1, 8)
    assert (terms.review_bytes, terms.most_bytes, terms.own_targets) == (1 << 20, 64 << 20, False)
    assert gate._export_terms(agent, secret).vector_bits == 4
    free = gate._export_terms(who, gate.lineage(FACTS.model_copy(update={"open_weights": True})))
    assert (free.first_raw_layer, free.maps, free.review_bytes) == (0, (), said.most_bytes)


# ---- starts that fail -------------------------------------------------------------------------------


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """Whatever the test opened keeps no anchors any more; rooms of other tests may."""
    before = set(threading.enumerate())
    yield
    assert [t.name for t in set(threading.enumerate()) - before if t.name == "anchors"] == []


def nothing_stays_open(folder: Path) -> None:
    """Whoever comes next may start, and is admitted."""
    opened = at(folder, anchors=folder / "anchors")
    assert isinstance(ask(opened, key(opened)), Hold)
    opened.close()


@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize("policy", [LOOSER, Policy(data=Data(lineage_tier="agent"))])
def test_a_start_that_is_refused_leaves_nothing_open(tmp_path: Path, policy: Policy) -> None:
    at(tmp_path, anchors=tmp_path / "anchors").close()
    with pytest.raises(TrocarError):
        at(tmp_path, policy, anchors=tmp_path / "anchors")
    nothing_stays_open(tmp_path)


@pytest.mark.usefixtures("no_thread_stays")
def test_a_start_without_its_signing_key_changes_no_policy(tmp_path: Path) -> None:
    at(tmp_path, anchors=tmp_path / "anchors").close()
    (tmp_path / "airlock.ed25519").write_bytes(b"short")
    refused(
        "ledger_unavailable", lambda: at(tmp_path, TIGHTER, anchors=tmp_path / "anchors", secrets=tmp_path)
    )
    nothing_stays_open(tmp_path)


@pytest.mark.usefixtures("no_thread_stays")
def test_anchors_see_what_a_gate_wrote_and_an_older_copy_does_not_start(tmp_path: Path) -> None:
    anchors, ledger = tmp_path / "elsewhere", tmp_path / "ledger.db"
    first = at(tmp_path, anchors=anchors)
    first.close()
    yesterday = ledger.read_bytes()
    second = at(tmp_path, anchors=anchors)
    gate_key = key(second)
    second.cancel(hold(second, gate_key), errors.refuse("cancelled", "", "the job was cancelled"))
    head = second.ledger.head()
    second.close()
    [file] = anchors.iterdir()
    assert file.read_text().splitlines()[-1].split()[:2] == [str(head.seq), head.hash]
    ledger.write_bytes(yesterday)
    refused("ledger_rolled_back", lambda: at(tmp_path, anchors=anchors))
    refused("ledger_rolled_back", lambda: at(tmp_path))  # nor without naming them


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    opened = at(tmp_path)
    opened.close()
    opened.close()


def test_two_changes_at_once_end_as_the_log_says(gate: Gate) -> None:
    ladder = [with_tier(Tier.external, scalar_bits=bits) for bits in (7, 6, 5, 4)]
    refusals: list[str] = []

    def change(policy: Policy) -> None:
        try:
            gate.change_policy(policy)
        except TrocarError as e:
            refusals.append(e.code)

    threads = [threading.Thread(target=change, args=(policy,)) for policy in ladder * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gate.policy == current(gate) == ladder[-1]
    assert set(refusals) <= {"policy_loosened"}

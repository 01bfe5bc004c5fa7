"""Twelve attacks on a small random model: each steals where nothing protects, and is stopped where a budget does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trocar.attacks.table import ATTACKS, BY_NAME, Attack
from trocar.cli import attack_room
from trocar.cli.app import main
from trocar.cli.attack_room import Played, Row, problems
from trocar.codes import CODES
from trocar.gate.policy import Policy, Tier

# What the open side must reach for the attack to count as one: relative error, and share of the attacked weights.
REAL = {
    "embedding-read": (1e-6, 1.0),
    "hidden-dimension": (0.0, 0.0),
    "subspace": (1e-5, 0.0),
    "steer-logprobs": (1e-5, 1.0),
    "basis-injection": (1e-3, 1.0),
    "passive-regression": (1e-4, 1.0),
    "activation-target": (0.01, 1.0),
    "gradient-read": (1e-6, 1.0),
    "boolean-oracle": (0.02, 1.0),
    "k-average": (1e-4, 1.0),
    "coalition": (1e-6, 1.0),
    "adapter-initialisation": (0.7, 0.1),
}


# Stopped by a rule before a budget runs out.
RULED = {"activation-target": "policy", "boolean-oracle": "rank_exhausted"}


@pytest.fixture(scope="module")
def played() -> Played:
    return attack_room.play("random", ATTACKS)


@pytest.fixture(scope="module")
def rows(played: Played) -> dict[str, Row]:
    return {row.attack: row for row in played.rows}


@pytest.fixture
def again(played: Played, rows: dict[str, Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command plays what was played already."""

    def chosen(_model: str, attacks: Sequence[Attack], **_: Any) -> Played:
        return replace(played, rows=tuple(rows[a.name] for a in attacks))

    monkeypatch.setattr(attack_room, "play", chosen)


def test_every_attack_is_judged() -> None:
    assert set(REAL) == set(BY_NAME)
    assert len(ATTACKS) == 12


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_an_attack_is_real(rows: dict[str, Row], attack: Attack) -> None:
    """Where nothing protects the weights, it has them."""
    off, (error, share) = rows[attack.name].open, REAL[attack.name]
    assert off.error <= error
    assert off.recovered >= share * off.attacked_weights
    assert off.limit_bits is None


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_an_attack_is_stopped(rows: dict[str, Row], attack: Attack) -> None:
    """As a secret: within the limit, what came was charged, no better than the bits allow, and by a refusal."""
    on = rows[attack.name].secret
    assert rows[attack.name].problems == ()
    assert on.limit_bits is not None
    assert on.received_bits <= on.charged_bits <= on.limit_bits
    assert on.error >= on.least_error
    assert on.matrix_error >= on.least_matrix_error
    assert on.refusals
    assert set(on.refusals) <= set(CODES)
    assert on.recovered <= on.matrix_weights / 10
    assert on.error <= 1.0  # an attack that guesses worse than nothing would prove nothing


@pytest.mark.parametrize("attack", [a for a in ATTACKS if not a.offline], ids=lambda a: a.name)
def test_an_attack_spends_what_it_has(rows: dict[str, Row], attack: Attack) -> None:
    """Nothing is stopped for want of trying: the window of a day is used up, where there is one, or all there is."""
    on, policy = rows[attack.name].secret, Policy()
    day = policy.data.lineage_day_ppm / (policy.terms(Tier.external).life_ppm or 1)
    if attack.name in RULED:
        assert RULED[attack.name] in on.refusals
        return
    assert on.charged_bits >= 0.8 * day * (on.limit_bits or 0)


PATIENT = ("embedding-read", "subspace", "steer-logprobs", "coalition")


@pytest.fixture(scope="module")
def waited() -> dict[str, Row]:
    played = attack_room.play("random", [BY_NAME[n] for n in PATIENT], patient=True)
    assert played.limits.day_bits == played.limits.life_bits
    return {row.attack: row for row in played.rows}


@pytest.mark.parametrize("name", PATIENT)
def test_a_thief_who_waits_gets_the_limit_for_life_and_no_more(waited: dict[str, Row], name: str) -> None:
    on = waited[name].secret
    assert waited[name].problems == ()
    assert 0.8 * (on.limit_bits or 0) <= on.charged_bits <= (on.limit_bits or 0)
    assert on.error >= on.least_error


def test_a_coalition_is_no_better(rows: dict[str, Row]) -> None:
    alone, together = rows["embedding-read"].secret, rows["coalition"].secret
    assert together.charged_bits <= (alone.limit_bits or 0)
    assert together.recovered <= 1.1 * alone.recovered


def test_what_must_not_be_is_noticed(rows: dict[str, Row]) -> None:
    """Each judgement can fail."""
    attack, good = BY_NAME["embedding-read"], rows["embedding-read"].secret
    bad = {
        "limit is": replace(good, charged_bits=(good.limit_bits or 0) + 1),
        "were charged": replace(good, received_bits=good.charged_bits + 1),
        "is below": replace(good, error=0.5 * good.least_error),
        "no limit": replace(good, limit_bits=None),
        "nothing stopped": replace(good, refusals=()),
    }
    assert list(problems(attack, good)) == []
    assert all(words in " ".join(problems(attack, side)) for words, side in bad.items())


@pytest.mark.usefixtures("again")
def test_the_command_prints_a_table(capsys: Any) -> None:
    assert main(["attack", "run"]) == 0
    said = capsys.readouterr().out
    assert all(a.name in said for a in ATTACKS)
    assert "not through the server" in said
    assert "nothing came out that was not charged for" in said


@pytest.mark.usefixtures("again")
def test_the_command_writes_what_it_prints_as_json(played: Played, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "attacks.json"
    assert main(["attack", "run", "--attack", "coalition", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found
    assert [row["attack"] for row in found["rows"]] == ["coalition"]
    assert found["rows"][0]["secret"]["charged_bits"] <= found["limits"]["life_bits"]
    assert found["rows"][0]["secret"]["limit_bits"] == found["limits"]["life_bits"]
    assert (found["model"], found["fingerprint"]) == ("random", played.fingerprint)
    assert "cores" in found["machine"]


@pytest.mark.usefixtures("again")
def test_a_file_that_cannot_be_written_is_said_before(tmp_path: Path, capsys: Any) -> None:
    assert main(["attack", "run", "--out", str(tmp_path / "no" / "attacks.json")]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err
    assert said.out == ""


def test_the_command_fails_when_more_came_out(
    played: Played, rows: dict[str, Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    bad = replace(rows["coalition"], problems=("12 bits came, 11 were charged",))
    monkeypatch.setattr(attack_room, "play", lambda _model, _attacks, **_: replace(played, rows=(bad,)))
    assert main(["attack", "run", "--attack", "coalition", "--out", str(tmp_path / "bad.json")]) == 1
    assert "coalition: 12 bits came, 11 were charged" in capsys.readouterr().out
    assert json.loads((tmp_path / "bad.json").read_text())["rows"][0]["problems"]  # a bad run is kept too


def test_an_unknown_attack_is_refused(capsys: Any) -> None:
    assert main(["attack", "run", "--attack", "colition"]) == 2
    assert "closest: 'coalition'" in capsys.readouterr().err

"""How many refusals a key hears in a minute: exactly as many as it may, by any clock, each key for itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.service import pace as room
from trocar.service.pace import Pace


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def taken(pace: Pace, key: str, per_minute: int, tries: int = 1000) -> int:
    return sum(pace.wait_s(key, per_minute) == 0.0 for _ in range(tries))


def test_a_minutes_worth_at_once_and_then_one_by_one(clock: Clock) -> None:
    pace = Pace(clock)
    assert taken(pace, "a", 6) == 6
    assert pace.wait_s("a", 6) == pytest.approx(10.0)
    clock.now_s += 4
    assert pace.wait_s("a", 6) == pytest.approx(6.0)
    clock.now_s += 6
    assert (pace.wait_s("a", 6), taken(pace, "a", 6)) == (0.0, 0)
    clock.now_s += 3600
    assert taken(pace, "a", 6) == 6  # no more than a minute's worth, however long it was quiet


def test_keys_do_not_share(clock: Clock) -> None:
    pace = Pace(clock)
    assert [taken(pace, name, 3) for name in "ab"] == [3, 3]


def test_who_waits_as_long_as_was_said_is_heard(clock: Clock) -> None:
    pace = Pace(clock)
    taken(pace, "a", 7)
    for _ in range(20):
        clock.now_s += pace.wait_s("a", 7) + 1e-9
        assert pace.wait_s("a", 7) == 0.0


def test_a_stricter_policy_holds_at_once(clock: Clock) -> None:
    pace = Pace(clock)
    pace.wait_s("a", 600)
    assert taken(pace, "a", 2) == 2


def test_asking_while_one_must_wait_costs_nothing(clock: Clock) -> None:
    pace = Pace(clock)
    taken(pace, "a", 60)
    clock.now_s += 0.5
    waits = {round(pace.wait_s("a", 60), 6) for _ in range(50)}
    assert waits == {0.5}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.lists(st.floats(0, 30), max_size=80))
def test_no_minute_has_twice_the_rate(per_minute: int, pauses: list[float]) -> None:
    clock, heard = Clock(), list[float]()
    pace = Pace(clock)
    for pause in pauses:
        clock.now_s += pause
        while pace.wait_s("a", per_minute) == 0.0:
            heard.append(clock.now_s)
    for start_s in heard:
        assert sum(start_s <= at_s < start_s + 60 for at_s in heard) <= 2 * per_minute


def test_quiet_keys_are_forgotten_and_busy_ones_are_not(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MOST_KEYS", 3)
    pace = Pace(clock)
    for name in "abc":
        taken(pace, name, 5)
    clock.now_s += 30
    taken(pace, "c", 5)
    clock.now_s += 31
    pace.wait_s("d", 5)
    assert set(pace._buckets) == {"c", "d"}
    assert taken(pace, "c", 5) < 5

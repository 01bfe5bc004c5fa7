"""The arithmetic of one account, against a history that is kept in plain lists."""

from __future__ import annotations

import pytest
from gate_room import refused
from hypothesis import given
from hypothesis import strategies as st

from trocar.gate import windows
from trocar.gate.limits import MAX_BITS, Limits, Payer, with_everyone
from trocar.gate.windows import Account


def account(life: int | None = 1000, daily: int | None = 100, day: int = 5) -> Account:
    return windows.opened("key:k", "base", Limits(life, daily), day)


def test_a_new_account_has_all_of_both_windows() -> None:
    new = account()
    assert (new.left_life_bits, new.left_today_bits, new.left_bits) == (1000, 100, 100)
    assert account(None, None).left_bits is None
    assert account(None, 7).left_bits == 7
    assert account(50, 70).left_bits == 50


def test_what_is_held_counts_into_the_next_day_and_its_refund_comes_off_there() -> None:
    held = windows.held(account(), 60)
    assert windows.lacking(held, 41) == "today"
    tomorrow = windows.rolled(held, 6)
    assert (tomorrow.day, tomorrow.day_bits) == (6, 60)
    assert windows.lacking(tomorrow, 40) is None
    done = windows.closed(tomorrow, 60, 15)
    assert (done.charged_bits, done.held_bits, done.day_bits) == (15, 0, 15)


def test_a_day_is_never_begun_again() -> None:
    spent = windows.closed(windows.held(account(day=5), 100), 100, 100)
    for day in (5, 4, -3000):
        assert windows.rolled(spent, day) is spent
        assert windows.lacking(windows.rolled(spent, day), 1) == "today"
    assert windows.lacking(windows.rolled(spent, 6), 1) is None


def test_the_life_of_an_account_does_not_refill() -> None:
    spent = account(life=100, daily=100)
    for day in range(5, 3000, 500):
        spent = windows.rolled(spent, day)
        if windows.lacking(spent, 60) is None:
            spent = windows.closed(windows.held(spent, 60), 60, 60)
    assert spent.charged_bits == 60
    assert windows.lacking(spent, 41) == "life"


def test_a_lower_limit_is_taken_over_and_a_higher_one_is_not() -> None:
    first = account(1000, 100)
    assert windows.lowered(first, Limits(2000, 200)) is first
    assert windows.lowered(first, Limits(None, None)) is first
    less = windows.lowered(first, Limits(400, 30))
    assert (less.limit_bits, less.day_limit_bits) == (400, 30)
    assert windows.lowered(less, Limits(1000, 100)) is less
    assert windows.lowered(account(None, None), Limits(9, None)).left_bits == 9
    assert windows.lowered(account(None, None), Limits(None, 8)).left_bits == 8


def test_a_limit_below_the_use_leaves_nothing_and_forgives_what_was_spent() -> None:
    used = windows.held(windows.closed(windows.held(account(1000, 500), 300), 300, 300), 100)
    less = windows.lowered(used, Limits(50, 20))
    assert (less.left_life_bits, less.left_today_bits) == (0, 0)
    assert (less.grace_bits, less.day_grace_bits) == (350, 380)
    assert windows.lacking(less, 1) == "life"
    after = windows.rolled(windows.closed(less, 100, 0), 9)
    assert (after.left_today_bits, after.day_grace_bits) == (20, 0)
    assert windows.rolled(less, 9).day_grace_bits == 80  # what is held counts on


def test_a_raise_holds_until_configuration_asks_for_less_than_ever() -> None:
    more = windows.raised(account(1000, 100), Limits(3000, 100))
    assert windows.lowered(more, Limits(1000, 100)) is more
    assert windows.lowered(more, Limits(2000, 100)) is more
    assert windows.lowered(more, Limits(999, 100)).limit_bits == 999
    below = windows.lowered(account(100, 100), Limits(50, 50))
    again = windows.raised(below, Limits(80, 90))
    assert windows.lowered(again, Limits(50, 50)) is again
    assert (again.left_life_bits, again.left_today_bits) == (80, 90)


def test_configuration_below_the_first_limit_but_above_the_raised_one_is_nothing_new() -> None:
    odd = windows.lowered(account(None, None), Limits(10, 10))
    assert windows.lowered(windows.raised(odd, Limits(10, 10)), Limits(10, 10)).limit_bits == 10


@pytest.mark.parametrize(
    "limits", [Limits(999, 100), Limits(1000, 99), Limits(None, 100), Limits(1000, None)]
)
def test_a_raise_neither_lowers_nor_lifts(limits: Limits) -> None:
    refused("bad_value", lambda: windows.raised(account(1000, 100), limits))


def test_an_uncapped_account_stays_uncapped_through_a_raise_of_the_other_window() -> None:
    assert windows.raised(account(None, 100), Limits(None, 200)).limit_bits is None


@pytest.mark.parametrize("owner", ["", "k", "key:", "key:a b", "user:x", "key:" + "x" * 191, "key:é", "**"])
def test_a_payer_has_a_name_of_the_grammar(owner: str) -> None:
    refused("bad_value", lambda: Payer(owner, Limits(None)))


@pytest.mark.parametrize("bits", [-1, 1.0, True, "5", MAX_BITS + 1])
def test_limits_are_amounts_of_bits(bits: object) -> None:
    for limits in ((bits, None), (None, bits)):
        refused("bad_bits", lambda limits=limits: Limits(*limits))


def test_nobody_pays_twice() -> None:
    one = Payer("key:a", Limits(1))
    for twice in ((one, one), (Payer("*", Limits(1)),)):
        refused("bad_value", lambda twice=twice: with_everyone(twice, Limits(None)))


STEP = st.tuples(
    st.sampled_from(["hold", "close", "day", "back", "config", "raise"]),
    st.integers(0, 60),
    st.integers(0, 300),
)


@given(st.lists(STEP, max_size=40), st.integers(0, 200), st.integers(0, 100))
def test_a_history_never_uses_more_than_its_limits(
    steps: list[tuple[str, int, int]], life: int, daily: int
) -> None:
    now, today, top, day_top = account(life, daily), 5, life, daily
    charged: list[tuple[int, int]] = []  # day, bits
    holds: list[int] = []
    for what, first, second in steps:
        match what:
            case "day":
                today += first % 3
            case "back":
                today -= first
            case "config":
                now = windows.lowered(windows.rolled(now, today), Limits(second, first))
            case "raise":
                now = windows.rolled(now, today)
                limits = Limits((now.limit_bits or 0) + first, (now.day_limit_bits or 0) + first)
                now = windows.raised(now, limits)
                top, day_top = max(top, limits.life_bits or 0), max(day_top, limits.day_bits or 0)
            case "hold":
                now = windows.rolled(now, today)
                if windows.lacking(now, first + 1) is None:
                    assert now.used_bits + first + 1 <= (now.limit_bits or 0)
                    holds.append(first + 1)
                    now = windows.held(now, first + 1)
            case "close" if holds:
                bits = holds.pop()
                now = windows.closed(windows.rolled(now, today), bits, min(bits, first))
                charged.append((now.day, min(bits, first)))
        assert now.used_bits == sum(holds) + sum(bits for _, bits in charged) <= top
        assert now.day_bits == sum(holds) + sum(bits for day, bits in charged if day == now.day) <= day_top
        assert now.used_bits <= (now.limit_bits or 0) + now.grace_bits
        assert now.day_bits <= (now.day_limit_bits or 0) + now.day_grace_bits

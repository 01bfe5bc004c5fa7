"""Random legal programs are accepted and priced; random and broken ones are refused, quickly, never worse."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Any

from graph_drafts import drafts
from graph_room import HANDLES, PRICES, Case, node, program, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trocar import errors, strict
from trocar.codes import CODES
from trocar.graph import check
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.graph.spec import SPEC

NEW = 4
EXAMPLES = int(os.environ.get("TROCAR_EXAMPLES", "60"))  # 10000 for a long look
FAST = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def scope(lengths: tuple[int, ...]) -> Scope:
    return Case(lengths=lengths, new=NEW).scope()


@FAST
@given(drafts())
def test_legal_programs_are_accepted_and_their_price_adds_up(
    draft: tuple[list[dict[str, Any]], tuple[int, ...]],
) -> None:
    nodes, lengths = draft
    written = program(*nodes)
    checked = check.check(written, scope(lengths), PRICES)
    price = checked.cost
    assert price.total_bits == sum(price.bits_out.values())
    assert all(b >= 0 for b in price.bits_out.values())
    assert {n.id for n in checked.outputs()} <= set(price.bits_out)
    assert set(price.bits_out) - {n.id for n in checked.outputs()} <= {"overhead", "receipts", "lengths"}
    assert strict.parse(Program, json.dumps({"nodes": nodes}).encode()).digest() == written.digest()


@FAST
@given(drafts(), st.integers(1, 40))
def test_the_price_grows_with_the_lengths_only(
    draft: tuple[list[dict[str, Any]], tuple[int, ...]], extra: int
) -> None:
    """The checker is given lengths and no contents, and a price never falls with them."""
    nodes, lengths = draft
    assert "prompts" not in Scope.__slots__
    here = check.check(program(*nodes), scope(lengths), PRICES).cost
    longer = check.check(program(*nodes), scope(tuple(n + extra for n in lengths)), PRICES).cost
    assert longer.total_bits >= here.total_bits
    backwards = check.check(program(*nodes), scope(lengths[::-1]), PRICES).cost
    assert backwards == here


@FAST
@given(drafts(), st.data())
def test_broken_programs_are_refused_or_checked_but_nothing_else(
    draft: tuple[list[dict[str, Any]], tuple[int, ...]], data: st.DataObject
) -> None:
    nodes, lengths = draft
    broken = json.loads(json.dumps(nodes))
    for _ in range(data.draw(st.integers(1, 3))):
        victim = data.draw(st.sampled_from(broken))
        field = data.draw(st.sampled_from([*victim, "nope"]))
        victim[field] = data.draw(GARBAGE)
    judge({"nodes": broken}, lengths)


WORDS = st.sampled_from(
    ["zero", "x0", "x1", "x2", "resid_post.1", "final_norm", "prompt[0]", "gen[*]", "all", "", "\x00", "é", "__class__",
     "edit.add", "lens", *HANDLES]
)  # fmt: skip
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
    | st.text(max_size=8)
)
GARBAGE = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(WORDS, x, max_size=3), max_leaves=6
)


def judge(body: Any, lengths: tuple[int, ...]) -> None:
    raw = json.dumps(body).encode()

    def look() -> None:
        check.check(strict.parse(Program, raw, options={"op": tuple(SPEC)}), scope(lengths), PRICES)

    started = time.thread_time()
    try:
        look()
    except errors.TrocarError as e:
        found = e.refusals
    else:
        found = ()
    assert all(r.code in CODES and r.reason and r.next_step for r in found)
    assert len(found) <= check.MAX_REFUSALS
    spent_s = time.thread_time() - started
    # who is slow is asked again: one call in ten thousand meets Python's collector or a busy machine
    assert spent_s < 0.05 * SLACK or seconds(look) < 0.05 * SLACK


SLACK = 4  # the machine is shared


@FAST
@given(GARBAGE)
def test_garbage(body: Any) -> None:
    judge(body, (5,))
    judge({"nodes": body}, (5,))
    judge({"nodes": [body, {"op": "text", "id": "t"}]}, (5,))


@FAST
@given(st.binary(max_size=60))
def test_bytes(raw: bytes) -> None:
    for body in (raw, b'{"nodes":[' + raw + b"]}"):
        try:
            strict.parse(Program, body)
        except errors.TrocarError:
            continue


def seconds(work: Any) -> float:
    best = 9.0
    for _ in range(3):
        started = time.thread_time()
        with suppress(errors.TrocarError):
            work()
        best = min(best, time.thread_time() - started)
    return best


def chain(n: int) -> list[dict[str, Any]]:
    """A DAG of 2^n paths: each value is the sum of the one before with itself."""
    adds = [node("add", f"a{i}", a=f"a{i - 1}" if i else "r", b=f"a{i - 1}" if i else "r") for i in range(n)]
    return [read(), *adds, node("lens", "out", of=[f"a{n - 1}"])]


def test_five_thousand_nodes_are_refused_at_once() -> None:
    raw = json.dumps({"nodes": chain(5000)}).encode()
    started = time.thread_time()
    try:
        strict.parse(Program, raw)
    except errors.ProgramError as e:
        found = e
    assert (found.code, found.path) == ("too_many_nodes", "nodes")
    assert "5002" in found.reason
    assert time.thread_time() - started < 1.0


def test_doubling_is_linear() -> None:
    small, large = program(*chain(450)), program(*chain(1800))
    case = Case().scope()
    times = [seconds(lambda p=p: check.check(p, case, PRICES)) for p in (small, large)]
    assert times[1] < 1.0
    assert times[1] < 4 * 4 * times[0] + 0.01


def test_an_ordinary_program_takes_a_millisecond() -> None:
    reads = [read(f"r{i}", f"resid_post.{i % 4}", f"prompt[{i % 5}]") for i in range(19)]
    nodes = [
        *reads,
        *(node("lens", f"l{i}", of=[f"r{i}"]) for i in range(19)),
        node("text", "t"),
        node("logprobs", "p", tokens=[1]),
    ]
    ordinary = program(*nodes)
    assert len(ordinary.nodes) == 40
    times = []
    for _ in range(50):
        started = time.thread_time()
        check.check(ordinary, Case(new=2).scope(), PRICES)
        times.append(time.thread_time() - started)
    assert sorted(times)[25] < 0.001 * SLACK


def test_many_prompts_with_many_selectors() -> None:
    """Each of 240 nodes selects other rows of 4,096 prompts of many lengths."""
    lengths = tuple(50 + i % 150 for i in range(4096))
    nodes = [read(f"r{i}", at=f"prompt[{i % 25}:{25 + i // 25}]") for i in range(238)]
    big = Case(lengths=lengths, model=Case().model.model_copy(update={"context": 1000})).scope()
    assert (
        seconds(lambda: check.check(program(*nodes, node("logprobs", tokens=["a"])), big, PRICES))
        < 1.0 * SLACK
    )


def test_unknown_names_beside_long_legal_ones() -> None:
    legal = [node("tensor", f"a{'b' * 55}{i}", name="v") for i in range(1000)]
    unknown = [node("scale", f"s{i}", of=f"a{'c' * 25}{'b' * 30}{i}", by=1.0) for i in range(900)]
    assert seconds(lambda: check.check(program(*legal, *unknown), Case().scope(), PRICES)) < 1.0 * SLACK


def test_generation_is_bounded() -> None:
    assert Generation(max_new_tokens=1024).max_new_tokens == 1024

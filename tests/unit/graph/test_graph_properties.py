"""Random legal programs are accepted and priced; random and broken ones are refused, quickly, never worse."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from graph_room import ACTS, HANDLES, PRICES, PROBE, Case, node, program, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trocar import errors, strict
from trocar.codes import CODES
from trocar.graph import check
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.graph.spec import SPEC

LAYERED = {"resid_post": 8, "resid_pre": 8, "mlp_out": 8, "mlp_act": 16, "v": 4}
NEW = 4
PROMPT_AT = ("prompt[-1]", "prompt[0]", "prompt[1:3]", "prompt[:-1]", "prompt[*]")
GEN_AT = ("gen[*]", "gen[0:2]", "gen[1]", "all")
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Draft:
    """Writes a legal program, remembering of each value what the language says about it."""

    def __init__(self, draw: st.DrawFn, lengths: tuple[int, ...]) -> None:
        self.draw = draw
        self.lengths = lengths
        self.nodes: list[dict[str, Any]] = []
        self.values: dict[str, tuple[str, int, str | None, int]] = {}  # kind, width, selector, layer known at

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def add(self, op: str, value: tuple[str, int, str | None, int] | None = None, /, **fields: Any) -> str:
        name = f"x{len(self.nodes)}"
        self.nodes.append(node(op, name, **fields))
        if value is not None:
            self.values[name] = value
        return name

    def site(self) -> tuple[str, int, int]:
        name, layer = self.pick(LAYERED), self.draw(st.integers(0, 3))
        return f"{name}.{layer}", LAYERED[name], layer

    def read(self, at: str | None = None) -> str:
        text, width, layer = self.site()
        at = at or self.pick(PROMPT_AT + GEN_AT)
        return self.add("read", ("rows", width, at, layer), site=text, at=at)

    def constant(self) -> None:
        kind = self.draw(st.integers(0, 2))
        if kind == 0:
            self.add("tensor", ("vector", 8, None, -1), name="v")
        elif kind == 1:
            self.add("vector", ("vector", 8, None, -1), handle=PROBE, site="resid_post.1")
        elif len(self.lengths) == 2:
            self.add("stored", ("stored", 16, None, -1), handle=ACTS, site="mlp_act.2")

    def arithmetic(self) -> None:
        a = self.pick(self.values)
        kind, width, at, layer = self.values[a]
        same = [
            b
            for b, v in self.values.items()
            if v[1] == width and (v[0] == "vector" or v[:3] == (kind, width, at))
        ]
        verb = self.draw(st.integers(0, 3))
        if verb == 0:
            self.add("scale", self.values[a], of=a, by=self.draw(st.floats(-1e6, 1e6)))
        elif verb == 1 and same:
            b = self.pick(same)
            self.add(self.pick(("add", "sub")), (kind, width, at, max(layer, self.values[b][3])), a=a, b=b)
        elif verb == 2 and same and kind in ("rows", "stored"):
            b = self.pick(same)
            self.add("dot", ("scalars", 1, at, max(layer, self.values[b][3])), a=a, b=b)
        elif verb == 3 and kind in ("rows", "stored") and at not in GEN_AT:
            self.add("mean", ("per_prompt", width, None, layer), of=a)

    def edit(self) -> None:
        text, width, layer = self.site()
        at = self.pick(PROMPT_AT + GEN_AT)
        # a value of an earlier layer goes anywhere; one of a later layer only where it is per prompt, at gen
        legal = [
            name
            for name, (kind, w, value_at, known) in self.values.items()
            if w == width
            and (kind == "vector" or ((kind == "per_prompt" or (kind == "rows" and value_at == at)) and known < layer)
                 or (kind == "per_prompt" and at in ("gen[*]", "gen[0:2]", "gen[1]")))
        ]  # fmt: skip
        if not legal:
            self.add("edit.scale", site=text, at=at, by=0.5)
            return
        op = self.pick(("edit.add", "edit.set", "edit.project_out"))
        self.add(op, site=text, at=at, value=self.pick(legal))

    def output(self) -> None:
        rows = [n for n, v in self.values.items() if v[0] in ("rows", "per_prompt", "stored") and v[1] == 8]
        numbers = [n for n, v in self.values.items() if v[0] == "scalars"]
        verb = self.draw(st.integers(0, 4))
        if verb == 0 and rows:
            self.add("lens", of=[self.pick(rows)], top_k=self.draw(st.integers(1, 20)))
        elif verb == 1 and numbers:
            self.add("score", of=self.pick(numbers))
        elif verb == 2:
            self.add("text")
        elif verb == 3:
            self.add("capture", of=[self.read()])
        else:
            self.add("logprobs", at=self.pick(PROMPT_AT + GEN_AT), tokens=["a", 7])


@st.composite
def drafts(draw: st.DrawFn) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    lengths = tuple(draw(st.lists(st.integers(4, 12), min_size=1, max_size=3)))
    draft = Draft(draw, lengths)
    draft.read("prompt[-1]")
    for step in draw(
        st.lists(st.sampled_from(("read", "constant", "arithmetic", "edit", "output")), max_size=14)
    ):
        getattr(draft, step)()
    draft.output()
    return draft.nodes, lengths


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
    started = time.perf_counter()
    try:
        check.check(strict.parse(Program, raw, options={"op": tuple(SPEC)}), scope(lengths), PRICES)
    except errors.TrocarError as e:
        found = e.refusals
    else:
        found = ()
    assert all(r.code in CODES and r.reason and r.next_step for r in found)
    assert len(found) <= check.MAX_REFUSALS
    assert time.perf_counter() - started < 0.05 * SLACK


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
        started = time.perf_counter()
        with suppress(errors.TrocarError):
            work()
        best = min(best, time.perf_counter() - started)
    return best


def chain(n: int) -> list[dict[str, Any]]:
    """A DAG of 2^n paths: each value is the sum of the one before with itself."""
    adds = [node("add", f"a{i}", a=f"a{i - 1}" if i else "r", b=f"a{i - 1}" if i else "r") for i in range(n)]
    return [read(), *adds, node("lens", "out", of=[f"a{n - 1}"])]


def test_five_thousand_nodes_are_refused_at_once() -> None:
    raw = json.dumps({"nodes": chain(5000)}).encode()
    started = time.perf_counter()
    try:
        strict.parse(Program, raw)
    except errors.ProgramError as e:
        found = e
    assert (found.code, found.path) == ("too_many_nodes", "nodes")
    assert "5002" in found.reason
    assert time.perf_counter() - started < 1.0


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
        started = time.perf_counter()
        check.check(ordinary, Case(new=2).scope(), PRICES)
        times.append(time.perf_counter() - started)
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

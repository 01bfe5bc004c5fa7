"""The scheduler alone, without a model: budgets, turns, whole prompts, preemption, sweeps; nobody is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.engine.hf.kv import KV, KVShape, PrefixCache
from trocar.engine.hf.schedule import Chunk, Limits, Scheduler
from trocar.engine.hf.sequences import Live, first_row
from trocar.engine.protocol import Task
from trocar.graph import check, ops
from trocar.graph.cost import Prices
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.sites import SITES

FACTS = ModelFacts(
    name="paper", fingerprint="f" * 64, lineage="paper", family="llama", dtype="float32", n_layers=2, d_model=8,
    d_mlp=16, n_heads=2, n_kv_heads=1, d_head=4, vocab_size=300, context=4096, parameters=1000, weight_bits=16_000,
    open_weights=True, sites=tuple(SITES), unavailable={}, eos=(0,),
)  # fmt: skip
TEXT = (ops.Text(id="text"),)
LENS = (ops.Logprobs(id="lp", tokens=(1,)),)
MEAN = (
    ops.Read(id="r", site="mlp_out.0", at="prompt[*]"),
    ops.Mean(id="m", of="r"),
    ops.EditSet(id="e", site="mlp_out.0", at="prompt[*]", value="m"),
    *LENS,
)


def live(
    name: str,
    lengths: tuple[int, ...],
    nodes: Any = LENS,
    most: int = 0,
    tenant: str = "",
    row_flops: float = 1e12,
    **more: Any,
) -> Live:
    generation = Generation(max_new_tokens=most, stop_at_eos=False)
    checked = check.check(
        Program(nodes=nodes), Scope(FACTS, lengths, generation, {}, {}, lambda _: ()), Prices(32, 256)
    )
    tokens = tuple(tuple(range(n)) for n in lengths)
    task = Task(name, checked, tokens, {}, {}, {}, {}, lambda _: None, tenant=tenant)
    return Live.of(replace(task, **more), row_flops)


def scheduler(**limits: Any) -> Scheduler:
    made = Limits(**limits)
    shape = KVShape(FACTS.n_layers, 1, 4, torch.float32)
    kv = KV(shape, made.tokens_of(shape))
    return Scheduler(made, kv, PrefixCache(kv, kv.limit_tokens // 4))


def advance(s: Scheduler, chunks: list[Chunk]) -> None:
    """What a step does to host state: tokens are fed, a next one is chosen, who is done leaves."""
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None
        assert sequence.fed + chunk.count <= sequence.slot.pool.capacity_tokens
        sequence.fed += chunk.count
        sequence.slot.tokens = sequence.fed
        sequence.seen = max(sequence.seen, sequence.fed)
        if sequence.most and not sequence.ended and sequence.fed == len(sequence.tokens):
            sequence.accept(7, frozenset())
    for sequence in [x for x in s.running if x.finished]:
        s.retire(sequence)
        sequence.live.done += 1
    for one in [x for x in s.live.values() if x.over]:
        s.remove(one)


def names(chunks: list[Chunk]) -> list[tuple[str, int]]:
    return [(c.sequence.live.task.request, c.count) for c in chunks]


def test_prompts_are_fed_in_chunks_within_the_budget() -> None:
    s = scheduler(step_tokens=10)
    s.add(live("a", (25,)))
    seen = []
    while s.live:
        chunks = s.plan()
        seen.append(names(chunks))
        advance(s, chunks)
    assert seen == [[("a", 10)], [("a", 10)], [("a", 5)]]
    assert s.counts.chunks == 3


def test_rows_that_cost_more_count_for_more() -> None:
    """A lens on every token is a pass through the unembedding for each: its prompt is fed in smaller chunks."""
    s = scheduler(step_tokens=10)
    reads = (ops.Read(id="r", site="resid_post.1", at="prompt[*]"), ops.Lens(id="l", of=("r",)))
    one = live("a", (25,), reads, row_flops=2 * FACTS.parameters)
    assert one.weight == 1 + FACTS.d_model * FACTS.vocab_size / FACTS.parameters
    s.add(one)
    assert names(s.plan()) == [("a", int(10 / one.weight))]


def test_decoding_goes_before_prompts() -> None:
    s = scheduler(step_tokens=10)
    s.add(live("a", (4,), TEXT, most=3))
    advance(s, s.plan())
    s.add(live("b", (20,)))
    assert names(s.plan()) == [("a", 1), ("b", 9)]


def test_a_prompt_that_must_stay_whole_waits_for_a_step_of_its_own() -> None:
    s = scheduler(step_tokens=10)
    for name, length, nodes in (("a", 6, LENS), ("whole", 15, MEAN), ("b", 3, LENS)):
        s.add(live(name, (length,), nodes, tenant=name))
    first = s.plan()
    assert names(first) == [("a", 6)]
    advance(s, first)
    assert names(s.plan()) == [("whole", 15)]


def test_tenants_take_turns() -> None:
    s = scheduler(step_tokens=40, prefix_cache=False)
    s.add(live("many", (10,) * 50, tenant="a"))
    s.add(live("few", (10, 10), tenant="b"))
    s.add(live("one", (10,), tenant="c"))
    order = []
    for _ in range(3):
        chunks = s.plan()
        order += [n for n, _ in names(chunks)]
        advance(s, chunks)
    assert order[:5] == ["many", "few", "one", "many", "few"]
    assert set(order[5:]) == {"many"}


def test_requests_of_one_tenant_take_turns_too() -> None:
    s = scheduler(step_tokens=30)
    s.add(live("long", (10,) * 9))
    s.add(live("short", (10,)))
    assert [n for n, _ in names(s.plan())] == ["long", "short", "long"]


def test_who_does_not_fit_stays_first_in_line() -> None:
    s = scheduler(step_tokens=1000, kv_tokens=256, prefix_cache=False)
    for name, length in (("a", 128), ("big", 200), ("c", 20)):
        s.add(live(name, (length,), TEXT, most=5, tenant=name))
    started = []
    while s.live:
        chunks = s.plan()
        started += [n for n, count in names(chunks) if count > 1]
        advance(s, chunks)
    assert started == ["a", "big", "c"]


def test_the_youngest_gives_way_and_comes_back() -> None:
    s = scheduler(step_tokens=1000, kv_tokens=256, prefix_cache=False)
    s.add(live("old", (100,), TEXT, most=60, tenant="a"))
    advance(s, s.plan())
    s.add(live("young", (100,), TEXT, most=60, tenant="b"))
    for _ in range(200):
        if not s.live:
            break
        advance(s, s.plan())
        assert s.check() == []
    assert not s.live
    assert s.counts.preemptions >= 1


def holders(s: Scheduler) -> dict[str, int]:
    return dict(Counter(x.live.task.tenant for x in s.running))


def test_places_are_shared_between_tenants_who_wait() -> None:
    """One tenant's long texts hold every place; each step gives one to who waits with fewer, until they are even."""
    s = scheduler(step_tokens=1000, sequences=6, prefix_cache=False)
    s.add(live("flood", (4,) * 20, TEXT, most=100, tenant="a"))
    advance(s, s.plan())
    assert holders(s) == {"a": 6}
    s.add(live("b", (4,) * 5, TEXT, most=100, tenant="b"))
    s.add(live("c", (4,), TEXT, most=100, tenant="c"))
    seen = []
    for _ in range(5):
        advance(s, s.plan())
        assert s.check() == []
        seen.append(holders(s))
    assert seen[0] in ({"a": 5, "b": 1}, {"a": 5, "c": 1})
    assert seen[1] == {"a": 4, "b": 1, "c": 1}
    assert seen[2:] == [{"a": 3, "b": 2, "c": 1}] * 3
    assert s.counts.preemptions == 3
    while s.live:
        advance(s, s.plan())


def test_nobody_gives_way_while_places_are_free() -> None:
    s = scheduler(step_tokens=1000, sequences=6)
    s.add(live("many", (4,) * 4, TEXT, most=9, tenant="a"))
    advance(s, s.plan())
    s.add(live("few", (4,), TEXT, most=9, tenant="b"))
    advance(s, s.plan())
    assert holders(s) == {"a": 4, "b": 1}
    assert s.counts.preemptions == 0


def test_variants_of_a_sweep_start_together() -> None:
    s = scheduler(step_tokens=100)
    for name in "abc":
        s.add(live(name, (20, 10), family="f", fork=1))
    chunks = s.plan()
    for number in (0, 1):
        leader, *others = chunks[3 * number : 3 * number + 3]
        assert {c.sequence.live.task.request for c in (leader, *others)} == set("abc")
        assert {c.sequence.prompt for c in (leader, *others)} == {number}
        assert (leader.leader, leader.fork) == (None, 0)
        assert all(c.leader is leader.sequence and c.fork == 1 for c in others)
    assert s.counts.shared_rows == 60


def test_variants_that_do_not_fit_into_one_step_start_in_groups() -> None:
    s = scheduler(step_tokens=45)
    for name in "abc":
        s.add(live(name, (20,), family="f", fork=1))
    first = s.plan()
    assert [n for n, _ in names(first)] == ["a", "b"]
    advance(s, first)
    second = s.plan()
    assert (names(second), second[0].leader) == ([("c", 20)], None)


def test_an_edited_row_is_never_kept() -> None:
    s = scheduler(step_tokens=1000)
    edit = (ops.EditScale(id="e", site="resid_post.0", at="prompt[20:]", by=2.0), *LENS)
    s.add(live("a", (40,), edit))
    advance(s, s.plan())
    assert [len(k.keys) for k in s.cache._kept] == [1]
    s.add(live("b", (40,)))
    chunks = s.plan()
    assert names(chunks) == [("b", 24)]
    assert s.counts.prefix_hit_tokens == 16


def test_a_row_that_is_looked_at_is_computed() -> None:
    s = scheduler(step_tokens=1000)
    s.add(live("a", (40,)))
    advance(s, s.plan())
    looks = (ops.Read(id="r", site="resid_post.0", at="prompt[20:]"), ops.Lens(id="l", of=("r",)))
    one = live("b", (40,), looks)
    assert first_row(one, 0, reads=True) == 20
    s.add(one)
    assert names(s.plan()) == [("b", 24)]


def test_layers_that_were_not_computed_are_not_kept() -> None:
    s = scheduler(step_tokens=1000)
    early = (ops.Read(id="r", site="resid_post.0", at="prompt[-1]"), ops.Lens(id="l", of=("r",)))
    one = live("a", (40,), early)
    assert one.task.checked.depth == 1
    s.add(one)
    advance(s, s.plan())
    assert len(s.cache) == 0


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.lists(st.integers(1, 70), min_size=1, max_size=4),
        st.sampled_from([(LENS, 0), (TEXT, 5), (TEXT, 40), (MEAN, 0)]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(REQUESTS, st.integers(4, 80), st.sampled_from([128, 256, 1024]), st.booleans())
def test_everything_ends_and_nothing_is_left(
    wanted: list[Any], step_tokens: int, kv_tokens: int, cache: bool
) -> None:
    s = scheduler(step_tokens=step_tokens, kv_tokens=kv_tokens, sequences=5, prefix_cache=cache)
    for number, (tenant, lengths, (nodes, most)) in enumerate(wanted):
        s.add(live(str(number), tuple(lengths), nodes, most, tenant))
    steps = 0
    while s.live:
        chunks = s.plan()
        assert chunks, "nothing runs although somebody waits"
        rows = sum(c.count for c in chunks if not c.sequence.decoding)
        biggest = max(c.count for c in chunks)
        assert rows <= step_tokens or biggest > step_tokens
        assert len({id(c.sequence) for c in chunks}) == len(chunks)
        advance(s, chunks)
        assert s.check() == []
        assert s.kv.used_tokens <= kv_tokens
        steps += 1
        assert steps < 5000
    assert s.running == []
    s.cache.clear()
    assert s.kv.allocated_bytes == 0

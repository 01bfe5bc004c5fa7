"""Slots stay dense whatever comes and goes, contents follow their slot, and kept prefixes are found by their tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trocar.engine.hf.kv import KV, KVShape, PrefixCache, rounded
from trocar.engine.hf.sequences import block_keys

SHAPE = KVShape(layers=2, heads=1, width=3, dtype=torch.float32)


def _fill(slot, tokens: int, number: float) -> None:  # type: ignore[no-untyped-def]
    for layer in range(SHAPE.layers):
        slot.keys(layer)[:, :tokens] = number + layer
        slot.values(layer)[:, :tokens] = -number - layer
    slot.tokens = tokens


def _holds(slot, number: float) -> bool:  # type: ignore[no-untyped-def]
    for layer in range(SHAPE.layers):
        keys, values = slot.keys(layer), slot.values(layer)
        if not bool((keys[:, : slot.tokens] == number + layer).all()):
            return False
        if not bool((values[:, : slot.tokens] == -number - layer).all()):
            return False
        if bool(keys[:, slot.tokens :].any()) or bool(values[:, slot.tokens :].any()):
            return False  # what is behind the tokens is zero: masks meet no garbage
    return True


def test_capacities_are_the_next_power_of_two_from_64() -> None:
    assert [KV.capacity(n) for n in (1, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]
    assert [rounded(n) for n in (1, 64, 65, 129)] == [64, 64, 128, 192]
    assert SHAPE.token_bytes == 2 * 2 * 1 * 3 * 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "give", "grow"]), st.integers(0, 200)), max_size=60))
def test_contents_follow_their_slots(moves: list[tuple[str, int]]) -> None:
    kv, held = KV(SHAPE, 1 << 20), {}
    for number, (move, n) in enumerate(moves, start=1):
        if move == "take":
            held[number] = kv.take(n + 1)
            _fill(held[number], n + 1, float(number))
        elif held:
            key = sorted(held)[n % len(held)]
            if move == "give":
                kv.give(held.pop(key))
            else:
                held[key] = kv.grown(held[key], held[key].tokens + n)
        assert kv.check() == []
        assert kv.used_tokens == sum(s.pool.capacity_tokens for s in held.values())
    assert all(_holds(slot, float(key)) for key, slot in held.items())
    for slot in held.values():
        kv.give(slot)
    assert kv.allocated_bytes == 0


def test_a_full_store_says_so() -> None:
    kv = KV(SHAPE, 192)
    kv.take(100)
    assert kv.fits(64)
    assert not kv.fits(65)


def test_a_broken_pool_is_noticed() -> None:
    kv = KV(SHAPE, 1024)
    first, second = kv.take(10), kv.take(10)
    first.index, second.tokens = 1, 65
    assert len(kv.check()) == 2


def _kept(kv: KV, cache: PrefixCache, tokens: list[int], tenant: str = "a") -> bool:
    slot = kv.take(len(tokens))
    _fill(slot, len(tokens), float(tokens[0]))
    kept = cache.keep(slot, block_keys(tenant, tokens, len(tokens), cache.block_tokens))
    kv.give(slot)
    return kept


def test_the_longest_kept_prefix_is_found() -> None:
    kv = KV(SHAPE, 4096)
    cache = PrefixCache(kv, 4096)
    assert _kept(kv, cache, list(range(40)))
    assert not _kept(kv, cache, list(range(40)))  # twice is once
    assert _kept(kv, cache, [*range(32), *range(100, 116)])
    keys = block_keys("a", list(range(40)), 40, 16)
    assert len(keys) == 2
    assert cache.find(keys, 40)[1] == 32
    assert cache.find(keys, 31)[1] == 16
    assert cache.find(keys, 15) is None
    assert cache.find(block_keys("a", [9, *range(1, 40)], 40, 16), 40) is None
    longer = block_keys("a", [*range(32), *range(100, 140)], 72, 16)
    assert cache.find(longer, 71)[1] == 48


def test_a_stranger_never_finds_it() -> None:
    kv = KV(SHAPE, 4096)
    cache = PrefixCache(kv, 4096)
    assert _kept(kv, cache, list(range(40)), "a")
    assert cache.find(block_keys("b", list(range(40)), 40, 16), 40) is None


def test_the_least_recently_used_goes_first() -> None:
    kv = KV(SHAPE, 4096)
    cache = PrefixCache(kv, 4096)
    for start in (0, 100, 200):
        _kept(kv, cache, list(range(start, start + 20)))
    first = block_keys("a", list(range(20)), 20, 16)
    slot = cache.find(first, 20)[0]
    assert cache.evict()
    assert cache.find(block_keys("a", list(range(100, 120)), 20, 16), 20) is None
    assert cache.find(first, 20)[0] is slot
    assert cache.evict(spare=slot)
    assert not cache.evict(spare=slot)
    cache.clear()
    assert (len(cache), kv.used_tokens, kv.allocated_bytes) == (0, 0, 0)


def test_a_shared_block_outlives_the_slot_that_also_had_it() -> None:
    kv = KV(SHAPE, 4096)
    cache = PrefixCache(kv, 4096)
    _kept(kv, cache, list(range(40)))
    _kept(kv, cache, [*range(16), *range(500, 516)])
    own = block_keys("a", [*range(16), *range(500, 516)], 32, 16)
    assert cache.evict()
    assert cache.find(own, 32)[1] == 32


def test_the_cache_stays_within_its_share() -> None:
    kv = KV(SHAPE, 4096)
    cache = PrefixCache(kv, 128)
    for start in (0, 100, 200):
        assert _kept(kv, cache, list(range(start, start + 20)))
        assert cache.kept_tokens <= 128
    assert not _kept(kv, cache, list(range(500)))
    assert kv.check() == []


def test_what_is_kept_is_a_copy_in_a_pool_of_its_own() -> None:
    kv = KV(SHAPE, 4096)
    cache = PrefixCache(kv, 4096)
    live = kv.take(40)
    _fill(live, 40, 7.0)
    cache.keep(live, block_keys("a", list(range(40)), 40, 16))
    found = cache.find(block_keys("a", list(range(40)), 40, 16), 40)
    assert found is not None
    assert found[0].pool is not live.pool
    _fill(live, 40, 8.0)
    assert bool((found[0].keys(0)[:, :32] == 7.0).all())

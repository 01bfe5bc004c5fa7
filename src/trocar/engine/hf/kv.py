"""Keys and values of live sequences: slots in pools of one capacity each, and a cache of shared prefixes.

A sequence owns one slot of the smallest pool that holds it and moves to the next pool when it outgrows it.
Slots of a pool are kept dense (the last one moves into a hole), so a decode step reads them as one view without
gathering. Unwritten places are zero: padding meets masks, never garbage.

Shape letters: S slots, H key/value heads, C capacity in tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

STEP: Final = 64
"""Capacities and views are multiples of this: the attention kernel then rounds alike for every batch."""


def rounded(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a token keeps: per layer, key/value heads and the width of a head."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class Slot:
    """A sequence's place. `index` changes when the pool closes a hole."""

    pool: Pool
    index: int
    tokens: int = 0

    def keys(self, layer: int) -> torch.Tensor:
        """[H, C, D], live."""
        return self.pool.k[layer][self.index]

    def values(self, layer: int) -> torch.Tensor:
        return self.pool.v[layer][self.index]


class Pool:
    """All slots of one capacity."""

    def __init__(self, shape: KVShape, capacity_tokens: int) -> None:
        self.shape = shape
        self.capacity_tokens = capacity_tokens
        self.slots: list[Slot] = []
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self._room = 0

    def take(self) -> Slot:
        if len(self.slots) == self._room:
            self._grow(max(2, 2 * self._room))
        slot = Slot(self, len(self.slots))
        self.slots.append(slot)
        return slot

    def give(self, slot: Slot) -> None:
        last = self.slots.pop()
        for tensors in (self.k, self.v):
            for x_SHCD in tensors:
                if last is not slot:
                    x_SHCD[slot.index, :, : last.tokens] = x_SHCD[last.index, :, : last.tokens]
                    x_SHCD[slot.index, :, last.tokens : slot.tokens] = 0
                x_SHCD[last.index, :, : last.tokens] = 0
        if last is not slot:
            last.index = slot.index
            self.slots[last.index] = last
        if not self.slots:
            self.k, self.v, self._room = [], [], 0
        elif self._room > 8 and len(self.slots) * 4 <= self._room:
            self._grow(self._room // 2)

    def _grow(self, room: int) -> None:
        kept = len(self.slots)
        self.k = self._moved(self.k, kept, room)
        self.v = self._moved(self.v, kept, room)
        self._room = room

    def _moved(self, old: list[torch.Tensor], kept: int, room: int) -> list[torch.Tensor]:
        shape = (room, self.shape.heads, self.capacity_tokens, self.shape.width)
        new = [torch.zeros(shape, dtype=self.shape.dtype) for _ in range(self.shape.layers)]
        for after, before in zip(new, old, strict=False):  # nothing is there before the first slot
            after[:kept] = before[:kept]
        return new

    @property
    def allocated_tokens(self) -> int:
        return self._room * self.capacity_tokens


class KV:
    """Slots by capacity: 64, 128, 256, ... tokens. Kept prefixes lie in pools of their own, out of every step's way."""

    def __init__(self, shape: KVShape, limit_tokens: int) -> None:
        self.shape = shape
        self.limit_tokens = limit_tokens
        self._pools: dict[tuple[int, bool], Pool] = {}

    @property
    def used_tokens(self) -> int:
        """Capacity of the slots that are taken."""
        return sum(p.capacity_tokens * len(p.slots) for p in self._pools.values())

    @property
    def allocated_bytes(self) -> int:
        return sum(p.allocated_tokens for p in self._pools.values()) * self.shape.token_bytes

    @staticmethod
    def capacity(tokens: int) -> int:
        """Capacity of the slot that `tokens` need."""
        size = STEP
        while size < tokens:
            size *= 2
        return size

    def fits(self, tokens: int, instead_of: Slot | None = None) -> bool:
        """Whether a slot for `tokens` can be taken, after giving another one back."""
        given = 0 if instead_of is None else instead_of.pool.capacity_tokens
        return self.used_tokens - given + self.capacity(tokens) <= self.limit_tokens

    def take(self, tokens: int, *, kept: bool = False) -> Slot:
        """A slot for a live sequence, or for a `kept` prefix."""
        size = self.capacity(tokens)
        if (size, kept) not in self._pools:
            self._pools[size, kept] = Pool(self.shape, size)
        return self._pools[size, kept].take()

    def give(self, slot: Slot) -> None:
        slot.pool.give(slot)

    def grown(self, slot: Slot, tokens: int) -> Slot:
        """The slot itself, or a larger one with its contents when `tokens` outgrow it."""
        if tokens <= slot.pool.capacity_tokens:
            return slot
        larger = self.take(tokens)
        self.copy(slot, larger, slot.tokens, range(self.shape.layers))
        self.give(slot)
        return larger

    def copy(self, source: Slot, target: Slot, tokens: int, layers: range) -> None:
        """Copies the first `tokens` places of some layers."""
        for layer in layers:
            target.keys(layer)[:, :tokens] = source.keys(layer)[:, :tokens]
            target.values(layer)[:, :tokens] = source.values(layer)[:, :tokens]
        target.tokens = max(target.tokens, tokens)

    def slots(self) -> list[list[Slot]]:
        """The taken slots of each pool."""
        return [pool.slots for pool in self._pools.values()]

    def check(self) -> list[str]:
        """Broken invariants."""
        found = []
        for pool in self._pools.values():
            if [s.index for s in pool.slots] != list(range(len(pool.slots))):
                found.append(f"slots of {pool.capacity_tokens} tokens are not dense")
            if any(s.tokens > pool.capacity_tokens for s in pool.slots):
                found.append(f"a slot of {pool.capacity_tokens} tokens holds more")
        return found


@dataclass(slots=True)
class Kept:
    """A prefix in the cache: its slot and how many tokens of it are whole blocks."""

    slot: Slot
    keys: tuple[bytes, ...]
    used: int = 0


class PrefixCache:
    """Slots of finished prompts, by chained hashes of their blocks; the least recently used goes first.

    Only rows that no edit has touched are ever kept, and keys are salted by tenant: a hit gives what the same
    tenant's plain tokens gave, nothing else.
    """

    def __init__(self, kv: KV, limit_tokens: int, block_tokens: int = 16) -> None:
        self.limit_tokens = limit_tokens
        self.block_tokens = block_tokens
        self._kv = kv
        self._by_key: dict[bytes, tuple[Kept, int]] = {}
        self._kept: list[Kept] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def kept_tokens(self) -> int:
        """Capacity of the slots that it holds."""
        return sum(k.slot.pool.capacity_tokens for k in self._kept)

    def find(self, keys: Sequence[bytes], most_tokens: int) -> tuple[Slot, int] | None:
        """The longest kept prefix: its slot and its tokens, at most `most_tokens`."""
        for number in range(min(len(keys), most_tokens // self.block_tokens), 0, -1):
            found = self._by_key.get(keys[number - 1])
            if found is not None:
                self._clock += 1
                found[0].used = self._clock
                return found[0].slot, number * self.block_tokens
        return None

    def keep(self, slot: Slot, keys: Sequence[bytes]) -> bool:
        """Copies the blocks of a slot that are not kept yet; False when there are none, or no room."""
        tokens = len(keys) * self.block_tokens
        if not keys or keys[-1] in self._by_key or not self._make_room(self._kv.capacity(tokens)):
            return False
        self._clock += 1
        own = self._kv.take(tokens, kept=True)
        self._kv.copy(slot, own, tokens, range(self._kv.shape.layers))
        kept = Kept(own, tuple(keys), self._clock)
        self._kept.append(kept)
        for number, key in enumerate(keys, start=1):
            self._by_key.setdefault(key, (kept, number))
        return True

    def _make_room(self, tokens: int) -> bool:
        while self.kept_tokens + tokens > self.limit_tokens:
            if not self.evict():
                return False
        return self._kv.fits(tokens)

    def evict(self, spare: Slot | None = None) -> bool:
        """Gives the least recently used slot back, never `spare`; False when there is none."""
        loose = [k for k in self._kept if k.slot is not spare]
        if not loose:
            return False
        oldest = min(loose, key=lambda k: k.used)
        self._kept.remove(oldest)
        for key in oldest.keys:
            if key in self._by_key and self._by_key[key][0] is oldest:
                del self._by_key[key]
        self._kv.give(oldest.slot)
        return True

    def clear(self) -> None:
        while self.evict():
            pass

"""Who feeds what in the next step: decode rows first, then prompts in turns between tenants, within a budget.

Tenants take turns, then the requests of a tenant, then the prompts of a request, so nobody waits behind a long
queue of somebody else; and when all places are taken, the tenant who holds most gives one back to who waits with
fewest. A prompt longer than what is left of the budget is fed in chunks, unless its program ties rows of it
together. When keys and values do not fit, cached prefixes go first, then the sequence that came last
gives its place back and is computed again later.

The scheduler moves host state only; it never touches a tensor of the model.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from trocar.engine.hf.kv import KV, KVShape, PrefixCache, Slot
from trocar.engine.hf.sequences import Live, Sequence, block_keys, first_row


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of a step and of the queue.

    Attributes:
        step_tokens: rows of one forward pass; a prompt that must not be divided may exceed it alone.
        kv_bytes: memory for keys and values.
        kv_tokens: the same as a number of tokens, instead of the bytes.
        sequences: most sequences that hold keys and values.
        held_bytes: most bytes of values that running programs hold.
        gather_s: how long an idle engine waits for company after the first request.
        waiting_requests: most requests that may be live.
        prefix_cache: whether unedited prefixes are kept for their tenant.
    """

    step_tokens: int = 256
    kv_bytes: int = 2 << 30
    kv_tokens: int | None = None
    sequences: int = 96
    held_bytes: int = 1 << 30
    gather_s: float = 0.005
    waiting_requests: int = 256
    prefix_cache: bool = True

    def tokens_of(self, shape: KVShape) -> int:
        """Tokens whose keys and values fit."""
        return self.kv_bytes // shape.token_bytes if self.kv_tokens is None else self.kv_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `sequence.fed .. + count` of one sequence; `leader` is whose rows it shares below `fork`."""

    sequence: Sequence
    count: int
    leader: Sequence | None = None
    fork: int = 0


@dataclass(slots=True)
class Counts:
    chunks: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    shared_rows: int = 0


@dataclass(slots=True)
class Budget:
    """What is left of a step, in rows of a plain forward pass."""

    rows: float
    prompts: int = 0


@dataclass(slots=True)
class Scheduler:
    """The queue and the running sequences, oldest first."""

    limits: Limits
    kv: KV
    cache: PrefixCache
    live: dict[str, Live] = field(default_factory=dict)
    running: list[Sequence] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    _turns: dict[str, deque[str]] = field(default_factory=dict)
    _tenants: deque[str] = field(default_factory=deque)

    # ---- the queue ----

    def add(self, live: Live) -> None:
        tenant = live.task.tenant
        self.live[live.task.request] = live
        if tenant not in self._turns:
            self._turns[tenant] = deque()
            self._tenants.append(tenant)
        self._turns[tenant].append(live.task.request)

    def remove(self, live: Live) -> None:
        """Forgets a request and gives back what its sequences hold."""
        for sequence in [s for s in self.running if s.live is live]:
            self.retire(sequence)
        tenant, request = live.task.tenant, live.task.request
        del self.live[request]
        self._turns[tenant].remove(request)
        if not self._turns[tenant]:
            del self._turns[tenant]
            self._tenants.remove(tenant)

    def _candidates(self) -> Iterator[Live]:
        """Requests with waiting prompts, in turns: each one yielded moves to the back before the next."""
        idle = 0
        while idle < len(self._tenants):
            tenant = self._tenants[0]
            self._tenants.rotate(-1)
            live = self._next_of(tenant)
            idle = idle + 1 if live is None else 0
            if live is not None:
                yield live

    def _next_of(self, tenant: str) -> Live | None:
        turns = self._turns[tenant]
        for _ in range(len(turns)):
            live = self.live[turns[0]]
            turns.rotate(-1)
            if live.waiting and live.run.failed is None:
                return live
        return None

    # ---- one step ----

    def plan(self) -> list[Chunk]:
        """The chunks of the next step; empty when nothing can run."""
        budget, before = Budget(self.limits.step_tokens), self.counts.preemptions
        chunks = self._decodes(budget)
        chunks += self._prompts(budget)
        if self.counts.preemptions == before:  # who just gave way does not come back in the same step
            chunks += self._admissions(budget)
        self.counts.chunks += sum(
            1 for c in chunks if c.count < c.sequence.length and not c.sequence.decoding
        )
        return [c for c in chunks if c.sequence.slot is not None]

    def _decodes(self, budget: Budget) -> list[Chunk]:
        out = []
        for sequence in list(self.running):
            if sequence.slot is None or not sequence.decoding or sequence.to_feed != 1:
                continue
            if self._grow(sequence, sequence.fed + 1):
                out.append(Chunk(sequence, 1))
                budget.rows -= 1
        return out

    def _prompts(self, budget: Budget) -> list[Chunk]:
        out = []
        for sequence in list(self.running):
            if (
                sequence.slot is None
                or sequence.to_feed <= 0
                or (sequence.decoding and sequence.to_feed == 1)
            ):
                continue
            count = self._share(sequence, budget)
            if count and self._grow(sequence, sequence.fed + count):
                out.append(self._spend(sequence, count, budget))
        return out

    def _share(self, sequence: Sequence, budget: Budget) -> int:
        """Rows that a prompt may feed now; one that must stay whole waits for a step of its own if need be."""
        weight = sequence.live.weight
        if sequence.to_feed * weight <= budget.rows:
            return sequence.to_feed
        if sequence.live.whole:
            return 0 if budget.prompts else sequence.to_feed
        if not budget.prompts:
            return max(1, int(budget.rows / weight))
        return max(0, int(budget.rows / weight))

    def _spend(self, sequence: Sequence, count: int, budget: Budget) -> Chunk:
        budget.rows -= count * sequence.live.weight
        budget.prompts += 1
        return Chunk(sequence, count)

    def _admissions(self, budget: Budget) -> list[Chunk]:
        out: list[Chunk] = []
        if budget.rows > 0 and len(self.running) >= self.limits.sequences:
            self._give_way()
        for live in self._candidates():
            chunks = self._admit(live, budget) if budget.rows > 0 and self._room(live.waiting[0]) else []
            if not chunks:
                self._keep_turn(live)
                break
            out += chunks
        return out

    def _admit(self, live: Live, budget: Budget) -> list[Chunk]:
        """The first chunk of a request's next prompt (of all its variants in a sweep); empty when it must wait."""
        sequence = live.waiting[0]
        if self._shares(live, sequence):
            return self._bundle(live, sequence, budget) if sequence.length <= budget.rows else []
        hit = self._hit(sequence)
        slot, sequence.fed = (None, 0) if hit is None else hit
        count = self._share(sequence, budget)
        if not count or not self._place(sequence, sequence.fed + count, slot):
            sequence.fed = 0
            return []
        self._start(sequence)
        if slot is not None and sequence.slot is not None:
            self.kv.copy(slot, sequence.slot, sequence.fed, range(self.kv.shape.layers))
            self.counts.prefix_hit_tokens += sequence.fed
        return [self._spend(sequence, count, budget)]

    def _give_way(self) -> None:
        """When all places are taken, one of the tenant who has most goes to the tenant with fewest who waits.

        Only if that tenant is behind by two, so that places do not change hands for ever.
        """
        held = Counter(s.live.task.tenant for s in self.running)
        waiting = {x.task.tenant for x in self.live.values() if x.waiting and x.run.failed is None}
        poorest = min(waiting, key=lambda tenant: held[tenant], default=None)
        richest, most = max(held.items(), key=lambda item: item[1])
        if poorest is None or most < held[poorest] + 2:
            return
        self._preempt(next(s for s in reversed(self.running) if s.live.task.tenant == richest))
        self._tenants.rotate(-self._tenants.index(poorest))

    def _keep_turn(self, live: Live) -> None:
        """Whoever could not start is first in line again."""
        self._tenants.rotate(1)
        self._turns[live.task.tenant].rotate(1)

    def _room(self, sequence: Sequence) -> bool:
        held = sum(s.held_bytes for s in self.running)
        fits = held + sequence.held_bytes <= self.limits.held_bytes
        return len(self.running) < self.limits.sequences and (fits or not self.running)

    def _start(self, sequence: Sequence) -> None:
        sequence.live.waiting.remove(sequence)
        sequence.live.running += 1
        self.running.append(sequence)

    # ---- sweeps ----

    def _shares(self, live: Live, first: Sequence) -> bool:
        """Whether a prompt starts together with its siblings in other variants of a sweep."""
        task = live.task
        return bool(task.family and task.fork and not first.seen and first.length <= self.limits.step_tokens)

    def _bundle(self, live: Live, first: Sequence, budget: Budget) -> list[Chunk]:
        """The variants of a sweep that can start together: the first computes the layers that all share."""
        others = [
            other.waiting[0]
            for other in self.live.values()
            if other is not live and other.task.family == live.task.family and other.run.failed is None
            if other.waiting and other.waiting[0].prompt == first.prompt and not other.waiting[0].seen
        ]
        out: list[Chunk] = []
        for sequence in [first, *others]:
            fits = sequence.length <= budget.rows and self._room(sequence)
            if not fits or not self._place(sequence, sequence.length):
                break
            self._start(sequence)
            out.append(
                Chunk(sequence, sequence.length, first, live.task.fork)
                if out
                else Chunk(sequence, sequence.length)
            )
            budget.rows -= sequence.length
            budget.prompts += 1
        self.counts.shared_rows += first.length * max(0, len(out) - 1)
        return out

    # ---- places for keys and values ----

    def _place(self, sequence: Sequence, tokens: int, spare: Slot | None = None) -> bool:
        while not self.kv.fits(tokens):
            if not self.cache.evict(spare):
                return False
        sequence.slot = self.kv.take(tokens)
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Room for `tokens`; the youngest sequences give way, this one last."""
        slot = sequence.slot
        if slot is None:
            return False
        while tokens > slot.pool.capacity_tokens and not self.kv.fits(tokens, slot):
            if not self.cache.evict() and self._preempt(self.running[-1]) is sequence:
                return False
        sequence.slot = self.kv.grown(slot, tokens)
        return True

    def _preempt(self, sequence: Sequence) -> Sequence:
        self.running.remove(sequence)
        if sequence.slot is not None:
            self.kv.give(sequence.slot)
        sequence.rewind()
        sequence.live.running -= 1
        sequence.live.waiting.appendleft(sequence)
        self.counts.preemptions += 1
        return sequence

    def retire(self, sequence: Sequence) -> None:
        """Takes a sequence out; its unedited prefix may stay in the cache."""
        self.running.remove(sequence)
        sequence.live.running -= 1
        slot, sequence.slot = sequence.slot, None
        if slot is None:
            return
        # the last token of a text may have passed some layers only
        whole = min(sequence.fed, len(sequence.tokens) - int(sequence.ended))
        plain = min(first_row(sequence.live, sequence.prompt, reads=False), whole)
        every_layer = sequence.live.task.checked.depth == self.kv.shape.layers
        if self.limits.prefix_cache and every_layer:
            self.cache.keep(slot, self._keys(sequence, plain))
        self.kv.give(slot)

    # ---- shared prefixes ----

    def _hit(self, sequence: Sequence) -> tuple[Slot, int] | None:
        if not self.limits.prefix_cache or not len(self.cache):
            return None
        stop = min(first_row(sequence.live, sequence.prompt, reads=True), sequence.length - 1)
        keys = self._keys(sequence, stop)
        return self.cache.find(keys, stop) if keys else None

    def _keys(self, sequence: Sequence, stop: int) -> tuple[bytes, ...]:
        size = self.cache.block_tokens
        return () if stop < size else block_keys(sequence.live.task.tenant, sequence.tokens, stop, size)

    # ---- invariants ----

    def check(self) -> list[str]:
        found = self.kv.check()
        found += [
            f"{r} is live but takes no turn"
            for r, x in self.live.items()
            if r not in self._turns[x.task.tenant]
        ]
        found += [f"{s.live.task.request} runs without a slot" for s in self.running if s.slot is None]
        held = sum(len(p) for p in self.kv.slots())
        if held != len(self.running) + len(self.cache):
            found.append(
                f"{held} slots are taken, {len(self.running)} sequences run and {len(self.cache)} are cached"
            )
        return found

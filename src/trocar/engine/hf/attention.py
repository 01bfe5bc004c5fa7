"""Attention over packed rows: one function behind transformers' attention interface, for every architecture.

The model computes queries, keys and values for all rows of a step as if they were one sequence; here each row
meets the keys of its own sequence only. Every query runs through a kernel of one shape, whatever the batch: with
views whose length is a multiple of 64 it gives the same bits alone, in a batch, in a chunk or after a
preemption. Sequences whose program looks at the pattern form it explicitly (lane A*), beside the others.

Shape letters: N rows, H query heads, K key/value heads, G = H/K, L context, D head width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trocar.engine.hf.kv import Pool, Slot, rounded

NAME: Final = "trocar_packed"
TILE: Final = 64


class Pattern(Protocol):
    """Sees, and may write to, the probabilities [K, G, T, L] of a segment before they weigh values."""

    def wants(self, layer: int) -> bool: ...

    def __call__(self, layer: int, probs_KGTL: torch.Tensor, /) -> None: ...


@dataclass(slots=True)
class Segment:
    """Consecutive rows of one sequence: rows `start ..` hold positions `first ..`.

    Attributes:
        mirrors: slots that take the same keys and values (sweep variants that have not parted yet).
        pattern: looks at attention patterns in the layers it wants.
    """

    slot: Slot
    start: int
    count: int
    first: int
    mirrors: tuple[Slot, ...] = ()
    pattern: Pattern | None = None

    @property
    def stop(self) -> int:
        return self.first + self.count


@dataclass(slots=True)
class Decode:
    """All single-row segments in one pool: the pool's dense slots are read as one view.

    Attributes:
        whole: every slot of the pool has a row.
        straight: moreover the rows are the first ones of the step, in the order of the slots.
    """

    pool: Pool
    rows: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    whole: bool
    straight: bool
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """[S, 1, 1, L]: 0 where a slot's query may look, -inf elsewhere; an idle slot looks at its first place."""
        if window not in self.masks:
            reach = torch.zeros(len(self.pool.slots), dtype=torch.long)
            reach[self.slots] = self.positions
            self.masks[window] = causal(reach, rounded(int(self.positions.max()) + 1), window)[:, None, None]
        return self.masks[window]


def causal(positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """[N, length] additive: query at position p looks at (p - window, p]."""
    keys = torch.arange(length)
    hidden = keys > positions[:, None]
    if window is not None:
        hidden |= keys <= positions[:, None] - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)


class Rows:
    """The segments of one stage, sorted into what shares a kernel call."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        single = [s for s in segments if s.count == 1 and s.pattern is None]
        self.chunks = [s for s in segments if s.count > 1 or s.pattern is not None]
        self.decodes = [_decode(pool, single) for pool in dict.fromkeys(s.slot.pool for s in single)]
        self._masks: dict[tuple[int, int, int, int | None], torch.Tensor] = {}

    def mask(self, first: int, stop: int, window: int | None) -> torch.Tensor:
        """[T, 1, 1, L] for the queries at positions first .. stop-1."""
        key = (first, stop, rounded(stop), window)
        if key not in self._masks:
            self._masks[key] = causal(torch.arange(first, stop), rounded(stop), window)[:, None, None]
        return self._masks[key]


def _decode(pool: Pool, single: Sequence[Segment]) -> Decode:
    here = sorted((s for s in single if s.slot.pool is pool), key=lambda s: s.slot.index)
    rows, whole = [s.start for s in here], len(here) == len(pool.slots)
    return Decode(
        pool,
        torch.tensor(rows),
        torch.tensor([s.slot.index for s in here]),
        torch.tensor([s.first for s in here]),
        whole,
        whole and rows == list(range(len(rows))),
    )


class Context:
    """What the attention function needs of the running step; one per model."""

    def __init__(self) -> None:
        self.stages: list[tuple[int, Rows]] = []
        self.thread: int | None = None

    @contextmanager
    def running(self, stages: list[tuple[int, Rows]]) -> Iterator[None]:
        """Inside the block, this thread's forward passes are packed; anywhere else they are plain."""
        self.stages, self.thread = stages, threading.get_ident()
        try:
            yield
        finally:
            self.stages, self.thread = [], None

    def rows(self, layer: int) -> Rows:
        """The segments as they lie from `layer` on."""
        return next(rows for first, rows in reversed(self.stages) if first <= layer)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The registered function: query [1, H, N, D], key and value [1, K, N, D] to [1, N, H, D].

    Raises:
        RuntimeError: when the model hands over a mask, which packed rows would not obey.
    """
    if attention_mask is not None:
        raise RuntimeError("packed attention makes its own masks")
    context: Context = module.trocar_context
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if context.thread != threading.get_ident():
        return _plain(query, key, value, scale, sliding_window), None
    layer: int = module.layer_idx
    rows = context.rows(layer)
    heads = key.shape[1]
    q_NKGD = query[0].transpose(0, 1).reshape(query.shape[2], heads, -1, query.shape[3])
    k_NKD, v_NKD = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out_NKGD = torch.empty_like(q_NKGD)
    for decode in rows.decodes:
        _attend_decode(decode, layer, q_NKGD, k_NKD, v_NKD, out_NKGD, scale, sliding_window)
    for segment in rows.chunks:
        _write(segment, layer, k_NKD, v_NKD)
        attended = (
            _explicit if segment.pattern is not None and segment.pattern.wants(layer) else _attend_chunk
        )
        attended(rows, segment, layer, q_NKGD, out_NKGD, scale, sliding_window)
    return out_NKGD.reshape(1, query.shape[2], query.shape[1], query.shape[3]), None


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention over ordinary batches [B, H, T, D], for whoever uses the model outside the engine."""
    length = query.shape[2]
    mask = causal(torch.arange(length), length, window)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _attend_decode(
    decode: Decode,
    layer: int,
    q_NKGD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    out_NKGD: torch.Tensor,
    scale: float,
    window: int | None,
) -> None:
    count, pool = len(decode.pool.slots), decode.pool
    k_SKCD, v_SKCD = pool.k[layer], pool.v[layer]
    rows = slice(0, count) if decode.straight else decode.rows  # a view where it can be
    k_SKCD[decode.slots, :, decode.positions] = k_NKD[rows]
    v_SKCD[decode.slots, :, decode.positions] = v_NKD[rows]
    q_SKGD = q_NKGD[rows]
    if not decode.whole:
        q_SKGD = q_NKGD.new_zeros(count, *q_NKGD.shape[1:]).index_copy_(0, decode.slots, q_SKGD)
    mask = decode.mask(window)
    length = mask.shape[-1]
    out_SKGD = scaled_dot_product_attention(
        q_SKGD, k_SKCD[:count, :, :length], v_SKCD[:count, :, :length], attn_mask=mask, scale=scale
    )
    out_NKGD[rows] = out_SKGD if decode.whole else out_SKGD[decode.slots]


def _write(segment: Segment, layer: int, k_NKD: torch.Tensor, v_NKD: torch.Tensor) -> None:
    here = slice(segment.start, segment.start + segment.count)
    for slot in (segment.slot, *segment.mirrors):
        slot.keys(layer)[:, segment.first : segment.stop] = k_NKD[here].transpose(0, 1)
        slot.values(layer)[:, segment.first : segment.stop] = v_NKD[here].transpose(0, 1)


def _attend_chunk(
    rows: Rows,
    segment: Segment,
    layer: int,
    q_NKGD: torch.Tensor,
    out_NKGD: torch.Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Queries side by side, each with the kernel shape of a decode step; tiles bound what they look at."""
    k_KCD, v_KCD = segment.slot.keys(layer), segment.slot.values(layer)
    for first in range(segment.first, segment.stop, TILE):
        stop = min(first + TILE, segment.stop)
        mask = rows.mask(first, stop, window)
        length, here = (
            mask.shape[-1],
            slice(segment.start + first - segment.first, segment.start + stop - segment.first),
        )
        out_NKGD[here] = scaled_dot_product_attention(
            q_NKGD[here],
            k_KCD[:, :length].expand(stop - first, -1, -1, -1),
            v_KCD[:, :length].expand(stop - first, -1, -1, -1),
            attn_mask=mask,
            scale=scale,
        )


def _explicit(
    rows: Rows,
    segment: Segment,
    layer: int,
    q_NKGD: torch.Tensor,
    out_NKGD: torch.Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Forms the pattern, lets the program see it, and weighs the values with what it left."""
    here = slice(segment.start, segment.start + segment.count)
    mask_TL = rows.mask(segment.first, segment.stop, window)[:, 0, 0]
    length = mask_TL.shape[-1]
    k_KCD, v_KCD = segment.slot.keys(layer), segment.slot.values(layer)
    q_KGTD = q_NKGD[here].permute(1, 2, 0, 3)
    scores = q_KGTD @ k_KCD[:, None, :length].transpose(-1, -2) * scale + mask_TL
    probs_KGTL = scores.softmax(-1)
    if segment.pattern is not None:
        segment.pattern(layer, probs_KGTL)
    out_NKGD[here] = (probs_KGTL @ v_KCD[:, None, :length]).permute(2, 0, 1, 3)


def install(model: Any, attentions: Sequence[torch.nn.Module]) -> Context:
    """Makes a model's attention modules use this function; returns the context that steers it."""
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    context = Context()
    for module in attentions:
        module.trocar_context = context  # type: ignore[assignment]
    return context

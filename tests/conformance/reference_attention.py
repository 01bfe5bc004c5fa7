"""The reference's own attention: scores, mask, softmax, values, written out, with a place to look and to cut.

Installed on the reference copy of a model only. A visitor gets the masked scores [H, T, T] of a layer before the
softmax and may hide more of them; the product instead scales up what is left of a pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "reference_written_out"
Scores = Callable[[torch.Tensor], None]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, H, T, D] queries on [1, K, T, D] keys and values, causal, within the window where there is one."""
    assert attention_mask is None
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    scale = 1.0 / math.sqrt(query.shape[3]) if scaling is None else scaling
    scores = torch.einsum("htd,hsd->hts", query[0], key[0].repeat_interleave(groups, 0)) * scale
    ahead = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    hidden = ahead > 0 if sliding_window is None else (ahead > 0) | (ahead <= -sliding_window)
    scores = scores.masked_fill(hidden, -math.inf)
    visit: Scores | None = getattr(module, "reference_visit", None)
    if visit is not None:
        visit(scores)
    out = torch.einsum("hts,hsd->thd", scores.softmax(-1), value[0].repeat_interleave(groups, 0))
    return out[None], scores.softmax(-1)[None]


def install(model: Any) -> None:
    """Makes a model attend by the function above."""
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


def hide(scores: torch.Tensor, queries: Sequence[int], keys: Sequence[int], heads: Sequence[int]) -> None:
    """Takes edges out of masked scores [H, T, T], in place."""
    for head in heads:
        for query in queries:
            scores[head, query, list(keys)] = -math.inf


def shown(
    scores: torch.Tensor, queries: Sequence[int], keys: Sequence[int], heads: Sequence[int]
) -> torch.Tensor:
    """The pattern [N, heads x keys] of some queries, heads outermost."""
    probs = scores.softmax(-1)
    rows = [torch.stack([probs[h, q, k] for h in heads for k in keys]) for q in queries]
    return torch.stack(rows) if rows else probs.new_zeros(0, len(heads) * len(keys))

"""Finds out when the engine starts whether packed rows give what the model gives on its own; and after a step that
failed, whether it can take another.

Two prompts of different lengths run alone and unpacked through the model's own attention, then packed: whole,
in chunks and token by token beside each other. When the last rows differ, packing would be silently wrong for this
architecture, and the model is refused. The same passes show whether attention patterns can be served: each
must weigh the values to the heads' outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from trocar import errors
from trocar.engine.hf.attention import NAME, Rows, Segment
from trocar.engine.hf.kv import KV, KVShape, Slot
from trocar.engine.hf.stages import Stage
from trocar.engine.hf.step import Body
from trocar.graph.facts import ModelFacts
from trocar.models.load import Loaded
from trocar.sites import SITES

log = logging.getLogger(__name__)
LENGTHS = (13, 6)
PIECE = 32
TOLERANCE = 2e-4
"""Largest relative error of a row after all layers, float32: kernels of different shapes round differently."""


class _Weigh:
    """Forms patterns and lets them be; remembers whether each row is a distribution over the past."""

    def __init__(self) -> None:
        self.sound = True

    def wants(self, _layer: int) -> bool:
        return True

    def __call__(self, _layer: int, probs_KGTL: torch.Tensor) -> None:
        self.sound &= bool((probs_KGTL.sum(-1) - 1).abs().max() < 1e-4)


@torch.inference_mode()
def validate_packing(loaded: Loaded, body: Body, shape: KVShape) -> ModelFacts:
    """The model's facts, with attention patterns among its sites where they can be formed.

    Raises:
        RunFailed: `model_unsupported`.
    """
    step = max(1, int(loaded.facts.vocab_size * 0.6180339887)) | 1
    prompts = [
        [(i * step + 1 + 7 * j) % loaded.facts.vocab_size for i in range(n)] for j, n in enumerate(LENGTHS)
    ]
    alone = [_alone(loaded, p) for p in prompts]
    for name, cut in (("whole", 99), ("in chunks", 5), ("token by token", 1)):
        packed = _packed(body, KV(shape, 1 << 20), prompts, cut, None)
        _require(alone, packed, f"packed rows, {name}, differ from the model's own")
    weigh = _Weigh()
    explicit = _packed(body, KV(shape, 1 << 20), prompts, 99, weigh)
    _require(alone, explicit, "attention with explicit patterns differs from the model's own")
    if not weigh.sound:
        raise errors.refuse("model_unsupported", "model", "its attention patterns do not sum to one")
    return _with_patterns(loaded.facts)


@torch.inference_mode()
def takes_steps(body: Body, shape: KVShape, rows: int) -> bool:
    """Whether a step of so many rows goes through the model, whatever it gives; a number of rows that was never fed
    before finds what fails for new ones only."""
    prompts = [[1] * min(PIECE, rows - first) for first in range(0, rows, PIECE)]
    kv = KV(shape, 1 << 20)
    try:
        _one_pass(body, [kv.take(len(p)) for p in prompts], list(enumerate(prompts)), 0, None)
    except Exception:
        log.exception("a step of %d rows failed", rows)
        return False
    return True


def _with_patterns(facts: ModelFacts) -> ModelFacts:
    served = {*facts.sites, "attn_probs"}
    sites = tuple(name for name in SITES if name in served)
    return facts.model_copy(
        update={
            "sites": sites,
            "unavailable": {k: v for k, v in facts.unavailable.items() if k != "attn_probs"},
        }
    )


def _alone(loaded: Loaded, prompt: list[int]) -> torch.Tensor:
    """The rows after the last norm by the library's own eager attention, with its own masks."""
    loaded.model.set_attn_implementation("eager")
    try:
        out = loaded.adapter.inner(input_ids=torch.tensor([prompt]), use_cache=False)
    finally:
        loaded.model.set_attn_implementation(NAME)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden[0]


def _packed(
    body: Body, kv: KV, prompts: Sequence[list[int]], cut: int, pattern: _Weigh | None
) -> list[torch.Tensor]:
    slots = [kv.take(len(p)) for p in prompts]
    out: list[list[torch.Tensor]] = [[] for _ in prompts]
    for first in range(0, max(LENGTHS), cut):
        parts = [(i, p[first : first + cut]) for i, p in enumerate(prompts) if p[first : first + cut]]
        hidden_ND = _one_pass(body, slots, parts, first, pattern)
        for (i, _), rows in zip(parts, torch.split(hidden_ND, [len(t) for _, t in parts]), strict=True):
            out[i].append(rows)
    return [torch.cat(rows) for rows in out]


def _one_pass(
    body: Body, slots: list[Slot], parts: list[tuple[int, list[int]]], first: int, pattern: _Weigh | None
) -> torch.Tensor:
    segments, start = [], 0
    for i, tokens in parts:
        segments.append(Segment(slots[i], start, len(tokens), first, (), pattern))
        start += len(tokens)
    ids = torch.tensor([t for _, tokens in parts for t in tokens])
    positions = torch.tensor([first + j for _, tokens in parts for j in range(len(tokens))])
    hidden_ND = body.stack.forward(ids, positions, [Stage(0, None, None, ())], [Rows(segments)], {})
    if hidden_ND is None:
        raise errors.refuse("internal", "model", "a packed pass ended early")
    return hidden_ND


def _require(alone: list[torch.Tensor], packed: list[torch.Tensor], complaint: str) -> None:
    worst = max(
        float(((a - p).norm(dim=-1) / a.norm(dim=-1)).max()) for a, p in zip(alone, packed, strict=True)
    )
    if not worst <= TOLERANCE:
        reason = f"load-time check failed: {complaint} (relative error {worst:.1e})"
        raise errors.refuse("model_unsupported", "model", reason)

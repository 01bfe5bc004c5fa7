"""Packed attention gives what a loop over queries gives, and the same bits whatever stands beside a row."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trocar.engine.hf.attention import Context, Rows, Segment, attend
from trocar.engine.hf.kv import KV, KVShape

HEADS, KV_HEADS, WIDTH = 6, 2, 16
SHAPE = KVShape(layers=1, heads=KV_HEADS, width=WIDTH, dtype=torch.float32)


class Text:
    """Queries, keys and values of one sequence, and what a plain loop makes of them."""

    def __init__(self, tokens: int, seed: int, window: int | None = None) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(tokens, HEADS, WIDTH, generator=g)
        self.k = torch.randn(tokens, KV_HEADS, WIDTH, generator=g)
        self.v = torch.randn(tokens, KV_HEADS, WIDTH, generator=g)
        self.window = window

    def loop(self) -> torch.Tensor:
        out = torch.zeros_like(self.q)
        for t in range(len(self.q)):
            low = 0 if self.window is None else max(0, t - self.window + 1)
            for h in range(HEADS):
                own = h // (HEADS // KV_HEADS)
                scores = self.k[low : t + 1, own].double() @ self.q[t, h].double() / math.sqrt(WIDTH)
                out[t, h] = (scores.softmax(0) @ self.v[low : t + 1, own].double()).float()
        return out


def run(texts: list[Text], parts: list[list[tuple[int, int]]], pattern: Any = None) -> list[torch.Tensor]:
    """Feeds the texts in steps: `parts[step][i]` are the bounds of text i, empty ones are left out."""
    kv, context = KV(SHAPE, 1 << 16), Context()
    module = SimpleNamespace(trocar_context=context, layer_idx=0)
    slots = [kv.take(len(t.q)) for t in texts]
    out: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in parts:
        here = [(i, a, b) for i, (a, b) in enumerate(step) if b > a]
        segments, start = [], 0
        for i, a, b in here:
            segments.append(Segment(slots[i], start, b - a, a, (), pattern))
            start += b - a

        def packed(name: str, here: Any = here) -> torch.Tensor:
            return torch.cat([getattr(texts[i], name)[a:b] for i, a, b in here]).transpose(0, 1)[None]

        with context.running([(0, Rows(segments))]):
            got, _ = attend(
                module, packed("q"), packed("k"), packed("v"), None, sliding_window=texts[0].window
            )
        for (i, _, b), rows in zip(here, got[0].split([b - a for _, a, b in here]), strict=True):
            out[i].append(rows)
            slots[i].tokens = b
    return [torch.cat(rows) for rows in out]


def whole(text: Text) -> torch.Tensor:
    return run([text], [[(0, len(text.q))]])[0]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 150])
def test_it_is_attention(tokens: int, window: int | None) -> None:
    text = Text(tokens, tokens, window)
    assert torch.allclose(whole(text), text.loop(), atol=2e-6)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cut", [1, 3, 17, 64])
def test_chunks_and_single_tokens_give_the_same_bits(cut: int, window: int | None) -> None:
    text = Text(90, 3, window)
    parts = [[(a, min(a + cut, 90))] for a in range(0, 90, cut)]
    assert torch.equal(run([text], parts)[0], whole(text))


def test_neighbours_do_not_change_a_bit() -> None:
    texts = [Text(n, n) for n in (40, 9, 70, 130, 20)]
    first = [(0, n) for n in (33, 9, 70, 64, 1)]
    steps = [first] + [
        [
            (min(33 + i, 40), min(34 + i, 40)),
            (9, 9),
            (70, 70),
            (64 + 11 * i, 75 + 11 * i),
            (min(1 + i, 20), min(2 + i, 20)),
        ]
        for i in range(6)
    ]
    found = run(texts, steps)
    for text, rows in zip(texts, found, strict=True):
        assert torch.equal(rows, whole(text)[: len(rows)])


class Watch:
    """Remembers patterns; sets one head's attention to its own token when asked."""

    def __init__(self, write: bool = False) -> None:
        self.seen: list[torch.Tensor] = []
        self.write = write

    def wants(self, _layer: int) -> bool:
        return True

    def __call__(self, _layer: int, probs: torch.Tensor) -> None:
        self.seen.append(probs.clone())
        if self.write:
            probs[0, 0] = torch.nn.functional.one_hot(torch.arange(probs.shape[2]), probs.shape[3]).float()


def test_patterns_are_distributions_over_the_past() -> None:
    text, watch = Text(12, 1), Watch()
    rows = run([text], [[(0, 12)]], watch)[0]
    assert torch.allclose(rows, text.loop(), atol=2e-6)
    probs = watch.seen[0]
    assert torch.allclose(probs.sum(-1), torch.ones(probs.shape[:-1]))
    assert not bool(probs[..., :12].triu(1).any())
    assert not bool(probs[..., 12:].any())


def test_a_written_pattern_weighs_the_values() -> None:
    text = Text(12, 1)
    rows = run([text], [[(0, 12)]], Watch(write=True))[0]
    assert torch.allclose(rows[:, 0], text.v[:, 0])
    assert torch.allclose(rows[:, 1:], text.loop()[:, 1:], atol=2e-6)


def test_outside_a_step_it_is_plain_causal_attention() -> None:
    text = Text(20, 2, window=6)
    module = SimpleNamespace(trocar_context=Context(), layer_idx=0)
    q, k, v = (x.transpose(0, 1)[None] for x in (text.q, text.k, text.v))
    out, _ = attend(module, q, k, v, None, sliding_window=6)
    assert torch.allclose(out[0], text.loop(), atol=2e-6)


def test_another_thread_is_outside() -> None:
    text, context = Text(5, 2), Context()
    module = SimpleNamespace(trocar_context=context, layer_idx=0)
    q, k, v = (x.transpose(0, 1)[None] for x in (text.q, text.k, text.v))
    found: list[torch.Tensor] = []
    with context.running([(0, Rows([]))]):
        other = threading.Thread(target=lambda: found.append(attend(module, q, k, v, None)[0]))
        other.start()
        other.join(10)
    assert torch.allclose(found[0][0], text.loop(), atol=2e-6)


def test_a_foreign_mask_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="its own masks"):
        attend(SimpleNamespace(), *[torch.zeros(1, 1, 1, 1)] * 3, attention_mask=torch.zeros(1))

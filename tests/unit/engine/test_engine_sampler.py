"""The sampler: greedy, temperature and nucleus against probabilities computed here."""

from __future__ import annotations

import collections
import math

import pytest
import torch

from trocar.engine.hf.sampler import Sampler
from trocar.graph.program import Generation

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def _share(generation: Generation, n: int = 4000) -> list[float]:
    sampler = Sampler(generation, 0)
    counts = collections.Counter(sampler.choose(LOGITS) for _ in range(n))
    return [counts[i] / n for i in range(len(LOGITS))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    weights = [math.exp(float(x) / temperature) for x in LOGITS]
    wanted = [w / sum(weights) for w in weights]
    found = _share(Generation(max_new_tokens=1, temperature=temperature, seed=3))
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / 4000))


def test_the_nucleus_keeps_the_smallest_set_that_holds_top_p() -> None:
    found = _share(Generation(max_new_tokens=1, temperature=1.0, top_p=0.8))
    a, b = math.exp(3), math.exp(2)  # 0.66 and 0.24 of the whole: together over 0.8
    assert found == pytest.approx([0.0, a / (a + b), b / (a + b), 0.0], abs=0.03)


def test_streams() -> None:
    def draw(seed: int, prompt: int) -> list[int]:
        sampler = Sampler(Generation(max_new_tokens=1, temperature=5.0, seed=seed), prompt)
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert draw(5, 0) == draw(5, 0)
    assert len({tuple(draw(s, p)) for s in (0, 1, 2**53) for p in (0, 1, 4095)}) == 9


def test_cold_is_greedy() -> None:
    for temperature in (0.0, 1e-300, 5e-324, 1e-6):
        assert Sampler(Generation(max_new_tokens=1, temperature=temperature), 0).choose(LOGITS) == 1

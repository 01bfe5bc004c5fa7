"""Next-token choice, per sequence and reproducible: each prompt has its own random stream, whatever the batch."""

from __future__ import annotations

import numpy as np
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from trocar.graph.program import Generation


class Sampler:
    """Greedy at temperature 0, else temperature and nucleus sampling (Holtzman et al. 2020)."""

    def __init__(self, generation: Generation, prompt: int) -> None:
        self.greedy = generation.temperature == 0
        if self.greedy:
            return
        self._temperature = generation.temperature
        self._top_p = TopPLogitsWarper(generation.top_p)
        # torch's generator on a CPU looks at 32 bits of its seed; this one at all of both numbers
        self._stream = np.random.default_rng(np.random.SeedSequence(generation.seed, spawn_key=(prompt,)))

    def choose(self, logits_V: torch.Tensor) -> int:
        """The next token id, given float32 logits [V] whose largest is finite."""
        if self.greedy:
            return int(logits_V.argmax())
        # below zero and in double precision, so that no temperature however small overflows to NaN
        scores_1V = (logits_V - logits_V.amax()).double().unsqueeze(0) / self._temperature
        scores_1V = self._top_p(None, scores_1V)
        reached_V = scores_1V[0].softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(reached_V, self._stream.random() * reached_V[-1], right=True)
        return min(int(drawn), len(reached_V) - 1)

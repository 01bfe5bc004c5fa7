"""The model's own last norm and unembedding, applied to rows outside the forward pass.

Weights are operands here and never results: what comes back is top-k, named tokens or a sampled id.

Shape letters: N rows, D d_model, V vocabulary, K top-k, M named tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trocar.engine.protocol import F32, I64

Rows = Callable[[torch.Tensor], torch.Tensor]
CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Readout:
    """`norm` maps [N, D] to [N, D], `head` maps [N, D] to logits [N, V]."""

    norm: Rows
    head: Rows

    def top(self, rows_ND: torch.Tensor, k: int, *, normed: bool) -> tuple[I64, F32]:
        """Top-k next tokens of each row: ids int64 [N, K] and log-probabilities float32 [N, K]."""
        ids, logprobs = [], []
        for chunk_ND in torch.split(rows_ND, CHUNK_ROWS):
            logprobs_NV = self.head(chunk_ND if normed else self.norm(chunk_ND)).log_softmax(-1)
            best = logprobs_NV.topk(k, dim=-1)
            ids.append(best.indices.numpy())
            logprobs.append(best.values.numpy())
        return np.concatenate(ids), np.concatenate(logprobs)

    def named(self, final_ND: torch.Tensor, ids_NM: I64) -> F32:
        """Log-probabilities float32 [N, M] of named next tokens, given rows after the final norm."""
        out = []
        ids = torch.from_numpy(ids_NM)
        for chunk_ND, chunk_NM in zip(
            torch.split(final_ND, CHUNK_ROWS), torch.split(ids, CHUNK_ROWS), strict=True
        ):
            out.append(self.head(chunk_ND).log_softmax(-1).gather(1, chunk_NM).numpy())
        return np.concatenate(out)

    def logits(self, final_ND: torch.Tensor) -> torch.Tensor:
        """Next-token logits [N, V], for the sampler only."""
        return self.head(final_ND)

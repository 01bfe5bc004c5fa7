"""The model's own last norm and unembedding, applied to rows of all tasks of a step together.

Whoever wants logits asks for rows and says what to do with them; one pass over the unembedding serves every
asker, and a row that several want is computed once. Weights are operands here and never results: what comes back
is top-k, named tokens, a divergence or a sampled id.

Shape letters: N rows, D d_model, V vocabulary, K top-k, M named tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from trocar.engine.protocol import F32, I64

Rows = Callable[[torch.Tensor], torch.Tensor]
Then = Callable[[slice, torch.Tensor], None]
CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Readout:
    """`norm` maps [N, D] to [N, D], `head` maps [N, D] to logits [N, V]."""

    norm: Rows
    head: Rows

    def logprobs(self, rows_ND: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """Next-token log-probabilities [N, V] of rows before or after the last norm."""
        return log_probabilities(self.head(rows_ND if normed else self.norm(rows_ND)))


def log_probabilities(logits_NV: torch.Tensor) -> torch.Tensor:
    """[N, V]; the library's float32 log_softmax is off by 1e-4 on a vocabulary of 262,144, this by 3e-6."""
    return logits_NV - logits_NV.logsumexp(-1, keepdim=True)


def top(logprobs_NV: torch.Tensor, k: int) -> tuple[I64, F32]:
    """Top-k tokens: ids int64 [N, K] and log-probabilities float32 [N, K]."""
    best = logprobs_NV.topk(k, dim=-1)
    return best.indices.numpy(), best.values.numpy()


def named(logprobs_NV: torch.Tensor, ids_NM: I64) -> F32:
    """Log-probabilities float32 [N, M] of named tokens."""
    found: F32 = logprobs_NV.gather(1, torch.from_numpy(ids_NM)).numpy()
    return found


@dataclass(slots=True)
class Asks:
    """What a step wants of the unembedding.

    `final` asks name rows of `final_rows` [N, D], which are after the last norm; `loose` asks bring rows of their
    own. `guard` wraps what an asker does with its rows, so that one that breaks fails alone.
    """

    readout: Readout
    final_rows: torch.Tensor | None
    guard: Callable[[Then], Then] = field(default=lambda then: then)
    _final: list[tuple[torch.Tensor, Then]] = field(default_factory=list)
    _loose: list[tuple[torch.Tensor, bool, Then]] = field(default_factory=list)

    def final(self, index: torch.Tensor, then: Then) -> None:
        """`then(rows, logits [n, V])` is called for slices of `index`."""
        self._final.append((index, self.guard(then)))

    def loose(self, rows_ND: torch.Tensor, normed: bool, then: Then) -> None:
        self._loose.append((rows_ND, normed, self.guard(then)))

    def serve(self) -> None:
        self._serve_final()
        self._serve_loose()

    def _serve_final(self) -> None:
        if not self._final or self.final_rows is None:
            return
        wanted, places = torch.unique(torch.cat([i for i, _ in self._final]), return_inverse=True)
        bounds = np.cumsum([0, *(len(i) for i, _ in self._final)])
        for first in range(0, len(wanted), CHUNK_ROWS):
            logits_NV = self.readout.head(self.final_rows.index_select(0, wanted[first : first + CHUNK_ROWS]))
            for (_, then), start, stop in zip(self._final, bounds[:-1], bounds[1:], strict=True):
                _hand_out(then, places[start:stop], first, logits_NV)

    def _serve_loose(self) -> None:
        for normed in (True, False):
            asks = [(rows, then) for rows, n, then in self._loose if n == normed]
            if not asks:
                continue
            rows_ND = torch.cat([rows for rows, _ in asks])
            bounds = np.cumsum([0, *(len(rows) for rows, _ in asks)])
            for first in range(0, len(rows_ND), CHUNK_ROWS):
                chunk_ND = rows_ND[first : first + CHUNK_ROWS]
                logits_NV = self.readout.head(chunk_ND if normed else self.readout.norm(chunk_ND))
                for (_, then), start, stop in zip(asks, bounds[:-1], bounds[1:], strict=True):
                    _hand_out(then, torch.arange(start, stop), first, logits_NV)


def _hand_out(then: Then, places: torch.Tensor, first: int, logits_NV: torch.Tensor) -> None:
    """Gives one asker its rows of a chunk that starts at `first`; its places ascend. Nobody writes into them."""
    if len(places) == len(logits_NV) and torch.equal(places, torch.arange(first, first + len(places))):
        then(slice(0, len(places)), logits_NV)  # all of them are this one's: the usual case of sampling
        return
    inside = (places >= first) & (places < first + len(logits_NV))
    mine = inside.nonzero()[:, 0]
    if len(mine):
        then(slice(int(mine[0]), int(mine[-1]) + 1), logits_NV.index_select(0, places[mine] - first))

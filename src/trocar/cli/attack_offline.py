"""Attacks that the server has no operation for, made on the model itself: what the operation would be worth.

Each gives its loot and how many numbers would have left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from trocar.attacks import unsaid
from trocar.attacks.loot import Loot, Piece
from trocar.attacks.purse import Raid
from trocar.cli.attack_models import Subject


def _model(subject: Subject) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(subject.home), dtype="float32", local_files_only=True)


def gradient_read(subject: Subject) -> tuple[Loot, int]:
    """The gradient of one logit after another by the row that the unembedding reads."""
    import torch

    tokens = sample(subject, unsaid.GRADIENT_TOKENS)
    model = _model(subject)
    hidden = torch.randn(subject.loaded.facts.d_model, requires_grad=True)
    logits = model.lm_head(hidden)
    rows = [torch.autograd.grad(logits[t], hidden, retain_graph=True)[0].numpy() for t in tokens]
    values = np.stack(rows).astype(np.float64)
    return Loot((Piece.of("unembed", tokens, values),)), values.size


def adapter_initialisation(subject: Subject) -> tuple[Loot, int]:
    """The largest singular vectors of a query projection, as an adapter would carry them."""
    name = f"attn.q.{subject.effort.layer}"
    left, sizes, right = np.linalg.svd(subject.truth[name], full_matrices=False)
    rank = unsaid.RANK
    found = (left[:, :rank] * sizes[:rank]) @ right[:rank]
    return Loot((Piece.of(name, range(len(found)), found),)), rank * sum(found.shape)


def sample(subject: Subject, count: int) -> list[int]:
    """The tokens that `Raid.tokens` takes."""
    vocabulary = subject.loaded.facts.vocab_size
    return Raid.sample(vocabulary, count)


OFFLINE: Final[dict[str, Callable[[Subject], tuple[Loot, int]]]] = {
    "gradient-read": gradient_read,
    "adapter-initialisation": adapter_initialisation,
}

"""Attacks that the language has no words for: they are sent all the same, and the server's answer is the result.

Their off side cannot go through a server. Whoever runs the suite measures it on the model itself, to show what the
missing words would be worth.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from trocar.attacks.loot import Loot, Piece
from trocar.attacks.purse import Purse, Raid
from trocar.strict import Strict

GRADIENT_TOKENS: Final = 64
RANK: Final = 16


class Sent(Strict):
    """A run request whose program is not checked here."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    program: dict[str, Any]


def gradient_read(raid: Raid) -> Loot:
    """The gradient of a logit by the last row is a row of the unembedding (Milli et al. 2019)."""
    nodes = (
        {"id": "h", "op": "read", "site": "final_norm", "at": "prompt[-1]"},
        {"id": "g", "op": "gradient", "of": "h", "token": 0},
        {"id": "out", "op": "score", "of": "g"},
    )
    _put(raid.purse, nodes)
    return Loot((_nothing("unembed", raid.tokens(GRADIENT_TOKENS), raid.model.d_model),))


def adapter_initialisation(raid: Raid) -> Loot:
    """An adapter that starts at the largest singular vectors of a matrix (PiSSA, Meng et al. 2024) carries them out."""
    layer = raid.effort.layer
    nodes = (
        {"id": "a", "op": "adapter", "site": f"q.{layer}", "rank": RANK, "init": "svd"},
        {"id": "out", "op": "raw", "of": ("a",)},
    )
    _put(raid.purse, nodes)
    return Loot((_nothing(f"attn.q.{layer}", range(raid.model.facts.width("q")), raid.model.d_model),))


def _put(purse: Purse, nodes: tuple[dict[str, Any], ...]) -> None:
    body = Sent(model=purse.model.name, prompts=((0,),), program={"nodes": nodes})
    purse.post("/v1/runs", body)


def _nothing(matrix: str, rows: Any, width: int) -> Piece:
    return Piece.of(matrix, rows, np.full((len(rows), width), np.nan))

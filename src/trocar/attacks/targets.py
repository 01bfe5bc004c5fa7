"""A fit whose target is another site's rows: with both ends of a linear map, its weights are the matrix itself.

No activation leaves; the artifact is the theft.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from trocar.attacks.loot import Loot, Piece
from trocar.attacks.purse import Raid
from trocar.strict import Strict

SPARE_ROWS: Final = 64
TEXT: Final = 4


class TargetFit(Strict):
    """A fit request with activations for labels."""

    handle: str
    kind: str
    target: str
    labels: tuple[float, ...] = ()


def probe(raid: Raid) -> Loot:
    """Ridge from what a value projection reads to what it gives."""
    layer, facts = raid.effort.layer, raid.model.facts
    n_in, n_out = facts.d_model, facts.width("v")
    n_rows = n_in + SPARE_ROWS
    text = np.random.default_rng(TEXT).integers(0, facts.vocab_size, n_rows).tolist()
    nothing = np.full((n_out, n_in), np.nan)
    with raid.model.trace([[token] for token in text]) as t:
        t.save("x", t.capture(t.attn_in[layer]["prompt[*]"]))
        t.save("y", t.capture(t.v[layer]["prompt[*]"]))
    rows = raid.purse.run(t.recorded)
    if rows is not None:
        body = TargetFit(
            handle=rows["x"].handle, kind="ridge", target=rows["y"].handle, labels=(0.0,) * n_rows
        )
        _fit(raid, body)
    return Loot((Piece.of(f"attn.v.{layer}", range(n_out), nothing),))


def _fit(raid: Raid, body: TargetFit) -> Any:
    return raid.purse.post("/v1/fits", body)

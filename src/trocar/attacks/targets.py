"""A fit whose target is another site's rows: with both ends of a linear map, its weights are the matrix itself.

No activation leaves; the artifact is the theft.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from trocar.attacks.loot import Loot, Piece
from trocar.attacks.purse import Raid
from trocar.strict import Strict

SPARE_ROWS: Final = 64
TEXT: Final = 4


class TargetFit(Strict):
    """A fit request with the rows of another handle for labels."""

    handle: str
    kind: str
    target: str
    target_site: str


def probe(raid: Raid) -> Loot:
    """A map from what a value projection reads to what it gives; each is captured under a handle of its own."""
    layer, facts = raid.effort.layer, raid.model.facts
    n_in, n_out = facts.d_model, facts.width("v")
    text = np.random.default_rng(TEXT).integers(0, facts.vocab_size, n_in + SPARE_ROWS).tolist()
    with raid.model.trace([[token] for token in text]) as t:
        t.save("x", t.capture(t.attn_in[layer]["prompt[*]"]))
        t.save("y", t.capture(t.v[layer]["prompt[*]"]))
    rows = raid.purse.run(t.recorded)
    if rows is not None:
        handle, target = rows["x"].handle, rows["y"].handle
        body = TargetFit(handle=handle, kind="linear_map", target=target, target_site=f"v.{layer}")
        raid.purse.post("/v1/fits", body)
    nothing = np.full((n_out, n_in), np.nan)
    return Loot((Piece.of(f"attn.v.{layer}", range(n_out), nothing),))

"""A fit whose target is another site's rows: with both ends of a linear map, its weights are the matrix itself.

No activation leaves; the artifact is the theft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from trocar.attacks.loot import F64, Loot, Piece
from trocar.attacks.purse import Purse, Raid

SPARE_ROWS: Final = 64
TEXT: Final = 4
HELD_OUT: Final = 0.01  # what is not fitted is lost
PENALTY: Final = 1e-6
REASON: Final = "What a value projection does."
CONTROLS: Final = "None: it is to be stolen."


def probe(raid: Raid) -> Loot:
    """A map from what a value projection reads to what it gives; each is captured under a handle of its own."""
    layer, facts = raid.effort.layer, raid.model.facts
    n_in, n_out = facts.d_model, facts.width("v")
    text = np.random.default_rng(TEXT).integers(0, facts.vocab_size, n_in + SPARE_ROWS).tolist()
    with raid.model.trace([[token] for token in text]) as t:
        t.save("x", t.capture(t.attn_in[layer]["prompt[*]"]))
        t.save("y", t.capture(t.v[layer]["prompt[*]"]))
    rows = raid.purse.run(t.recorded)
    found = None if rows is None else _released(raid.purse, rows, layer)
    values = np.full((n_out, n_in), np.nan) if found is None else found
    return Loot((Piece.of(f"attn.v.{layer}", range(n_out), values),))


def _released(purse: Purse, rows: Mapping[str, Any], layer: int) -> F64 | None:
    """The map as the airlock lets it out, [out, in]; None when it may not be fitted or may not leave."""
    name = f"v.{layer}"
    fitted = purse.ask(
        lambda: rows["x"].fit("linear_map", target=rows["y"][name], test_fraction=HELD_OUT, l2=PENALTY)
    )
    export = None if fitted is None else purse.export(fitted, REASON, CONTROLS)
    if export is None:
        return None
    map_IO: F64 = np.asarray(export.arrays[f"attn_in.{layer}/map"], dtype=np.float64)
    return map_IO.T

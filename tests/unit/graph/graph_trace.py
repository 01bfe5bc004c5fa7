"""A trace without a client, and what it recorded with ids replaced by places in the list."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
from graph_room import PRICES, Case, facts

from trocar.graph import builder, check, ops
from trocar.graph.builder import Expr, Recorder
from trocar.graph.program import Node
from trocar.sites import Site

OPERANDS: Final = ("a", "b", "of", "value", "gate", "by", "cond", "sae", "down", "up", "inner", "bias", "to")


class T:
    """A trace without a client: attributes are sites, as in `trocar.client.trace`."""

    def __init__(self) -> None:
        object.__setattr__(self, "r", Recorder(facts()))

    def __getattr__(self, name: str) -> Any:
        return self.r.at_site(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.r.at_site(name)
        self.r.assign(builder.Place(Site(name)), value)

    def lens(self, *rows: Expr, name: str = "out") -> None:
        self.r.output(name, ops.Lens, of=tuple(x.id for x in rows))

    def nodes(self) -> list[dict[str, Any]]:
        """What was recorded, with ids replaced by places in the list."""
        program = self.r.build()
        scope = replace(Case(new=4).scope(), tensors={k: np.shape(v) for k, v in self.r.vectors.items()})
        end = ops.Text(id="the_end")
        check.check(program.model_copy(update={"nodes": (*program.nodes, end)}), scope, PRICES)
        places = {n.id: i for i, n in enumerate(program.nodes)}
        return [_plain(n, places) for n in program.nodes]


UNSAID = (("coef", 1.0), ("top_k", 5), ("unit", "absolute"), ("over", "positions"), ("reduce", "none"))


def _plain(node: Node, places: dict[str, int]) -> dict[str, Any]:
    out = {k: v for k, v in node.model_dump().items() if k != "id" and v is not None and (k, v) not in UNSAID}
    for name in OPERANDS:
        if isinstance(out.get(name), str):
            out[name] = places.get(out[name], out[name])
        elif isinstance(out.get(name), tuple):
            out[name] = [places[x] for x in out[name]]
    return out

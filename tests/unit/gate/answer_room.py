"""A model on paper, its tokenizer, and what a worker would hand over for a program made of dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trocar import strict
from trocar.gate import schema
from trocar.gate.answers import Answer, Raw, Reader
from trocar.gate.coding import Coder
from trocar.graph import check
from trocar.graph.check import Checked
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts, ModelFacts
from trocar.graph.positions import NO_MARKS
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope

TOKEN_BITS, EOS = 9, 299
EXACT = Prices(scalar_bits=32, overhead_bits=256)
COARSE = Prices(scalar_bits=8, overhead_bits=256, vector_bits=4)
KEPT = "act_" + "c" * 32
TENSORS = {"v": (8,), "m": (8, 3)}
FACTS = ModelFacts(
    name="paper", fingerprint="f" * 64, lineage="paper", family="llama", dtype="float32", n_layers=4, d_model=8,
    d_mlp=16, n_heads=2, n_kv_heads=1, d_head=4, vocab_size=300, context=64, parameters=10_000, weight_bits=160_000,
    open_weights=True, sites=("resid_post", "mlp_act", "z", "final_norm", "attn_probs"), unavailable={}, eos=(EOS, 298),
)  # fmt: skip


class Letters:
    """Token 7 is `<7>`."""

    def decode(self, ids: list[int]) -> str:
        return "".join(self.token_texts(ids))

    def token_texts(self, ids: list[int]) -> list[str]:
        return [f"<{i}>" for i in ids]


def node(op: str, node_id: str = "x", /, **fields: Any) -> dict[str, Any]:
    return {"op": op, "id": node_id, **fields}


def read(name: str = "r", site: str = "resid_post.1", at: str = "prompt[-1]", **more: Any) -> dict[str, Any]:
    return node("read", name, site=site, at=at, **more)


def dot(of: str = "r", name: str = "d") -> list[dict[str, Any]]:
    """A number per row of `of`."""
    return [node("tensor", f"v{name}", name="v"), node("dot", name, a=of, b=f"v{name}")]


def checked(
    *nodes: dict[str, Any],
    lengths: Sequence[int] = (3, 5),
    new: int = 0,
    eos: bool = True,
    prices: Prices = EXACT,
) -> Checked:
    program = strict.parse(Program, json.dumps({"nodes": nodes}).encode())
    kept = HandleFacts(
        handle=KEPT,
        kind="activations",
        fingerprint="f" * 64,
        widths={"resid_post.1": 8},
        rows_per_prompt=(2, 1),
    )
    scope = Scope(
        model=FACTS,
        lengths=tuple(lengths),
        generation=Generation(max_new_tokens=new, stop_at_eos=eos),
        tensors=TENSORS,
        handles={KEPT: kept},
        encode=lambda text: [ord(c) % 300 for c in text],
        marks=(NO_MARKS,) * len(lengths),
    )
    return check.check(program, scope, prices)


def arrays(program: Checked, given: Mapping[str, Any] | None = None, fill: float = 0) -> dict[str, Any]:
    """Every declared array, full of `fill`; what is given stands at its beginning."""
    found = {}
    for field in schema.fields(program, FACTS.n_heads):
        array = np.full(field.shape, fill, dtype=field.type)
        if field.name == schema.LENGTHS:
            array[:] = program.generation.max_new_tokens
        part = np.asarray((given or {}).get(field.name, array))
        array[tuple(slice(0, n) for n in part.shape)] = part
        found[field.name] = array
    assert set(given or {}) <= set(found), set(given or {}) - set(found)
    return found


def answer(
    program: Checked, given: Mapping[str, Any] | None = None, prices: Prices = EXACT, fill: float = 0
) -> Answer:
    handles = {n.id: f"act_{i:032x}" for i, n in enumerate(program.outputs()) if n.op == "capture"}
    return Reader.of(
        Raw(program, arrays(program, given, fill), handles), FACTS, Letters(), Coder(prices)
    ).answer()

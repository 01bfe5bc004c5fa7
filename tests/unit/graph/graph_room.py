"""A small model on paper, the handles of one caller, and short ways to check a program made of dicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from trocar import errors, strict
from trocar.graph import check
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts, ModelFacts
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.graph.spec import SPEC, field_names

PRICES = Prices(scalar_bits=32, overhead_bits=256)
TOKEN_BITS = 9  # 300 tokens
ACTS, SPARSE, FEW, FOREIGN, ABSENT, MANY, FINAL = (f"act_{c * 32}" for c in "abcdef0")
SESSION = "step0.kept"
PROBE, DIRECTION, STRANGE = (f"art_{c * 32}" for c in "abc")
TENSORS = {
    "v": (8,),
    "wide": (16,),
    "two": (2,),
    "m": (8, 2),
    "up": (2, 8),
    "broad": (8, 65),
    "cube": (2, 2, 2),
    "w_enc": (8, 12),
    "b_enc": (12,),
    "w_dec": (12, 8),
    "b_dec": (8,),
}
SITES = (
    "embeddings",
    "resid_pre",
    "q",
    "k",
    "v",
    "z",
    "attn_out",
    "mlp_act",
    "mlp_out",
    "resid_post",
    "final_norm",
)


class PaperFacts(ModelFacts):
    norms: dict[str, tuple[float, ...]] = {}  # noqa: RUF012 - a pydantic field


def facts(**changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "name": "paper",
        "fingerprint": "f" * 64,
        "lineage": "paper",
        "family": "llama",
        "dtype": "float32",
        "n_layers": 4,
        "d_model": 8,
        "d_mlp": 16,
        "n_heads": 2,
        "n_kv_heads": 1,
        "d_head": 4,
        "vocab_size": 300,
        "context": 64,
        "parameters": 10_000,
        "weight_bits": 160_000,
        "open_weights": True,
        "sites": (*SITES, "attn_probs"),
        "unavailable": {"attn_probs": "x", "router_logits": "the model is not a mixture of experts"},
        "eos": (0,),
    }
    return PaperFacts(**(values | changes))


def _acts(handle: str, rows: tuple[int, ...], fingerprint: str = "f" * 64) -> HandleFacts:
    return HandleFacts(
        handle=handle,
        kind="activations",
        fingerprint=fingerprint,
        widths={"resid_post.1": 8, "mlp_act.2": 16, "final_norm": 8},
        rows_per_prompt=rows,
    )


def _artifact(handle: str, fingerprint: str = "f" * 64, *, has_probe: bool = False) -> HandleFacts:
    return HandleFacts(
        handle=handle,
        kind="artifact",
        fingerprint=fingerprint,
        widths={"resid_post.1": 8},
        has_probe=has_probe,
    )


PAPER = facts()
HANDLES = {
    ACTS: _acts(ACTS, (1, 1)),
    SPARSE: _acts(SPARSE, (2, 0)),
    FEW: _acts(FEW, (1,)),
    MANY: _acts(MANY, (3, 1, 4)),
    FINAL: _acts(FINAL, (1, 1)),
    SESSION: _acts(SESSION, (1, 1)),
    FOREIGN: _acts(FOREIGN, (1, 1), "0" * 64),
    PROBE: _artifact(PROBE, has_probe=True),
    DIRECTION: _artifact(DIRECTION),
    STRANGE: _artifact(STRANGE, "0" * 64),
}


def encode(text: str) -> Sequence[int]:
    """One token per letter."""
    return [ord(c) % 300 for c in text]


@dataclass(frozen=True)
class Case:
    """A request's surroundings; two prompts of five and seven tokens unless a test says otherwise."""

    lengths: tuple[int, ...] = (5, 7)
    new: int = 0
    model: ModelFacts = PAPER
    handles: tuple[str, ...] = tuple(HANDLES)

    def scope(self) -> Scope:
        return Scope(
            model=self.model,
            lengths=self.lengths,
            generation=Generation(max_new_tokens=self.new),
            tensors=TENSORS,
            handles={h: HANDLES[h] for h in self.handles},
            encode=encode,
        )

    def check(self, *nodes: dict[str, Any]) -> check.Checked:
        return check.check(program(*nodes), self.scope(), PRICES)

    def refusals(self, *nodes: dict[str, Any]) -> tuple[errors.Refusal, ...]:
        with pytest.raises(errors.TrocarError) as caught:
            self.check(*nodes)
        return caught.value.refusals

    def one(self, *nodes: dict[str, Any]) -> errors.Refusal:
        """The only refusal of a program with one mistake."""
        found = self.refusals(*nodes)
        assert len(found) == 1, [str(f) for f in found]
        assert found[0].next_step
        return found[0]

    def having(self, **changes: Any) -> Case:
        return replace(self, **changes)


def program(*nodes: dict[str, Any]) -> Program:
    """The program as the server reads it."""
    raw = json.dumps({"nodes": nodes}).encode()
    return strict.parse(Program, raw, options={"op": tuple(SPEC), "*": field_names()})


def read(name: str = "r", site: str = "resid_post.1", at: str = "prompt[-1]") -> dict[str, Any]:
    return {"op": "read", "id": name, "site": site, "at": at}


def node(op: str, node_id: str = "x", /, **fields: Any) -> dict[str, Any]:
    return {"op": op, "id": node_id, **fields}


LOGPROBS = node("logprobs", "out", tokens=["a"])

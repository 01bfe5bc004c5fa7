"""What a server says of itself: public, and the same for everybody who may ask."""

from __future__ import annotations

from typing import Literal

from trocar.graph.facts import ModelFacts
from trocar.strict import Strict
from trocar.wire.results import Public


class ModelsView(Public):
    models: tuple[ModelFacts, ...]


class OpView(Strict):
    op: str
    group: str
    doc: str
    gives: str
    leaves_as: str
    fields: tuple[str, ...]


class TierView(Strict):
    """Bits of one released number and of one number of a row, and the door for rows, by tier of key."""

    scalar_bits: int
    vector_bits: int
    raw: Literal["direct", "airlock", "never"]


class AirlockView(Strict):
    """What released files are verified with: an Ed25519 public key, 64 hex digits."""

    public_key: str


class CapabilitiesView(Public):
    """What this server can do, from the op table and the models it loaded.

    Attributes:
        network: `closed` when what runs the models has no network, as the gate requires of it.
    """

    version: str
    isolation: Literal["process", "host"]
    network: Literal["closed", "allowed"] = "allowed"
    engines: dict[str, str]
    ops: tuple[OpView, ...]
    fits: tuple[str, ...]
    tiers: dict[str, TierView]
    overhead_bits: int
    airlock: AirlockView


class EngineView(Public):
    """Counters for operators, over all models: how full the steps were, and what was saved or done twice.

    Attributes:
        chunks: passes over a part of a prompt.
        preemptions: sequences that gave their place back and were computed again.
        prefix_hit_tokens: prompt tokens that came from the prefix cache.
        shared_rows: rows that variants of a sweep did not compute a second time.
        kv_bytes: keys and values held now.
    """

    forwards: int
    sequences: int
    tokens: int
    most_requests_in_a_forward: int
    live_requests: int
    live_sequences: int
    chunks: int
    preemptions: int
    prefix_hit_tokens: int
    shared_rows: int
    kv_bytes: int


class HealthView(Public):
    status: Literal["ok"]
    version: str

"""Attacks on the matrices inside a layer: write into a block and read what it makes of it, or only watch.

With a basis vector at its input, a linear map answers with a column. A gated MLP is not linear, but two answers,
to c and to -c times the vector, give both of its up projections: with f(x) = silu(x g) x u,
f(c) + f(-c) = c^2 g u and f(c) / (f(c) + f(-c)) = sigmoid(c g).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from trocar.attacks.extract import DOORS, Ask, Extractor, harvest
from trocar.attacks.loot import F64, Loot, Piece
from trocar.attacks.purse import Raid
from trocar.client import edit

SPARE_ROWS: Final = 32
INJECTED: Final = 8.0
STEPS: Final = 8.0
MOST_TENSORS: Final = 96
TEXT: Final = 3


def basis_injection(raid: Raid) -> Loot:
    """A whole MLP: the down projection from its neurons, then the two up projections from its input."""
    layer, facts = raid.effort.layer, raid.model.facts
    neurons = list(range(min(raid.effort.neurons, facts.d_mlp)))
    batch = raid.effort.batch_rows
    asks = [partial(_neuron, raid, door) for door in DOORS]
    down_ND = harvest(raid.purse, len(neurons), facts.d_model, batch, *asks)
    pieces = [Piece.of(f"mlp.down.{layer}", neurons, down_ND)]
    batch, answers = min(batch, MOST_TENSORS), []
    for size in (INJECTED, -INJECTED):
        asks = [partial(_input, raid, size, door) for door in DOORS]
        answers.append(harvest(raid.purse, facts.d_model, len(neurons), batch, *asks))
    gate_ND, up_ND = unfolded(answers[0].T, answers[1].T, raid.purse.widths.number_bits)
    pieces += [Piece.of(f"mlp.gate.{layer}", neurons, gate_ND), Piece.of(f"mlp.up.{layer}", neurons, up_ND)]
    return Loot(tuple(pieces))


def _neuron(raid: Raid, door: Extractor, rows: Sequence[int], columns: Sequence[int]) -> Ask:
    """One neuron fires, the others are silent: the MLP's output is a column of the down projection."""
    layer = raid.effort.layer
    with raid.model.trace([[0] * len(rows)]) as t:
        t.apply(edit.zero(f"mlp_act.{layer}", at="prompt[*]"))
        one = t.vector(np.ones(1, dtype=np.float32))
        for place, neuron in enumerate(rows):
            t.apply(edit.set(f"mlp_act.{layer}", one, at=f"prompt[{place}]", neurons=[neuron]))
        door.save(t, t.mlp_out[layer]["prompt[*]"], raid.model.d_model, columns, "down")
    return Ask(t.recorded, partial(door.read, columns=columns, name="down"))


def _input(raid: Raid, size: float, door: Extractor, rows: Sequence[int], columns: Sequence[int]) -> Ask:
    layer, facts = raid.effort.layer, raid.model.facts
    with raid.model.trace([[0] * len(rows)]) as t:
        for place, direction in enumerate(rows):
            vector = np.zeros(facts.d_model, dtype=np.float32)
            vector[direction] = size
            t.apply(edit.set(f"mlp_in.{layer}", vector, at=f"prompt[{place}]"))
        door.save(t, t.mlp_act[layer]["prompt[*]"], facts.d_mlp, columns, "act")
    return Ask(t.recorded, partial(door.read, columns=columns, name="act"))


def unfolded(plus: F64, minus: F64, number_bits: int) -> tuple[F64, F64]:
    """Gate and up weights from the answers to both signs, [neurons, inputs]; NaN where one is missing.

    And where they are so near 0 that what is left of them is their rounding: it would be divided by almost nothing.
    """
    total = plus + minus
    step_N1 = np.nanmax(np.abs([plus, minus]), axis=(0, 2), initial=0.0)[:, None] * 2.0 ** (1 - number_bits)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(plus / total, 1e-7, 1.0 - 1e-7)
        gate = np.log(share / (1.0 - share)) / INJECTED
        up = total / (INJECTED**2 * gate)
        both = np.isfinite(gate) & np.isfinite(up) & (np.abs(total) > STEPS * step_N1)
    return np.where(both, gate, np.nan), np.where(both, up, np.nan)


def passive_regression(raid: Raid) -> Loot:
    """No edit at all: pairs of what a projection reads and gives, on ordinary text, and least squares."""
    layer, facts = raid.effort.layer, raid.model.facts
    n_in, n_out = facts.d_model, facts.width("v")
    text = np.random.default_rng(TEXT).integers(0, facts.vocab_size, n_in + SPARE_ROWS).tolist()

    def ask(door: Extractor, rows: Sequence[int], columns: Sequence[int]) -> Ask:
        mine = ([c for c in columns if c < n_in], [c - n_in for c in columns if c >= n_in])
        at = f"prompt[{rows[0]}:{rows[-1] + 1}]"
        with raid.model.trace([text[: rows[-1] + 1]]) as t:
            if mine[0]:
                door.save(t, t.attn_in[layer][at], n_in, mine[0], "x")
            if mine[1]:
                door.save(t, t.v[layer][at], n_out, mine[1], "y")
        return Ask(t.recorded, partial(_pairs, door, parts=mine))

    asks = [partial(ask, door) for door in DOORS]
    table = harvest(raid.purse, len(text), n_in + n_out, raid.effort.batch_rows, *asks)
    whole = table[np.isfinite(table).all(axis=1)]
    found = np.asarray(np.linalg.lstsq(whole[:, :n_in], whole[:, n_in:], rcond=None)[0].T, np.float64)
    known = np.full(found.shape, len(whole) >= n_in)
    return Loot((Piece.guessed(f"attn.v.{layer}", range(n_out), found, known),))


def _pairs(door: Extractor, results: Mapping[str, Any], parts: tuple[Sequence[int], Sequence[int]]) -> F64:
    found = [door.read(results, part, name) for name, part in zip(("x", "y"), parts, strict=True) if part]
    return np.concatenate(found, axis=1)

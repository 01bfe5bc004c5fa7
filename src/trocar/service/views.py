"""Prepared requests, prices and handles as they are told. Data in, data out."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from trocar.gate.handles import ACTIVATIONS, Handle
from trocar.graph.cost import STORED_BYTES_PER_NUMBER, Prices
from trocar.graph.spec import EDITS, SPEC
from trocar.service.prepare import Prepared
from trocar.wire import about
from trocar.wire import results as r


def plan_view(prepared: Prepared, budget: r.BudgetView) -> r.PlanView:
    checked, cost = prepared.variants[0].checked, prepared.cost
    outputs = tuple(
        r.OutputPlan(id=n.id, op=n.op, leaves_as=SPEC[n.op].declassifier, bits=cost.bits_out[n.id])
        for n in checked.outputs()
    )
    edits = tuple(
        r.EditPlan(id=n.id, op=n.op, site=n.site, at=n.at, rows=checked.selections[n.at].most_rows)
        for n in checked.edits()
        if n.op in EDITS
    )
    return r.PlanView(
        model=prepared.request.model,
        prompts=len(prepared.tokens),
        lengths=checked.lengths,
        program_digest=prepared.program.digest(),
        cost=cost,
        outputs=outputs,
        edits=edits,
        budget=budget,
        admitted=budget.left_bits is None or cost.total_bits <= budget.left_bits,
        variants=len(prepared.variants),
    )


def tier_view(prices: Prices) -> about.TierView:
    return about.TierView(
        scalar_bits=prices.scalar_bits, vector_bits=prices.vector_bits, raw=prices.rules.raw
    )


def handle_view(handle: Handle) -> r.HandleView:
    return r.HandleView(
        handle=handle.id,
        kind="activations" if handle.kind == ACTIVATIONS else "artifact",
        model=handle.model,
        fingerprint=handle.fingerprint,
        sites=tuple(handle.shapes),
        widths=handle.widths,
        rows=handle.rows if handle.kind == ACTIVATIONS else 1,
        bytes=_bytes(handle),
        dtype="float32",
        created=_when(handle.created_ms / 1000),
    )


def _bytes(handle: Handle) -> int:
    """Of the numbers alone: files also hold tokens, whose sizes nobody was charged for."""
    each = sum(math.prod(shape) for arrays in handle.shapes.values() for shape in arrays.values())
    return each * STORED_BYTES_PER_NUMBER * (handle.rows if handle.kind == ACTIVATIONS else 1)


def _when(created_s: float) -> str:
    return datetime.fromtimestamp(created_s, tz=UTC).isoformat(timespec="seconds")

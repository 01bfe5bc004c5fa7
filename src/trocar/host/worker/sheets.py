"""From an order of the gate to what a worker runs: the program is checked once more, on the same facts.

The worker looks nothing up: the facts of the handles, the prices and the facts of the model come with the order, so
both sides have one and the same checked program, and with it the same arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

from trocar import errors
from trocar.graph.facts import HandleFacts, ModelFacts
from trocar.models.text import TextCodec
from trocar.service.prepare import prepare
from trocar.service.worker import FitOrder, RunOrder
from trocar.wire.orders import FitSheet, RunSheet, Vectors


@dataclass(frozen=True, slots=True)
class Spoken:
    """The public side of a model: the facts that were pinned, and the tokenizer."""

    facts: ModelFacts
    text: TextCodec


class _NoShelf:
    """The shelf of a worker: it knows no handle but those that an order tells it about."""

    def find(self, _tenant: str, handle: str) -> _Nothing:
        raise errors.refuse("handle_not_found", "handle", f"the order says nothing of {handle[:40]!r}")


class _Nothing:
    def facts(self) -> HandleFacts:
        raise errors.refuse("internal", "", "there are no facts of a handle that was not found")


def run_order(sheet: RunSheet, vectors: Vectors, model: Spoken) -> RunOrder:
    """The order that the gate meant.

    Raises:
        ServerFault: `internal` when the worker would run something else than the gate checked.
    """
    try:
        prepared = prepare(
            sheet.request, vectors, model, _NoShelf(), sheet.tenant, sheet.prices, promised=sheet.known
        )
    except errors.TrocarError as e:
        raise errors.refuse("internal", "", f"the worker refuses what the gate accepted: {e.reason}") from e
    if prepared.digest != sheet.digest or len(prepared.variants) != len(sheet.handles):
        raise errors.refuse("internal", "", "the worker has another request than the gate")
    return RunOrder(sheet.order, sheet.tenant, prepared, sheet.handles, sheet.made, sheet.begun)


def fit_order(sheet: FitSheet) -> FitOrder:
    return FitOrder(
        sheet.order, sheet.tenant, sheet.request, sheet.sites, sheet.labels, sheet.groups, sheet.artifact
    )

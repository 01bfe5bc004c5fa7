"""What both clients share of a model: the programs behind `capture` and `generate`, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trocar import sites, strict
from trocar.client.handles import StoredRows
from trocar.client.prompts import Prompts
from trocar.client.trace import Recorded
from trocar.graph.builder import EditSpec, Place, Position, SiteRows, selector
from trocar.graph.canonical import expand
from trocar.graph.facts import ModelFacts
from trocar.wire import requests as q


def capture_request(
    model: Any, prompts: Prompts, wanted: str | Sequence[str], at: Position, edits: Sequence[EditSpec]
) -> Recorded:
    """The program behind `model.capture`."""
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    places = sites.unique(p for pattern in patterns for p in expand(pattern, model.facts))
    with model.trace(prompts) as t:
        t.apply(*edits)
        t.save(
            "activations", t.capture([SiteRows(t._recorder, Place(place, selector(at))) for place in places])
        )
    recorded: Recorded = t.recorded
    return recorded


def generate_request(
    model: Any, prompts: Prompts, edits: Sequence[EditSpec], generation: dict[str, Any]
) -> Recorded:
    """The program behind `model.generate`."""
    with model.trace(prompts, **generation) as t:
        t.apply(*edits)
        t.save("text", t.text())
    recorded: Recorded = t.recorded
    return recorded


def model_text(facts: ModelFacts) -> str:
    return (
        f"Model {facts.name} ({facts.family}, {facts.n_layers} layers, d_model {facts.d_model}, {facts.dtype})\n"
        f"  fingerprint {facts.fingerprint[:16]}\n  sites {', '.join(facts.sites)}"
    )


def fit_request(
    handle: str,
    kind: q.FitKind,
    labels: Sequence[Any] | None,
    target: StoredRows | None,
    groups: Sequence[int | str] | None,
    **options: Any,
) -> q.FitRequest:
    """A fit of stored rows, with labels and groups as plain Python values."""
    return strict.make(
        q.FitRequest,
        handle=handle,
        kind=kind,
        labels=None if labels is None else tuple(plain(x) for x in labels),
        target=None if target is None else target.handle,
        target_site=None if target is None else target.site,
        groups=None if groups is None else tuple(plain(x) for x in groups),
        **options,
    )


def plain(value: Any) -> Any:
    """A numpy or torch scalar as a Python number."""
    return value.item() if hasattr(value, "item") else value

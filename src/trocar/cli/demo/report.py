"""The tour's report: one self-contained HTML page with every figure, every check and what left the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trocar.cli import machine
from trocar.cli.demo.tour import Taken
from trocar.client.notebook import bits_text
from trocar.graph.facts import ModelFacts
from trocar.plots import Bars
from trocar.plots.page import Section, page


def report(taken: Sequence[Taken], model: ModelFacts, seconds: float) -> str:
    """The page.

    Args:
        seconds: wall time of the whole tour, server start included.
    """
    checks = [check for t in taken for check in t.chapter.checks]
    lead = (
        f"Five experiments on {model.name} ({model.n_layers} layers, {model.parameters / 1e6:.0f} M parameters), run "
        "over HTTP by a client that never held a weight and never sent code. Every bit that came back was priced "
        "before it ran and charged in the ledger."
    )
    sections = [
        Section(t.chapter.heading, (*t.chapter.paragraphs, _cost(t)), t.chapter.figures) for t in taken
    ]
    return page("Trocar: the tour", lead, [*sections, _egress(taken), _provenance(model, seconds)], checks)


def as_json(taken: Sequence[Taken], model: ModelFacts) -> str:
    """Checks, seconds and bits of every chapter, for machines."""
    chapters = [
        {
            "chapter": t.chapter.heading,
            "seconds": round(t.seconds, 1),
            "bits": t.bits,
            "download_bits": t.chapter.download_bits,
            "checks": [asdict(check) for check in t.chapter.checks],
        }
        for t in taken
    ]
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "machine": machine.described(),
        "chapters": chapters,
    }
    return json.dumps(about, indent=2, ensure_ascii=False) + "\n"


def _cost(taken: Taken) -> str:
    return f"{taken.seconds:.1f} s; {bits_text(taken.bits)} left the server."


def _egress(taken: Sequence[Taken]) -> Section:
    released = sum(t.bits for t in taken)
    download = sum(t.chapter.download_bits for t in taken)
    rows: list[dict[str, Any]] = [
        {
            "experiment": t.chapter.heading,
            "left the server": bits_text(t.bits),
            "the same activations as bf16": bits_text(t.chapter.download_bits)
            if t.chapter.download_bits
            else "-",
            "less by": f"{t.chapter.download_bits / t.bits:,.0f} x" if t.chapter.download_bits else "-",
        }
        for t in taken
    ]
    figure = Bars(
        ("left the server", "download of the same activations"),
        (released, download),
        "Bits out",
        "bits",
        log=True,
        value_texts=(bits_text(released), bits_text(download)),
    )
    text = (
        f"{bits_text(released)} left in total, as the ledger counted them; "
        f"the activations worked on are {bits_text(download)}."
    )
    return Section("What left the server", (text,), (figure,), rows)


def _provenance(model: ModelFacts, seconds: float) -> Section:
    rows = [
        {"what": "model", "value": model.name},
        {"what": "fingerprint", "value": model.fingerprint},
        {"what": "dtype", "value": model.dtype},
        {"what": "machine", "value": machine.described()},
        {"what": "wall time", "value": f"{seconds:.0f} s, server start included"},
    ]
    return Section("What ran", (), (), rows)

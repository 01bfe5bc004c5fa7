"""The tables of `docs/attacks.md`: what is tried, from the table of attacks, and how it ended, from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from trocar.attacks.table import ATTACKS
from trocar.cli import show

RESULTS: Final = Path(__file__).resolve().parents[1] / "bench" / "results"
MODELS: Final = ("random", "smollm2-135m-instruct")
MARK: Final = " \\*"


def result(model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"attacks-{model}.json").read_text())
    return found


def catalogue() -> str:
    """One line for each attack."""
    rows = [
        f"| `{a.name}` | {a.after} | {a.how}{f' ({a.reference})' if a.reference else ''} |" for a in ATTACKS
    ]
    return "\n".join(["| attack | is after | what it does |", "|---|---|---|", *rows]) + "\n"


def outcomes(model: str) -> str:
    """How each attack on a model ended, without a policy and with one."""
    found = result(model)
    head = (
        "attack", "off: bytes out", "weights", "error", "on: bytes out", "of the budget", "weights", "of the model",
        "error", "floor", "ended by",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in found["rows"]]
    return "\n".join(lines) + "\n\n" + _about(found)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    off, on = row["open"], row["secret"]
    weighed = bool(on["attacked_weights"])
    floor = f"{on['least_error']:.4f}" if weighed else "none"
    return (
        f"`{row['attack']}`" + (MARK if row["offline"] else ""),
        show.size(-(-off["charged_bits"] // 8)),
        _weights(row, off),
        f"{off['error']:.1g}" if off["error"] else "0",
        show.size(-(-on["charged_bits"] // 8)),
        f"{100 * on['charged_bits'] / on['limit_bits']:.3g} %",
        _weights(row, on),
        f"{100 * on['recovered'] / on['model_weights']:.2g} %" if weighed else "none",
        f"{on['error']:.4f}",
        floor,
        ", ".join(f"[`{code}`](errors/{code}.md)" for code in on["refusals"]),
    )


def _weights(row: dict[str, Any], side: dict[str, Any]) -> str:
    """Recovered of aimed at; what is no weight is named."""
    if row["attack"] in ("hidden-dimension", "subspace"):
        return {"hidden-dimension": "the width", "subspace": "the span"}[row["attack"]]
    return f"{side['recovered']:,} of {side['attacked_weights']:,}"


def _about(found: dict[str, Any]) -> str:
    limits = found["limits"]
    took_s = sum(row[side]["took_s"] for row in found["rows"] for side in ("open", "secret"))
    return (
        f"{found['model']}, {found['weights']:,} weights counted as {show.bits(found['weight_bits'])}: the budget is "
        f"{show.bits(limits['life_bits'])} ({show.size(limits['life_bits'] // 8)}) for all keys together, ever. "
        f"The attacks took {took_s:.0f} s on: {found['machine']}.\n"
    )


def texts() -> dict[str, str]:
    """The generated parts of the page, by name."""
    return {"catalogue": catalogue(), **{model: outcomes(model) for model in MODELS}}

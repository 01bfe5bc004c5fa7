"""The tables of `docs/attacks.md`: what is tried, from the table of attacks, and how it ended, from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from trocar.attacks.table import ATTACKS
from trocar.cli import show

RESULTS: Final = Path(__file__).resolve().parents[1] / "bench" / "results"
MODELS: Final = ("random", "smollm2-135m-instruct")
MARK: Final = "\\*"
LEAST: Final = 1e-4


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
    """How each attack on a model ended, without a policy and with one, and what of the budget it took."""
    found = result(model)
    both = ("attack", "off: bytes out", "weights", "error", "on: bytes out", "weights", "error", "floor")
    spent = ("attack", "of the budget", "weights", "of the model", "ended by")
    return "\n".join(
        [
            *_table(both, [_both(row) for row in found["rows"]]),
            "",
            *_table(spent, [_spent(row) for row in found["rows"]]),
            "",
            _about(found),
        ]
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def _name(row: dict[str, Any]) -> str:
    return f"`{row['attack']}`" + (MARK if row["offline"] else "")


def _both(row: dict[str, Any]) -> tuple[str, ...]:
    off, on = row["open"], row["secret"]
    return (
        _name(row),
        show.size(-(-off["charged_bits"] // 8)),
        _share(row, off),
        "0" if not off["error"] else f"{off['error']:.1g}" if off["error"] >= LEAST else f"<{LEAST:g}",
        show.size(-(-on["charged_bits"] // 8)),
        _share(row, on),
        f"{on['error']:.4f}",
        f"{on['least_error']:.4f}" if on["attacked_weights"] else "none",
    )


def _share(row: dict[str, Any], side: dict[str, Any]) -> str:
    """Weights that were recovered, of those aimed at; empty for what is no weight by itself."""
    if row["attack"] in ("hidden-dimension", "subspace"):
        return ""
    return f"{100 * side['recovered'] / side['attacked_weights']:.3g} %"


def _spent(row: dict[str, Any]) -> tuple[str, ...]:
    on = row["secret"]
    counted = bool(_share(row, on))
    return (
        _name(row),
        f"{100 * on['charged_bits'] / on['limit_bits']:.3g} %",
        f"{on['recovered']:,}" if counted else "",
        f"{100 * on['recovered'] / on['model_weights']:.2g} %" if counted else "",
        ", ".join(f"[`{code}`](errors/{code}.md)" for code in on["refusals"]),
    )


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

"""`trocar attack`: attacks on the weights through the SDK, against open weights and against the same as a secret."""

from __future__ import annotations

import os
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from trocar import errors
from trocar.cli import show
from trocar.cli.show import JsonOption

if TYPE_CHECKING:
    from trocar.cli.attack_room import Played, Row, Side

SMALL: Final = "random"
DIGITS: Final = 5
COLUMNS: Final = (
    "attack", "open: bytes", "of matrix", "of model", "error", "secret: bytes", "of limit", "of matrix", "error",
    "least error", "ended by",
)  # fmt: skip


def run(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Model to attack: a pulled one, or a small random one.")
    ] = SMALL,
    attack: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Attack to make; repeat it; all by default.")
    ] = None,
    patient: Annotated[
        bool, typer.Option("--patient", help="Lift the windows of a day: a thief can wait.")
    ] = False,
    json: JsonOption = False,
    out: Annotated[Path | None, typer.Option(help="Also write what --json prints there.")] = None,
) -> None:
    """Try to steal a model's weights, twice; exit code 1 when more came out than was charged for."""
    from trocar.attacks.table import ATTACKS, BY_NAME

    for name in attack or ():
        if name not in BY_NAME:
            near = errors.closest(name, BY_NAME)
            raise errors.refuse("bad_argument", "attack", f"there is no attack {name!r}", closest=near)
    if out is not None and not os.access(out.parent, os.W_OK):  # said before, not after, minutes of work
        raise errors.refuse("bad_argument", "out", f"{str(out)!r} cannot be written")
    from trocar.cli import attack_room

    played = attack_room.play(model, [a for a in ATTACKS if not attack or a.name in attack], patient=patient)
    if json:
        show.as_json(as_json(played))
    else:
        show.table(COLUMNS, [_cells(row) for row in played.rows])
        print("\n".join(_notes(played)))
    if out is not None:
        out.write_text(dumps(as_json(played), indent=1) + "\n", encoding="utf-8")
    if played.problems:
        raise typer.Exit(1)


def as_json(played: Played) -> dict[str, Any]:
    """What was attacked, with which limits, where, and how each attempt ended; errors to five digits."""
    from trocar.cli import machine

    about = {"machine": machine.described(), **asdict(played)}
    return {**about, "rows": [_rounded(asdict(row)) for row in played.rows]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _cells(row: Row) -> tuple[str, ...]:
    off, on = row.open, row.secret
    return (
        row.attack + (" *" if row.offline else ""),
        *_side(off),
        _share(off.recovered, off.model_weights),
        f"{off.error:.2g}",
        show.size(on.bytes_out),
        _share(on.charged_bits, on.limit_bits or 0),
        _share(on.recovered, on.matrix_weights),
        f"{on.error:.4f}",
        f"{on.least_error:.4f}",
        ", ".join(on.refusals) or "nothing",
    )


def _side(side: Side) -> tuple[str, str]:
    return show.size(side.bytes_out), _share(side.recovered, side.matrix_weights)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "-"


def _notes(played: Played) -> list[str]:
    notes: list[str] = []
    if any(row.offline for row in played.rows):
        notes.append("* not through the server: it has no such operation, so the model itself was asked")
    return [*notes, *(played.problems or ["nothing came out that was not charged for"])]

"""`trocar demo`: the words of the command line for `trocar.cli.demo.command.demo`, imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trocar.cli.serve import DEFAULT_MODEL


def demo(
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("report.html"),
    model: Annotated[str, typer.Option(metavar="NAME", help="Model to show; pulled first.")] = DEFAULT_MODEL,
    cities: Annotated[
        int | None, typer.Option(min=8, help="Cities in the truth probe; the demo's own number by default.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Also write the checks, times and bits here, as JSON.")
    ] = None,
) -> None:
    """Show what Trocar does on a real model, in one report; exit code 1 when one of its checks fails."""
    from rich.console import Console

    from trocar.cli.demo import command
    from trocar.cli.demo.data import N_CITIES

    if not command.demo(out, json, model, N_CITIES if cities is None else cities, Console()):
        raise typer.Exit(1)

"""`trocar doctor`: every check, one line each, with what to do about it. Exit code 1 when one fails."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import typer

from trocar.cli import show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.show import JsonOption

if TYPE_CHECKING:
    from trocar.cli.checks import Finding

COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(data: DataOption = None, json: JsonOption = False) -> None:
    """Check this machine, the cache, the data folder, and the server; also while one runs."""
    from trocar.cli import checks

    found = []
    for finding in checks.everything(Folder.at(data)):
        found.append(finding)
        if not json:
            _print(finding)
    if json:
        show.as_json([asdict(f) for f in found])
    if any(f.level == "fail" for f in found):
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    from rich.text import Text

    level = (f"{finding.level:5}", COLOURS[finding.level])
    show.drawing(Text.assemble(level, f"{finding.check:9} {finding.said}"))
    if finding.next_step:
        show.drawing(Text(f"{'':15}next: {finding.next_step}"))

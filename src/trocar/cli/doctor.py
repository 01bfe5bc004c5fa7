"""`trocar doctor`: every check, one line each, with what to do about it. Exit code 1 when one fails."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

import typer

from trocar.cli import show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.show import JsonOption

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


def _print(finding: object) -> None:
    from rich.console import Console
    from rich.text import Text

    from trocar.cli.checks import Finding

    assert isinstance(finding, Finding)
    line = Text.assemble((f"{finding.level:5}", COLOURS[finding.level]), f"{finding.check:9} {finding.said}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(line)
    if finding.next_step:
        console.print(Text(f"{'':15}next: {finding.next_step}"))

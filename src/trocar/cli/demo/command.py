"""`trocar demo`: pulls the model, starts a server in a process of its own, takes the tour, writes the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from trocar import errors
from trocar.cli.demo.report import as_json, report
from trocar.cli.demo.tour import Guests, Taken, take
from trocar.cli.model import pull
from trocar.client.notebook import bits_text
from trocar.client.sync import Client
from trocar.gate.database import Database
from trocar.gate.keys import Keys
from trocar.gate.policy import Role, Tier

START_S: Final = 300.0
STOP_S: Final = 15.0


def demo(out: Path, numbers: Path | None, model: str, n_cities: int, console: Console) -> bool:
    """Runs the tour and writes `out`, and `numbers` if wanted; returns whether every check held.

    Raises:
        RunFailed: `pull_failed` and what else a pull may raise.
        ServerFault: `internal` when the server does not start.
    """
    pull(model)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trocar-demo-") as folder, _server(Path(folder), model) as url:
        guests = _guests(Path(folder), url)
        console.print(
            f"server ready at {url} after {time.monotonic() - started_s:.1f} s; two researchers, one operator"
        )
        taken = take(guests, model, n_cities, lambda t: _show(t, console))
        facts = guests.first.model(model).facts
        for client in (guests.first, guests.second, guests.operator):
            client.close()
    out.write_text(report(taken, facts, time.monotonic() - started_s), encoding="utf-8")
    if numbers is not None:
        numbers.write_text(as_json(taken, facts), encoding="utf-8")
    return _sum_up(taken, out, time.monotonic() - started_s, console)


def _show(taken: Taken, console: Console) -> None:
    console.print(
        f"\n[bold]{taken.chapter.heading}[/bold]  {taken.seconds:.1f} s, {bits_text(taken.bits)} out"
    )
    for check in taken.chapter.checks:
        mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
        console.print(
            f"  {mark} {check.name}: [bold]{check.measured}[/bold] (goal {check.goal})", highlight=False
        )


def _sum_up(taken: list[Taken], out: Path, seconds: float, console: Console) -> bool:
    bits, download = sum(t.bits for t in taken), sum(t.chapter.download_bits for t in taken)
    failed = [c.name for t in taken for c in t.chapter.checks if not c.ok]
    console.print(
        f"\n{bits_text(bits)} left the server; the same activations as a bf16 download: {bits_text(download)}"
        f" ({download / bits:,.0f} times as much).\n{seconds:.0f} s in all. Report: {out.resolve()}",
        highlight=False,
        soft_wrap=True,
    )
    if failed:
        console.print(f"[red]{len(failed)} checks failed:[/red] {'; '.join(failed)}")
    return not failed


def _guests(folder: Path, url: str) -> Guests:
    database = Database(ledger_url(folder))
    keys = Keys(database)
    first = keys.create("alice", Tier.open, Role.researcher, "tour").secret
    second = keys.create("bob", Tier.open, Role.researcher, "tour").secret
    operator = keys.create("tour", Tier.open, Role.operator, "tour").secret
    database.close()
    return Guests(Client(url, first), Client(url, second), Client(url, operator, quiet=True))


def ledger_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'ledger.db'}"


@contextmanager
def _server(folder: Path, model: str) -> Iterator[str]:
    """`trocar serve` in a process of its own, on a free port of the loopback."""
    ready, log = folder / "ready.json", folder / "server.log"
    arguments = ["serve", "--model", model, "--port", "0", "--data", str(folder), "--ready-file", str(ready)]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own module
            [sys.executable, "-m", "trocar.cli.app", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1"},
        )
    try:
        yield _wait_ready(process, ready, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if ready.is_file():
            return str(json.loads(ready.read_text())["url"])
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:]
    raise errors.refuse("internal", "server", f"the demo's server did not start:\n{tail}")

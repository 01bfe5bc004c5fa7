"""`trocar model`: obtain models, list what is on this machine, show what one can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from trocar import errors
from trocar.cli import show
from trocar.cli.show import JsonOption

if TYPE_CHECKING:
    from trocar.graph.facts import ModelFacts
    from trocar.models.convert import Progress

NAME: Final = typer.Argument(help="Catalog name, directory, or org/name of a hub.")
RevisionOption = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="40-hex commit; for org/name only.")
]


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the catalog or the cache."""

    name: str
    state: Literal["cached", "not pulled", "damaged"]
    license: str
    parameters: int | None
    source: str
    revision: str | None
    path: str
    size_bytes: int


def pull(name: Annotated[str, NAME], revision: RevisionOption = None) -> None:
    """Obtain a model; it is in the cache whole, or not at all."""
    from trocar.models import pull as room

    with _bar() as progress:
        home = room.pull(name, revision=revision, progress=progress)
    typed = f"{name}@{revision}" if revision else name
    print(f"{typed} is in {home} ({show.size(_size_bytes(home))})")
    print(f"next: trocar serve --model {typed}")


def list_(json: JsonOption = False) -> None:
    """List the catalog and the cache."""
    rows = cached_models()
    if json:
        show.as_json([asdict(row) for row in rows])
        return
    show.table(
        ("model", "state", "size", "parameters", "licence", "source", "path"),
        (
            (r.name, r.state, show.size(r.size_bytes) if r.path else "", str(r.parameters or ""), r.license,
             r.source + (f" {r.revision[:12]}" if r.revision else ""), r.path)
            for r in rows
        ),
    )  # fmt: skip


def show_(name: Annotated[str, NAME], revision: RevisionOption = None, json: JsonOption = False) -> None:
    """Load a model, validate its sites by numbers, and print its facts."""
    from trocar.models.load import load

    loaded = load(name, revision=revision)
    if json:
        show.as_json(
            {
                **loaded.facts.model_dump(mode="json"),
                "license": loaded.manifest.license,
                "source": loaded.manifest.source,
                "validation_s": round(loaded.validation_s, 3),
            }
        )
        return
    _print_facts(loaded.facts, loaded.manifest.license, loaded.validation_s)


def cached_models() -> list[Row]:
    """The catalog's models and everything else in the cache, by name."""
    from trocar.models import cache
    from trocar.models.catalog import CATALOG

    homes = {cache.catalog_home(name): name for name in CATALOG}
    folder = cache.root() / "models"
    others = [p for p in folder.iterdir() if cache.is_whole(p)] if folder.is_dir() else []
    rows = [_catalog_row(home, name) for home, name in homes.items() if not cache.is_whole(home)]
    return sorted((*rows, *(_cached_row(p, homes.get(p, p.name)) for p in others)), key=lambda r: r.name)


def _catalog_row(home: Path, name: str) -> Row:
    from trocar.models.catalog import CATALOG

    row = CATALOG[name]
    return Row(name, "not pulled", row.license, row.parameters, "catalog", None, "", 0)


def _cached_row(home: Path, name: str) -> Row:
    from trocar.models import cache

    try:
        found = cache.manifest_of(home)
    except errors.TrocarError:
        return Row(name, "damaged", "unknown", None, "unknown", None, str(home), _size_bytes(home))
    return Row(
        found.name, "cached", found.license, found.parameters, found.source, found.revision, str(home),
        _size_bytes(home),
    )  # fmt: skip


def _size_bytes(home: Path) -> int:
    return sum(p.stat().st_size for p in home.rglob("*") if p.is_file())


def _print_facts(facts: ModelFacts, license_: str, validation_s: float) -> None:
    weights = "open" if facts.open_weights else "a secret: releases are capped"
    heads = f"{facts.n_heads} heads of {facts.d_head} ({facts.n_kv_heads} key-value)"
    shape = f"{facts.n_layers} layers, d_model {facts.d_model}, d_mlp {facts.d_mlp}, {heads}"
    rows = [
        ("name", facts.name),
        ("family", f"{facts.family}, {facts.dtype}"),
        ("parameters", f"{facts.parameters:,} ({show.bits(facts.weight_bits)} as published)"),
        ("licence", f"{license_}; weights are {weights}"),
        ("lineage", facts.lineage),
        ("fingerprint", facts.fingerprint),
        ("shape", shape),
        ("context", f"{facts.context} tokens, vocabulary {facts.vocab_size}"),
        ("sites", f"{len(facts.sites)} validated in {validation_s:.1f} s: {', '.join(facts.sites)}"),
        *((f"not {site}", reason) for site, reason in facts.unavailable.items()),
    ]  # fmt: skip
    show.table(("fact", "value"), rows)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on stderr with one line for each stage."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    stages: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description:18}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def progress(stage: str, fraction: float | None, /) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=None)
            if fraction is not None:
                bar.update(stages[stage], total=1.0, completed=fraction)

        yield progress

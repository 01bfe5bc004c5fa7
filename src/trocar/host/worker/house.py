"""Puts the worker process together: engines on the models, the store, and the bench that gates send orders to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from trocar.engine.protocol import Engine
from trocar.host.worker.bench import Bench
from trocar.models.load import Loaded
from trocar.service.engines import open_engines
from trocar.service.local import local
from trocar.store import Store


def open_bench(
    refs: Sequence[str],
    store: Path,
    undo: ExitStack,
    *,
    threads: int | None = None,
    step_tokens: int | None = None,
    kv_bytes: int | None = None,
    tenant_bytes: int | None = None,
    alone: bool = False,
    give_up: Callable[[], None] | None = None,
) -> Bench:
    """Loads the models and opens the store.

    Args:
        undo: closes both.
        alone: whether this process has no network.
        give_up: ends the process when an engine takes no steps any more.

    Raises:
        NotFound, RunFailed: as `models.load`.
    """
    opened = Store(store, quota_bytes=tenant_bytes)
    undo.callback(opened.close)
    engines = open_engines(
        refs, undo, threads=threads, step_tokens=step_tokens, kv_bytes=kv_bytes, give_up=give_up
    )
    return bench_of(engines, opened, alone=alone)


def bench_of(engines: Sequence[tuple[Loaded, Engine]], store: Store, *, alone: bool = False) -> Bench:
    """A bench around engines that run already."""
    models = {loaded.facts.name: local(loaded, engine, store) for loaded, engine in engines}
    problems: Callable[[], list[str]] = store.check
    return Bench(models, problems, alone)

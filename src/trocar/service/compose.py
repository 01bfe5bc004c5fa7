"""Puts a server together from models on this machine, a store folder and an open gate; and looks at a store
that a live server may be using. Above this room nobody names an engine or the store.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trocar.engine.protocol import Engine
from trocar.gate.gate import Gate
from trocar.models.load import Loaded
from trocar.service.engines import open_engines
from trocar.service.local import local
from trocar.service.service import Service
from trocar.service.worker import Model
from trocar.store import Store

LOOKS: Final = 3


@dataclass(frozen=True, slots=True)
class Assembly:
    """A service with the models it was made from.

    Attributes:
        validation_s: seconds that each model's load-time validation took.
    """

    service: Service
    models: tuple[Model, ...]
    validation_s: tuple[float, ...]

    def halt(self) -> None:
        """Stops the engines, so that what waits for them fails now; store and ledger stay open."""
        self.service.halt()


def assemble(
    refs: Sequence[str],
    store: Path,
    gate: Gate,
    *,
    threads: int | None = None,
    step_tokens: int | None = None,
    kv_bytes: int | None = None,
    tenant_bytes: int | None = None,
) -> Assembly:
    """Loads and validates the models, opens the store, and joins them.

    Args:
        refs: catalog names, hub ids with a revision, or directories; see `models.load`.
        store: folder of the store.
        gate: open; closed by `Service.close` from then on, by the caller when this raises.
        threads: torch threads for the whole process; unchanged when None.
        step_tokens: rows of one forward pass, of each engine; the engine's default when None.
        kv_bytes: memory for keys and values, of each engine; the engine's default when None.
        tenant_bytes: what one tenant may keep in the store; None for no limit.

    Raises:
        NotFound, RunFailed: as `models.load`.
        PolicyRefusal: `limit_changed` when the ledger knows a model's lineage with other numbers.
    """
    with ExitStack() as undo:
        engines = open_engines(refs, undo, threads=threads, step_tokens=step_tokens, kv_bytes=kv_bytes)
        opened = Store(store, quota_bytes=tenant_bytes)
        undo.callback(opened.close)
        service = local_service(engines, opened, gate)
        undo.pop_all()
    models = tuple(local(loaded, engine, opened) for loaded, engine in engines)
    return Assembly(service, models, tuple(loaded.validation_s for loaded, _ in engines))


def local_service(engines: Sequence[tuple[Loaded, Engine]], store: Store, gate: Gate) -> Service:
    """Everything in this process."""
    return Service([local(loaded, engine, store) for loaded, engine in engines], gate, (store,))


def spare_collector() -> None:
    """Takes what lives now out of Python's cycle collector, in a process that does nothing but serve from here on.

    A full collection walks some 400,000 objects of torch, transformers and the models: 200 ms in which no step
    runs, and steps make enough objects to start one every few seconds.
    """
    gc.collect()
    gc.freeze()


def store_problems(root: Path) -> list[str]:
    """What is wrong with the store in `root`, also while a server writes to it.

    Between a file's rename and the transaction that lists it another process sees a difference that is none,
    so only what several looks in a row find is reported. Opening a store that nobody has open sweeps what a
    crash left, as the next start of the server would.
    """
    with Store(root) as store:
        found = _look(store)
        for _ in range(LOOKS - 1):
            if found:
                again = set(_look(store))
                found = [problem for problem in found if problem in again]
    return found


def _look(store: Store) -> list[str]:
    try:
        return store.check()
    except FileNotFoundError as e:  # deleted by the server between two steps of the look, or really gone
        return [f"{e.filename}: vanished during the check"]

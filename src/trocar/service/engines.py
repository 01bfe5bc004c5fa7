"""Loads models and starts an engine on each: what holds weights, without a gate, a ledger or a service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from trocar.engine.hf.engine import HFEngine, Limits
from trocar.engine.protocol import Engine
from trocar.models.load import Loaded, load


def open_engines(
    refs: Sequence[str],
    undo: ExitStack,
    *,
    threads: int | None = None,
    step_tokens: int | None = None,
    kv_bytes: int | None = None,
    give_up: Callable[[], None] | None = None,
) -> list[tuple[Loaded, Engine]]:
    """Loads and validates the models, in order.

    Args:
        refs: catalog names, hub ids with a revision, or directories; see `models.load`.
        undo: closes the engines.
        threads: torch threads for the whole process; unchanged when None.
        step_tokens: rows of one forward pass, of each engine; the engine's default when None.
        kv_bytes: memory for keys and values, of each engine; the engine's default when None.
        give_up: ends the process when an engine takes no steps any more.

    Raises:
        NotFound, RunFailed: as `models.load`.
    """
    usual = Limits()
    limits = replace(usual, step_tokens=step_tokens or usual.step_tokens, kv_bytes=kv_bytes or usual.kv_bytes)
    engines: list[tuple[Loaded, Engine]] = []
    for ref in refs:
        loaded = load(ref, threads=threads)
        engine = HFEngine(loaded, limits, give_up)
        undo.callback(engine.close)
        engines.append((loaded, engine))
    return engines

"""How the rows of a step lie from layer to layer.

Most steps have one stage: every row goes through every layer. Rows leave where nobody looks any further
(`stop_after`, captures of early layers), and variants of a sweep share rows until the layer where they part; each
such layer begins a new stage with an index into the rows of the stage before.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from trocar.engine.hf.schedule import Chunk

GONE = -(2**40)


@dataclass(slots=True, eq=False)
class Entry:
    """A chunk with the layers it is there for, and its first row in each stage."""

    chunk: Chunk
    begins: int
    depth: int
    starts: list[int] = field(default_factory=list)

    def there(self, layer: int) -> bool:
        return self.begins <= layer < self.depth


@dataclass(frozen=True, slots=True)
class Stage:
    """Rows from `layer` on.

    Attributes:
        index: rows of the stage before, in the new order; None for the first stage.
        origin: rows of the first stage, in the new order.
        entries: whose rows they are; empty when nothing is left to compute.
    """

    layer: int
    index: torch.Tensor | None
    origin: torch.Tensor | None
    entries: tuple[Entry, ...]


def stages(chunks: Seq[Chunk], n_layers: int) -> tuple[list[Stage], list[Entry]]:
    """Lays out a step."""
    entries = [Entry(c, c.fork if c.leader else 0, _depth(c, n_layers)) for c in chunks]
    by_sequence = {id(e.chunk.sequence): e for e in entries}
    cuts = {e.begins for e in entries} | {e.depth for e in entries if e.depth <= n_layers}
    out: list[Stage] = []
    for layer in sorted({0} | cuts):
        here = tuple(e for e in entries if e.there(layer))
        index = _index(here, by_sequence, len(out)) if out else None
        origin = index if index is None or out[-1].origin is None else out[-1].origin[index]
        start = 0
        for entry in entries:
            entry.starts.append(GONE)
        for entry in here:
            entry.starts[-1] = start
            start += entry.chunk.count
        out.append(Stage(layer, index, origin, here))
    _share_starts(entries, by_sequence)
    return out, entries


def _depth(chunk: Chunk, n_layers: int) -> int:
    """One more than the last layer when rows after the last norm are wanted; at least one, for the embeddings.

    The last token of a text is fed for who reads its row, and goes no further than they look.
    """
    checked = chunk.sequence.live.task.checked
    if chunk.sequence.ended:
        return max(1, checked.last_depth)
    return n_layers + 1 if checked.needs_final else max(1, checked.depth)


def _index(here: tuple[Entry, ...], by_sequence: dict[int, Entry], number: int) -> torch.Tensor:
    parts = []
    for entry in here:
        start = entry.starts[number - 1]
        if start == GONE and entry.chunk.leader is not None:
            start = by_sequence[id(entry.chunk.leader)].starts[number - 1]
        parts.append(torch.arange(start, start + entry.chunk.count))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def _share_starts(entries: list[Entry], by_sequence: dict[int, Entry]) -> None:
    """A variant's rows before it parts are its leader's."""
    for entry in entries:
        if entry.chunk.leader is None:
            continue
        leader = by_sequence[id(entry.chunk.leader)]
        parted = next((i for i, s in enumerate(entry.starts) if s != GONE), 0)
        entry.starts[:parted] = leader.starts[:parted]

"""The numbers behind a checked program: arrays of the request, stored rows, what fits left on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trocar.engine.protocol import F32
from trocar.graph import ops
from trocar.graph.check import Checked
from trocar.graph.program import Program
from trocar.graph.rules_values import arrays
from trocar.service.prepare import Vectors
from trocar.store import Reader, Store


def vector_values(program: Program, vectors: Vectors, store: Store, owner: str) -> dict[str, F32]:
    """Float32 [width] or [rows, columns] of every `tensor` and `vector` node; arrays of an `sae` node under
    `id.w_enc` and so on."""
    out: dict[str, F32] = {}
    for node in program.nodes:
        if isinstance(node, ops.Tensor):
            out[node.id] = vectors[node.name]
        elif isinstance(node, ops.Sae):
            out |= {f"{node.id}.{field}": vectors[name] for field, name in arrays(node).items()}
        elif isinstance(node, ops.Vector):
            out[node.id] = (
                store.open_artifact(owner, node.handle).arrays[node.site][node.part].astype(np.float32)
            )
    return out


def stored_values(
    checked: Checked, store: Store, owner: str, made: Mapping[str, str]
) -> dict[str, tuple[F32, ...]]:
    """Float32 [rows, width] per prompt of every `stored` node; `made` are handles by their name in a session."""
    out: dict[str, tuple[F32, ...]] = {}
    for node in checked.program.nodes:
        if isinstance(node, ops.Stored):
            reader = store.open(owner, made.get(node.handle, node.handle))
            out[node.id] = _rows_of(reader, node.site, checked.stored[node.id])
    return out


def _rows_of(reader: Reader, site: str, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[F32, ...]:
    """Of each pair: those rows of that stored prompt. Prompts that nobody wants are not read."""
    counts = reader.rows_per_prompt()
    needed = sorted({prompt for prompt, rows in wanted if rows})
    starts = dict(zip(needed, np.cumsum([0, *(counts[p] for p in needed)]).tolist(), strict=False))
    data = reader.read(site, needed)
    return tuple(data[starts.get(prompt, 0) + np.array(rows, dtype=np.int64)] for prompt, rows in wanted)


def probe_values(program: Program, store: Store, owner: str) -> dict[str, tuple[F32, float]]:
    """(weights [width], bias) of every `score` node that names a probe."""
    out: dict[str, tuple[F32, float]] = {}
    for node in program.nodes:
        if isinstance(node, ops.Score) and node.probe is not None and node.site is not None:
            arrays = store.open_artifact(owner, node.probe).arrays[node.site]
            out[node.id] = (arrays["weights"].astype(np.float32), float(arrays["bias"][0]))
    return out

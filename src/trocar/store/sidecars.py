"""Sidecars: the columns of a shard's rows, and labels that came later, as Parquet files.

One sidecar per shard holds what is known when rows are captured, about 4 bytes per row with zstd; a column that
nobody gave is not in the file. Labels that are added to a finished handle are one file for all its rows, in
the order of the shards. Whoever reads one has compared its hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from trocar.store.rows import FIXED, Ints, Labels, RowTable, Texts

_PHASES: Final = pa.array(["prompt", "gen"])
_GROUP_ROWS: Final = 1 << 17


def pack(table: RowTable) -> bytes:
    """The sidecar of a shard."""
    columns = {
        "prompt": pa.array(table.prompt),
        "position": pa.array(table.position),
        "token_id": pa.array(table.token_id),
        "token": pa.array(table.token, type=pa.string()),
        "phase": _PHASES.take(pa.array((table.phase == "gen").astype(np.int8))),
    }
    for name in ("role", "split"):
        column = getattr(table, name)
        if column is not None:
            columns[name] = pa.array(column, type=pa.string())
    return _write(columns | {name: _arrow(values) for name, values in table.labels.items()})


def unpack(raw: bytes) -> RowTable:
    """Reads what `pack` wrote."""
    table = pq.ParquetFile(pa.BufferReader(raw)).read(use_threads=False)
    names = set(table.column_names)
    return RowTable(
        prompt=table["prompt"].to_numpy(),
        position=table["position"].to_numpy(),
        token_id=table["token_id"].to_numpy(),
        token=_texts(table["token"]),
        phase=_texts(table["phase"]).astype("<U6"),
        role=_texts(table["role"]) if "role" in names else None,
        split=_texts(table["split"]) if "split" in names else None,
        labels={name: _values(table[name]) for name in table.column_names if name not in FIXED},
    )


def pack_labels(name: str, values: Labels) -> bytes:
    """The sidecar of labels for all rows of a handle."""
    return _write({name: _arrow(values)})


def unpack_labels(name: str, raw: bytes) -> Labels:
    """Reads what `pack_labels` wrote."""
    return _values(pq.ParquetFile(pa.BufferReader(raw)).read(use_threads=False)[name])


def columns(raw: bytes) -> dict[str, str]:
    """Kind of each of a sidecar's columns."""
    schema = pq.ParquetFile(pa.BufferReader(raw)).schema_arrow
    return {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)}


def column(raw: bytes, name: str) -> npt.NDArray[Any]:
    """One column of a sidecar; None is an empty string."""
    found = pq.ParquetFile(pa.BufferReader(raw)).read(columns=[name], use_threads=False)[name]
    if not pa.types.is_string(found.type):
        return cast("npt.NDArray[Any]", found.to_numpy())
    return np.array([v or "" for v in _texts(found)], dtype=object)


def places(raw: bytes) -> tuple[Ints, Ints]:
    """Prompts and positions of a shard's rows; the other columns are not read."""
    table = pq.ParquetFile(pa.BufferReader(raw)).read(columns=["prompt", "position"], use_threads=False)
    return table["prompt"].to_numpy(), table["position"].to_numpy()


def _write(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", row_group_size=_GROUP_ROWS)
    return cast("bytes", sink.getvalue().to_pybytes())


def _arrow(values: Labels) -> Any:
    return pa.array(values, type=pa.string()) if values.dtype == object else pa.array(values)


def _values(column: Any) -> Labels:
    return _texts(column) if pa.types.is_string(column.type) else cast("Labels", column.to_numpy())


def _texts(column: Any) -> Texts:
    """Strings and None; equal strings are one object."""
    if not len(column):
        return np.empty(0, dtype=object)
    coded = column.combine_chunks().dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.combine_chunks()
    words: Sequence[str | None] = [*coded.dictionary.to_pylist(), None]
    found = np.array(words, dtype=object)
    return cast("Texts", found[coded.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)])

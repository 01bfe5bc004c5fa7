"""What the stored rows are: one line per captured vector, in numpy columns and as a Parquet sidecar.

A row is a token of a prompt (`phase` "prompt") or of its continuation ("gen"); `position` counts tokens from
the start of the prompt, through the continuation. The canonical order is (prompt, position); rows with equal
keys keep the order in which they arrived. This module knows nothing of vectors or of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from trocar import errors

Phase = Literal["prompt", "gen"]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64] | npt.NDArray[np.float64]
_PHASES: Final = ("prompt", "gen")


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """Columns of equal length n; make one with `RowTable.of`.

    Attributes:
        prompt: int64 [n], index of the prompt in the request, from 0.
        position: int64 [n], index of the token counted from the start of the prompt; -1 for a row that stands for
            the whole prompt (a mean), whose token id is -1 too and whose token is empty.
        token_id: int64 [n].
        token: object [n] of str, the token's text.
        phase: str [n], "prompt" or "gen".
        label: int64 or float64 [n], or None when no labels were stored.
    """

    prompt: Ints
    position: Ints
    token_id: Ints
    token: npt.NDArray[np.object_]
    phase: npt.NDArray[np.str_]
    label: Labels | None = None

    @classmethod
    def of(
        cls,
        *,
        prompt: Sequence[int] | Ints,
        position: Sequence[int] | Ints,
        token_id: Sequence[int] | Ints,
        token: Sequence[str],
        phase: Sequence[Phase],
        label: Sequence[int] | Sequence[float] | Labels | None = None,
    ) -> RowTable:
        """Builds a table from lists or arrays.

        Raises:
            ProgramError: `rows_mismatch` for columns of different lengths, `bad_value` for a wrong type.
        """
        return cls(
            prompt=_ints("prompt", prompt),
            position=_ints("position", position),
            token_id=_ints("token_id", token_id),
            token=_texts(token),
            phase=np.array(list(phase), dtype="<U6"),
            label=None if label is None else _labels(label),
        ).checked()

    def checked(self) -> RowTable:
        """The table itself, after checking lengths, signs and phases."""
        n = len(self)
        for name in ("position", "token_id", "token", "phase", "label"):
            column = getattr(self, name)
            if column is not None and column.shape != (n,):
                raise errors.refuse(
                    "rows_mismatch", f"rows.{name}", f"{name} has shape {column.shape} and prompt has ({n},)"
                )
        if n and min(self.prompt.min(), self.position.min() + 1) < 0:
            raise errors.refuse("bad_value", "rows", "a prompt is negative, or a position below -1")
        if bool(((self.position == -1) != (self.token_id == -1)).any()):
            raise errors.refuse(
                "bad_value", "rows", "a row of a whole prompt has no token, and no other row lacks one"
            )
        odd = set(np.unique(self.phase)) - set(_PHASES)
        if odd:
            raise errors.refuse("bad_value", "rows.phase", f"{min(odd)!r} is neither 'prompt' nor 'gen'")
        return self

    def __len__(self) -> int:
        return len(self.prompt)

    def order(self) -> Ints:
        """int64 [n]: the stable permutation that puts the rows into canonical order."""
        return np.lexsort((self.position, self.prompt))

    def take(self, index: Ints | slice) -> RowTable:
        """The rows at `index`, in that order."""
        label = None if self.label is None else self.label[index]
        return RowTable(
            self.prompt[index],
            self.position[index],
            self.token_id[index],
            self.token[index],
            self.phase[index],
            label,
        )

    def same_label_type(self, other: RowTable) -> bool:
        """Whether both have labels of one type, or both have none."""
        ours, theirs = (None if t.label is None else t.label.dtype for t in (self, other))
        return ours == theirs


def empty() -> RowTable:
    """A table of no rows."""
    return RowTable.of(prompt=[], position=[], token_id=[], token=[], phase=[])


def concat(tables: Sequence[RowTable]) -> RowTable:
    """One table after the other; all have labels of one type, or none has."""
    if not tables:
        return empty()
    return RowTable(*(_joined([getattr(t, f.name) for t in tables]) for f in fields(RowTable)))


def _joined(columns: Sequence[Any]) -> Any:
    return None if columns[0] is None else np.concatenate(columns)


def is_sorted(order: Ints) -> bool:
    """Whether `order` changes nothing."""
    return bool(np.array_equal(order, np.arange(len(order))))


def _ints(name: str, values: Sequence[int] | Ints) -> Ints:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise errors.refuse("bad_value", f"rows.{name}", f"{name} holds {array.dtype}, not integers")
    return array.astype(np.int64)


def _texts(values: Sequence[str]) -> npt.NDArray[np.object_]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    if not all(isinstance(v, str) for v in array):
        raise errors.refuse("bad_value", "rows.token", "a token is not a string")
    return array


def _labels(values: Sequence[int] | Sequence[float] | Labels) -> Labels:
    array = np.asarray(values)
    if array.dtype.kind in "bi":
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    raise errors.refuse("bad_value", "rows.label", f"label holds {array.dtype}, not integers or floats")


def to_parquet(table: RowTable) -> bytes:
    """The sidecar of a shard: one Parquet file, zstd, about 4 bytes per row."""
    columns = {
        "prompt": pa.array(table.prompt),
        "position": pa.array(table.position),
        "token_id": pa.array(table.token_id),
        "token": pa.array(table.token, type=pa.string()),
        "phase": pa.array(table.phase.tolist(), type=pa.string()),
    }
    if table.label is not None:
        columns["label"] = pa.array(table.label)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return cast("bytes", sink.getvalue().to_pybytes())


def from_parquet(raw: bytes) -> RowTable:
    """Reads a sidecar whose hash has been checked."""
    table = pq.ParquetFile(pa.BufferReader(raw)).read(use_threads=False)
    return RowTable(
        prompt=table["prompt"].to_numpy(),
        position=table["position"].to_numpy(),
        token_id=table["token_id"].to_numpy(),
        token=_texts(table["token"].to_pylist()),
        phase=np.array(table["phase"].to_pylist(), dtype="<U6"),
        label=table["label"].to_numpy() if "label" in table.column_names else None,
    )

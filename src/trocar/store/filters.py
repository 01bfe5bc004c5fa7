"""Which rows of a handle meet conditions on their columns: a query of DuckDB over the sidecars.

A condition is a value, a list of values, a `range`, or a `slice` with one or two ends (the upper one not included).
Values travel as parameters; names of columns come from a closed list or from the sidecars, never from a caller
unchecked. Negative positions count from the last stored token of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import duckdb
import numpy as np

from trocar import errors
from trocar.store.index import RowIndex
from trocar.store.rows import Ints

_SETTINGS: Final[dict[str, str | bool | int | float | list[str]]] = {
    "threads": 1,
    "memory_limit": "2GB",
    "temp_directory": "",
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
_PHASES: Final = ("prompt", "gen")
_NULLABLE: Final = ("role", "split")


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """One of these; `null` for rows whose column is empty."""

    given: tuple[Any, ...]
    null: bool = False


@dataclass(frozen=True, slots=True)
class Between:
    """`low` <= value < `high`; None for an end that is open."""

    low: int | float | None
    high: int | float | None


Condition = Values | Between


def parse(column: str, kind: str, value: Any) -> Condition:
    """A condition on a column of this kind ("int64", "double" or "string").

    Raises:
        ProgramError: `bad_value`.
    """
    path = f"where.{column}"
    if isinstance(value, slice):
        return _between(path, kind, value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    many = list(value) if isinstance(value, list | tuple | set | frozenset | range) else [value]
    null = column in _NULLABLE and None in many
    found = tuple(_value(path, kind, v) for v in many if not (null and v is None))
    odd = [v for v in found if column == "phase" and v not in _PHASES]
    if odd:
        near = errors.closest(odd[0], _PHASES)
        raise errors.refuse("bad_value", path, f"{odd[0]!r} is neither 'prompt' nor 'gen'", closest=near)
    return Values(found, null)


def _between(path: str, kind: str, value: slice) -> Between:
    if kind == "string" or value.step is not None or value.start is value.stop is None:
        raise errors.refuse("bad_value", path, "a slice has one or two ends, both numbers, and no step")
    low, high = (None if end is None else _value(path, kind, end) for end in (value.start, value.stop))
    if path == "where.position" and (((low or 0) < 0 and high is not None) or (high or 0) < 0):
        reason = "a slice of positions that counts from the end has no upper end"
        raise errors.refuse("bad_value", path, reason)
    return Between(low, high)


def _value(path: str, kind: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if kind == "string":
        legal = isinstance(value, str)
    elif kind == "int64" and path.removeprefix("where.") in ("prompt", "position", "token_id", "part"):
        legal = type(value) is int and abs(value) < 1 << 62
    else:
        legal = isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1 << 62
    if not legal:
        raise errors.refuse("bad_value", path, f"{value!r} is not what a column of {kind} holds")
    return value


def matching(index: RowIndex, conditions: Mapping[str, Condition]) -> Ints:
    """int64: the ids of the rows that meet all conditions, in canonical order."""
    query = _Query()
    tests = [query.test(column, condition) for column, condition in conditions.items()]
    if not index.n_shards:
        return np.empty(0, np.int64)
    named = [name for name in conditions if name in index.label_paths]
    sql = (
        f"SELECT _id FROM (SELECT *{query.more} FROM {query.rows(index, named)}) WHERE {' AND '.join(tests)}"  # noqa: S608
    )
    with _database().cursor() as cursor:
        found = cursor.execute(sql, query.parameters).fetchnumpy()["_id"]
    return index.in_order(np.asarray(found, dtype=np.int64))


@cache
def _database() -> duckdb.DuckDBPyConnection:
    """One for the process: nothing is kept in it, and starting one costs more than most queries."""
    return duckdb.connect(":memory:", config=_SETTINGS)


@dataclass(slots=True)
class _Query:
    """The parts of one query; every value that a caller named is in `parameters`.

    Attributes:
        more: computed columns.
    """

    parameters: dict[str, Any] = field(default_factory=dict)
    more: str = ""

    def _add(self, value: Any) -> str:
        name = f"v{len(self.parameters)}"
        self.parameters[name] = value
        return f"${name}"

    def rows(self, index: RowIndex, labels: list[str]) -> str:
        """The rows of all shards with their ids, side by side with labels that came later."""
        paths, starts = self._add([str(p) for p in index.paths]), self._add(index.starts[:-1].tolist())
        id_ = f"(({starts})[file_index::BIGINT + 1] + file_row_number)::BIGINT AS _id"
        tables = [f"(SELECT *, {id_} FROM read_parquet({paths}, union_by_name = true))"]  # noqa: S608
        tables += [f"(SELECT * FROM read_parquet({self._add([str(index.label_paths[n])])}))" for n in labels]  # noqa: S608
        return " POSITIONAL JOIN ".join(tables)

    def test(self, column: str, condition: Condition) -> str:
        if isinstance(condition, Between):
            return self._between(column, condition)
        if column == "position":
            return self._positions(condition)
        found = self._one_of(f'"{column}"', condition.given)
        return f'({found} OR "{column}" IS NULL)' if condition.null else found

    def _one_of(self, column: str, values: tuple[Any, ...]) -> str:
        if len(values) == 1:
            return f"{column} = {self._add(values[0])}"
        return f"{column} IN (SELECT unnest({self._add(list(values))}))" if values else "false"

    def _between(self, column: str, ends: Between) -> str:
        if column == "position" and (ends.low or 0) < 0:
            return f"{self._back()} <= {self._add(-(ends.low or 0))}"
        tests = [] if ends.low is None else [f'"{column}" >= {self._add(ends.low)}']
        tests += [] if ends.high is None else [f'"{column}" < {self._add(ends.high)}']
        return f"({' AND '.join(tests)})"

    def _positions(self, condition: Values) -> str:
        from_start = tuple(p for p in condition.given if p >= 0)
        from_end = tuple(-p for p in condition.given if p < 0)
        if from_end == (1,) and not from_start:
            self.more += ", max(position) OVER (PARTITION BY prompt) AS _last"
            return "position = _last"
        tests = [self._one_of("position", from_start)] if from_start else []
        tests += [self._one_of(self._back(), from_end)] if from_end else []
        return f"({' OR '.join(tests)})" if tests else "false"

    def _back(self) -> str:
        """The name of the column that counts positions from the end of a prompt, from 1."""
        if " AS _back" not in self.more:
            self.more += ", dense_rank() OVER (PARTITION BY prompt ORDER BY position DESC) AS _back"
        return "_back"

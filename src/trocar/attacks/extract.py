"""Numbers of rows, by whatever door is open: whole rows where `raw` gives them, else one number per direction.

`harvest` fills a table of numbers request by request, as large as budget and policy admit; where all columns are
too many it takes fewer, and at the end it spends what is left on a part of one more row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import numpy as np

from trocar.attacks.loot import F64
from trocar.attacks.purse import Purse
from trocar.client.trace import Recorded
from trocar.graph.builder import Expr

BLOCK: Final = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and how its answer is read: float64 [rows, columns]."""

    recorded: Recorded
    read: Callable[[Mapping[str, Any]], F64]


Asker = Callable[[Sequence[int], Sequence[int]], Ask]


class Extractor(Protocol):
    """Gets columns of rows out of a trace."""

    def save(self, trace: Any, rows: Expr, width: int, columns: Sequence[int], name: str) -> None: ...

    def read(self, results: Mapping[str, Any], columns: Sequence[int], name: str) -> F64: ...


class OneHot:
    """A score for each column: the row's inner product with a unit vector. Every number costs the same anyway.

    A matrix cuts out 64 columns at a time, so that few arrays travel.
    """

    def save(self, trace: Any, rows: Expr, width: int, columns: Sequence[int], name: str) -> None:
        for column, number in zip(columns, self.numbers(trace, rows, width, columns), strict=True):
            trace.save(f"{name}.{column}", trace.score(number))

    def numbers(self, trace: Any, rows: Expr, width: int, columns: Sequence[int]) -> list[Expr]:
        """One expression per column."""
        block = min(BLOCK, len(columns))
        units = [trace.vector(row) for row in np.eye(block, dtype=np.float32)]
        found: list[Expr] = []
        for start in range(0, len(columns), block):
            mine = columns[start : start + block]
            cut = np.zeros((width, block), dtype=np.float32)
            cut[list(mine), range(len(mine))] = 1.0
            part = rows @ trace.vector(cut)
            found += [part @ units[k] for k in range(len(mine))]
        return found

    def read(self, results: Mapping[str, Any], columns: Sequence[int], name: str) -> F64:
        return np.stack([np.asarray(results[f"{name}.{c}"].values) for c in columns], axis=1)


class WholeRows:
    """The rows themselves, under `raw`; columns are picked here."""

    def save(self, trace: Any, rows: Expr, width: int, columns: Sequence[int], name: str) -> None:
        trace.save(name, trace.raw(rows))

    def read(self, results: Mapping[str, Any], columns: Sequence[int], name: str) -> F64:
        rows: F64 = np.asarray(results[name].to_numpy(), dtype=np.float64)[:, list(columns)]
        return rows


DOORS: Final[tuple[Extractor, ...]] = (WholeRows(), OneHot())


def harvest(purse: Purse, n_rows: int, n_columns: int, batch_rows: int, *doors: Asker) -> F64:
    """Float64 [n_rows, n_columns], NaN where the budget did not reach.

    Args:
        doors: ways to ask, the best first; the first that the server does not refuse is taken.
    """
    table = np.full((n_rows, n_columns), np.nan)
    ask = next(
        (d for d in doors[:-1] if purse.plan(d([0], range(n_columns)).recorded) is not None), doors[-1]
    )
    start, size = 0, n_columns
    while start < n_columns and size:
        columns = list(range(start, min(start + size, n_columns)))
        done = _fill(purse, table, columns, batch_rows, ask)
        if done == n_rows:
            start += len(columns)
        elif done:
            _end(purse, table, done, columns, doors[-1])
            break
        else:
            size //= 2
    return table


def _fill(purse: Purse, table: F64, columns: Sequence[int], batch_rows: int, ask: Asker) -> int:
    """Reads some columns of all rows; how many rows it got."""
    row = 0
    while row < len(table):
        rows = list(range(row, min(row + batch_rows, len(table))))
        fits = purse.most(partial(_recorded, ask, rows, columns), len(rows))
        if not fits or not _take(purse, table, rows[:fits], columns, ask):
            break
        row += fits
    return row


def _end(purse: Purse, table: F64, row: int, columns: Sequence[int], ask: Asker) -> None:
    """The last bits buy a part of one more row."""
    fits = purse.most(lambda n: ask([row], columns[:n]).recorded, len(columns))
    _take(purse, table, [row], columns[:fits], ask)


def _recorded(ask: Asker, rows: Sequence[int], columns: Sequence[int], count: int) -> Recorded:
    return ask(rows[:count], columns).recorded


def _take(purse: Purse, table: F64, rows: Sequence[int], columns: Sequence[int], ask: Asker) -> bool:
    if not columns:
        return False
    asked = ask(rows, columns)
    results = purse.run(asked.recorded)
    if results is None:
        return False
    table[np.ix_(rows, columns)] = asked.read(results)
    return True

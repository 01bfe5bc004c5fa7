"""What the stored rows are: one line per captured vector, in numpy columns.

A row is a token of a prompt (`phase` "prompt") or of its continuation ("gen"); `position` counts tokens from
the start of the prompt, through the continuation. The canonical order is (prompt, position); rows with equal
keys keep the order in which they arrived. This module knows nothing of vectors or of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trocar import errors

Phase = Literal["prompt", "gen"]
Ints = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]
Labels = npt.NDArray[np.int64] | npt.NDArray[np.float64] | Texts
GivenLabels = Sequence[int] | Sequence[float] | Sequence[str] | npt.NDArray[Any]
LABEL: Final = "label"  # the name of labels that have no other
FIXED: Final = ("prompt", "position", "token_id", "token", "phase", "role", "split", "part")
_RESERVED: Final = (*FIXED, "site", "layer", "row", "file_index", "file_row_number", "filename")
_MOST_PROMPTS: Final = 1 << 38
_MOST_POSITIONS: Final = 1 << 24
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")


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
        role: object [n] of str or None, who speaks ("user", "assistant"); None when nobody said.
        split: object [n] of str or None, the part of its data set ("train"); None when nobody said.
        labels: by name, int64, float64 or object (str) [n].
        part: int64 [n], which of the views that were joined a row comes from; None when none were.
    """

    prompt: Ints
    position: Ints
    token_id: Ints
    token: Texts
    phase: npt.NDArray[np.str_]
    role: Texts | None = None
    split: Texts | None = None
    labels: Mapping[str, Labels] = field(default_factory=dict)
    part: Ints | None = None

    @classmethod
    def of(
        cls,
        *,
        prompt: Sequence[int] | Ints,
        position: Sequence[int] | Ints,
        token_id: Sequence[int] | Ints,
        token: Sequence[str],
        phase: Sequence[Phase],
        role: Sequence[str | None] | None = None,
        split: Sequence[str | None] | None = None,
        label: GivenLabels | None = None,
        labels: Mapping[str, GivenLabels] | None = None,
    ) -> RowTable:
        """Builds a table from lists or arrays.

        Args:
            label: the labels named "label".

        Raises:
            ProgramError: `rows_mismatch` for columns of different lengths, `bad_value` for a wrong type.
        """
        named = {**(labels or {}), **({} if label is None else {LABEL: label})}
        return cls(
            prompt=_ints("prompt", prompt),
            position=_ints("position", position),
            token_id=_ints("token_id", token_id),
            token=_texts("rows.token", token),
            phase=np.array(list(phase), dtype="<U6"),
            role=None if role is None else _texts("rows.role", role, or_none=True),
            split=None if split is None else _texts("rows.split", split, or_none=True),
            labels={require_name(k, "rows.labels"): label_values(f"rows.{k}", v) for k, v in named.items()},
        ).checked()

    @property
    def label(self) -> Labels | None:
        """The labels named "label", or None."""
        return self.labels.get(LABEL)

    def checked(self) -> RowTable:
        """The table itself, after checking lengths, signs and phases."""
        n = len(self)
        for name, column in self._columns():
            if column.shape != (n,):
                raise errors.refuse(
                    "rows_mismatch", f"rows.{name}", f"{name} has shape {column.shape} and prompt has ({n},)"
                )
        if n and min(self.prompt.min(), self.position.min() + 1) < 0:
            raise errors.refuse("bad_value", "rows", "a prompt is negative, or a position below -1")
        if n and (self.prompt.max() >= _MOST_PROMPTS or self.position.max() >= _MOST_POSITIONS - 1):
            raise errors.refuse("bad_value", "rows", "a prompt or a position is too large a number")
        if bool(((self.position == -1) != (self.token_id == -1)).any()):
            raise errors.refuse(
                "bad_value", "rows", "a row of a whole prompt has no token, and no other row lacks one"
            )
        odd = (self.phase != "prompt") & (self.phase != "gen")
        if odd.any():
            reason = f"{self.phase[odd][0]!r} is neither 'prompt' nor 'gen'"
            raise errors.refuse("bad_value", "rows.phase", reason)
        return self

    def _columns(self) -> Iterable[tuple[str, npt.NDArray[Any]]]:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "labels":
                yield from self.labels.items()
            elif value is not None:
                yield f.name, value

    def __len__(self) -> int:
        return len(self.prompt)

    def order(self) -> Ints:
        """int64 [n]: the stable permutation that puts the rows into canonical order."""
        return np.argsort(keys(self.prompt, self.position), kind="stable")

    def take(self, index: Ints | slice) -> RowTable:
        """The rows at `index`, in that order."""
        columns = {name: column[index] for name, column in self._columns()}
        labels = {name: columns.pop(name) for name in self.labels}
        return replace(self, **columns, labels=labels)

    def with_labels(self, more: Mapping[str, Labels]) -> RowTable:
        """The same rows with more labels."""
        return replace(self, labels={**self.labels, **more})

    def kinds(self) -> dict[str, str]:
        """Type of each column that a table may lack, by name: what the tables of one handle agree on."""
        given = {"role": self.role, "split": self.split, **self.labels}
        return {name: column.dtype.name for name, column in given.items() if column is not None}


def keys(prompt: Ints, position: Ints) -> Ints:
    """int64 [n] that sort as (prompt, position) does."""
    return prompt * _MOST_POSITIONS + position + 1


def prompts(keys: Ints) -> Ints:
    """int64 [n], the prompts of such keys."""
    return keys // _MOST_POSITIONS


def empty() -> RowTable:
    """A table of no rows."""
    return RowTable.of(prompt=[], position=[], token_id=[], token=[], phase=[])


def concat(tables: Sequence[RowTable]) -> RowTable:
    """One table after the other; all have the same columns."""
    if not tables:
        return empty()
    names = [
        f.name for f in fields(RowTable) if f.name != "labels" and getattr(tables[0], f.name) is not None
    ]
    joined = {name: np.concatenate([getattr(t, name) for t in tables]) for name in names}
    labels = {name: np.concatenate([t.labels[name] for t in tables]) for name in tables[0].labels}
    return RowTable(**joined, labels=labels)


def is_sorted(order: Ints) -> bool:
    """Whether `order` changes nothing."""
    return bool(np.array_equal(order, np.arange(len(order))))


def require_name(name: str, path: str) -> str:
    """A legal name of labels.

    Raises:
        ProgramError: `bad_value` for one that is no small word, or that another column has.
    """
    if _NAME.fullmatch(name) is None or name in _RESERVED:
        raise errors.refuse("bad_value", path, f"{name[:40]!r} cannot name a column of labels")
    return name


def label_values(path: str, values: GivenLabels) -> Labels:
    """Labels as int64, float64 or an object array of strings (`bad_value` otherwise)."""
    array = np.asarray(values)
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    if array.dtype.kind == "f" and not np.isnan(array).any():
        return array.astype(np.float64)
    if array.dtype.kind in "UO":
        return _texts(path, values)
    raise errors.refuse("bad_value", path, f"labels of {array.dtype} are not integers, numbers or strings")


def _ints(name: str, values: Sequence[int] | Ints) -> Ints:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise errors.refuse("bad_value", f"rows.{name}", f"{name} holds {array.dtype}, not integers")
    return array.astype(np.int64)


def _texts(path: str, values: Sequence[Any] | npt.NDArray[Any], *, or_none: bool = False) -> Texts:
    array = np.empty(len(values), dtype=object)
    array[:] = values.tolist() if isinstance(values, np.ndarray) else values
    if not set(map(type, array)) <= ({str, type(None)} if or_none else {str}):
        raise errors.refuse("bad_value", path, "a value is not a string")
    return array

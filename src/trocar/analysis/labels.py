"""Labels and groups as users send them, checked once and turned into arrays.

Types are not converted: "1" and 1.0 are not classes, True is not a number to regress on. Labels are public
input, so refusals may quote them. This module never sees a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import errors

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Given = Sequence[Any] | npt.NDArray[Any]
_LARGEST: Final = 1e12
_SMALLEST: Final = 1e-12


def classes(labels: Given, most: int = 2) -> tuple[Floats, tuple[int, ...]]:
    """Reads class labels: float64 [n] of 0, 1, ..., and the values that they stand for, ascending.

    Raises:
        ProgramError: `bad_labels` for anything but ints or bools of up to `most` values, `too_few_rows` for one value.
    """
    array = _column(labels, "labels")
    if array.size and array.dtype.kind not in "biu":
        raise errors.refuse("bad_labels", "labels", f"class labels are ints or bools, not {array.dtype}")
    values, index = np.unique(array, return_inverse=True)
    if len(values) > most:
        takes = "two classes" if most == 2 else f"at most {most}"
        raise errors.refuse("bad_labels", "labels", f"{len(values)} different labels; this fit takes {takes}")
    if len(values) < 2:
        raise errors.refuse(
            "too_few_rows", "labels", f"the labels of {len(array)} rows have fewer than two classes"
        )
    return index.astype(np.float64), tuple(int(value) for value in values)


def targets(labels: Given) -> Floats:
    """Reads regression targets: float64 [n].

    Raises:
        ProgramError: `bad_labels` for anything but finite numbers up to 1e12 that differ.
    """
    array = _column(labels, "labels")
    if array.size and array.dtype.kind not in "iuf":
        raise errors.refuse("bad_labels", "labels", f"ridge labels are numbers, not {array.dtype}")
    numbers = array.astype(np.float64)
    if not (np.abs(numbers) <= _LARGEST).all():
        raise errors.refuse("bad_labels", "labels", f"a label is not finite, or larger than {_LARGEST:g}")
    if 0 < np.abs(numbers).max(initial=0) < _SMALLEST:
        raise errors.refuse("bad_labels", "labels", f"every label is smaller than {_SMALLEST:g}")
    if numbers.size and np.ptp(numbers) == 0:
        raise errors.refuse(
            "bad_labels", "labels", f"every label is {numbers[0]:g}: there is nothing to predict"
        )
    return numbers


def groups(given: Given | None, n_rows: int) -> Ints:
    """Group number of each row, int64 [n]; without groups, each row is its own.

    Raises:
        ProgramError: `bad_labels` for a wrong count or a type other than int or str.
    """
    if given is None:
        return np.arange(n_rows, dtype=np.int64)
    array = _column(given, "groups")
    if len(array) != n_rows:
        raise errors.refuse("bad_labels", "groups", f"{len(array)} groups for {n_rows} labels")
    if array.dtype.kind not in "iuU":
        raise errors.refuse("bad_labels", "groups", f"groups are ints or strings, not {array.dtype}")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def _column(given: Given, path: str) -> npt.NDArray[Any]:
    """A rank-1 array of one Python type: numpy would read [True, 2] as ints and [1, "a"] as strings."""
    if not isinstance(given, np.ndarray):
        kinds = {type(v) for v in given}
        if len(kinds - {int} if kinds <= {int, float} else kinds) > 1:
            names = sorted(kind.__name__ for kind in kinds)
            raise errors.refuse("bad_labels", path, f"{path} mix {' and '.join(names)}")
        if not kinds <= {bool, int, float, str}:
            raise errors.refuse("bad_labels", path, f"{path} hold {min(kind.__name__ for kind in kinds)}")
    array = np.asarray(given)
    if array.ndim != 1:
        raise errors.refuse("bad_labels", path, f"{path} have rank {array.ndim}; send one per row")
    return array

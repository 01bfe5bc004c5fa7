"""A source gives every row once per pass, in order, as float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trocar import errors
from trocar.analysis.source import ArraySource, Source


def read(source: Source, most: int) -> npt.NDArray[np.float32]:
    return np.concatenate([block.copy() for block in source.blocks(most)])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("most", [1, 7, 20, 512])
def test_blocks_cover_the_rows_in_order_on_every_pass(dtype: Any, most: int) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 3)).astype(dtype)
    source = ArraySource(rows)
    assert isinstance(source, Source)
    assert (len(source), source.width) == (20, 3)
    for _ in range(2):
        np.testing.assert_array_equal(read(source, most), rows.astype(np.float32))
    assert all(b.dtype == np.float32 and b.flags.c_contiguous and len(b) <= most for b in source.blocks(most))


def test_a_view_with_strides_is_read_as_it_looks() -> None:
    rows = np.arange(60.0).reshape(6, 10)
    np.testing.assert_array_equal(read(ArraySource(rows[::2, ::-3]), 2), rows[::2, ::-3])


def test_a_buffer_is_used_again() -> None:
    first, second = list(ArraySource(np.eye(4)).blocks(2))
    assert np.shares_memory(first, second)


def test_a_number_beyond_float32_becomes_an_infinity() -> None:
    assert np.isinf(read(ArraySource(np.array([[1e300]])), 1)).all()


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((2, 2, 2)), np.zeros((2, 2), int), np.zeros((2, 2), bool)]
)
def test_what_is_not_floats_of_rank_two_is_refused(array: npt.NDArray[Any]) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        ArraySource(array)
    assert caught.value.code == "rows_mismatch"

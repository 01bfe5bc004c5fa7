"""Passes over sources: blocks that end anywhere give the same rows, moments and orders as one array."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.joined import Beside, Difference, Subset, together
from trocar.analysis.source import ArraySource, Source

Rows = npt.NDArray[np.float32]


class Ragged:
    """A source whose blocks end where shards do, and whose one buffer is overwritten at each block."""

    def __init__(self, array: Rows, *ends: int) -> None:
        self._array, self._ends = array, (*ends, len(array))
        self._buffer = np.empty((len(array), array.shape[1]), dtype=np.float32)

    @property
    def width(self) -> int:
        return int(self._array.shape[1])

    def __len__(self) -> int:
        return len(self._array)

    def blocks(self, most: int = 512) -> Iterator[Rows]:
        start = 0
        for end in self._ends:
            while start < end:
                n = min(most, end - start)
                self._buffer[:] = np.nan
                self._buffer[:n] = self._array[start : start + n]
                yield self._buffer[:n]
                start += n


def rows(n: int, width: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def read(source: Source, most: int = 512) -> Rows:
    return np.concatenate([block.copy() for block in source.blocks(most)])


@pytest.mark.parametrize("most", [1, 4, 7, 512])
def test_sources_of_sources_are_the_arrays_they_stand_for(most: int) -> None:
    x, y = rows(23, 3), rows(23, 3, seed=1)
    a, b = Ragged(x, 5, 6, 20), Ragged(y, 11, 22)
    keep = np.arange(23) % 3 == 1
    assert [len(p) for p, _ in together(a, b, 512)] == [5, 1, 5, 9, 2, 1]
    np.testing.assert_array_equal(read(Beside(a, b), most), np.hstack([x, y]))
    np.testing.assert_array_equal(read(Difference(a, b), most), x - y)
    np.testing.assert_array_equal(read(Subset(a, keep), most), x[keep])
    assert (len(Beside(a, b)), Beside(a, b).width, len(Subset(a, keep)), Difference(a, b).width) == (
        23,
        6,
        8,
        3,
    )


def test_a_scale_gives_mean_0_and_deviation_1_and_leaves_constants_at_0() -> None:
    x = rows(400, 3) * 5 + 40
    x[:, 1] = 0.1
    z = streams.scale(ArraySource(x)).apply(x)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=0), [1, 0, 1], atol=1e-5)


def test_rows_are_found_by_number_in_the_order_asked_for() -> None:
    x = rows(50, 2)
    index = np.array([49, 3, 3, 0, 17])
    np.testing.assert_array_equal(streams.rows_at(Ragged(x, 4, 18, 40), index), x[index])
    assert streams.rows_at(ArraySource(x), np.zeros(0, dtype=np.int64)).shape == (0, 2)
    for wrong in (-1, 50):
        with pytest.raises(errors.ProgramError, match=f"no row {wrong}"):
            streams.rows_at(ArraySource(x), np.array([0, wrong]))


def test_a_sample_is_uniform_and_without_repeats() -> None:
    counts = np.zeros(10)
    for seed in range(600):
        chosen = streams.sample(10, 4, seed)
        assert len(set(chosen.tolist())) == 4
        assert (np.diff(chosen) > 0).all()
        counts[chosen] += 1
    np.testing.assert_allclose(counts, 240, atol=60)  # five deviations of a binomial(600, 0.4)
    np.testing.assert_array_equal(streams.sample(4, 9, seed=0), np.arange(4))


@pytest.mark.parametrize(("n", "room"), [(40, 100), (200, 64), (200, 7), (1, 3), (0, 3)])
def test_a_shuffle_gives_every_row_once_with_its_number(n: int, room: int) -> None:
    x = rows(n, 3)
    found, index = [], []
    for block, numbers in streams.shuffled(ArraySource(x), 6, np.random.default_rng(0), room):
        assert 1 <= len(block) <= 6
        np.testing.assert_array_equal(block, x[numbers])
        found.append(block)
        index.extend(numbers.tolist())
    assert sorted(index) == list(range(n))


def test_the_first_batch_of_a_shuffle_comes_from_the_whole_source_though_the_buffer_is_an_eighth() -> None:
    """A buffer that fills from the front would give the rows 0 to 99 first, in one class when classes are sorted."""
    x = np.arange(800, dtype=np.float32)[:, None]
    firsts = []
    for seed in range(30):
        batch, _ = next(streams.shuffled(ArraySource(x), 20, np.random.default_rng(seed), room=100))
        firsts.append(batch.mean())
    assert np.mean(firsts) == pytest.approx(399.5, abs=40)  # 4.2 deviations
    assert np.ptp(firsts) > 50


def test_shuffles_of_one_generator_differ_and_of_one_seed_do_not() -> None:
    source, rng = ArraySource(rows(50, 1)), np.random.default_rng(3)
    first, second = ([i for _, n in streams.shuffled(source, 9, rng) for i in n] for _ in range(2))
    again = [i for _, n in streams.shuffled(source, 9, np.random.default_rng(3)) for i in n]
    assert first == again != second


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e15])
def test_rows_that_cannot_be_computed_with_are_refused(bad: float) -> None:
    x = rows(30, 2)
    x[17, 1] = bad
    source = ArraySource(x)
    uses: list[Any] = [
        lambda: list(streams.finite(source)),
        lambda: streams.rows_at(source, np.array([17])),
        lambda: streams.residuals(source, source),
    ]
    for use in uses if bad == 2e15 else [*uses, lambda: streams.scale(source)]:
        with pytest.raises(errors.ProgramError) as caught:
            use()
        assert caught.value.code == "rows_not_finite"


@pytest.mark.parametrize("make", [Beside, Difference])
def test_sources_of_different_lengths_do_not_join(make: Any) -> None:
    with pytest.raises(errors.ProgramError, match="4 rows on one side and 5"):
        make(ArraySource(np.eye(4)), ArraySource(np.eye(5)))


def test_rows_of_different_widths_have_no_difference() -> None:
    with pytest.raises(errors.ProgramError) as caught:
        Difference(ArraySource(np.eye(4)), ArraySource(np.eye(4, 3)))
    assert caught.value.code == "width_mismatch"

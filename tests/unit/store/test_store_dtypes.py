"""Narrow numbers: rounded to the nearest even, refused when they would overflow, read back as float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from trocar import errors
from trocar.store import RowTable, Store

F32 = npt.NDArray[np.float32]
ODD = [0.0, -0.0, 1.0, -1.5, 1 / 3, 65_504.0, 65_519.0, 1e-8, -3e-45, 6.1e-5, np.inf, -np.inf, np.nan]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened
        assert opened.check() == opened.verify() == []


def numbers(n: int, width: int, *, scale: float = 1.0) -> F32:
    """All sorts of float32, odd ones and exact ties among them."""
    rng = np.random.default_rng(5)
    found = rng.standard_normal(n * width).astype(np.float32) * np.float32(scale)
    found[: len(ODD)] = ODD
    ties = (np.arange(256, dtype=np.uint32) << 16 | 0x3F80_8000).view(
        np.float32
    )  # halfway between two bfloat16
    found[100:356] = ties
    found[400:528] = np.float32(1) + np.arange(128, dtype=np.float32) * np.float32(2**-11)  # and two float16
    return found.reshape(n, width)


def rounded(vectors: F32, dtype: str) -> F32:
    """The nearest number of the type, computed with integers and by numpy."""
    if dtype == "float32":
        return vectors
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return vectors.astype(np.float16).astype(np.float32)
    bits = vectors.view(np.uint32)
    up = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    words = np.where(np.isnan(vectors), np.uint32(0x7FC0_0000), up & np.uint32(0xFFFF_0000))
    return words.astype(np.uint32).view(np.float32)


def table(n: int) -> RowTable:
    return RowTable.of(
        prompt=range(n), position=[3] * n, token_id=[1] * n, token=["t"] * n, phase=["prompt"] * n
    )


def kept(store: Store, vectors: F32, dtype: str) -> str:
    with store.create("alice", "smol", "f1", {"final_norm": vectors.shape[1]}, "p1", dtype=dtype) as writer:
        for start in range(0, len(vectors), 40):  # two shards and a rest
            part = vectors[start : start + 40]
            writer.append({"final_norm": part}, table(len(vectors)).take(slice(start, start + 40)))
            writer.flush()
        return writer.finish().id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_are_rounded_to_the_nearest(store: Store, dtype: str) -> None:
    vectors = numbers(100, 16)
    handle = kept(store, vectors, dtype)
    reader = store.open("alice", handle)
    assert reader.info.dtype == dtype
    expected = rounded(vectors, dtype)
    finite = np.isfinite(vectors)
    assert bool((expected[finite] != vectors[finite]).any()) == (dtype != "float32")
    for found in (reader.read("final_norm"), reader.site("final_norm").read()):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert np.signbit(found[0, 1])
    np.testing.assert_array_equal(reader.read("final_norm", [3, 70]), expected[[3, 70]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_files_are_of_the_type(store: Store, tmp_path: Path, dtype: str) -> None:
    vectors = numbers(40, 16)
    handle = kept(store, vectors, dtype)
    (path,) = (tmp_path / "data" / handle).glob("*.final_norm.safetensors")
    assert path.stat().st_size == 4096 + 40 * 16 * 2
    tensor = load_file(path)["rows"]
    assert tensor.dtype == {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    np.testing.assert_array_equal(tensor.float().numpy(), rounded(vectors, dtype))


OVERFLOWS = [("float16", 65_520.0), ("float16", -1e9), ("bfloat16", 3.3961775e38), ("bfloat16", -3.4e38)]


@pytest.mark.parametrize(("dtype", "number"), OVERFLOWS)
@pytest.mark.parametrize("beside", [0.0, np.inf, np.nan])
def test_what_would_become_an_infinity_is_refused(
    store: Store, dtype: str, number: float, beside: float
) -> None:
    vectors = np.ones((5, 3), np.float32)
    vectors[2] = [beside, number, beside]
    assert not np.isfinite(rounded(vectors, dtype)[2, 1])
    with store.create("alice", "smol", "f1", {"final_norm": 3}, "p1", dtype=dtype) as writer:
        with pytest.raises(errors.ProgramError) as caught:
            writer.append({"final_norm": vectors}, table(5))
        assert (caught.value.code, caught.value.path) == ("bad_value", "vectors.final_norm")
        assert "row 2" in str(caught.value)
        vectors[2, 1] = np.nextafter(
            np.float32(65_520 if dtype == "float16" else 3.3961775e38), np.float32(0)
        )
        writer.append({"final_norm": vectors}, table(5))
        assert writer.finish().n_rows == 5
    reader = store.open("alice", writer.id)
    assert np.isfinite(reader.read("final_norm")[2, 1])


def test_an_unknown_type_is_refused(store: Store) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        store.create("alice", "smol", "f1", {"final_norm": 3}, "p1", dtype="float61")
    assert (caught.value.code, caught.value.path, caught.value.closest) == ("bad_value", "dtype", "float16")
    assert store.list("alice") == []


def test_rows_that_cannot_be_written_can_be_stored(store: Store) -> None:
    vectors = numbers(40, 16)
    vectors.flags.writeable = False
    np.testing.assert_array_equal(
        store.open("alice", kept(store, vectors, "bfloat16")).read("final_norm"), rounded(vectors, "bfloat16")
    )

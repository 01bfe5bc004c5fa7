"""Frames: what is packed comes back, and everything else is refused with a code before it costs anything."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import json
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trocar import errors
from trocar.wire import tensors

NAMES = st.text(min_size=1, max_size=20).filter(lambda s: s != "__metadata__" and s.isprintable())
VECTORS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.dictionaries(NAMES, VECTORS, max_size=6))
def test_what_is_packed_comes_back(body: bytes, vectors: dict[str, Any]) -> None:
    found, back = tensors.unpack(tensors.pack(body, vectors))
    assert found == body
    assert set(back) == set(vectors)
    for name, v in vectors.items():
        assert back[name].dtype == np.float32
        assert back[name].tobytes() == v.tobytes()


def test_other_floats_arrive_as_float32() -> None:
    _, back = tensors.unpack(tensors.pack(b"{}", {"h": np.ones(3, np.float16), "d": np.ones(2, np.float64)}))
    assert [v.dtype for v in back.values()] == [np.float32, np.float32]
    strided = np.arange(6, dtype=np.float32)[::2]
    assert tensors.unpack(tensors.pack(b"", {"s": strided}))[1]["s"].tolist() == [0, 2, 4]
    _, half = tensors.unpack(frame({"v": entry("F16", [2], 0, 4)}, np.array([1, -2], np.float16).tobytes()))
    assert half["v"].tolist() == [1, -2]


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def block(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    body = b"{}"
    head = struct.pack(">5sI", tensors.MAGIC, len(body)) + body
    return head + (len(header) if length is None else length).to_bytes(8, "little") + header + data


def frame(header: Any, data: bytes = b"") -> bytes:
    return block(json.dumps(header).encode(), data)


def four(n: int = 1) -> bytes:
    return np.ones(n, np.float32).tobytes()


BIG = 1 << 40
CASES: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "bad_frame"),
    ("another magic", b"TRCR\x02" + bytes(20), "bad_frame"),
    ("a pickle", b"\x80\x04\x95" + bytes(40), "bad_frame"),
    ("an npy file", b"\x93NUMPY\x01\x00" + bytes(40), "bad_frame"),
    ("the magic alone", tensors.MAGIC, "bad_frame"),
    ("a promise of more JSON", struct.pack(">5sI", tensors.MAGIC, 100) + b"{}", "bad_frame"),
    ("a promise of 4 GB", struct.pack(">5sI", tensors.MAGIC, 2**32 - 1) + b"{}", "bad_frame"),
    ("no tensors at all", struct.pack(">5sI", tensors.MAGIC, 2) + b"{}", "bad_tensor"),
    ("a lying header length", block(b"{}", length=10**6), "bad_tensor"),
    ("a header of 2^63", block(b"{}", length=2**63), "bad_tensor"),
    ("a header that is no JSON", block(b"{{{{"), "bad_tensor"),
    ("a header that is no object", block(b"[]"), "bad_tensor"),
    ("a header that is no UTF-8", block(b'{"\xff":1}'), "bad_tensor"),
    ("a nested header", block(b"[" * 100_000), "bad_tensor"),
    ("a number of 10^5 digits", block(b'{"v":' + b"1" * 100_000 + b"}"), "bad_tensor"),
    ("a key twice", block(b'{"v":' + json.dumps(entry("F32", [1], 0, 4)).encode() + b',"v":{}}', four()), "bad_tensor"),
    ("a header too long", block(b" " * 200_000), "bad_tensor"),
    ("an entry that is no object", frame({"v": 1}), "bad_tensor"),
    ("300 tensors", frame({f"v{i}": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(300)}, four(300)), "too_large"),
    ("50,000 tensors", frame({f"v{i}": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(50_000)}, four(50_000)), "bad_tensor"),
    ("metadata", frame({"__metadata__": {"format": "pt"}, "v": entry("F32", [1], 0, 4)}, four()), "bad_tensor"),
    *((f"dtype {d}", frame({"v": entry(d, [1], 0, 8)}, bytes(8)), "bad_tensor") for d in ("F64", "I64", "BF16", "BOOL", "F8_E4M3", "?")),
    ("dtype that is a list", frame({"v": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, four()), "bad_tensor"),
    ("no shape", frame({"v": {"dtype": "F32"}}, four()), "bad_tensor"),
    ("rank 0", frame({"v": entry("F32", [], 0, 4)}, four()), "bad_tensor"),
    ("rank 3", frame({"v": entry("F32", [1, 1, 1], 0, 4)}, four()), "bad_tensor"),
    ("a matrix without rows", frame({"v": entry("F32", [0, 1], 0, 0)}), "bad_tensor"),
    ("zero size", frame({"v": entry("F32", [0], 0, 0)}), "bad_tensor"),
    ("2^40 wide", frame({"v": entry("F32", [BIG], 0, 4)}, four()), "bad_tensor"),
    ("an overflow of the product", frame({"v": entry("F32", [BIG, BIG, BIG], 0, 4)}, four()), "bad_tensor"),
    ("a negative width", frame({"v": entry("F32", [-1], 0, 4)}, four()), "bad_tensor"),
    ("wider than the limit", frame({"v": entry("F32", [tensors.MAX_WIDTH + 1], 0, 4 * tensors.MAX_WIDTH + 4)}, four(tensors.MAX_WIDTH + 1)), "bad_tensor"),
    ("bytes that do not fit", frame({"v": entry("F32", [2], 0, 4)}, four()), "bad_tensor"),
    ("bytes that are not there", frame({"v": entry("F32", [2], 0, 8)}, four()), "bad_tensor"),
    ("bytes left over", frame({"v": entry("F32", [1], 0, 4)}, four(2)), "bad_tensor"),
    ("overlapping offsets", frame({"v": entry("F32", [2], 0, 8), "w": entry("F32", [1], 4, 8)}, four(2)), "bad_tensor"),
    ("offsets backwards", frame({"v": entry("F32", [1], 4, 0)}, four()), "bad_tensor"),
    ("NaN", frame({"v": entry("F32", [2], 0, 8)}, np.array([1, np.nan], np.float32).tobytes()), "not_finite"),
    ("infinity", frame({"v": entry("F16", [1], 0, 2)}, np.array([np.inf], np.float16).tobytes()), "not_finite"),
    ("too large", frame({"v": entry("F32", [1], 0, 4)}, np.array([1.1e6], np.float32).tobytes()), "bad_tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "code"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_every_other_frame_is_refused_quickly(raw: bytes, code: str) -> None:
    started = time.thread_time()
    with pytest.raises(errors.BadRequest) as caught:
        tensors.unpack(raw)
    assert caught.value.code == code
    assert caught.value.next_step
    assert len(caught.value.reason) < 300
    assert time.thread_time() - started < 0.2


def test_refusals_name_vector_value_and_index() -> None:
    bad = np.array([0, 1, np.nan], np.float32)
    for work in (
        lambda: tensors.pack(b"", {"steer": bad}),
        lambda: tensors.unpack(frame({"steer": entry("F32", [3], 0, 12)}, bad.tobytes())),
    ):
        with pytest.raises(errors.BadRequest) as caught:
            work()
        assert caught.value.path == "tensors.steer"
        assert "'steer' is nan at index 2" in caught.value.reason
    with pytest.raises(errors.BadRequest, match=r"'steer' is nan at index \[0, 2\]"):
        tensors.pack(b"", {"steer": bad[None]})


def test_a_matrix_travels() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    body, arrays = tensors.unpack(tensors.pack(b"{}", {"m": matrix.T}))
    assert body == b"{}"
    assert arrays["m"].tolist() == matrix.T.tolist()


@pytest.mark.parametrize(
    "vector", [np.ones((2, 2, 2), np.float32), np.ones((2, 0), np.float32), np.ones(3, np.int64), np.ones(0, np.float32), np.ones(3, np.complex64), np.array(1.0), np.array(["a"])]
)  # fmt: skip
def test_what_is_no_vector_is_not_packed(vector: Any) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        tensors.pack(b"{}", {"v": vector})
    assert (caught.value.code, caught.value.path) == ("bad_tensor", "tensors.v")


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_a_damaged_frame_is_read_or_refused(body: bytes, where: int, noise: bytes) -> None:
    whole = tensors.pack(body, {"v": np.ones(8, np.float32), "w": np.ones(3, np.float32)})
    at = where % len(whole)
    for damaged in (whole[:at], whole[:at] + noise + whole[at + len(noise) :], noise + whole):
        try:
            _, vectors = tensors.unpack(damaged)
        except errors.BadRequest:
            continue
        assert all(np.isfinite(v).all() and v.ndim == 1 for v in vectors.values())

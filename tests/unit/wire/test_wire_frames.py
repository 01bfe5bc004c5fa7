"""Frames between processes: what is packed comes out, all else is refused, nothing is held beyond its limit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.errors import TrocarError
from trocar.wire import frames
from trocar.wire.frames import (
    HEAD_BYTES,
    MAX_LENGTH,
    MAX_NUMBER,
    Collector,
    Frame,
    Head,
    Kind,
    Status,
    at_most,
)

LIMIT = 4096
T = TypeVar("T")
HEADS = st.builds(
    Head,
    st.sampled_from(Kind),
    st.integers(0, MAX_NUMBER),
    st.integers(0, MAX_LENGTH),
    st.sampled_from(Status),
)


def small(head: Head) -> None:
    at_most(**{kind.name: LIMIT for kind in Kind})(head)


def outcome(attempt: Callable[[], T]) -> T | str:
    """What comes out, or the code of the refusal."""
    try:
        return attempt()
    except TrocarError as e:
        return e.code


def code(attempt: object) -> str:
    with pytest.raises(TrocarError) as caught:
        attempt()  # type: ignore[operator]
    return caught.value.code


def fed(collector: Collector, stream: bytes, sizes: list[int]) -> list[Frame]:
    """The frames of a stream that arrives in pieces, never more than is wanted at once."""
    found, at = list[Frame](), 0
    for size in [*sizes, *[1] * len(stream)]:
        piece = stream[at : at + min(size, collector.wanted)]
        if not piece:
            break
        frame = collector.feed(piece)
        found += [frame] if frame else []
        at += len(piece)
    return found


@given(HEADS)
def test_a_header_comes_out_as_it_went_in(head: Head) -> None:
    raw = frames.pack(head)
    assert len(raw) == HEAD_BYTES
    assert frames.unpack(raw) == head


@given(st.binary(max_size=40))
def test_other_bytes_are_no_header(raw: bytes) -> None:
    found = outcome(lambda: frames.unpack(raw))
    assert found == "bad_frame" or (isinstance(found, Head) and frames.pack(found) == raw)


@given(HEADS, st.integers(0, HEAD_BYTES - 1), st.integers(1, 255))
def test_a_byte_that_changed_is_another_header_or_none(head: Head, at: int, by: int) -> None:
    raw = bytearray(frames.pack(head))
    raw[at] = (raw[at] + by) % 256
    found = outcome(lambda: frames.unpack(bytes(raw)))
    assert found == "bad_frame" or (isinstance(found, Head) and found != head)


def test_lengths_end_where_four_bytes_end() -> None:
    assert frames.unpack(frames.pack(Head(Kind.result, 0, MAX_LENGTH))).length == (1 << 32) - 1
    assert code(lambda: frames.pack(Head(Kind.result, 0, MAX_LENGTH + 1))) == "too_large"


@given(
    st.lists(st.tuples(HEADS, st.binary(max_size=200)), max_size=5),
    st.lists(st.integers(1, 64), max_size=40),
)
def test_frames_come_out_however_their_bytes_arrive(sent: list[tuple[Head, bytes]], sizes: list[int]) -> None:
    made = [Frame(Head(h.kind, h.number, len(body), h.status), body) for h, body in sent]
    stream = b"".join(frames.pack(f.head) + f.body for f in made)
    collector = Collector(small)
    assert fed(collector, stream, sizes) == made
    assert collector.empty


@given(st.binary(max_size=400), st.lists(st.integers(1, 64), max_size=40))
def test_random_bytes_are_refused_or_wait(stream: bytes, sizes: list[int]) -> None:
    collector = Collector(small)
    found = outcome(lambda: fed(collector, stream, sizes))
    assert isinstance(found, list) or found in ("bad_frame", "too_large")
    assert collector.wanted <= max(HEAD_BYTES, LIMIT)


@given(HEADS, st.integers(0, 300))
def test_a_frame_that_was_cut_off_is_none(head: Head, kept: int) -> None:
    body = bytes(200)
    stream = frames.pack(Head(head.kind, head.number, len(body), head.status)) + body
    cut = stream[: min(kept, len(stream) - 1)]
    collector = Collector(small)
    assert fed(collector, cut, []) == []
    assert collector.empty == (not cut)


@pytest.mark.parametrize("length", [LIMIT + 1, 1 << 20, 1 << 31, MAX_LENGTH])
def test_a_length_beyond_the_limit_is_refused_by_its_header(length: int) -> None:
    collector = Collector(small)
    assert code(lambda: collector.feed(frames.pack(Head(Kind.run, 1, length)))) == "too_large"


def test_one_byte_at_a_time_holds_no_more_than_was_asked_for() -> None:
    collector = Collector(small)
    for byte in frames.pack(Head(Kind.call, 9, LIMIT)):
        assert collector.feed(bytes([byte])) is None
    for left in range(LIMIT, 1, -1):
        assert collector.wanted == left
        assert collector.feed(b"x") is None
    assert collector.feed(b"x") == Frame(Head(Kind.call, 9, LIMIT), b"x" * LIMIT)


def test_more_than_is_wanted_is_not_taken() -> None:
    collector = Collector(small)
    assert code(lambda: collector.feed(bytes(HEAD_BYTES + 1))) == "bad_frame"


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">4sBBHQI", b"TRF\x02", 1, 0, 0, 1, 0),
        struct.pack(">4sBBHQI", b"TRF\x01", 1, 0, 7, 1, 0),
        struct.pack(">4sBBHQI", b"TRF\x01", 0, 0, 0, 1, 0),
        struct.pack(">4sBBHQI", b"TRF\x01", 200, 0, 0, 1, 0),
        struct.pack(">4sBBHQI", b"TRF\x01", 32, 2, 0, 1, 0),
    ],
)
def test_every_part_of_a_header_counts(raw: bytes) -> None:
    assert code(lambda: frames.unpack(raw)) == "bad_frame"


def test_kinds_that_do_not_belong_here_are_refused() -> None:
    allow = at_most(call=10)
    allow(Head(Kind.call, 1, 10))
    assert code(lambda: allow(Head(Kind.call, 1, 11))) == "too_large"
    assert code(lambda: allow(Head(Kind.run, 1, 0))) == "bad_frame"

"""The envelope: one spelling of a chain, and every other sequence of bytes refused without a crash."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_forge import chain, field, fields, whole

from trocar.grants import envelope

SECRET = bytes(range(32))
BODY = field(1, b"a")
GOOD = chain(SECRET, [BODY, b"", field(4, b"c" * 200) + field(6, b"")])


def test_blocks_are_counted() -> None:
    assert envelope.count(GOOD) == 3
    assert envelope.count(chain(SECRET, [field(1, b"a" * 20_000)])) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x12",
        b"\x12\x00",
        b"\x12\xff\xff\xff",
        GOOD[:-1],
        GOOD + b"\x00",
        field(2, field(1, BODY) + field(2, bytes(36)) + field(3, bytes(64))),
        b"\x12\x80\x00" + GOOD[2:],
    ],
)
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        envelope.count(raw)


def test_a_length_has_its_shortest_spelling() -> None:
    [(_, block), (_, proof)] = fields(chain(SECRET, [BODY]))
    assert envelope.count(field(2, block) + field(4, proof)) == 1
    longer = block.replace(b"\x0a\x03" + BODY, b"\x0a\x83\x00" + BODY, 1)
    assert dict(fields(longer)) == dict(fields(block))
    assert longer != block
    with pytest.raises(ValueError, match="shortest"):
        envelope.count(field(2, longer) + field(4, proof))


@settings(max_examples=500)
@given(st.binary(max_size=60), st.integers(0, len(GOOD)), st.integers(0, 60))
def test_no_bytes_crash_the_reader(junk: bytes, at: int, cut: int) -> None:
    raw = GOOD[:at] + junk + GOOD[at + cut :]
    if raw == GOOD:
        return
    try:
        count = envelope.count(raw)
    except ValueError:
        return
    assert 1 <= count <= len(raw)


@pytest.mark.parametrize("size", [31, 33, 0])
def test_the_last_secret_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="one secret"):
        envelope.count(chain(SECRET, [BODY], proof=field(1, bytes(size))))


@pytest.mark.parametrize("extra", [whole(5, 1), field(4, b""), b"\x00"])
def test_a_block_has_three_fields(extra: bytes) -> None:
    with pytest.raises(ValueError, match="signed as ours"):
        envelope.count(chain(SECRET, [BODY], extra=extra))

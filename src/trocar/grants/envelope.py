"""The outer shape of a token's bytes: a chain of signed blocks and the secret that signs the next one.

A biscuit may be more than Trocar wants: signed with ECDSA (whose signatures can be rewritten by anybody, which
would give a block a second name), signed by third parties, sealed, or numbered. All of that is refused here by
reading the protobuf envelope byte by byte: one spelling, Ed25519 only. It checks no signature and reads no
block: `biscuits.py` does.
"""

from __future__ import annotations

from typing import Final

MAX_BLOCKS: Final = 16
_AUTHORITY: Final = 0x12
_BLOCK: Final = 0x1A
_PROOF: Final = 0x22
_SYMBOL: Final = 0x0A
_VERSION: Final = 0x18
_FACT: Final = 0x22
_CHECK: Final = 0x32
_ED25519: Final = bytes.fromhex("08001220")
"""Of a public key: algorithm 0, then 32 bytes."""


def count(raw: bytes) -> int:
    """The number of signed blocks.

    Raises:
        ValueError: the bytes are not exactly a chain of at most `MAX_BLOCKS` blocks signed with Ed25519.
    """
    authority, at = _take(raw, 0, _AUTHORITY)
    _require_signed(authority)
    blocks = 1
    while raw[at : at + 1] == bytes([_BLOCK]):
        block, at = _take(raw, at, _BLOCK)
        _require_signed(block)
        blocks += 1
    proof, at = _take(raw, at, _PROOF)
    secret, end = _take(proof, 0, 0x0A)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"there are {blocks} blocks; {MAX_BLOCKS} are the most")
    if at != len(raw) or end != len(proof) or len(secret) != 32:
        raise ValueError("the chain does not end with one secret")
    return blocks


def _require_signed(block: bytes) -> None:
    """A body, the next public key, a signature: nothing before, between or after."""
    body, at = _take(block, 0, 0x0A)
    _require_plain(body)
    key, at = _take(block, at, 0x12)
    signature, at = _take(block, at, 0x1A)
    if len(key) != 36 or not key.startswith(_ED25519) or len(signature) != 64 or at != len(block):
        raise ValueError("a block is not signed as ours are")


def _require_plain(body: bytes) -> None:
    """Symbols, a version, facts, checks: all of it shows in the text."""
    at = _past(body, 0, _SYMBOL)
    if body[at : at + 1] == bytes([_VERSION]):
        _, at = _varint(body, at + 1)
    at = _past(body, _past(body, at, _FACT), _CHECK)
    if at != len(body):
        raise ValueError(f"byte {at} of a block does not begin a fact or a check")


def _past(raw: bytes, at: int, tag: int) -> int:
    """Where the fields of one tag that begin at `at` end."""
    while raw[at : at + 1] == bytes([tag]):
        _, at = _take(raw, at, tag)
    return at


def _take(raw: bytes, at: int, tag: int) -> tuple[bytes, int]:
    """The field that must stand at `at`, and where the next one starts."""
    if raw[at : at + 1] != bytes([tag]):
        raise ValueError(f"no field {tag:#x} at byte {at}")
    length, at = _varint(raw, at + 1)
    if at + length > len(raw):
        raise ValueError(f"the field that ends at byte {at + length} is cut off")
    return raw[at : at + length], at + length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A length of at most three bytes, in its shortest spelling."""
    value = 0
    for i, byte in enumerate(raw[at : at + 3]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if byte == 0 and i > 0:
                raise ValueError(f"the length at byte {at} is not in its shortest spelling")
            return value, at + i + 1
    raise ValueError(f"no length at byte {at}")

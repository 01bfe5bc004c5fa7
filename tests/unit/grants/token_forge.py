"""Makes the bytes of tokens by hand, with plain protobuf and Ed25519: what an attacker can send, well signed."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of the group that Ed25519 signatures live in."""


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def whole(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def secret_of(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def public_of(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def signed(body: bytes, signer: Ed25519PrivateKey, following: Ed25519PrivateKey, extra: bytes = b"") -> bytes:
    public = whole(1, 0) + field(2, public_of(following))
    signature = signer.sign(body + (0).to_bytes(4, "little") + public_of(following))
    return field(1, body) + field(2, public) + field(3, signature) + extra


def chain(
    root: bytes, bodies: Sequence[bytes], extra: bytes = b"", before: bytes = b"", proof: bytes = b""
) -> bytes:
    """A token of these bodies; the rest are fields that ours do not have."""
    secrets = [Ed25519PrivateKey.from_private_bytes(root), *(Ed25519PrivateKey.generate() for _ in bodies)]
    first, *rest = (signed(body, secrets[i], secrets[i + 1], extra) for i, body in enumerate(bodies))
    end = proof or field(1, secret_of(secrets[-1]))
    return before + field(2, first) + b"".join(field(3, block) for block in rest) + field(4, end)


def fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(raw):
        numbers = []
        for _ in range(2):
            value = shift = 0
            while True:
                value |= (raw[at] & 127) << shift
                shift, at = shift + 7, at + 1
                if raw[at - 1] < 128:
                    break
            numbers.append(value)
        yield numbers[0] >> 3, raw[at : at + numbers[1]]
        at += numbers[1]


def bodies(raw: bytes) -> list[bytes]:
    """The signed bodies of a token's blocks."""
    return [dict(fields(block))[1] for number, block in fields(raw) if number in (2, 3)]


def rewritten(raw: bytes) -> bytes:
    """The token with its last signature (R, S) as (R, S + order), which a lax check takes too."""
    signature = [dict(fields(block))[3] for number, block in fields(raw) if number in (2, 3)][-1]
    other = int.from_bytes(signature[32:], "little") + ORDER
    return raw.replace(signature, signature[:32] + other.to_bytes(32, "little"))


def text(public: bytes, raw: bytes) -> str:
    return "trt_" + base64.urlsafe_b64encode(public + raw).rstrip(b"=").decode()


def raw_of(token: str) -> bytes:
    body = token.removeprefix("trt_")
    return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))[32:]

"""The only file that touches the biscuit library: sign a first block, append one, check a chain.

A biscuit is a chain of blocks. Each is signed by the key that the block before names, and the secret of the
last one travels with the token: whoever holds it can append a block and nobody can take one off. The blocks'
texts are Datalog; what they may say is the business of `tokens.py`, and no Datalog is ever run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import biscuit_auth

from trocar.grants import envelope

_LIBRARY: Final[Any] = biscuit_auth  # its stubs do not say what its functions take
_ED25519: Final = _LIBRARY.Algorithm.Ed25519
_FAULTS: Final = (
    _LIBRARY.BiscuitValidationError,
    _LIBRARY.BiscuitBlockError,
    _LIBRARY.BiscuitBuildError,
    _LIBRARY.BiscuitSerializationError,
    _LIBRARY.DataLogError,
    ValueError,
)


class Broken(Exception):
    """The bytes are not a chain that this root signed."""


@dataclass(frozen=True, slots=True)
class Block:
    """One signed block: its name, which nobody can change without its signer, and what it says."""

    id: str
    source: str


@dataclass(frozen=True, slots=True)
class Root:
    """The pair of keys that signs first blocks; 32 bytes each."""

    secret: bytes
    public: bytes

    @classmethod
    def make(cls) -> Root:
        return cls.of(bytes(_LIBRARY.KeyPair().private_key.to_bytes()))

    @classmethod
    def of(cls, secret: bytes) -> Root:
        """The pair of a secret.

        Raises:
            Broken: it is not a secret of 32 bytes.
        """
        try:
            pair = _LIBRARY.KeyPair.from_private_key(_LIBRARY.PrivateKey.from_bytes(secret, _ED25519))
        except _FAULTS as e:
            raise Broken from e
        return cls(secret, bytes(pair.public_key.to_bytes()))


def sign(root: Root, source: str) -> bytes:
    """A chain of one block."""
    secret = _LIBRARY.PrivateKey.from_bytes(root.secret, _ED25519)
    return bytes(_LIBRARY.BiscuitBuilder(source).build(secret).to_bytes())


def append(raw: bytes, public: bytes, source: str) -> bytes:
    """The chain with one more block, signed by the secret that travels in it.

    Raises:
        Broken: `raw` is not a whole chain of the root `public`.
    """
    chain, _ = _checked(raw, public)
    return bytes(chain.append(_LIBRARY.BlockBuilder(source)).to_bytes())


def blocks(raw: bytes, public: bytes) -> tuple[Block, ...]:
    """The blocks of a chain whose every signature was checked, first one first.

    Raises:
        Broken: it is not a whole chain of the root `public`.
    """
    chain, count = _checked(raw, public)
    try:
        sources = [chain.block_source(i) for i in range(count)]
    except _FAULTS as e:
        raise Broken from e
    return tuple(Block(_name(i), s) for i, s in zip(chain.revocation_ids, sources, strict=True))


def _checked(raw: bytes, public: bytes) -> tuple[Any, int]:
    try:
        count = envelope.count(raw)
        return _LIBRARY.Biscuit.from_bytes(raw, _LIBRARY.PublicKey.from_bytes(public, _ED25519)), count
    except _FAULTS as e:
        raise Broken from e


def _name(signature: str) -> str:
    """128 bits of a hash: a block's signature in hexadecimal is too long for people and for columns."""
    return hashlib.sha256(bytes.fromhex(signature)).hexdigest()[:32]

"""A file of the airlock as whoever got it reads it: its manifest, its tensors, and whether anything was changed.

    header: {"__metadata__": {"trocar": {"manifest": {...}, "signature": "<hex>"}}, tensors ...} | tensor bytes

The manifest is canonical JSON and holds the SHA-256 of all tensors with their names and shapes. Only checking the
signature needs the package `cryptography`, which is loaded then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trocar import errors, strict

FIELD: Final = "trocar"
_LENGTH: Final = 8
_METADATA: Final = "__metadata__"
_MOST_KEYS: Final = 1_000_000
_MOST_HEADER_BYTES: Final = 10_000_000
_UNREADABLE: Final = (errors.TrocarError, KeyError, TypeError, ValueError, AttributeError)


def canonical(value: Mapping[str, Any]) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256(header: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 of all tensors with their names, types, shapes and places."""
    entries = {name: entry for name, entry in header.items() if name != _METADATA}
    return hashlib.sha256(canonical(entries).encode("ascii") + b"\n" + data).hexdigest()


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that was looked at: what it says, and what is wrong with it; trust nothing unless `faults` is empty."""

    manifest: Mapping[str, Any]
    faults: tuple[str, ...]


def verify(raw: bytes, public_key: str) -> Opened:
    """Compares a file with its manifest, and the manifest with its signature.

    Args:
        raw: the whole file, from anywhere.
        public_key: of the gate that is said to have let it out; not taken from the file.

    Raises:
        ProgramError: `bad_value` for a public key that is none.
        ClientError: `missing_extra` without the package `cryptography`.
    """
    known = _key(public_key)
    try:
        header, data = split(raw)
        manifest, signature = _signed(header)
    except _UNREADABLE:
        return Opened({}, ("it is not a file of an airlock",))
    faults = []
    if not _is_signed(known, canonical(manifest), signature):
        faults.append("the manifest was not signed by this gate, or was changed since")
    if sha256(header, data) != manifest.get("sha256"):
        faults.append("the tensors are not those of the manifest")
    return Opened(manifest, tuple(faults))


def manifest_of(raw: bytes) -> Mapping[str, Any]:
    """What a file says of itself, whether it is true or not.

    Raises:
        ClientError: `bad_argument` when it is not a file of an airlock.
    """
    try:
        return _signed(split(raw)[0])[0]
    except _UNREADABLE:
        raise errors.refuse("bad_argument", "file", "it is not a file of an airlock") from None


def _key(public_key: str) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise errors.refuse(
            "missing_extra", "verify", "the package 'cryptography' is not installed",
            next_step="Run `pip install cryptography`.",
        ) from None  # fmt: skip
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    except ValueError:
        raise errors.refuse("bad_value", "public_key", "a public key is 64 hex digits") from None


def _is_signed(key: Any, text: str, signature: str) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(signature), text.encode("ascii"))
    except (ValueError, InvalidSignature):
        return False
    return True


def _signed(header: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The manifest and signature in a header; one of many exceptions when they are not where they belong."""
    metadata = header[_METADATA]
    if set(metadata) != {FIELD}:
        raise TypeError("unsigned words")
    text = str(metadata[FIELD])
    signed = strict.read_json(text.encode(), most_keys=_MOST_KEYS)
    manifest, signature = signed["manifest"], signed["signature"]
    # one spelling: what is not covered by the signature must not vary
    if (
        canonical({"manifest": manifest, "signature": signature.lower()}) != text
        or type(manifest) is not dict
    ):
        raise TypeError("not canonical")
    return manifest, signature


def split(raw: bytes) -> tuple[Mapping[str, Any], bytes]:
    """The header and the tensor bytes of a safetensors file."""
    length = int.from_bytes(raw[:_LENGTH], "little")
    if length > min(len(raw) - _LENGTH, _MOST_HEADER_BYTES):
        raise errors.refuse("bad_tensor", "", "the file is shorter than its header says")
    header = strict.read_json(raw[_LENGTH : _LENGTH + length], most_keys=_MOST_KEYS)
    if not isinstance(header, dict):
        raise errors.refuse("bad_tensor", "", "the file has no header")
    return header, raw[_LENGTH + length :]

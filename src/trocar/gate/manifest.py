"""The file that leaves: packed tensors in safetensors, with a signed manifest of what they are.

    header: {"__metadata__": {"trocar": {"manifest": {...}, "signature": "<hex>"}}, tensors ...} | tensor bytes

The manifest is canonical JSON (sorted keys, ASCII) and holds the SHA-256 of all tensors, with their names and
shapes, so a signature over it covers the whole file. It is signed with Ed25519 by a key that is made once, in
the gate's folder, for its owner alone. Anybody with the public key can tell what the gate let out, whatever
became of the file since. Times are milliseconds since 1970, UTC. This module knows nothing of requests,
budgets or databases.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from safetensors.numpy import save

from trocar import errors, strict
from trocar.gate.chain import canonical
from trocar.gate.database import unavailable

KEY_FILE: Final = "airlock.ed25519"
FORMAT: Final = 1
_KEY_BYTES: Final = 32
_LENGTH: Final = 8
_FIELD: Final = "trocar"
_METADATA: Final = "__metadata__"
_MOST_KEYS: Final = 1_000_000
_MOST_HEADER_BYTES: Final = 10_000_000

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ManifestPart:
    """One array of a file, which holds it as the tensors `name:codes` and `name:scales`.

    Attributes:
        site: canonical site, or empty.
        texts: words that go with it.
    """

    name: str
    site: str
    origin: str
    rows: int
    width: int
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a file is, who let it out, and what it cost.

    Attributes:
        request: id of the airlock's request.
        fingerprint: of the model it was made on.
        bits: of one number.
        approvers: holders who approved, sorted.
        digest: of what was submitted: the frozen bytes with their description.
        sha256: of the file's tensors: their names, types, shapes and places as canonical JSON, a line feed,
            and all their bytes.
        charged_bits: what the ledger charged.
        ledger_seq, ledger_head: the end of the ledger's log before the charge.
        submitted_ms, released_ms: UTC.
        public_key: of the gate, 64 hex digits.
    """

    request: str
    kind: str
    lineage: str
    fingerprint: str
    author: str
    bits: int
    parts: tuple[ManifestPart, ...]
    approvers: tuple[str, ...]
    digest: str
    sha256: str
    charged_bits: int
    ledger_seq: int
    ledger_head: str
    submitted_ms: int
    released_ms: int
    public_key: str
    format: int = FORMAT

    @property
    def text(self) -> str:
        """Canonical JSON: what is signed."""
        return canonical(asdict(self))


class SigningKey:
    """The gate's Ed25519 key; its repr shows the public half only."""

    def __init__(self, raw: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(raw)

    @classmethod
    def made(cls) -> SigningKey:
        """A new key that is kept nowhere."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def in_folder(cls, folder: Path) -> SigningKey:
        """The key kept in `folder`; made there, once, when there is none.

        Raises:
            ServerFault: `ledger_unavailable` when it cannot be made or read, or others may read it.
        """
        path = folder / KEY_FILE
        try:
            if not path.exists():
                _make(path)
            return cls(_read(path))
        except OSError as e:
            raise unavailable("the airlock's signing key cannot be read or made") from e

    @property
    def public_key(self) -> str:
        """64 hex digits; public."""
        return self._private.public_key().public_bytes_raw().hex()

    def sign(self, text: str) -> str:
        """The signature of a text, 128 hex digits."""
        return self._private.sign(text.encode("ascii")).hex()

    def __repr__(self) -> str:
        return f"SigningKey(public_key={self.public_key!r})"


def _make(path: Path) -> None:
    """Writes a new key whole and on disk under another name first; whoever links it first has made it."""
    partial = path.with_name(f".{KEY_FILE}.{os.getpid()}.{os.urandom(8).hex()}")
    file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(Ed25519PrivateKey.generate().private_bytes_raw())
            stream.flush()
            os.fsync(stream.fileno())
        os.link(partial, path)
    except FileExistsError:
        pass  # another process was first: its key is the key
    finally:
        partial.unlink()


def _read(path: Path) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(file, "rb") as stream:
        facts, raw = os.fstat(stream.fileno()), stream.read(_KEY_BYTES + 1)
    if facts.st_mode & 0o077 or facts.st_uid != os.geteuid():
        raise unavailable("the airlock's signing key may be read by others: make its mode 0600")
    if len(raw) != _KEY_BYTES:
        raise unavailable("the airlock's signing key is damaged")
    return raw


def tensor_sha256(tensors: Tensors) -> str:
    """SHA-256 of the tensors as `build` lays them out."""
    return _sha256(*_split(save(dict(tensors))))


def build(tensors: Tensors, manifest: Manifest, key: SigningKey) -> bytes:
    """The file: the same tensors and manifest give the same bytes."""
    # one metadata key: the library keeps several in no fixed order
    signed = canonical({"manifest": asdict(manifest), "signature": key.sign(manifest.text)})
    raw = bytes(save(dict(tensors), metadata={_FIELD: signed}))
    if _sha256(*_split(raw)) != manifest.sha256:
        raise errors.refuse("internal", "", "a manifest that is not of these tensors")
    return raw


def _sha256(header: Mapping[str, Any], data: bytes) -> str:
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
    """
    try:
        known = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    except ValueError:
        raise errors.refuse("bad_value", "public_key", "a public key is 64 hex digits") from None
    try:
        header, data = _split(raw)
        manifest, signature = _signed(header)
    except (errors.TrocarError, KeyError, TypeError, ValueError, AttributeError):
        return Opened({}, ("it is not a file of an airlock",))
    faults = []
    if not _is_signed(known, canonical(manifest), signature):
        faults.append("the manifest was not signed by this gate, or was changed since")
    if _sha256(header, data) != manifest.get("sha256"):
        faults.append("the tensors are not those of the manifest")
    return Opened(manifest, tuple(faults))


def _is_signed(key: Ed25519PublicKey, text: str, signature: str) -> bool:
    try:
        key.verify(bytes.fromhex(signature), text.encode("ascii"))
    except (ValueError, InvalidSignature):
        return False
    return True


def _signed(header: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The manifest and signature in a header; one of many exceptions when they are not where they belong."""
    metadata = header[_METADATA]
    if set(metadata) != {_FIELD}:
        raise TypeError("unsigned words")
    text = str(metadata[_FIELD])
    signed = strict.read_json(text.encode(), most_keys=_MOST_KEYS)
    manifest, signature = signed["manifest"], signed["signature"]
    # one spelling: what is not covered by the signature must not vary
    if (
        canonical({"manifest": manifest, "signature": signature.lower()}) != text
        or type(manifest) is not dict
    ):
        raise TypeError("not canonical")
    return manifest, signature


def _split(raw: bytes) -> tuple[Mapping[str, Any], bytes]:
    """The header and the tensor bytes of a safetensors file."""
    length = int.from_bytes(raw[:_LENGTH], "little")
    if length > min(len(raw) - _LENGTH, _MOST_HEADER_BYTES):
        raise errors.refuse("bad_tensor", "", "the file is shorter than its header says")
    header = strict.read_json(raw[_LENGTH : _LENGTH + length], most_keys=_MOST_KEYS)
    if not isinstance(header, dict):
        raise errors.refuse("bad_tensor", "", "the file has no header")
    return header, raw[_LENGTH + length :]

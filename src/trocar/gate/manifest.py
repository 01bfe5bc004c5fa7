"""The file that leaves: packed tensors in safetensors, with a signed manifest of what they are.

    header: {"__metadata__": {"trocar": {"manifest": {...}, "signature": "<hex>"}}, tensors ...} | tensor bytes

The manifest is canonical JSON (sorted keys, ASCII) and holds the SHA-256 of all tensors, with their names and
shapes, so a signature over it covers the whole file. It is signed with Ed25519 by a key that is made once, in
the gate's folder, for its owner alone. Anybody with the public key can tell what the gate let out, whatever
became of the file since (`wire.signed`). Times are milliseconds since 1970, UTC. This module knows nothing of
requests, budgets or databases.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from trocar import errors
from trocar.gate.database import unavailable
from trocar.wire import signed
from trocar.wire.signed import Opened, canonical, verify

__all__ = ["KEY_FILE", "Manifest", "ManifestPart", "Opened", "SigningKey", "build", "tensor_sha256", "verify"]
KEY_FILE: Final = "airlock.ed25519"
FORMAT: Final = 1
_KEY_BYTES: Final = 32

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
    return signed.sha256(*signed.split(save(dict(tensors))))


def build(tensors: Tensors, manifest: Manifest, key: SigningKey) -> bytes:
    """The file: the same tensors and manifest give the same bytes."""
    # one metadata key: the library keeps several in no fixed order
    text = canonical({"manifest": asdict(manifest), "signature": key.sign(manifest.text)})
    raw = bytes(save(dict(tensors), metadata={signed.FIELD: text}))
    if signed.sha256(*signed.split(raw)) != manifest.sha256:
        raise errors.refuse("internal", "", "a manifest that is not of these tensors")
    return raw

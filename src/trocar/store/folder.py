"""Files on a local disk: drafts in `tmp/`, shelved files in `data/ENTRY/NAME`, private to this user.

A draft is written and synchronised under a random name; shelving renames it and synchronises the folder. This
module knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from trocar import errors
from trocar.store.catalog import File
from trocar.store.shelf import Draft, Parts, Slot, damaged

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_PIECE_BYTES: Final = 8 << 20
_PROBES: Final = 8


class Folder:
    """Owns `root/data` and `root/tmp`."""

    def __init__(self, root: Path) -> None:
        self._data, self._tmp = root / "data", root / "tmp"
        for folder in (self._data, self._tmp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="trocar-store-hash")

    def close(self) -> None:
        self._hashing.shutdown()

    def draft(self, entry: str, parts: Parts, slot: Slot) -> Draft:
        path, size, digest = self._tmp / secrets.token_hex(16), 0, hashlib.sha256()
        with _discarding([path]), disk_faults():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb", buffering=0) as file:
                for part in parts:
                    view = memoryview(part).cast("B")
                    hashed = self._hashing.submit(digest.update, view)  # while the disk is busy
                    _write_all(file.fileno(), view)
                    size += view.nbytes
                    hashed.result()
                os.fsync(file.fileno())
        return Draft(slot, entry, f"{entry}/{slot.name}", str(path), size, digest.hexdigest())

    def shelve(self, entry: str, drafts: Sequence[Draft]) -> None:
        folder = self._data / entry
        with _discarding([self._data / d.place for d in drafts], folder), disk_faults():
            if not folder.exists():
                folder.mkdir(mode=0o700)
                _sync_folder(self._data)
            for draft in drafts:
                Path(draft.held).rename(self._data / draft.place)
            _sync_folder(folder)

    def discard(self, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            Path(draft.held).unlink(missing_ok=True)

    def remove(self, places: Iterable[str]) -> None:
        folders = set()
        for place in places:
            (self._data / place).unlink(missing_ok=True)
            folders.add((self._data / place).parent)
        for folder in folders:
            _remove_if_empty(folder)

    def sweep(self, known: set[str]) -> None:
        for draft in self._tmp.iterdir():
            draft.unlink()
        for place in self.sizes().keys() - known:
            (self._data / place).unlink()
        for folder in self._data.iterdir():
            _remove_if_empty(folder)

    def map(self, file: File) -> mmap.mmap:
        fd = self._open(file)
        try:
            return mmap.mmap(fd, file.size_bytes, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)

    def local(self, file: File) -> Path:
        os.close(self._open(file))
        return self._data / file.path

    def _open(self, file: File) -> int:
        fd = os.open(self._data / file.path, os.O_RDONLY | os.O_NOFOLLOW)
        size = os.fstat(fd).st_size
        if size != file.size_bytes:
            os.close(fd)
            raise damaged(f"{file.path} has {size} bytes and was written with {file.size_bytes}")
        return fd

    def hint(self, file: File) -> None:
        with suppress(OSError):  # whoever maps it will say what is wrong
            fd = os.open(self._data / file.path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _is_cold(fd, [0, file.size_bytes // 2, file.size_bytes - 1]):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def pick(self, file: File, starts: Sequence[int], out: memoryview) -> bool:
        """Leaves the reading to the map; rows on a cold disk are asked for all at once, so that it serves many."""
        fd, each = self._open(file), len(out) // max(1, len(starts))
        try:
            if _is_cold(fd, starts[:: 1 + len(starts) // _PROBES]):
                for start in sorted(starts):
                    os.posix_fadvise(fd, start, each, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)
        return False

    def sizes(self) -> dict[str, int]:
        found = [p for p in self._data.rglob("*") if not p.is_dir()]
        return {str(p.relative_to(self._data)): p.lstat().st_size for p in found}

    def digest(self, file: File) -> str:
        with open(self._data / file.path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


def _is_cold(fd: int, starts: Sequence[int]) -> bool:
    """Whether a byte at one of the starts is not in memory; False where the system cannot say."""
    byte = bytearray(1)
    try:
        for start in starts:
            os.preadv(fd, [byte], start, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view[:_PIECE_BYTES]) :]


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
def disk_faults() -> Iterator[None]:
    """Turns a full disk into our refusal; any other fault of the disk stays what it is."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise errors.refuse("disk_full", "", "the disk that holds the store is full") from e
        raise

"""The cache of a store on object storage: whole files on the local disk.

What is in the cache has been compared with its SHA-256. When it grows beyond its bound, what was used longest ago is
deleted; whoever has it mapped reads on. Several processes may share the folder.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from trocar.store.catalog import File
from trocar.store.folder import disk_faults
from trocar.store.shelf import damaged

_TRIES: Final = 5


class Cache:
    """Owns the folder `root`.

    Args:
        most_bytes: how much it keeps; one file is kept even if it is larger.
        fetch: the bytes of a file, from where it comes.
    """

    def __init__(self, root: Path, most_bytes: int, fetch: Callable[[File], Iterator[memoryview]]) -> None:
        self._root, self._most_bytes, self._fetch = root, most_bytes, fetch
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._coming: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._fetching = ThreadPoolExecutor(2, thread_name_prefix="trocar-store-fetch")

    def close(self) -> None:
        self._fetching.shutdown(cancel_futures=True)

    def sweep(self) -> None:
        """Deletes what a dead process has half fetched."""
        for path in self._root.glob("*.part"):
            path.unlink(missing_ok=True)

    def forget(self, places: Iterable[str]) -> None:
        """Deletes files that no longer exist."""
        for place in places:
            (self._root / _name(place)).unlink(missing_ok=True)

    def has(self, file: File) -> bool:
        return self._place(file).exists()

    def path(self, file: File) -> Path:
        """Where the file lies, after fetching it if need be; raises what `fetch` does, or `store_damaged`."""
        with self.open(file):
            return self._place(file)

    def open(self, file: File) -> IO[bytes]:
        """The file, opened; raises as `path` does."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                held = open(self._place(file), "rb")  # noqa: SIM115
                os.utime(held.fileno())
                return held
            self._come(file).result()
        raise OSError(f"{file.path} leaves the cache as fast as it comes; give it more room")

    def ahead(self, file: File) -> None:
        """Fetches the file in the background, if it is not there; what goes wrong shows when it is opened."""
        if not self.has(file):
            self._come(file)

    def _come(self, file: File) -> Future[None]:
        with self._lock:
            future = self._coming.get(file.path)
            if future is None:
                future = self._fetching.submit(self._get, file)
                self._coming[file.path] = future
            return future

    def _get(self, file: File) -> None:
        part, digest = self._root / f"{secrets.token_hex(16)}.part", hashlib.sha256()
        try:
            with disk_faults(), open(part, "xb") as out:
                for piece in self._fetch(file):
                    digest.update(piece)
                    out.write(piece)
            if digest.hexdigest() != file.sha256:
                raise damaged(f"{file.path} does not have the SHA-256 it was written with")
            part.rename(self._place(file))
        finally:
            part.unlink(missing_ok=True)
            with self._lock:
                self._coming.pop(file.path, None)
        self._make_room(keep=self._place(file).name)

    def _make_room(self, keep: str) -> None:
        found = []
        for path in self._root.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda f: f[0]):
            if total <= self._most_bytes:
                return
            if path.name != keep and path.suffix != ".part":
                path.unlink(missing_ok=True)
                total -= size

    def _place(self, file: File) -> Path:
        return self._root / _name(file.path)


def _name(place: str) -> str:
    return place.replace("/", ",")

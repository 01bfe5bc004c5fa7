"""The depot: the folder of a store, its catalog, and the order in which files become visible in it.

    lock              shared while a store is open; exclusive while leftovers are swept
    catalog.sqlite    see `catalog`
    writing/ID        locked by the writer of a handle for as long as it lives
    tmp/, data/       see `folder`; on object storage, see `bucket`

Commit order: draft the files of a shard, shelve them, one transaction. What no transaction has listed does not
exist. This module knows nothing of what is inside a file, except that it has a size and a SHA-256.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog, ids
from trocar.store.catalog import Catalog, File
from trocar.store.shelf import Draft, Shelf, damaged


class Depot:
    """Owns the folder `root`, and what lies on the shelf.

    Several processes may open the same root; leftovers of a crash are swept by the first that finds itself
    alone. Within one process, publishing, deleting and checking exclude each other.

    Args:
        shelf: makes the place for files; called with `root`, which exists.
    """

    def __init__(self, root: Path, shelf: Callable[[Path], Shelf]) -> None:
        self._writing = root / "writing"
        for folder in (root, self._writing):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._moving = threading.RLock()
        self._claims: dict[str, int] = {}
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        with ExitStack() as undo:
            undo.callback(os.close, self._lock)
            alone = self._try_lock_alone()
            self.catalog = Catalog(root / "catalog.sqlite")
            undo.callback(self.catalog.close)
            self.shelf = shelf(root)
            undo.callback(self.shelf.close)
            if alone:
                self._sweep_leftovers()
                fcntl.flock(self._lock, fcntl.LOCK_SH)
            undo.pop_all()

    def close(self) -> None:
        for entry_id in list(self._claims):
            self.unclaim(entry_id)
        self.shelf.close()
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
        with self.catalog.write() as c:
            catalog.fail_open(c)
            known = {f.path for f in catalog.files(c)}
        self.shelf.sweep(known)
        for mark in self._writing.iterdir():
            mark.unlink()

    def claim(self, entry_id: str) -> bool:
        """Marks an entry as being written, until `unclaim` or the death of this process.

        Returns:
            False when another writer, here or in another process, lives.
        """
        mark = self._writing / entry_id
        fd = os.open(mark, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(mark).st_ino == os.fstat(fd).st_ino:
                self._claims[entry_id] = fd
                return True
        except (BlockingIOError, FileNotFoundError):  # taken, or being given back just now
            pass
        os.close(fd)
        return False

    def unclaim(self, entry_id: str) -> None:
        """Ends a claim of this process; nothing happens when there is none."""
        fd = self._claims.pop(entry_id, None)
        if fd is not None:
            (self._writing / entry_id).unlink(missing_ok=True)
            os.close(fd)

    def publish(self, entry_id: str, drafts: Sequence[Draft], admit: Callable[[sa.Connection], None]) -> None:
        """Makes the drafts visible together, or not at all.

        Args:
            entry_id: the entry the files belong to.
            drafts: what the shelf's `draft` returned.
            admit: runs first in the transaction that lists the files; raises to refuse them.
        """
        with self._moving:
            done = False
            try:
                self.shelf.shelve(entry_id, drafts)
                with self.catalog.write() as c:
                    admit(c)
                    catalog.add_files(c, [d.listed() for d in drafts])
                done = True
            finally:
                if not done:
                    self.shelf.discard(drafts)
                    self.shelf.remove([d.place for d in drafts])

    def withdraw(self, change: Callable[[sa.Connection], list[File]]) -> None:
        """Runs a transaction that unlists files, then deletes them; what readers have mapped stays."""
        with self._moving:
            with self.catalog.write() as c:
                gone = change(c)
            self.shelf.remove([f.path for f in gone])

    def map(self, file: File) -> mmap.mmap:
        """Maps a published file.

        Raises:
            ServerFault: `store_damaged` when its size is not the one that was written, or it is lost.
            NotFound: `handle_not_found` when its entry was deleted meanwhile.
        """
        try:
            return self.shelf.map(file)
        except FileNotFoundError:
            raise self._missing(file) from None

    def load(self, file: File) -> bytes:
        """The bytes of a small file, after comparing its hash as well; raises as `map` does."""
        with self.map(file) as mapped:
            raw = mapped[:]
        if hashlib.sha256(raw).hexdigest() != file.sha256:
            raise damaged(f"{file.path} does not have the SHA-256 it was written with")
        return raw

    def local(self, file: File) -> Path:
        """A path on this machine with the file's bytes, whose hash was compared; raises as `map` does."""
        self.load(file)
        return self.shelf.local(file)

    def pick(self, file: File, starts: Sequence[int], out: memoryview) -> bool:
        """As `Shelf.pick`; raises as `map` does."""
        try:
            return self.shelf.pick(file, starts, out)
        except FileNotFoundError:
            raise self._missing(file) from None

    def _missing(self, file: File) -> errors.TrocarError:
        """The reason for a FileNotFoundError: deleted meanwhile, or lost."""
        with self.catalog.read() as c:
            listed = catalog.find(c, file.entry) is not None
        return damaged(f"{file.path} is missing") if listed else ids.not_found(file.entry)

    def check(self) -> list[str]:
        """What is wrong with names and sizes: files missing, of another size, or unlisted."""
        with self._moving:
            with self.catalog.read() as c:
                listed = catalog.files(c)
            found = self.shelf.sizes()
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
            found = self.shelf.digest(file)
        except FileNotFoundError:
            with self.catalog.read() as c:  # deleted while we were reading is not damage
                return "missing" if file in catalog.files(c, file.entry) else None
        return None if found == file.sha256 else "another SHA-256 than the one written"

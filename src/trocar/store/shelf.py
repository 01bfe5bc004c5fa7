"""What a depot asks of the place where its files lie: whole files under a name, or nothing.

A file is drafted first, where nobody reads it, and shelved later; then it never changes. Two shelves exist:
`folder` on a local disk and `bucket` on object storage. Neither knows what is inside a file, nor the catalog.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trocar import errors
from trocar.store.catalog import File

Parts = Iterable[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Slot:
    """What a file of an entry is for; the names mean what they mean in `catalog.File`."""

    name: str
    shard: int
    site: str
    n_rows: int
    label: str = ""
    first_key: int | None = None
    last_key: int | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A file that is written and durable, and that nobody reads yet.

    Attributes:
        place: where it will lie.
        held: where it lies now.
    """

    slot: Slot
    entry: str
    place: str
    held: str
    size_bytes: int
    sha256: str

    def listed(self) -> File:
        """The catalog's line for it."""
        s = self.slot
        return File(
            self.place, self.entry, s.shard, s.site, s.n_rows, self.size_bytes, self.sha256,
            s.label, s.first_key, s.last_key,
        )  # fmt: skip


class Shelf(Protocol):
    """Where files lie, by the names that the catalog knows."""

    def draft(self, entry: str, parts: Parts, slot: Slot) -> Draft:
        """Writes `parts` one after the other; when it returns they survive a crash. Leaves nothing when it raises."""
        ...

    def shelve(self, entry: str, drafts: Sequence[Draft]) -> None:
        """Puts drafts of one entry into their places; they are durable there when it returns."""
        ...

    def discard(self, drafts: Sequence[Draft]) -> None:
        """Deletes drafts that were not shelved."""
        ...

    def remove(self, places: Iterable[str]) -> None:
        """Deletes files, if they are there; what is mapped stays readable."""
        ...

    def sweep(self, known: set[str]) -> None:
        """Deletes every draft, and every file that is not known. Nobody may be writing."""
        ...

    def map(self, file: File) -> mmap.mmap:
        """The file's bytes, in pages of this process alone.

        Raises:
            ServerFault: `store_damaged` when the size is not the one that was written.
            FileNotFoundError: it was deleted after the caller looked it up.
        """
        ...

    def local(self, file: File) -> Path:
        """A path on this machine with the file's bytes; raises as `map` does."""
        ...

    def hint(self, file: File) -> None:
        """Says that the file will be mapped soon."""
        ...

    def pick(self, file: File, starts: Sequence[int], out: memoryview) -> bool:
        """Reads len(out) / len(starts) bytes from each of the starts, one after the other, into `out`.

        Returns:
            False when nothing was read, since `map` serves the caller better; raises as `map` does.
        """
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every shelved file, by place."""
        ...

    def digest(self, file: File) -> str:
        """SHA-256 of the file as it is now; FileNotFoundError when it is not there."""
        ...

    def close(self) -> None:
        """Lets go of what it holds open; files stay."""
        ...


def damaged(reason: str) -> errors.TrocarError:
    return errors.refuse("store_damaged", "", reason)

"""Files on S3-compatible object storage, with a cache of whole files on the local disk.

An object is written in one piece under a name that nobody else can have and that no reader knows before the catalog
lists it, so it needs no second place. Reading fetches the object into the cache, compares its SHA-256 on the way,
and maps it there; a few rows are read by ranges instead. The bucket's `owner` object names the store that it
belongs to: another one does not open it, since sweeping would delete what it does not know.
"""

from __future__ import annotations

import hashlib
import mmap
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from trocar import errors
from trocar.store.cache import Cache
from trocar.store.catalog import File
from trocar.store.shelf import Draft, Parts, Slot, damaged

OWNER: Final = "owner"
RANGE_BYTES: Final = 8 << 20
SINGLE_BYTES: Final = 128 << 20  # what is larger goes up in parts
LATENCY_BYTES: Final = 64 << 10  # what a connection moves while one request waits
_AT_ONCE: Final = 16
_RETRY: Final = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}


@dataclass(frozen=True, slots=True)
class Objects:
    """Where the objects of a store lie.

    Attributes:
        url: "s3://BUCKET/PREFIX"; the bucket exists.
        options: what the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) does not say, by lower-case names
            without AWS_: `access_key_id`, `secret_access_key`, `endpoint`, `region`.
        cache_bytes: how much of the local disk the cache may fill.
    """

    url: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    cache_bytes: int = 16 << 30

    def shelf(self) -> Callable[[Path], Bucket]:
        """Makes the shelf of a store in a folder."""
        return lambda root: Bucket(root, self)


class Bucket:
    """Owns everything under the prefix, and `root/cache`."""

    def __init__(self, root: Path, objects: Objects) -> None:
        self._remote, self._api = _connect(objects)
        self._drafts: set[str] = set()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="trocar-store-s3")
        self._cache = Cache(root / "cache", objects.cache_bytes, self._fetch)
        done = False
        try:
            self._claim(root / OWNER, objects.url)
            done = True
        finally:
            if not done:
                self.close()

    def close(self) -> None:
        self._cache.close()
        self._pool.shutdown()

    def _claim(self, mark: Path, url: str) -> None:
        """Writes this store's name into an empty place, or finds it there."""
        if not mark.exists():
            mark.write_text(secrets.token_hex(16))
        mine = mark.read_bytes()
        with _clear_faults():
            try:
                self._api.put(self._remote, OWNER, mine, mode="create")
            except self._api.exceptions.AlreadyExistsError:
                if bytes(self._api.get(self._remote, OWNER).bytes()) != mine:
                    reason = f"{url} belongs to another store"
                    step = "Name a prefix of its own, or the folder that this one was made with."
                    raise errors.refuse("bad_value", "objects", reason, next_step=step) from None

    def draft(self, entry: str, parts: Parts, slot: Slot) -> Draft:
        place = f"{entry}/{secrets.token_hex(8)}-{slot.name}"
        digest, pieces = hashlib.sha256(), [memoryview(part).cast("B") for part in parts]
        size = sum(p.nbytes for p in pieces)
        hashing = self._pool.submit(_update, digest, pieces)  # while the network is busy
        self._drafts.add(place)
        done = False
        try:
            self._put(place, pieces, size)
            done = True
        finally:
            hashing.result()
            if not done:
                with suppress(OSError):  # it may be there all the same
                    self.remove([place])
        return Draft(slot, entry, place, place, size, digest.hexdigest())

    def _put(self, place: str, pieces: Sequence[memoryview], size: int) -> None:
        with _clear_faults():
            if size <= SINGLE_BYTES:
                self._api.put(self._remote, place, b"".join(pieces), use_multipart=False)
            else:
                cut = _cut(pieces)
                self._api.put(self._remote, place, cut, use_multipart=True, chunk_size=RANGE_BYTES)

    def shelve(self, entry: str, drafts: Sequence[Draft]) -> None:
        """They are in their places already, and are only called what they are."""
        self._drafts -= {d.place for d in drafts}

    def discard(self, drafts: Sequence[Draft]) -> None:
        self.remove([d.place for d in drafts])

    def remove(self, places: Iterable[str]) -> None:
        gone = list(places)
        self._drafts -= set(gone)
        self._cache.forget(gone)
        with _clear_faults():
            for start in range(0, len(gone), 1000):
                self._api.delete(self._remote, gone[start : start + 1000])

    def sweep(self, known: set[str]) -> None:
        self._cache.sweep()
        self.remove(self.sizes().keys() - known)

    def map(self, file: File) -> mmap.mmap:
        with self._cache.open(file) as held:
            return mmap.mmap(held.fileno(), file.size_bytes, access=mmap.ACCESS_COPY)

    def local(self, file: File) -> Path:
        return self._cache.path(file)

    def hint(self, file: File) -> None:
        self._cache.ahead(file)

    def pick(self, file: File, starts: Sequence[int], out: memoryview) -> bool:
        """Reads ranges when they are few and the file is not in the cache."""
        each = len(out) // max(1, len(starts))
        if len(starts) * max(each, LATENCY_BYTES) >= file.size_bytes or self._cache.has(file):
            return False

        def read(number: int) -> None:
            start = starts[number]
            found = self._api.get_range(self._remote, file.path, start=start, length=each)
            out[number * each : (number + 1) * each] = memoryview(found)

        with _clear_faults():
            list(self._pool.map(read, range(len(starts))))
        return True

    def sizes(self) -> dict[str, int]:
        with _clear_faults():
            found = {m["path"]: m["size"] for chunk in self._api.list(self._remote) for m in chunk}
        return {place: size for place, size in found.items() if place not in {OWNER, *self._drafts}}

    def digest(self, file: File) -> str:
        digest = hashlib.sha256()
        with _clear_faults():
            for piece in self._api.get(self._remote, file.path).stream(min_chunk_size=RANGE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def _fetch(self, file: File) -> Iterator[memoryview]:
        """The file's bytes in order, several ranges at once, after a look at its size."""
        with _clear_faults():
            size = self._api.head(self._remote, file.path)["size"]
            if size != file.size_bytes:
                raise damaged(f"{file.path} has {size} bytes and was written with {file.size_bytes}")
            starts = range(0, size, RANGE_BYTES)
            waiting = []
            for start in starts:
                end = min(start + RANGE_BYTES, size)
                args = (self._remote, file.path)
                waiting.append(self._pool.submit(self._api.get_range, *args, start=start, end=end))
                if len(waiting) == _AT_ONCE // 2:
                    yield memoryview(waiting.pop(0).result())
            for future in waiting:
                yield memoryview(future.result())


def _connect(objects: Objects) -> tuple[Any, Any]:
    """The object store, and the library that speaks to it."""
    try:
        import obstore
        import obstore.exceptions
        from obstore.store import S3Store
    except ImportError as e:
        step = "Run `pip install 'trocar[s3]'`."
        raise errors.refuse("missing_extra", "objects", "object storage needs obstore", next_step=step) from e
    if not objects.url.startswith("s3://"):
        raise errors.refuse("bad_value", "objects", f"{objects.url!r} does not begin with s3://")
    plain = objects.options.get("endpoint", "").startswith("http://")
    options: dict[str, Any] = {"client_options": {"allow_http": True}} if plain else {}
    try:
        remote = S3Store.from_url(objects.url, **objects.options, **options, retry_config=_RETRY)
    except (obstore.exceptions.BaseError, TypeError) as e:
        raise errors.refuse("bad_value", "objects.options", str(e).partition("\n")[0]) from e
    return remote, obstore


def _update(digest: Any, pieces: Sequence[memoryview]) -> None:
    for piece in pieces:
        digest.update(piece)


def _cut(pieces: Sequence[memoryview]) -> Iterator[bytes]:
    for piece in pieces:
        for start in range(0, piece.nbytes, RANGE_BYTES):
            yield bytes(piece[start : start + RANGE_BYTES])


@contextmanager
def _clear_faults() -> Iterator[None]:
    """Turns the library's faults into `OSError`, as a disk's would be; what is absent stays FileNotFoundError."""
    try:
        yield
    except Exception as e:
        if type(e).__module__.startswith("obstore"):
            raise OSError(str(e).partition("\n")[0]) from e
        raise

"""The store: opens, lists, limits and deletes what its owners keep. The only door of this room.

Every lookup names an owner, and nothing but the owner's own, unexpired entries is ever found: everything else
is one `handle_not_found`. The owner is a plain string that the caller has authenticated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import sqlalchemy as sa

from trocar import errors
from trocar.store import artifacts, catalog, dtypes, ids, labels
from trocar.store.artifacts import Arrays, Artifact, ArtifactInfo
from trocar.store.bucket import Objects
from trocar.store.catalog import ACTIVATIONS, Entry, File
from trocar.store.depot import Depot
from trocar.store.folder import Folder
from trocar.store.ids import ArtifactId, HandleId
from trocar.store.index import RowIndex
from trocar.store.quota import Quota
from trocar.store.reader import HandleInfo, Reader, infos_of
from trocar.store.rows import GivenLabels
from trocar.store.shelf import Slot
from trocar.store.writer import Begun, Writer

SHARD_BYTES: Final = 64 << 20
Findings = list[str]  # the class below has a method of that name


class Store:
    """The store in the folder `root`; safe to share between threads.

    Opening a root that no other process has open sweeps what a crash left behind, and marks handles whose
    writer died as "failed": their committed rows can be read with `open(..., partial=True)`.

    Args:
        root: made when absent; nothing else may write there.
        objects: where files lie, with the catalog and a cache in `root`; in `root` too when None.
        quota_bytes: what each owner may keep; None for no limit.
        shard_bytes: how much a writer buffers, over all sites of a handle.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        root: Path,
        *,
        objects: Objects | None = None,
        quota_bytes: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._shard_bytes, self._quota = clock, shard_bytes, Quota(quota_bytes)
        self._depot = Depot(root, Folder if objects is None else objects.shelf())
        self._catalog = self._depot.catalog
        self.sweep()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._depot.close()

    def create(
        self,
        owner: str,
        model: str,
        fingerprint: str,
        widths: Mapping[str, int],
        program_hash: str,
        *,
        handle: HandleId | None = None,
        dtype: str = "float32",
        resumable: bool = False,
        ttl_s: float | None = None,
    ) -> Writer:
        """Starts a handle and returns its writer.

        Args:
            handle: its id, from `ids.new_handle`; a new one when None.
            widths: width of a row by canonical site, for example {"resid_post.12": 576}.
            dtype: of the numbers in the files: "float32", "bfloat16" or "float16".
            resumable: whether leaving the writer's `with` block early keeps what is committed, for `resume`.
            ttl_s: seconds from now after which the handle is gone, open or not; None to keep it.

        Raises:
            ProgramError: `unknown_site`, `nothing_returned` (no site) or `bad_value`.
        """
        kind = dtypes.require(dtype, "dtype")
        if not widths:
            raise errors.refuse("nothing_returned", "widths", "a handle needs at least one site")
        for site, width in widths.items():
            ids.require_site(site, "widths")
            if width < 1:
                raise errors.refuse("bad_value", f"widths.{site}", f"{width} is not a width")
        self.sweep()
        now_s = self._clock()
        entry = Entry(
            id=handle or ids.new_handle(),
            owner=owner,
            kind=ACTIVATIONS,
            fingerprint=fingerprint,
            layout=json.dumps(dict(widths)),
            created_s=now_s,
            expires_s=self._expiry(now_s, ttl_s),
            model=model,
            program_hash=program_hash,
            dtype=kind,
        )
        with self._catalog.write() as c:
            catalog.add_entry(c, entry)
        self._depot.claim(entry.id)
        return self._writer(entry, Begun(), resumable=resumable)

    def resume(self, owner: str, handle: str) -> Writer:
        """The writer of a handle whose writer died or detached; what that one committed stays.

        Raises:
            NotFound: `handle_not_found`, as for `open`.
            ProgramError: `handle_incomplete` while another writer lives, `bad_value` for a finished handle.
        """
        with self._catalog.read() as c:
            self._find(c, owner, handle, ids.is_handle)
        if not self._depot.claim(handle):
            raise errors.refuse("handle_incomplete", "handle", f"{handle} is being written")
        done = False
        try:
            with self._catalog.write() as c:
                entry = self._find(c, owner, handle, ids.is_handle)
                if entry.state == "complete":
                    raise errors.refuse("bad_value", "handle", f"{handle} is complete")
                catalog.set_state(c, entry.id, "open")
                files = catalog.files(c, entry.id)
            index = RowIndex(self._depot, files)
            writer = self._writer(entry, Begun(index.n_shards, index.kinds(), index.prompts), resumable=True)
            done = True
        finally:
            if not done:
                self._depot.unclaim(handle)
        return writer

    def _writer(self, entry: Entry, begun: Begun, *, resumable: bool) -> Writer:
        return Writer(
            self._depot,
            self._quota,
            HandleId(entry.id),
            json.loads(entry.layout),
            entry.dtype,
            self._shard_bytes,
            begun,
            resumable=resumable,
        )

    def _expiry(self, now_s: float, ttl_s: float | None) -> float | None:
        if ttl_s is None:
            return None
        if not 0 < ttl_s < float("inf"):
            raise errors.refuse("bad_value", "ttl_s", f"{ttl_s!r} is not a positive number of seconds")
        return now_s + ttl_s

    def open(self, owner: str, handle: str, *, partial: bool = False) -> Reader:
        """Opens a handle as it is now.

        Args:
            partial: also accept a handle that is still being written, or whose writer died.

        Raises:
            NotFound: `handle_not_found`, the same for absent, foreign, expired and malformed ids.
            ProgramError: `handle_incomplete` unless `partial`.
        """
        with self._catalog.read() as c:
            entry = self._find(c, owner, handle, ids.is_handle)
            if entry.state != "complete" and not partial:
                raise errors.refuse("handle_incomplete", "handle", f"{handle} is {entry.state}")
            return Reader(self._depot, infos_of(c, [entry])[0], catalog.files(c, entry.id))

    def add_labels(
        self, owner: str, handle: str, name: str, values: GivenLabels, *, by: labels.By = "row"
    ) -> None:
        """Adds a column of labels to a finished handle; its vectors are not touched.

        Args:
            name: a small word that no column of the handle has.
            values: integers, booleans, numbers or strings: one per row, in the order of `Reader.rows`.
            by: "prompt" when there is one value per prompt instead, from prompt 0 on.

        Raises:
            NotFound, ProgramError: as `open`; `bad_value`, `rows_mismatch`.
            Overloaded: `disk_full`.
        """
        labels.add(self._depot, self._quota, self.open(owner, handle), name, values, by)

    def drop_labels(self, owner: str, handle: str, name: str) -> None:
        """Removes labels that `add_labels` has added (`bad_value` if there are none); else raises as `open`."""
        labels.drop(self._depot, self.open(owner, handle), name)

    def list(self, owner: str) -> Sequence[HandleInfo]:
        """The owner's handles in any state, oldest first."""
        with self._catalog.read() as c:
            return infos_of(c, [e for e in self._owned(c, owner) if e.kind == ACTIVATIONS])

    def save_artifact(
        self,
        owner: str,
        kind: str,
        fingerprint: str,
        arrays: Arrays,
        info: Any,
        *,
        artifact: ArtifactId | None = None,
        ttl_s: float | None = None,
    ) -> ArtifactId:
        """Stores the result of a fit.

        Args:
            kind: what made it; any word but "activations".
            arrays: float32, float64 or int64 arrays by site and name.
            info: JSON values (finite numbers) to give back with it.
            artifact: its id, from `ids.new_artifact`; a new one when None.

        Raises:
            ProgramError: `unknown_site` or `bad_value`.
            Overloaded: `disk_full`.
        """
        if kind == ACTIVATIONS:
            raise errors.refuse("bad_value", "kind", f"{kind!r} is what handles are, not artifacts")
        self.sweep()
        name, now_s = artifact or ids.new_artifact(), self._clock()
        entry = Entry(
            id=name,
            owner=owner,
            kind=kind,
            fingerprint=fingerprint,
            layout=artifacts.layout_of(arrays),
            created_s=now_s,
            expires_s=self._expiry(now_s, ttl_s),
            info=json.dumps(info, allow_nan=False),
            state="complete",
        )
        raw = artifacts.pack(arrays)

        def admit(c: sa.Connection) -> None:
            self._quota.admit(c, owner, len(raw))
            catalog.add_entry(c, entry)

        draft = self._depot.shelf.draft(name, [raw], Slot("artifact.safetensors", 0, "", 0))
        self._depot.publish(name, [draft], admit)
        return name

    def open_artifact(self, owner: str, artifact: str) -> Artifact:
        """Loads an artifact, with its hash checked.

        Raises:
            NotFound: `handle_not_found`, as for `open`.
            ServerFault: `store_damaged`.
        """
        with self._catalog.read() as c:
            entry = self._find(c, owner, artifact, ids.is_artifact)
            file = catalog.files(c, entry.id)[0]
        raw = self._depot.load(file)
        return artifacts.unpack(artifacts.info_of(entry, file.size_bytes), raw)

    def list_artifacts(self, owner: str) -> Sequence[ArtifactInfo]:
        """The owner's artifacts, oldest first."""
        with self._catalog.read() as c:
            found = [e for e in self._owned(c, owner) if e.kind != ACTIVATIONS]
            totals = catalog.totals(c, [e.id for e in found])
        return [artifacts.info_of(e, totals[e.id][1]) for e in found]

    def delete(self, owner: str, entry: str) -> None:
        """Deletes a handle or an artifact; readers that are open keep what they have mapped.

        Raises:
            NotFound: `handle_not_found`, as for `open`.
        """

        def remove(c: sa.Connection) -> list[File]:
            found = self._find(c, owner, entry, lambda text: ids.is_handle(text) or ids.is_artifact(text))
            return catalog.remove(c, found.id)

        self._depot.withdraw(remove)
        self._depot.unclaim(entry)

    def pin(self, owner: str, entry: str) -> None:
        """Keeps a handle or an artifact beyond its time; it counts in the quota like any other.

        Raises:
            NotFound: `handle_not_found`, as for `open`.
        """
        self._set_pinned(owner, entry, pinned=True)

    def unpin(self, owner: str, entry: str) -> None:
        """Ends a pin: an entry whose time is over is gone at once. Raises as `pin` does."""
        self._set_pinned(owner, entry, pinned=False)

    def _set_pinned(self, owner: str, entry: str, *, pinned: bool) -> None:
        with self._catalog.write() as c:
            found = self._find(c, owner, entry, lambda text: ids.is_handle(text) or ids.is_artifact(text))
            catalog.set_pinned(c, found.id, pinned)

    def usage(self, owner: str) -> int:
        """Bytes on disk of the owner's handles and artifacts."""
        self.sweep()
        with self._catalog.read() as c:
            return catalog.usage_bytes(c, owner)

    def sweep(self) -> int:
        """Deletes what has expired, whoever owns it; returns how many entries."""
        gone: list[str] = []

        def remove(c: sa.Connection) -> list[File]:
            gone.extend(catalog.expired(c, self._clock()))
            return [file for entry in gone for file in catalog.remove(c, entry)]

        with self._catalog.read() as c:
            if not catalog.expired(c, self._clock()):
                return 0  # reading does not wait for writers
        self._depot.withdraw(remove)
        return len(gone)

    def check(self) -> Findings:
        """What is wrong with the store by names, sizes and numbers of rows; empty when nothing is."""
        return self._depot.check() + self._check_shards()

    def verify(self) -> Findings:
        """Reads every file and compares its SHA-256; empty when nothing was changed since it was written."""
        return self._depot.verify()

    def _check_shards(self) -> Findings:
        with self._catalog.read() as c:
            handles = [e for e in catalog.entries(c) if e.kind == ACTIVATIONS]
            files = {e.id: catalog.files(c, e.id) for e in handles}
        wrong: list[str] = []
        for entry in handles:
            expected = {"", *json.loads(entry.layout)}
            listed = [f for f in files[entry.id] if f.shard != catalog.WHOLE]
            numbers = sorted({f.shard for f in listed})
            if numbers != list(range(len(numbers))):
                wrong.append(f"{entry.id}: shards {numbers} have a gap")
            for number in numbers:
                shard = [f for f in listed if f.shard == number]
                if {f.site for f in shard} != expected or len({f.n_rows for f in shard}) != 1:
                    wrong.append(f"{entry.id}: the sites of shard {number} do not match")
        return wrong

    def _owned(self, c: sa.Connection, owner: str) -> Sequence[Entry]:
        return catalog.owned(c, owner, self._clock())

    def _find(self, c: sa.Connection, owner: str, text: str, legal: Callable[[str], bool]) -> Entry:
        entry = catalog.find_owned(c, owner, text, self._clock()) if legal(text) else None
        if entry is None:
            raise ids.not_found(text)
        return entry

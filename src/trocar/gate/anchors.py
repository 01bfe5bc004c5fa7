"""Heads of the log written down in a second place, so that an older copy of a ledger cannot be started.

Whoever restores a backup has a ledger in which less was charged: whole, consistent, and worth a second budget.
One file per ledger, named by the ledger's own id, holds lines `seq hash time_ms check`, each on disk before
the next; `check` is over the line and the id. A running ledger is at most `MOST_S` or `MOST_ENTRIES` ahead of
its file, and not at all once it was closed. One that is behind its file, or is not the one in it, does not
start; nor does one that remembers anchors which are gone.

Put the folder where a restore of the ledger does not reach: another disk, another host. Whoever can write
both places can turn both back; the heads in clients' receipts are the witnesses then.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, select, update

from trocar import errors
from trocar.gate import chain
from trocar.gate.chain import Head, Kind
from trocar.gate.database import Database, unavailable
from trocar.gate.tables import HEAD, LOG

MOST_ENTRIES: Final = 100
MOST_S: Final = 1.0
_TAIL_BYTES: Final = 65_536
_BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class Report:
    """What a look at every line found.

    Attributes:
        lines: how many lines could be read.
        unreadable: how many could not: a write that a crash cut off leaves one.
        problems: the first line that the log contradicts, or that there are no lines; one sentence.
    """

    lines: int
    unreadable: int
    problems: list[str]


class Anchors:
    """Keeps the file of one open ledger up with it, from a thread of its own.

    Args:
        clock: milliseconds since 1970, for the reader of the file.

    Raises:
        ServerFault: `ledger_rolled_back`; `ledger_unavailable` when the folder cannot be written.
    """

    def __init__(self, database: Database, folder: Path, clock: Callable[[], int]) -> None:
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._failure: errors.TrocarError | None = None
        try:
            self._file, self._last = _begin(database, folder, clock())
        except OSError as e:
            raise unavailable("its anchors cannot be read or written") from e
        self._thread = threading.Thread(target=self._run, name="anchors", daemon=True)
        self._thread.start()

    def wrote(self, seq: int) -> None:
        """The log has entry `seq` now; never refuses, because what was charged was charged."""
        if seq - self._last.seq >= MOST_ENTRIES:
            self._keep_up()
        else:
            self._wake.set()

    def require_kept(self) -> None:
        """Refuses to go on while heads cannot be written down, or the log lacks one that was.

        Raises:
            ServerFault: `ledger_unavailable`, `ledger_rolled_back`.
        """
        failure = self._failure and self._keep_up()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Writes the last head down and ends the thread; idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            self._wake.set()
            self._thread.join()
            self._keep_up()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            # half of what is allowed: the rest is for the disk
            if self._closing.wait(MOST_S / 2):
                return
            self._keep_up()

    def _keep_up(self) -> errors.TrocarError | None:
        """Writes the present head down; says why not when it could not."""
        with self._lock:
            try:
                with self._database.read() as connection:
                    head = chain.head(connection)
                    _require_contained(connection, self._last, head)
                if head.seq > self._last.seq:
                    _append(self._file, head, self._clock())
                    self._last = head
                self._failure = None
            except OSError:
                self._failure = unavailable("its anchors cannot be written")
            except errors.TrocarError as e:
                self._failure = e
            if self._failure is not None:
                self._wake.set()  # try again, also when nothing else happens
            return self._failure


def require_none(connection: Connection) -> None:
    """Refuses a ledger that was anchored, when no folder of anchors was named.

    Raises:
        ServerFault: `ledger_rolled_back`.
    """
    if chain.identity(connection).anchored:
        raise errors.refuse(
            "ledger_rolled_back",
            "anchors",
            "the ledger is anchored, and no folder of anchors was named",
            next_step="Name the folder that holds them.",
        )


def anchor(database: Database, folder: Path, now_ms: int) -> Head:
    """Writes the present head down, after the checks of a start; for an operator.

    Raises:
        ServerFault: `ledger_rolled_back`, `ledger_unavailable`.
    """
    try:
        file, _ = _begin(database, folder, now_ms)
        with database.read() as connection:
            head = chain.head(connection)
        _append(file, head, now_ms)
    except OSError as e:
        raise unavailable("its anchors cannot be read or written") from e
    return head


def accept(database: Database, folder: Path, reason: str, now_ms: int) -> Head:
    """Starts new anchors from the ledger as it is; the old ones stay beside them under another name.

    What was charged after this copy was made is forgotten: the operator takes that upon himself, and it is an
    entry of the log.

    Raises:
        ServerFault: `ledger_unavailable`.
    """
    with database.write() as connection:
        file = _path(connection, folder)
        head = _mark(connection, {"reason": reason}, now_ms)
    try:
        if file.exists():
            file.rename(file.with_name(f"{file.name}.before-{now_ms}"))
        _append(file, head, now_ms)
    except OSError as e:
        raise unavailable("its anchors cannot be read or written") from e
    return head


def report(connection: Connection, folder: Path) -> Report:
    """Compares every line of the file with the log, which was found whole."""
    file = _path(connection, folder)
    lines = _lines(file, 0) if file.exists() else []
    heads = [head for head in (_head(file.stem, line) for line in lines) if head is not None]
    bad = len(lines) - len(heads)
    if not heads and chain.identity(connection).anchored:
        return Report(0, bad, ["anchors: the ledger was anchored, and its anchors are gone"])
    for start in range(0, len(heads), _BATCH):
        batch = heads[start : start + _BATCH]
        query = select(LOG.c.seq, LOG.c.hash).where(LOG.c.seq.in_([head.seq for head in batch]))
        there = {chain.START.seq: chain.START.hash}
        there.update({row.seq: row.hash for row in connection.execute(query)})
        for head in batch:
            if there.get(head.seq) != head.hash:
                what = "not the one that was anchored" if head.seq in there else "missing, but was anchored"
                return Report(len(heads), bad, [f"entry {head.seq} is {what}"])
    return Report(len(heads), bad, [])


def _begin(database: Database, folder: Path, now_ms: int) -> tuple[Path, Head]:
    """The file of a ledger that may start, and the last head in it."""
    with database.write() as connection:
        file, head = _path(connection, folder), chain.head(connection)
        last = _last(file)
        if last is not None:
            _require_contained(connection, last, head)
            return file, last
        if chain.identity(connection).anchored:
            raise errors.refuse(
                "ledger_rolled_back",
                "anchors",
                "the ledger was anchored, and its anchors are gone",
                next_step="Restore the folder of anchors; `trocar audit anchor --accept REASON` starts new ones.",
            )
        # the file first: a ledger that remembers anchors which were never written would not start again
        _append(file, head, now_ms)
        _mark(connection, {}, now_ms)
        return file, head


def _require_contained(connection: Connection, last: Head, head: Head) -> None:
    if head.seq < last.seq:
        reason = (
            f"the ledger ends at entry {head.seq}; entry {last.seq} was anchored: an older copy was restored"
        )
        raise errors.refuse("ledger_rolled_back", "", reason)
    query = select(LOG.c.hash).where(LOG.c.seq == last.seq)
    there = connection.execute(query).scalar_one_or_none() if last.seq else chain.START.hash
    if there != last.hash:
        reason = (
            f"entry {last.seq} is not the one that was anchored: an older copy was restored and written to"
        )
        raise errors.refuse("ledger_rolled_back", "", reason)


def _mark(connection: Connection, detail: dict[str, chain.Json], now_ms: int) -> Head:
    connection.execute(update(HEAD).values(anchored=1))
    return chain.append(connection, Kind.anchored, detail=detail, time_ms=now_ms)


def _path(connection: Connection, folder: Path) -> Path:
    return folder / f"{chain.identity(connection).ledger}.anchors"


def _last(file: Path) -> Head | None:
    """The highest head near the end of a file: processes that share a ledger may write out of turn."""
    if not file.exists():
        return None
    start = max(0, file.stat().st_size - _TAIL_BYTES)
    heads = (_head(file.stem, line) for line in _lines(file, start))
    return max((head for head in heads if head is not None), key=lambda head: head.seq, default=None)


def _lines(file: Path, start: int) -> list[str]:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read().decode("ascii", errors="replace").splitlines()


def _head(ledger: str, line: str) -> Head | None:
    words, _, check = line.rpartition(" ")
    parts = words.split(" ")
    if len(parts) != 3 or check != _check(ledger, words):
        return None
    return Head(int(parts[0]), parts[1])


def _check(ledger: str, words: str) -> str:
    return hashlib.sha256(f"{ledger} {words}".encode()).hexdigest()[:16]


def _append(file: Path, head: Head, now_ms: int) -> None:
    """Adds one line; it is on disk when this returns."""
    words = f"{head.seq} {head.hash} {now_ms}"
    line = f"{words} {_check(file.stem, words)}\n"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    opened = os.open(file, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(opened).st_size
        torn = size > 0 and os.pread(opened, 1, size - 1) != b"\n"
        whole = (b"\n" if torn else b"") + line.encode()
        if os.write(opened, whole) != len(whole):
            raise OSError("the disk took a part of a line")
        os.fsync(opened)
    finally:
        os.close(opened)
    directory = os.open(file.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

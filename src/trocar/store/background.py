"""A writer that commits in a thread of its own, so that whoever captures rows goes on with the next step.

Rows wait in a queue of bounded size; when it is full, `append` waits, which is all the back-pressure there is. What
goes wrong in the thread is raised by the next call here, and again by every later one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

from trocar.store.dtypes import Vectors
from trocar.store.reader import HandleInfo
from trocar.store.rows import Ints, RowTable
from trocar.store.writer import Writer

WAITING_BYTES: Final = 64 << 20
_Item = tuple[dict[str, Vectors], RowTable, int]


class BackgroundWriter:
    """Appends to `writer`, which nobody else may use, from a thread.

    Leaving a `with` block without `finish` leaves the writer's own block: the handle is abandoned, or detached from.

    Args:
        most_bytes: of vectors that wait; one append may always wait, however large.

    Example:
        >>> with BackgroundWriter(store.create("alice", "smol", "f1", {"resid_post.3": 576}, "p1")) as writer:
        ...     writer.append({"resid_post.3": vectors}, table)
        ...     info = writer.finish()
    """

    def __init__(self, writer: Writer, most_bytes: int = WAITING_BYTES) -> None:
        self._writer, self._most_bytes = writer, most_bytes
        self._waiting: deque[_Item] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"trocar-{writer.id}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._waiting.clear()
        self._join()
        self._writer.__exit__(kind, error, trace)

    @property
    def id(self) -> str:
        return self._writer.id

    @property
    def committed(self) -> Ints:
        """As `Writer.committed`; rows that wait are not among them."""
        return self._writer.committed

    def append(self, vectors: Mapping[str, Vectors], table: RowTable) -> None:
        """Copies rows into the queue, when there is room for them; raises what an earlier append met."""
        size = sum(v.nbytes for v in vectors.values())
        with self._changed:
            self._changed.wait_for(
                lambda: self._fault is not None or not self._bytes or self._bytes + size <= self._most_bytes
            )
            self._raise()
            self._waiting.append(({site: v.copy() for site, v in vectors.items()}, table, size))
            self._bytes += size
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all rows are with the writer, and commits them."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault is not None or not self._bytes)
            self._raise()
        self._writer.flush()

    def finish(self) -> HandleInfo:
        """As `Writer.finish`, for all rows that were appended."""
        self.flush()
        self._join()
        return self._writer.finish()

    def _raise(self) -> None:
        if self._closing:
            raise RuntimeError(f"the writer of {self.id} is finished")
        if self._fault is not None:
            raise self._fault

    def _join(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                vectors, table, size = self._waiting.popleft()
            try:
                self._writer.append(vectors, table)
            except BaseException as e:  # noqa: BLE001 - raised again where somebody listens
                with self._changed:
                    self._fault = e
                    self._waiting.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._bytes -= size
                self._changed.notify_all()

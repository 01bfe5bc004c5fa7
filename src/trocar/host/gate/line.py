"""The line to one worker process: orders go out, and each comes back once, with the length that was said before.

Whatever else a worker does with the line (another length, a result for an order that is not open, a second one, a
header that is none, a frame nobody asked for) is no mistake that an honest worker makes. Then the line is cut for
good, nothing of what came is used, every order that runs fails with `bad_result`, and the alarm is raised before any
of them hears of it. A line that ends, or stops in the middle of a frame, is a worker that died: its orders fail with
`worker_lost`, and the line waits for the next worker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from trocar import errors
from trocar.codes import CODES
from trocar.host.gate.suspects import Suspects
from trocar.host.streams import Lost, Stream, connect
from trocar.wire import orders
from trocar.wire.frames import Frame, Head, Kind, Status
from trocar.wire.orders import Hello

log = logging.getLogger(__name__)
RETRY_S: Final = 0.2
HELLO_S: Final = 120.0
MOST_OWED: Final = 10_000
AFTER_S: Final = 5
"""After how long a request may be sent again whose worker died."""


@dataclass(frozen=True, slots=True)
class Errand:
    """Something that a worker is asked.

    Attributes:
        length: bytes of what it may say, to the byte.
        nodes: paths that a fault may point to, by their numbers.
        request: names what is run, where it may be what kills a worker.
    """

    kind: Kind
    body: bytes
    length: int
    nodes: tuple[str, ...] = ()
    request: str | None = None


@dataclass(eq=False, slots=True)
class Open:
    """An errand that is out; `given_up` when nobody waits for it any more."""

    errand: Errand
    number: int
    result: Future[bytes] = field(default_factory=Future)
    given_up: bool = False

    def fail(self, error: errors.TrocarError) -> None:
        if not self.result.done():
            self.result.set_exception(error)


_REPIN: Final = "Delete the model's file in the folder `facts` to pin what the worker says today."


class Line:
    """Reaches the worker that listens at `path`, again and again; safe to share between threads.

    Args:
        hello: the facts by which the gate checks; a worker that has others is refused.
        alarm: told why a worker is not to be trusted, before anybody else learns of it.
        worker_uid: the user that runs the worker; the own one when None.
    """

    def __init__(
        self, path: Path, hello: Hello, alarm: Callable[[str], None], worker_uid: int | None = None
    ) -> None:
        self._path, self._hello, self._alarm, self._worker_uid = path, hello, alarm, worker_uid
        self._changed = threading.Condition()
        self._stream: Stream | None = None
        self._open: dict[int, Open] = {}
        self._last = 0
        self._owed: list[bytes] = []
        self._halting = self._closed = False
        self._distrusted = ""
        self._other = ""
        self._suspects = Suspects()
        self._thread = threading.Thread(target=self._keep, name="trocar-line", daemon=True)
        self._thread.start()

    @property
    def _over(self) -> bool:
        return bool(self._other or self._distrusted)

    @property
    def distrusted(self) -> str:
        """Why the line was cut for good; empty while it was not."""
        return self._distrusted

    def wait(self, within_s: float) -> None:
        """Waits until a worker is there.

        Raises:
            Overloaded: `worker_lost`.
            RunFailed: `checksum_mismatch` or `network_open` when it has other models than the hello says, or a network.
            ServerFault: `bad_result` when it was one that is not to be trusted.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stream is not None or self._over, within_s)
            self._require()

    def _require(self) -> Stream:
        if self._stream is not None:
            return self._stream
        if self._other == "network":
            raise errors.refuse("network_open", "--network", "the worker is in the machine's network")
        if self._other:
            reason = "the worker's models are not those whose facts were pinned"
            raise errors.refuse("checksum_mismatch", "model", reason, next_step=_REPIN)
        raise _bad() if self._distrusted else lost()

    def order(self, errand: Errand) -> Open:
        """Sends an errand; its result arrives once.

        Raises:
            Overloaded: `worker_lost`.
            PolicyRefusal: `quarantined`.
            ServerFault: `internal` when the server is stopping.
        """
        if errand.request is not None:
            self._suspects.require_harmless(errand.request)
        with self._changed:
            if self._halting and errand.kind is not Kind.erase:
                raise _stopping()
            stream = self._require()
            self._last += 1
            entry = Open(errand, self._last)
            self._open[entry.number] = entry
        try:
            stream.put(Head(errand.kind, entry.number, len(errand.body)), errand.body)
        except Lost:
            stream.close()  # the reader ends, and fails what is open
        return entry

    def cancel(self, entry: Open) -> None:
        """Says that an errand is not wanted any more; its result still arrives."""
        with self._changed:
            stream = self._stream if entry.number in self._open else None
        if stream is not None:
            with suppress(Lost):
                stream.put(Head(Kind.cancel, entry.number, 0))

    def give_up(self, entry: Open, error: errors.TrocarError) -> None:
        """Waits no longer for an errand: whatever it still brings is thrown away."""
        with self._changed:
            entry.given_up = True
        self.cancel(entry)
        entry.fail(error)

    def owe(self, body: bytes) -> None:
        """Keeps an erasure for the next worker, or sends it to the one that came meanwhile."""
        with self._changed:
            there = self._stream is not None and not self._closed
            if not there:
                self._owed = [*self._owed, body][-MOST_OWED:]
        if there:
            self._erase(body)

    def _erase(self, body: bytes) -> None:
        try:
            self.order(Errand(Kind.erase, body, 0))
        except errors.Overloaded:
            self.owe(body)

    def halt(self) -> None:
        """Fails what runs now and takes nothing new, but for erasures."""
        with self._changed:
            self._halting = True
            running = [e for e in self._open.values() if e.errand.kind is not Kind.erase]
        for entry in running:
            self.give_up(entry, _stopping())

    def close(self) -> None:
        """Ends the line."""
        with self._changed:
            self._closed = self._halting = True
            stream = self._stream
            self._changed.notify_all()
        if stream is not None:
            stream.close()
        self._thread.join()

    # ---- the thread that reads ----

    def _keep(self) -> None:
        while not (self._closed or self._over):
            try:
                stream = Stream(connect(self._path, self._worker_uid), self._allow)
            except OSError:
                time.sleep(RETRY_S)
                continue
            try:
                self._greet(stream)
                while True:
                    self._take(stream.receive())
            except Lost:
                self._end(stream, lost())
            except errors.TrocarError as e:
                self._distrust(stream, e.reason)

    def _greet(self, stream: Stream) -> None:
        """Tells a worker the facts, and what it is to erase."""
        body = self._hello.model_dump_json().encode()
        with self._changed:
            self._last += 1
            hello = Open(Errand(Kind.hello, body, 0, orders.GREETED), self._last)
            self._open[hello.number] = hello
        stream.put(Head(Kind.hello, hello.number, len(body)), body)
        self._take(stream.receive(HELLO_S))
        refused = hello.result.exception()
        if isinstance(refused, errors.TrocarError):
            # a new version, or other files: nothing was run, and nobody is accused
            self._other = refused.path or "model"
            raise Lost(f"the worker has another {self._other}")
        with self._changed:
            owed, self._owed = self._owed, []
            self._stream = stream
            self._changed.notify_all()
        for erasure in owed:
            self._erase(erasure)

    def _allow(self, head: Head) -> None:
        """Refuses a header before a byte of its body is read."""
        with self._changed:
            entry = self._open.get(head.number)
        if head.kind is not Kind.result:
            raise _broken("a frame that no worker may send")
        if entry is None:
            raise _broken("a result for an order that is not open")
        wanted = orders.FAULT_BYTES if head.status is Status.fault else entry.errand.length
        if head.length != wanted:
            raise _broken("a result of another length than was declared")

    def _take(self, frame: Frame) -> None:
        entry = self._open[frame.head.number]
        if frame.head.status is Status.fault:
            code, path = orders.unpack_fault(frame.body, entry.errand.nodes)
        with self._changed:
            del self._open[frame.head.number]
        if entry.errand.request is not None and frame.head.status is Status.done:
            self._suspects.survived(entry.errand.request)
        if entry.given_up:
            return
        if frame.head.status is Status.fault:
            # the words are the gate's own: no text of a worker leaves
            entry.fail(errors.refuse(code, path, CODES[code].summary))
        elif not entry.result.done():
            entry.result.set_result(frame.body)

    def _end(self, stream: Stream, error: errors.TrocarError) -> None:
        """A worker has gone."""
        stream.close()
        for entry in self._drop():
            if entry.errand.kind is Kind.erase:
                self.owe(entry.errand.body)
            if entry.errand.request is not None and not self._closed:
                self._suspects.died(entry.errand.request)
            entry.fail(error)
        if not self._closed:
            log.warning("the worker has gone; waiting for the next one")

    def _distrust(self, stream: Stream, why: str) -> None:
        """A worker did what no honest one does."""
        stream.close()
        with self._changed:
            self._distrusted, self._stream = why, None
        try:
            self._alarm(why)
        finally:
            for entry in self._drop():
                entry.fail(_bad())

    def _drop(self) -> Sequence[Open]:
        with self._changed:
            self._stream = None
            found = tuple(self._open.values())
            self._open.clear()
            self._changed.notify_all()
        return found


def lost() -> errors.TrocarError:
    """The refusal for an order whose worker died, or is not there yet."""
    error = errors.refuse("worker_lost", "", "the process that runs the model has ended and is started again")
    error.retry_after_s = AFTER_S
    return error


def _bad() -> errors.TrocarError:
    return errors.refuse(
        "bad_result", "", "the worker did not keep to what was declared; nothing of it is used"
    )


def _broken(what: str) -> errors.TrocarError:
    return errors.refuse("bad_frame", "", what)


def _stopping() -> errors.TrocarError:
    return errors.refuse("internal", "", "the server is stopping")

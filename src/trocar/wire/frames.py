"""Frames between the processes of one server: a fixed header, then exactly as many bytes as it says.

    b"TRF\\x01" | kind u8 | status u8 | 0 u16 | number u64 | length u32        (big-endian, 20 bytes)

Whoever reads decides about a frame when its header is there: `allow` refuses it, or its body is collected. So at
no time is more held than a header and a body of a length that was allowed. This module knows no sockets, and
nothing of what is in a body.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from trocar import errors

MAGIC: Final = b"TRF\x01"
_HEAD: Final = struct.Struct(">4sBBHQI")
HEAD_BYTES: Final = _HEAD.size
MAX_NUMBER: Final = (1 << 64) - 1
MAX_LENGTH: Final = (1 << 32) - 1


class Kind(IntEnum):
    """What a frame is. The gate sends the first group to a worker, a front sends `call` to the gate."""

    hello = 1
    facts = 2
    run = 3
    fit = 4
    cancel = 5
    erase = 6
    stats = 7
    check = 8
    numbers = 9
    result = 32
    call = 64
    answer = 65


class Status(IntEnum):
    """How a result ends: as declared, or as one code of a closed table."""

    done = 0
    fault = 1


@dataclass(frozen=True, slots=True)
class Head:
    """A header.

    Attributes:
        number: tells which frame a result belongs to.
        length: bytes of the body.
    """

    kind: Kind
    number: int
    length: int
    status: Status = Status.done


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame."""

    head: Head
    body: bytes


def pack(head: Head) -> bytes:
    """The bytes of a header.

    Raises:
        BadRequest: `too_large` for a body of 4 GiB or more.
    """
    if not 0 <= head.length <= MAX_LENGTH:
        raise errors.refuse("too_large", "$", f"a frame of {head.length} bytes; the limit is {MAX_LENGTH}")
    return _HEAD.pack(MAGIC, head.kind, head.status, 0, head.number, head.length)


def unpack(raw: bytes) -> Head:
    """The header that 20 bytes are.

    Raises:
        BadRequest: `bad_frame` for any other magic, kind, status or filler.
    """
    if len(raw) != HEAD_BYTES:
        raise _bad(f"a header has {HEAD_BYTES} bytes, not {len(raw)}")
    magic, kind, status, filler, number, length = _HEAD.unpack(raw)
    if magic != MAGIC or filler != 0:
        raise _bad("it does not start with a header")
    if kind not in _KINDS or status not in _STATUSES:
        raise _bad("it is of no kind or status that there is")
    return Head(Kind(kind), number, length, Status(status))


_KINDS: Final = frozenset(Kind)
_STATUSES: Final = frozenset(Status)


def _bad(why: str) -> errors.TrocarError:
    return errors.refuse("bad_frame", "$", f"not a frame: {why}")


class Collector:
    """Makes frames of bytes as they come.

    Args:
        allow: raises for a header whose body must not be read.
    """

    def __init__(self, allow: Callable[[Head], None]) -> None:
        self._allow = allow
        self._head: Head | None = None
        self._held = bytearray()

    @property
    def wanted(self) -> int:
        """Bytes that are missing of what is being collected: of the header, or of the body."""
        return (HEAD_BYTES if self._head is None else self._head.length) - len(self._held)

    @property
    def empty(self) -> bool:
        """Whether no byte of a frame is there, so that the other side may end here."""
        return self._head is None and not self._held

    def feed(self, data: bytes | memoryview) -> Frame | None:
        """Takes at most `wanted` bytes; a frame when it is whole.

        Raises:
            BadRequest: `bad_frame`, also for more bytes than are wanted, and what `allow` raises. Nothing of what
                came is of use then.
        """
        if len(data) > self.wanted:
            raise _bad("more bytes were handed over than asked for")
        self._held += data
        if self._head is None and not self.wanted:
            head = unpack(bytes(self._held))
            self._allow(head)
            self._head = head
            self._held = bytearray()
        if self._head is None or self.wanted:
            return None
        frame = Frame(self._head, bytes(self._held))
        self._head, self._held = None, bytearray()
        return frame


def at_most(**limits: int) -> Callable[[Head], None]:
    """An `allow` for a side that is trusted with the rest: these kinds, each up to a length.

    >>> at_most(call=10)(Head(Kind.call, 1, 10))
    """

    def allow(head: Head) -> None:
        limit = limits.get(head.kind.name)
        if limit is None:
            raise _bad(f"{head.kind.name!r} does not belong here")
        if head.length > limit:
            raise errors.refuse(
                "too_large", "$", f"a {head.kind.name} of {head.length} bytes; at most {limit}"
            )

    return allow

"""What a front and the gate say to each other: a verb of a closed table with its words, and an answer to pass on.

    call    u32 length | words | u32 length | request | arrays (a frame of wire.tensors, or nothing)
    answer  u32 length | ending | payload

The gate reads a call as strictly as it would read a client: a front is trusted with what passes through it, and
with nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from trocar import errors, strict
from trocar.strict import Strict
from trocar.wire import tensors
from trocar.wire.results import Charge
from trocar.wire.tensors import Vectors

MOST_CALL_BYTES: Final = 192 << 20
"""A body of 32 MiB, written as plainly as the gate reads it, with what its fields default to."""
MOST_ANSWER_BYTES: Final = (1 << 32) - 1
_LENGTH: Final = struct.Struct(">I")

Verb = Literal[
    "health", "models", "capabilities", "authenticate", "tokenize", "plan", "run", "session", "fit", "job",
    "job_result", "cancel", "handles", "handle", "erase", "account", "engine", "refused",
    "export", "raise", "tickets", "ticket", "step", "file", "token",
]  # fmt: skip


class Words(Strict):
    """A call without its request.

    Attributes:
        secret: the caller's key, looked up again by the gate.
        name: of a job, a handle or a ticket.
        word: of tickets, their state; of a step, which one.
        limit: of tickets.
    """

    verb: Verb
    secret: Annotated[str, Field(max_length=32 << 10)] | None = None
    name: Annotated[str, Field(max_length=4096)] = ""
    word: Annotated[str, Field(max_length=64)] = ""
    limit: int = 0
    wait_s: float = 0.0
    idempotency_key: Annotated[str, Field(max_length=32 << 10)] | None = None
    request_id: Annotated[str, Field(max_length=64)] = ""


class Refused(Strict):
    """A refusal that a caller is about to be told: the JSON of `TrocarError.as_json`."""

    error: Annotated[str, Field(max_length=1 << 20)]


class Ending(Strict):
    """An answer without its payload."""

    status: int
    charge: Charge | None = None
    retry_after_s: int | None = None
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Call:
    """A call; `request` is JSON that nobody on the gate's side has read yet."""

    words: Words
    request: bytes = b""
    arrays: bytes = b""


def pack_call(words: Words, request: Strict | None = None, vectors: Vectors | None = None) -> bytes:
    raw = b"" if request is None else request.model_dump_json().encode()
    return (
        _with_length(words.model_dump_json().encode())
        + _with_length(raw)
        + (tensors.pack(b"", vectors) if vectors else b"")
    )


def unpack_call(body: bytes) -> Call:
    """The parts of a call; its request is still to be read.

    Raises:
        BadRequest, ProgramError: as `strict.parse`; `bad_frame`.
    """
    words, rest = _split(body)
    request, arrays = _split(rest)
    return Call(words=strict.parse(Words, words), request=request, arrays=arrays)


def pack_answer(ending: Ending, payload: bytes) -> bytes:
    return _with_length(ending.model_dump_json().encode()) + payload


def unpack_answer(body: bytes) -> tuple[Ending, bytes]:
    """Ending and payload.

    Raises:
        BadRequest, ProgramError: as `strict.parse`; `bad_frame`.
    """
    ending, payload = _split(body)
    return strict.parse(Ending, ending), payload


def _with_length(raw: bytes) -> bytes:
    return _LENGTH.pack(len(raw)) + raw


def _split(body: bytes) -> tuple[bytes, bytes]:
    if len(body) < _LENGTH.size:
        raise errors.refuse("bad_frame", "$", "a part of the frame has no length")
    end = _LENGTH.size + _LENGTH.unpack_from(body)[0]
    if end > len(body):
        raise errors.refuse("bad_frame", "$", "a part of the frame is longer than the frame")
    return body[_LENGTH.size : end], body[end:]

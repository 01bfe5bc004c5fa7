"""A front: every use case is one call to the gate, and every answer the bytes that the gate made.

It has the methods that the API calls. A caller is the secret it sent, which goes along with each call, because the
gate believes nobody else about who is calling. Nothing here can make an answer: what goes wrong is a refusal.
"""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from trocar import errors, strict
from trocar.gate import release
from trocar.gate.release import Released
from trocar.host.streams import Lost, Stream, connect
from trocar.strict import Strict
from trocar.wire import airlock as a
from trocar.wire import calls, frames
from trocar.wire import requests as q
from trocar.wire.calls import Ending, Refused, Verb, Words
from trocar.wire.frames import Head, Kind
from trocar.wire.tensors import Vectors
from trocar.wire.tokens import TokenRequest

ANSWER_S: Final = 120.0
IDLE: Final = 64


@dataclass(frozen=True, slots=True)
class Bearer:
    """A secret that the gate knew when the request came."""

    secret: str | None = field(repr=False)


class Front:
    """Calls the gate at `path`; safe to share between threads.

    Args:
        gate_uid: the user that runs the gate; the own one when None.
    """

    def __init__(self, path: Path, gate_uid: int | None = None) -> None:
        self._path, self._gate_uid = path, gate_uid
        self._idle: list[Stream] = []
        self._turn = threading.Lock()

    def authenticate(self, secret: str | None) -> Bearer:
        """Asks the gate before a body is read; raises `no_key` or `bad_key`."""
        self._call("authenticate", Bearer(secret))
        return Bearer(secret)

    def health(self) -> Released:
        return self._call("health")

    def models(self) -> Released:
        return self._call("models")

    def capabilities(self) -> Released:
        return self._call("capabilities")

    def tokenize(self, caller: Bearer, request: q.TokenizeRequest, /) -> Released:
        return self._call("tokenize", caller, request)

    def plan(self, caller: Bearer, request: q.RunRequest, vectors: Vectors, /) -> Released:
        return self._call("plan", caller, request, vectors)

    def refused(self, caller: Bearer, request_id: str, error: errors.TrocarError, /) -> errors.TrocarError:
        """Has a refusal entered in the log; gives what the caller is told."""
        told = Refused(error=json.dumps(error.as_json()))
        try:
            self._call("refused", caller, told, request_id=request_id)
        except errors.TrocarError as e:
            return e
        return error

    def run(
        self,
        caller: Bearer,
        request: q.RunRequest,
        vectors: Vectors,
        key: str | None,
        request_id: str = "",
        /,
    ) -> Released:
        return self._call("run", caller, request, vectors, key=key, request_id=request_id)

    def session(
        self,
        caller: Bearer,
        request: q.SessionRequest,
        vectors: Vectors,
        key: str | None,
        request_id: str = "",
        /,
    ) -> Released:
        return self._call("session", caller, request, vectors, key=key, request_id=request_id)

    def fit(
        self, caller: Bearer, request: q.FitRequest, key: str | None, request_id: str = "", /
    ) -> Released:
        return self._call("fit", caller, request, key=key, request_id=request_id)

    def job(self, caller: Bearer, job: str, /) -> Released:
        return self._call("job", caller, name=job)

    def job_result(self, caller: Bearer, job: str, wait_s: float, /) -> Released:
        told_s = wait_s if math.isfinite(wait_s) else -1.0  # JSON has no other; the gate refuses both
        return self._call("job_result", caller, name=job, wait_s=told_s)

    def cancel(self, caller: Bearer, job: str, /) -> Released:
        return self._call("cancel", caller, name=job)

    def handles(self, caller: Bearer, /) -> Released:
        return self._call("handles", caller)

    def handle(self, caller: Bearer, handle: str, /) -> Released:
        return self._call("handle", caller, name=handle)

    def erase(self, caller: Bearer, handle: str, /) -> Released:
        return self._call("erase", caller, name=handle)

    def account(self, caller: Bearer, /) -> Released:
        return self._call("account", caller)

    def engine(self, caller: Bearer, /) -> Released:
        return self._call("engine", caller)

    def token(self, caller: Bearer, request: TokenRequest, /) -> Released:
        return self._call("token", caller, request)

    @property
    def exports(self) -> Exports:
        return Exports(self)

    def close(self) -> None:
        with self._turn:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    def _call(
        self,
        verb: Verb,
        caller: Bearer | None = None,
        request: Strict | None = None,
        vectors: Vectors | None = None,
        *,
        name: str = "",
        word: str = "",
        limit: int = 0,
        wait_s: float = 0.0,
        key: str | None = None,
        request_id: str = "",
    ) -> Released:
        secret = None if caller is None else caller.secret
        words = strict.make(
            Words,
            verb=verb,
            secret=secret,
            name=name,
            word=word,
            limit=limit,
            wait_s=wait_s,
            idempotency_key=key,
            request_id=request_id,
        )
        body = calls.pack_call(words, request, vectors)
        if len(body) > calls.MOST_CALL_BYTES:
            raise errors.refuse(
                "too_large", "$", f"the request takes {len(body)} bytes on its way to the gate"
            )
        ending, payload = calls.unpack_answer(self._exchange(body))
        return _passed_on(ending, payload)

    def _exchange(self, body: bytes) -> bytes:
        """Sends a call and waits; a connection that was idle may have ended meanwhile, which a second one tells."""
        with self._turn:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            try:
                kept.put(Head(Kind.call, 0, len(body)), body)
            except Lost:
                kept.close()
            else:
                return self._answer(kept)
        try:
            stream = Stream(
                connect(self._path, self._gate_uid), frames.at_most(answer=calls.MOST_ANSWER_BYTES)
            )
        except OSError:
            raise _away() from None
        try:
            stream.put(Head(Kind.call, 0, len(body)), body)
        except Lost:
            stream.close()
            raise _away() from None
        return self._answer(stream)

    def _answer(self, stream: Stream) -> bytes:
        try:
            found = stream.receive(ANSWER_S).body
        except Lost:
            stream.close()
            raise _away() from None
        except errors.TrocarError:
            stream.close()
            raise
        with self._turn:
            spare = len(self._idle) >= IDLE
            if not spare:
                self._idle.append(stream)
        if spare:
            stream.close()
        return found


@dataclass(frozen=True, slots=True)
class Exports:
    """The airlock's verbs of a front."""

    front: Front

    def submit(
        self, caller: Bearer, request: a.ExportRequest, key: str | None = None, request_id: str = "", /
    ) -> Released:
        return self.front._call("export", caller, request, key=key, request_id=request_id)

    def submit_raise(self, caller: Bearer, request: a.RaiseRequest, /) -> Released:
        return self.front._call("raise", caller, request)

    def list(self, caller: Bearer, state: str | None = None, limit: int = 100, /) -> Released:
        return self.front._call("tickets", caller, word=state or "", limit=limit)

    def show(self, caller: Bearer, ticket: str, /) -> Released:
        return self.front._call("ticket", caller, name=ticket)

    def step(self, caller: Bearer, ticket: str, step: a.Step, request: a.StepRequest, /) -> Released:
        return self.front._call("step", caller, request, name=ticket, word=step)

    def file(self, caller: Bearer, ticket: str, /) -> Released:
        return self.front._call("file", caller, name=ticket)


def _passed_on(ending: Ending, payload: bytes) -> Released:
    """The gate's answer; its refusals are raised, so that they leave as all refusals do."""
    if ending.status >= 400:
        raise errors.from_json(json.loads(payload))
    return release.forwarded(payload, ending.status, ending.charge, ending.retry_after_s, ending.media_type)


def _away() -> errors.TrocarError:
    return errors.refuse("ledger_unavailable", "", "the gate does not answer, so nothing may leave")

"""Where fronts call: reads a call, finds out who is calling, asks the service, and sends what it released.

A front is believed about nothing but the bytes that pass through it: the key is looked up here at every call, and
the request is read as strictly as it would be from the network.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar, get_args

from trocar import errors, strict
from trocar.gate import release
from trocar.gate.keys import Principal
from trocar.gate.release import Released
from trocar.graph.spec import SPEC, field_names
from trocar.graph.sweep import Axis
from trocar.host.streams import Lost, Stream
from trocar.service.service import Service
from trocar.strict import Strict
from trocar.wire import airlock as a
from trocar.wire import calls, frames, tensors
from trocar.wire import requests as q
from trocar.wire.calls import Call, Ending, Refused, Verb
from trocar.wire.frames import Head, Kind
from trocar.wire.tokens import ScopeWords, TokenRequest

log = logging.getLogger(__name__)
CONNECTIONS: Final = 1024
OPTIONS: Final = {
    "op": tuple(SPEC),
    "*": (
        *field_names(),
        *q.RunRequest.model_fields,
        *q.FitRequest.model_fields,
        *q.SessionRequest.model_fields,
        *Axis.model_fields,
        *a.ExportRequest.model_fields,
        *a.RaiseRequest.model_fields,
        *a.StepRequest.model_fields,
        *ScopeWords.model_fields,
    ),
}
M = TypeVar("M", bound=Strict)


class Desk:
    """Answers fronts with a service, a thread for each connection."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        self._service = service
        self._listener = listener
        self._streams: set[Stream] = set()
        self._turn = threading.Lock()
        self._closing = threading.Event()

    def serve(self) -> None:
        """Accepts fronts until `close`."""
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            stream = Stream(connection, frames.at_most(call=calls.MOST_CALL_BYTES))
            with self._turn:
                full = len(self._streams) >= CONNECTIONS
                if not full:
                    self._streams.add(stream)
            if full:
                stream.close()
                continue
            threading.Thread(target=self._talk, args=(stream,), name="trocar-desk", daemon=True).start()

    def close(self) -> None:
        """Ends every connection; calls that run are answered to nobody."""
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._turn:
            streams = tuple(self._streams)
        for stream in streams:
            stream.close()

    def _talk(self, stream: Stream) -> None:
        try:
            while True:
                frame = stream.receive()
                released = self._answer(frame.body)
                ending = Ending(
                    status=released.status,
                    charge=released.charge,
                    retry_after_s=released.retry_after_s,
                    media_type=released.media_type,
                )
                body = calls.pack_answer(ending, released.payload)
                stream.put(Head(Kind.answer, frame.head.number, len(body)), body)
        except (Lost, errors.TrocarError) as e:
            if not self._closing.is_set() and isinstance(e, errors.TrocarError):
                log.warning("a front was cut off: %s", e.reason)
        finally:
            stream.close()
            with self._turn:
                self._streams.discard(stream)

    def _answer(self, body: bytes) -> Released:
        try:
            return self._ask(calls.unpack_call(body))
        except errors.TrocarError as e:
            return release.refused(e)
        except Exception:
            log.exception("a call failed")
            return release.refused(errors.refuse("internal", "", "the request could not be served"))

    def _ask(self, call: Call) -> Released:
        verb = call.words.verb
        public = {"health": self._service.health, "models": self._service.models}
        public["capabilities"] = self._service.capabilities
        if verb in public:
            return public[verb]()
        caller = self._service.authenticate(call.words.secret)
        return _VERBS[verb](self._service, caller, call)


def _read(model: type[M], call: Call) -> M:
    return strict.parse(model, call.request, options=OPTIONS)


def _arrays(call: Call) -> Any:
    return tensors.unpack(call.arrays)[1] if call.arrays else {}


def _named(call: Call) -> tuple[str | None, str]:
    return call.words.idempotency_key, call.words.request_id


def _refused(service: Service, caller: Principal, call: Call) -> Released:
    """What a caller is told instead is raised; the same is no news."""
    error = errors.from_json(strict.read_json(_read(Refused, call).error.encode()))
    told = service.refused(caller, call.words.request_id, error)
    if told is not error:
        raise told
    return service.health()


def _step(call: Call) -> a.Step:
    for step in get_args(a.Step):
        if step == call.words.word:
            found: a.Step = step
            return found
    raise errors.refuse("bad_value", "step", f"{call.words.word[:40]!r} is no step")


_Answer = Callable[[Service, Principal, Call], Released]
_VERBS: Final[dict[Verb, _Answer]] = {
    "authenticate": lambda s, _who, _call: s.health(),
    "refused": _refused,
    "tokenize": lambda s, who, call: s.tokenize(who, _read(q.TokenizeRequest, call)),
    "plan": lambda s, who, call: s.plan(who, _read(q.RunRequest, call), _arrays(call)),
    "run": lambda s, who, call: s.run(who, _read(q.RunRequest, call), _arrays(call), *_named(call)),
    "session": lambda s, who, call: s.session(
        who, _read(q.SessionRequest, call), _arrays(call), *_named(call)
    ),
    "fit": lambda s, who, call: s.fit(who, _read(q.FitRequest, call), *_named(call)),
    "job": lambda s, who, call: s.job(who, call.words.name),
    "job_result": lambda s, who, call: s.job_result(who, call.words.name, call.words.wait_s),
    "cancel": lambda s, who, call: s.cancel(who, call.words.name),
    "handles": lambda s, who, _call: s.handles(who),
    "handle": lambda s, who, call: s.handle(who, call.words.name),
    "erase": lambda s, who, call: s.erase(who, call.words.name),
    "account": lambda s, who, _call: s.account(who),
    "engine": lambda s, who, _call: s.engine(who),
    "export": lambda s, who, call: s.exports.submit(who, _read(a.ExportRequest, call), *_named(call)),
    "raise": lambda s, who, call: s.exports.submit_raise(who, _read(a.RaiseRequest, call)),
    "tickets": lambda s, who, call: s.exports.list(who, call.words.word or None, call.words.limit),
    "ticket": lambda s, who, call: s.exports.show(who, call.words.name),
    "step": lambda s, who, call: s.exports.step(
        who, call.words.name, _step(call), _read(a.StepRequest, call)
    ),
    "file": lambda s, who, call: s.exports.file(who, call.words.name),
    "token": lambda s, who, call: s.token(who, _read(TokenRequest, call)),
}

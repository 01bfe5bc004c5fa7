"""The FastAPI application of a server.

Bodies are read whole up to a limit and decoded by our own strict reader, so duplicate keys, NaN and unknown
fields are refused before any model sees them. Every route returns `Released`; `answer` is the only function
that turns one into a response, and nothing else here makes responses.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Final, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from trocar import __version__, errors, strict
from trocar.api import openapi, waiting
from trocar.api.middleware import MOST_REQUESTS, Places, RequestId
from trocar.api.verbs import Verbs
from trocar.gate import release
from trocar.gate.release import Released
from trocar.graph.spec import SPEC, field_names
from trocar.graph.sweep import Axis
from trocar.strict import Strict
from trocar.wire import airlock as a
from trocar.wire import requests as q
from trocar.wire import tensors
from trocar.wire.tokens import ScopeWords, TokenRequest

log = logging.getLogger(__name__)
MAX_BODY_BYTES: Final = 32 << 20
M = TypeVar("M", bound=Strict)
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
JSON: Final = release.JSON
WAITERS: Final = 512


def answer(released: Released, request_id: str) -> Response:
    """The only way from a use case to the network."""
    headers = {"x-request-id": request_id, "cache-control": "no-store", "x-content-type-options": "nosniff"}
    if released.charge is not None:
        left = released.charge.left_bits
        headers |= {
            "x-trocar-bits": str(released.charge.bits),
            "x-trocar-ledger-seq": str(released.charge.seq),
            "x-trocar-ledger-head": released.charge.head,
            "x-trocar-bits-left": "uncapped" if left is None else str(left),
            "x-trocar-replayed": str(released.charge.replayed).lower(),
        }
    if released.status == 503:
        headers["retry-after"] = str(released.retry_after_s or 1)
    if released.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(released.payload, released.status, headers, released.media_type)


async def read_body(request: Request) -> bytes:
    """The body, cut off at the limit however it is sent.

    Raises:
        BadRequest: `too_large`, `bad_json` for a compressed body.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise errors.refuse("bad_json", "$", "compressed bodies are not read")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise errors.refuse("too_large", "$", f"the body is larger than {MAX_BODY_BYTES} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise errors.refuse("bad_json", "$", "the client hung up before the body ended") from None
    return b"".join(parts)


async def decode(request: Request, model: type[M]) -> tuple[M, dict[str, Any]]:
    """A strict model and the vectors beside it, from JSON or from a frame."""
    body = await read_body(request)
    kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    return await to_thread.run_sync(_decode, body, kind, model)  # a large body must not stop the loop


def _decode(body: bytes, kind: str, model: type[M]) -> tuple[M, dict[str, Any]]:
    if kind == tensors.MEDIA_TYPE:
        body, vectors = tensors.unpack(body)
        return strict.parse(model, body, options=OPTIONS), vectors
    if kind != JSON:
        raise errors.refuse(
            "bad_json", "content-type", f"{kind[:80]!r} is not {JSON} or {tensors.MEDIA_TYPE}"
        )
    return strict.parse(model, body, options=OPTIONS), {}


def _service(request: Request) -> Verbs:
    service: Verbs = request.app.state.service
    return service


def _principal(
    request: Request, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
) -> Any:
    scheme, _, secret = (authorization or "").partition(" ")
    caller = _service(request).authenticate(secret.strip() if scheme.lower() == "bearer" else None)
    request.state.caller = caller
    return caller


Caller = Annotated[Any, Depends(_principal)]
Idempotency = Annotated[str | None, Header(alias="idempotency-key")]
router = APIRouter(prefix="/v1")


def _named(request: Request, idempotency_key: str | None) -> tuple[str | None, str]:
    """What a client and what we call a request."""
    return idempotency_key, request.state.request_id


async def _off_loop(request: Request, verb: Callable[..., Released], *args: Any) -> Response:
    """Runs a use case on a worker thread, so that the event loop never waits for the ledger or the checker."""
    return answer(await to_thread.run_sync(verb, *args), request.state.request_id)


@router.get("/models", tags=["facts"])
async def models(request: Request) -> Response:
    """Facts of the served models: layers, widths, sites and why a site is unavailable."""
    return await _off_loop(request, _service(request).models)


@router.get("/capabilities", tags=["facts"])
async def capabilities(request: Request) -> Response:
    """Ops, fits, prices, engines and the isolation level."""
    return await _off_loop(request, _service(request).capabilities)


@router.post("/tokenize", tags=["facts"], openapi_extra=openapi.body(q.TokenizeRequest))
async def tokenize(request: Request, caller: Caller) -> Response:
    """Token ids and texts as the model sees them."""
    body, _ = await decode(request, q.TokenizeRequest)
    return await _off_loop(request, _service(request).tokenize, caller, body)


@router.post("/plan", tags=["programs"], openapi_extra=openapi.body(q.RunRequest))
async def plan(request: Request, caller: Caller) -> Response:
    """Checks and prices a program; nothing runs and nothing is spent."""
    body, vectors = await decode(request, q.RunRequest)
    return await _off_loop(request, _service(request).plan, caller, body, vectors)


@router.post("/runs", tags=["programs"], status_code=202, openapi_extra=openapi.body(q.RunRequest))
async def run(request: Request, caller: Caller, idempotency_key: Idempotency = None) -> Response:
    """Admits a program and starts its job."""
    body, vectors = await decode(request, q.RunRequest)
    return await _off_loop(
        request, _service(request).run, caller, body, vectors, *_named(request, idempotency_key)
    )


@router.post("/sessions", tags=["programs"], status_code=202, openapi_extra=openapi.body(q.SessionRequest))
async def session(request: Request, caller: Caller, idempotency_key: Idempotency = None) -> Response:
    """Admits programs that run one after another; a later one may use what an earlier one captured."""
    body, vectors = await decode(request, q.SessionRequest)
    return await _off_loop(
        request, _service(request).session, caller, body, vectors, *_named(request, idempotency_key)
    )


@router.post("/fits", tags=["programs"], status_code=202, openapi_extra=openapi.body(q.FitRequest))
async def fit(request: Request, caller: Caller, idempotency_key: Idempotency = None) -> Response:
    """Fits stored rows on the server; only metrics come back."""
    body, _ = await decode(request, q.FitRequest)
    return await _off_loop(request, _service(request).fit, caller, body, *_named(request, idempotency_key))


@router.get("/jobs/{job}", tags=["jobs"])
async def job_state(request: Request, caller: Caller, job: str) -> Response:
    """State and progress of a job."""
    return await _off_loop(request, _service(request).job, caller, job)


@router.get("/jobs/{job}/result", tags=["jobs"])
async def job_result(request: Request, caller: Caller, job: str, wait_s: float = 0.0) -> Response:
    """The result, waiting at most 30 s; 202 with the job's state while it runs."""
    request.state.of_job = True
    verb = partial(_service(request).job_result, caller, job)
    found = await waiting.outcome(request, verb, wait_s, request.app.state.waiters)
    return answer(found, request.state.request_id)


@router.delete("/jobs/{job}", tags=["jobs"])
async def cancel(request: Request, caller: Caller, job: str) -> Response:
    """Stops a job before its next batch."""
    return await _off_loop(request, _service(request).cancel, caller, job)


@router.get("/handles", tags=["handles"])
async def handles(request: Request, caller: Caller) -> Response:
    """The caller's activations and artifacts."""
    return await _off_loop(request, _service(request).handles, caller)


@router.get("/handles/{handle}", tags=["handles"])
async def handle_facts(request: Request, caller: Caller, handle: str) -> Response:
    """Facts of one handle; never its rows."""
    return await _off_loop(request, _service(request).handle, caller, handle)


@router.delete("/handles/{handle}", tags=["handles"])
async def erase(request: Request, caller: Caller, handle: str) -> Response:
    """Deletes a handle."""
    return await _off_loop(request, _service(request).erase, caller, handle)


@router.post("/airlock/exports", tags=["airlock"], openapi_extra=openapi.body(a.ExportRequest))
async def request_export(request: Request, caller: Caller, idempotency_key: Idempotency = None) -> Response:
    """Asks that the numbers of a handle leave: they are frozen, checked and priced."""
    body, _ = await decode(request, a.ExportRequest)
    verb = _service(request).exports.submit
    return await _off_loop(request, verb, caller, body, *_named(request, idempotency_key))


@router.post("/airlock/raises", tags=["airlock"], openapi_extra=openapi.body(a.RaiseRequest))
async def request_raise(request: Request, caller: Caller) -> Response:
    """Asks for larger limits of an account."""
    body, _ = await decode(request, a.RaiseRequest)
    return await _off_loop(request, _service(request).exports.submit_raise, caller, body)


@router.get("/airlock", tags=["airlock"])
async def airlock_list(
    request: Request, caller: Caller, state: str | None = None, limit: int = 100
) -> Response:
    """The newest requests that the caller sees."""
    return await _off_loop(request, _service(request).exports.list, caller, state, limit)


@router.get("/airlock/{ticket}", tags=["airlock"])
async def airlock_show(request: Request, caller: Caller, ticket: str) -> Response:
    """A request; for reviewers, all that a decision needs."""
    return await _off_loop(request, _service(request).exports.show, caller, ticket)


@router.get("/airlock/{ticket}/file", tags=["airlock"])
async def airlock_file(request: Request, caller: Caller, ticket: str) -> Response:
    """The file of an approved export, charged when it is fetched first."""
    return await _off_loop(request, _service(request).exports.file, caller, ticket)


@router.post("/airlock/{ticket}/{step}", tags=["airlock"], openapi_extra=openapi.body(a.StepRequest))
async def airlock_step(request: Request, caller: Caller, ticket: str, step: a.Step) -> Response:
    """Takes a step: `sign`, `approve`, `reject`, `withdraw` or `apply`."""
    body, _ = await decode(request, a.StepRequest)
    return await _off_loop(request, _service(request).exports.step, caller, ticket, step, body)


@router.get("/ledger", tags=["accounts"])
async def ledger(request: Request, caller: Caller) -> Response:
    """The calling key's own budgets and entries."""
    return await _off_loop(request, _service(request).account, caller)


@router.post("/tokens", tags=["accounts"], openapi_extra=openapi.body(TokenRequest))
async def token(request: Request, caller: Caller) -> Response:
    """A token that stands for the calling key with less; shown this once."""
    body, _ = await decode(request, TokenRequest)
    return await _off_loop(request, _service(request).token, caller, body)


@router.get("/engine", tags=["operators"])
async def engine(request: Request, caller: Caller) -> Response:
    """Batch counters."""
    return await _off_loop(request, _service(request).engine, caller)


def create_app(service: Verbs, *, most_requests: int = MOST_REQUESTS) -> FastAPI:
    """Builds the application around a service, which answers `most_requests` at once."""
    app = FastAPI(
        title="Trocar",
        version=__version__,
        summary="Interpretability on models you may never download.",
        description=openapi.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.router.redirect_slashes = False  # a redirect would name a host that the client chose
    app.state.service = service
    app.state.waiters = CapacityLimiter(WAITERS)
    app.include_router(router)
    app.add_middleware(Places, most=most_requests, told=told)
    app.add_middleware(RequestId)
    app.add_exception_handler(errors.TrocarError, _on_refusal)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_parameter)
    app.add_exception_handler(Exception, _on_fault)
    openapi.mount(app, answer)

    @app.get("/healthz", tags=["facts"])
    async def healthz(request: Request) -> Response:
        """Whether the server answers."""
        return answer(service.health(), request.state.request_id)

    return app


Handler = Callable[[Request, Exception], Awaitable[Response]]


async def _on_refusal(request: Request, error: Exception) -> Response:
    if not isinstance(error, errors.TrocarError):
        raise error
    return await _told(request, error)


async def _told(request: Request, error: errors.TrocarError) -> Response:
    """The refusal of a caller whom we know is an entry of the log; how a job ended was decided before."""
    caller = getattr(request.state, "caller", None)
    if caller is not None and not _decided(request, error):
        service, request_id = _service(request), request.state.request_id
        error = await to_thread.run_sync(service.refused, caller, request_id, error)
    return _refused(request, error)


def _decided(request: Request, error: errors.TrocarError) -> bool:
    """Whether it says how a job ended, or that we failed."""
    of_job = getattr(request.state, "of_job", False) and error.code not in ("job_not_found", "bad_value")
    return of_job or isinstance(error, errors.RunFailed | errors.ServerFault)


async def _on_http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _refused(
        request, errors.refuse("no_route", request.url.path[:200], f"HTTP {status} at this address")
    )


async def _on_parameter(request: Request, error: Exception) -> Response:
    """A query parameter or header that FastAPI itself could not read."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    refusals = [
        errors.refusal("bad_value", str(item["loc"][-1]), f"{item['msg']} (got {item.get('input')!r:.80})")
        for item in found[:20]
    ]
    return await _told(request, errors.ProgramError(refusals))


async def _on_fault(request: Request, error: Exception) -> Response:
    log.error("request %s failed", request.state.request_id, exc_info=error)
    return _refused(request, errors.refuse("internal", "", "the request could not be served"))


def _refused(request: Request, error: errors.TrocarError) -> Response:
    return told(error, request.state.request_id)


def told(error: errors.TrocarError, request_id: str) -> Response:
    """What refuses a request."""
    named = type(error)(error.refusals, request_id)
    named.retry_after_s = error.retry_after_s
    return answer(release.refused(named), request_id)

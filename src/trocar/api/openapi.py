"""The OpenAPI description and its page, served from the package: no script or style from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, Final

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from trocar.gate import release
from trocar.gate.release import Released
from trocar.wire import about, airlock, tensors
from trocar.wire import requests as q
from trocar.wire import results as r
from trocar.wire.tokens import TokenRequest, TokenView

DESCRIPTION: Final = """Programs are data: typed nodes, checked and priced before anything runs. Send JSON, or a
frame of JSON and safetensors (`application/vnd.trocar.frame`) when a request carries vectors. Every refusal
has a code, a JSON path, a reason and a next step. Authenticate with `Authorization: Bearer trk_...`."""
_REF: Final = "#/components/schemas/{model}"
_REQUESTS: Final[tuple[type[BaseModel], ...]] = (
    q.RunRequest, q.SessionRequest, q.FitRequest, q.TokenizeRequest, airlock.ExportRequest, airlock.RaiseRequest,
    airlock.StepRequest, TokenRequest,
)  # fmt: skip
_RESULTS: Final[tuple[type[BaseModel], ...]] = (
    r.PlanView, r.JobView, r.RunResult, r.SessionResult, r.HandlesView, about.ModelsView,
    about.CapabilitiesView, r.LedgerView, r.TokensView, about.EngineView, TokenView,
    airlock.TicketView, airlock.TicketsView,
)  # fmt: skip


def body(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of a route, for its `openapi_extra`; the body itself is read by our own decoder."""
    schema = {"schema": {"$ref": _REF.format(model=model.__name__)}}
    content: dict[str, Any] = {"application/json": schema}
    if model in (q.RunRequest, q.SessionRequest):
        content[tensors.MEDIA_TYPE] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with our strict models among its components."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
    )
    _, definitions = models_json_schema(
        [(m, "validation") for m in (*_REQUESTS, *_RESULTS)], ref_template=_REF
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    return document


def mount(app: FastAPI, answer: Callable[[Released, str], Response]) -> None:
    """Adds `/openapi.json` and `/docs`."""

    made = cache(lambda: release.document(describe(app)))  # once: it takes longer than most requests

    @app.get("/openapi.json", include_in_schema=False)
    async def document(request: Request) -> Response:
        return answer(await to_thread.run_sync(made), request.state.request_id)

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Trocar API",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/docs/static/favicon.png",
        )

    app.mount(
        "/docs/static", StaticFiles(directory=str(files("fastapi_offline") / "static")), name="docs-static"
    )

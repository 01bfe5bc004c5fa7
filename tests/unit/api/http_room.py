"""Plain HTTP against the application in this process: JSON in, status, headers and JSON out; no SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from trocar.wire import tensors


@dataclass(frozen=True)
class Heard:
    """An answer."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> dict[str, Any]:
        """The first refusal, after checking the shape that every refusal has."""
        error = self.json["error"]
        assert set(error) == {"kind", "category", "retryable", "retry_after_s", "request_id", "refusals"}
        assert error["request_id"] == self.headers["x-request-id"]
        assert error["request_id"].startswith("req_")
        first: dict[str, Any] = error["refusals"][0]
        assert set(first) == {"code", "path", "reason", "next_step", "closest", "docs"}
        assert first["reason"]
        assert first["next_step"]
        assert first["docs"] == f"docs/errors/{first['code']}.md"
        return first


class Caller:
    """Sends requests with one key, or none."""

    def __init__(self, app: Any, key: str | None) -> None:
        self._app = app
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def send(self, method: str, path: str, **options: Any) -> Heard:
        headers = {**self._headers, **options.pop("headers", {})}

        async def go() -> Heard:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as http:
                response = await http.request(method, path, headers=headers, **options)
                return Heard(response.status_code, response.headers, response.content)

        return asyncio.run(go())

    def get(self, path: str, **options: Any) -> Heard:
        return self.send("GET", path, **options)

    def delete(self, path: str) -> Heard:
        return self.send("DELETE", path)

    def post(self, path: str, body: Any, **headers: str) -> Heard:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        return self.send("POST", path, json=body, headers=named)

    def frame(self, path: str, body: Any, vectors: Mapping[str, Any]) -> Heard:
        packed = tensors.pack(json.dumps(body).encode(), {k: np.float32(v) for k, v in vectors.items()})
        return self.send("POST", path, content=packed, headers={"content-type": tensors.MEDIA_TYPE})

    def run(self, body: Any, **headers: str) -> Heard:
        """Starts a run and waits for its result; a replay is there at once and answers 200."""
        started = self.post("/v1/runs", body, **headers)
        assert started.status in (200, 202), started.json
        return self.result(started.json["job"])

    def result(self, job: str) -> Heard:
        while True:
            heard = self.get(f"/v1/jobs/{job}/result", params={"wait_s": 10})
            if heard.status != 202:
                return heard

    def account(self) -> tuple[Any, Any]:
        """What the ledger has of this key: entries of requests, and budgets."""
        view = self.get("/v1/ledger").json
        return [e for e in view["entries"] if e["kind"] not in ("account_opened", "refused")], view["budgets"]


def request(
    *nodes: dict[str, Any], model: str = "tiny", prompts: Any = ("abc", "hello"), **generation: Any
) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "prompts": list(prompts), "program": {"nodes": list(nodes)}}
    return {**body, "generation": generation} if generation else body


LOGPROBS: dict[str, Any] = {"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}
TEXT: dict[str, Any] = {"op": "text", "id": "text"}


def read(site: str, at: str = "prompt[-1]", name: str = "r") -> dict[str, Any]:
    return {"op": "read", "id": name, "site": site, "at": at}


def capture(*names: str) -> dict[str, Any]:
    return {"op": "capture", "id": "kept", "of": list(names)}


def edit(op: str, site: str, **fields: Any) -> dict[str, Any]:
    return {"op": f"edit.{op}", "id": "e", "site": site, **fields}

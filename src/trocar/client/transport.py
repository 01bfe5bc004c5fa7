"""One HTTP conversation with a server: headers, retries, and refusals turned back into exceptions."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx
from pydantic import ValidationError

from trocar import errors
from trocar.client.settings import Settings
from trocar.strict import Strict
from trocar.wire import results as r
from trocar.wire import tensors

RETRIES: Final = 3
CONNECT_S: Final = 10.0
READ_S: Final = 120.0
V = TypeVar("V", bound=Strict)


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and ledger headers of one answer."""

    status: int
    body: bytes
    headers: httpx.Headers

    def view(self, model: type[V]) -> V:
        """The body as a model.

        Raises:
            ClientError: `unreachable` when it is not what a Trocar server of this version answers.
        """
        try:
            return model.model_validate_json(self.body)
        except ValidationError as e:
            reason = f"the answer is not the {model.__name__} of this version: {e.errors()[0]['msg']}"
            step = "Check the address, and that server and SDK have the same version."
            raise errors.refuse("unreachable", "", reason, next_step=step) from None

    def charge(self) -> r.Charge:
        left = self.headers["x-trocar-bits-left"]
        return r.Charge(
            bits=int(self.headers["x-trocar-bits"]),
            seq=int(self.headers["x-trocar-ledger-seq"]),
            head=self.headers["x-trocar-ledger-head"],
            left_bits=None if left == "uncapped" else int(left),
            replayed=self.headers.get("x-trocar-replayed") == "true",
        )


class Transport:
    """Async HTTP with the server's conventions. `transport=` lets tests drive an app in-process."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._settings = settings
        self._http = httpx.AsyncClient(
            base_url=settings.url,
            headers=headers,
            transport=transport,
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
        )

    async def get(self, path: str, **params: Any) -> Answer:
        return await self._send("GET", path, params={k: v for k, v in params.items() if v is not None})

    async def delete(self, path: str) -> Answer:
        return await self._send("DELETE", path)

    async def post(
        self, path: str, body: Strict, vectors: tensors.Vectors | None = None, *, once: bool = False
    ) -> Answer:
        """Posts a request; `once` gives it an idempotency key, so that a retry is not a second request."""
        raw = body.model_dump_json().encode()
        content = tensors.pack(raw, vectors) if vectors else raw
        headers = {"content-type": tensors.MEDIA_TYPE if vectors else "application/json"}
        if once:
            headers["idempotency-key"] = uuid.uuid4().hex
        return await self._send("POST", path, content=content, headers=headers)

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, method: str, path: str, **options: Any) -> Answer:
        for attempt in range(RETRIES + 1):
            try:
                response = await self._http.request(method, path, **options)
            except httpx.TransportError as e:
                if attempt < RETRIES and not isinstance(e, httpx.ConnectError):
                    await asyncio.sleep(0.2 * 2**attempt)
                    continue
                raise errors.refuse(
                    "unreachable", self._settings.url, f"no answer from {self._settings.url}: {e!r}"
                ) from None
            if response.status_code == 503 and attempt < RETRIES:
                await asyncio.sleep(float(response.headers.get("retry-after", "1")))
                continue
            return _checked(response)
        raise errors.refuse("unreachable", self._settings.url, f"no answer from {self._settings.url}")


def _checked(response: httpx.Response) -> Answer:
    if response.is_success:
        return Answer(response.status_code, response.content, response.headers)
    request_id = response.headers.get("x-request-id")
    try:
        body = json.loads(response.content)
        raise errors.from_json(body, request_id)
    except (ValueError, KeyError, TypeError):
        text = response.text[:200]
        raise errors.refuse(
            "unreachable", str(response.url), f"HTTP {response.status_code} that is not Trocar's: {text!r}"
        ) from None

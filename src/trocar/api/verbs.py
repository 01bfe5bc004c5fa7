"""What the addresses call: one method for each, on a `Service` in this process or on a front of one in another.

A caller is whatever `authenticate` returned: this room only hands it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.gate.release import Released
from trocar.wire import airlock as a
from trocar.wire import requests as q
from trocar.wire.tokens import TokenRequest

Vectors = Mapping[str, npt.NDArray[np.float32]]


class Verbs(Protocol):
    """The use cases of a server."""

    def authenticate(self, secret: str | None) -> Any: ...

    def refused(self, caller: Any, request_id: str, error: errors.TrocarError, /) -> errors.TrocarError: ...

    def health(self) -> Released: ...

    def models(self) -> Released: ...

    def capabilities(self) -> Released: ...

    def tokenize(self, caller: Any, request: q.TokenizeRequest, /) -> Released: ...

    def plan(self, caller: Any, request: q.RunRequest, vectors: Vectors, /) -> Released: ...

    def run(
        self, caller: Any, request: q.RunRequest, vectors: Vectors, key: str | None, request_id: str, /
    ) -> Released: ...

    def session(
        self, caller: Any, request: q.SessionRequest, vectors: Vectors, key: str | None, request_id: str, /
    ) -> Released: ...

    def fit(self, caller: Any, request: q.FitRequest, key: str | None, request_id: str, /) -> Released: ...

    def job(self, caller: Any, job: str, /) -> Released: ...

    def job_result(self, caller: Any, job: str, wait_s: float, /) -> Released: ...

    def cancel(self, caller: Any, job: str, /) -> Released: ...

    def handles(self, caller: Any, /) -> Released: ...

    def handle(self, caller: Any, handle: str, /) -> Released: ...

    def erase(self, caller: Any, handle: str, /) -> Released: ...

    def account(self, caller: Any, /) -> Released: ...

    def engine(self, caller: Any, /) -> Released: ...

    def token(self, caller: Any, request: TokenRequest, /) -> Released: ...

    @property
    def exports(self) -> Exports: ...


class Exports(Protocol):
    """The use cases of the airlock."""

    def submit(
        self, caller: Any, request: a.ExportRequest, key: str | None, request_id: str, /
    ) -> Released: ...

    def submit_raise(self, caller: Any, request: a.RaiseRequest, /) -> Released: ...

    def list(self, caller: Any, state: str | None, limit: int, /) -> Released: ...

    def show(self, caller: Any, ticket: str, /) -> Released: ...

    def step(self, caller: Any, ticket: str, step: a.Step, request: a.StepRequest, /) -> Released: ...

    def file(self, caller: Any, ticket: str, /) -> Released: ...

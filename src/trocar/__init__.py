"""Trocar: interpretability on language models you may never download.

    import trocar
    model = trocar.Client().model("smollm2-135m-instruct")
    with model.trace("The Eiffel Tower is in") as t:
        t.save("top", t.lens(t.resid_post[:][-1], top_k=5))
    t.run().result()["top"].heatmap()

This package root is the SDK's public face; importing it loads no torch, no server and, until a name is used,
no HTTP client either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from trocar.errors import (
    AuthError,
    BadRequest,
    ClientError,
    Conflict,
    NotFound,
    Overloaded,
    PolicyRefusal,
    ProgramError,
    Refusal,
    RunFailed,
    ServerFault,
    TrocarError,
)

if TYPE_CHECKING:
    from trocar.client import edit
    from trocar.client.aio import AsyncActivations, AsyncClient, AsyncJob, AsyncModel
    from trocar.client.airlock import AsyncTicket, Export, Ticket
    from trocar.client.handles import Direction, Probe
    from trocar.client.results import Plan, Results, Text
    from trocar.client.sync import Activations, Client, Job, Model
    from trocar.client.trace import Trace
    from trocar.graph.builder import Sae

__version__: Final = "0.1.0"
_LAZY: Final = {
    "Activations": "trocar.client.sync",
    "AsyncActivations": "trocar.client.aio",
    "AsyncClient": "trocar.client.aio",
    "AsyncJob": "trocar.client.aio",
    "AsyncModel": "trocar.client.aio",
    "AsyncTicket": "trocar.client.airlock",
    "Client": "trocar.client.sync",
    "Direction": "trocar.client.handles",
    "Export": "trocar.client.airlock",
    "Job": "trocar.client.sync",
    "Model": "trocar.client.sync",
    "Plan": "trocar.client.results",
    "Probe": "trocar.client.handles",
    "Results": "trocar.client.results",
    "Sae": "trocar.graph.builder",
    "Text": "trocar.client.results",
    "Ticket": "trocar.client.airlock",
    "Trace": "trocar.client.trace",
}
__all__ = [
    "Activations",
    "AsyncActivations",
    "AsyncClient",
    "AsyncJob",
    "AsyncModel",
    "AsyncTicket",
    "AuthError",
    "BadRequest",
    "Client",
    "ClientError",
    "Conflict",
    "Direction",
    "Export",
    "Job",
    "Model",
    "NotFound",
    "Overloaded",
    "Plan",
    "PolicyRefusal",
    "Probe",
    "ProgramError",
    "Refusal",
    "Results",
    "RunFailed",
    "Sae",
    "ServerFault",
    "Text",
    "Ticket",
    "Trace",
    "TrocarError",
    "__version__",
    "edit",
]


def __getattr__(name: str) -> Any:
    if name == "edit":
        return importlib.import_module("trocar.client.edit")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'trocar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

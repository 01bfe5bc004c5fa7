"""A real server on the real model, for the code blocks of the docs: HTTP on a free port, one per session."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from trocar.api.app import create_app
from trocar.engine.hf.engine import HFEngine
from trocar.gate.gate import Gate
from trocar.gate.policy import Role, Tier
from trocar.models.load import Loaded
from trocar.service.compose import local_service
from trocar.service.service import Service
from trocar.store import Store

MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Desk:
    """Where the server is, and three keys: an operator's, a researcher's, an agent's with a small budget."""

    url: str
    operator: str
    researcher: str
    agent: str
    service: Service


@contextmanager
def desk(folder: Path, loaded: Loaded) -> Iterator[Desk]:
    """Starts a server in `folder` and stops it."""
    gate = Gate(f"sqlite:///{folder / 'ledger.db'}")
    keys = [
        gate.keys.create(name, tier, role).secret
        for name, tier, role in (
            ("ops", Tier.open, Role.operator),
            ("lab", Tier.open, Role.researcher),
            ("agent", Tier.agent, Role.researcher),
        )
    ]
    service = local_service([(loaded, HFEngine(loaded))], Store(folder / "store"), gate)
    with _serve(service) as url:
        yield Desk(url, keys[0], keys[1], keys[2], service)


@contextmanager
def _serve(service: Service) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(service), log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    deadline_s = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline_s:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
        service.close()

"""What every case asks of a refusal: one code, nothing of the machine, no bit, and a neighbour who sees nothing."""

from __future__ import annotations

import json
import re
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from http_room import Caller, Heard, capture, read, request

import trocar
from trocar.codes import CODES
from trocar.gate.policy import Role, Tier
from trocar.wire import tensors

JSON = {"content-type": "application/json"}
FRAME = {"content-type": tensors.MEDIA_TYPE}
LOGPROBS: dict[str, Any] = {"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1, 2]}
# What only a stack trace, a path of this machine or a library's own words would put into an answer.
INNER = re.compile(
    r"Traceback|\.py\b|site-packages|sqlalchemy|sqlite|pydantic|<class|object at 0x|"
    + re.escape(str(Path.home()))
    + "/"
)


def vector(value: float = 1.0, width: int = 32, name: str = "v") -> dict[str, Any]:
    """Fields of a frame's arrays."""
    import numpy as np

    return {name: np.full(width, value, dtype=np.float32)}


def steer(*more: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A program that adds the vector `v`, with the log-probabilities after it."""
    nodes = ({"op": "tensor", "id": "v", "name": "v"},
             {"op": "edit.add", "id": "e", "site": "resid_post.1", "value": "v", **fields})  # fmt: skip
    return request(*nodes, LOGPROBS, *more)


def clean(heard: Heard, *forbidden: str) -> None:
    """Nothing of the inside of the server is in an answer."""
    said = heard.body.decode("utf-8", "replace")
    assert not INNER.search(said), said[:500]
    for word in (str(Path(trocar.__file__).parent), sys.prefix, *forbidden):
        assert word not in said


def codes(heard: Heard) -> list[str]:
    """Codes of a refusal; each must be a row of the closed table."""
    found = [r["code"] for r in heard.json["error"]["refusals"]]
    assert found
    assert set(found) <= set(CODES)
    return found


@dataclass(frozen=True)
class World:
    """A server with an attacker and a stranger beside her; `quiet` is what the stranger gets when nobody attacks.

    Attributes:
        attacker: an uncapped key on open weights, so that nothing is refused for want of budget.
        neighbour: another tenant.
    """

    server: Any
    attacker: Caller
    neighbour: Caller
    attacker_key: str
    neighbour_key: str
    body: dict[str, Any]
    quiet: Any
    quiet_forwards: int

    @classmethod
    def of(cls, server: Any) -> World:
        attacker, neighbour = mint(server, "mallory"), mint(server, "victor")
        nodes = [read("resid_post.2", "prompt[*]"), {"op": "lens", "id": "top", "of": ["r"], "top_k": 3},
                 {**LOGPROBS, "at": "prompt[*]"}, capture("r")]  # fmt: skip
        body = request(*nodes, prompts=["a stranger's prompt"])
        stranger = Caller(server.app, neighbour.secret)
        before = server.forwards()
        quiet = numbers(stranger.run(body))
        return cls(server, Caller(server.app, attacker.secret), stranger, attacker.principal.key_id,
                   neighbour.principal.key_id, body, quiet, server.forwards() - before)  # fmt: skip

    def spent(self, key_id: str | None = None) -> dict[str, int]:
        """Bits charged and held of the accounts of a key, by lineage; the attacker's by default."""
        mine = key_id or self.attacker_key
        found = [a for a in self.server.service.gate.ledger.balances() if mine in a.owner]
        return {a.lineage: a.charged_bits + a.held_bits for a in found if a.charged_bits + a.held_bits}

    def rest(self) -> None:
        """As if a minute had passed: a key that was refused too often in one would be told to wait."""
        self.server.service._pace._buckets.clear()

    def refuses(self, attack: Callable[[], Heard], *expected: str, status: int | None = None) -> Heard:
        """Runs an attack that must be refused before a model is touched, while the stranger runs beside it.

        Checks the code, the shape and the words of the refusal, that it is free, that only the stranger's own
        forward passes happened, and that the stranger's numbers keep every bit.
        """
        self.rest()
        forwards, spent = self.server.forwards(), self.spent()
        job = self.neighbour.post("/v1/runs", self.body).json["job"]
        try:
            heard = attack()
        finally:
            beside = self.neighbour.result(job)
        assert heard.status in ({status} if status else {400, 401, 403, 404, 409, 413, 415, 422}), heard.body[
            :300
        ]
        assert heard.refusal["code"] == codes(heard)[0]
        assert codes(heard)[0] in expected, heard.json["error"]["refusals"][0]
        clean(heard)
        assert self.spent() == spent
        assert self.server.forwards() - forwards == self.quiet_forwards
        assert numbers(beside) == self.quiet
        return heard

    def refuses_json(
        self, body: Any, *expected: str, route: str = "/v1/runs", status: int | None = None
    ) -> Heard:
        return self.refuses(lambda: self.attacker.post(route, body), *expected, status=status)

    def refuses_raw(
        self, raw: bytes, *expected: str, route: str = "/v1/runs", headers: Mapping[str, str] = JSON
    ) -> Heard:
        return self.refuses(
            lambda: self.attacker.send("POST", route, content=raw, headers=dict(headers)), *expected
        )


@dataclass(frozen=True)
class Small:
    """A server as `guarded` makes it."""

    service: Any
    app: Any
    store: Any
    engines: dict[str, Any]

    def forwards(self) -> int:
        return sum(e.stats().forwards for e in self.engines.values())


def guarded(root: Path, *loaded: Any, data: Mapping[str, Any] | None = None, **people: Any) -> Any:
    """A server under a policy of its own: `people` are terms of the tier `external`, `data` is the section."""
    from trocar.api.app import create_app
    from trocar.engine.hf.engine import HFEngine
    from trocar.gate.gate import Gate
    from trocar.gate.policy import Policy
    from trocar.service.compose import local_service
    from trocar.store import Store

    terms = {"life_ppm": 900_000, "day_ppm": 900_000, "rank_ppm": 1_000_000, "tick_ms": 1, **people}
    policy = Policy.model_validate(
        {"people": {"tiers": {"external": terms}}, "data": {"lineage_day_ppm": 900_000, **(data or {})}}
    )
    gate = Gate(f"sqlite:///{root}/ledger.db", policy)
    engines, store = {m.facts.name: HFEngine(m) for m in loaded}, Store(root / "store")
    service = local_service([(m, engines[m.facts.name]) for m in loaded], store, gate)
    return Small(service, create_app(service), store, engines)


def mint(server: Any, tenant: str, tier: Tier = Tier.open, **more: Any) -> Any:
    """A new key of a tenant."""
    return server.service.gate.keys.create(tenant, tier, Role.researcher, **more)


def numbers(heard: Heard) -> Any:
    """What a result says, without what differs between any two runs: the handle."""
    assert heard.status == 200, heard.body[:500]
    outputs = heard.json["outputs"]
    for output in outputs.values():
        output.pop("handle", None)
    return outputs


def block(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors block with this header, whatever it says about the data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape: list[Any], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def frame(body: Any, tail: bytes) -> bytes:
    """A frame of JSON and any bytes."""
    raw = json.dumps(body).encode()
    return tensors.MAGIC + struct.pack(">I", len(raw)) + raw + tail


def fastest_s(act: Callable[[], Any], times: int = 5) -> float:
    """The shortest of several measurements: what it takes when nobody else has the processor."""
    took = []
    for _ in range(times):
        started = time.perf_counter()
        act()
        took.append(time.perf_counter() - started)
    return min(took)

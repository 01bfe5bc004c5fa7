"""Puts the gate process together: pinned facts, tokenizers from the model folders, the line to the worker, a service.

No weights are read here. A worker that is not to be trusted freezes the lineages of everything it served.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from trocar import errors
from trocar.gate import release
from trocar.gate.chain import Kind as Entry
from trocar.gate.gate import Gate
from trocar.gate.release import Released
from trocar.host.gate.line import RETRY_S, Line, lost
from trocar.host.gate.pins import pinned
from trocar.host.gate.remote import RemoteWorker
from trocar.host.streams import Lost, Stream, connect
from trocar.models.pull import locate
from trocar.models.text import codec_at
from trocar.service.service import Service
from trocar.service.worker import Model
from trocar.wire import about, frames, orders
from trocar.wire.frames import Head, Kind, Status
from trocar.wire.orders import Hello

log = logging.getLogger(__name__)
ASK_S: Final = 30.0
MOST_TOLD: Final = 200
Network = Literal["closed", "allowed"]


@dataclass(frozen=True, slots=True)
class Alarm:
    """What happens when a worker is not to be trusted: nothing of these lineages leaves until they are thawed."""

    gate: Gate
    lineages: Sequence[str]

    def __call__(self, why: str) -> None:
        """Freezes, enters the alert into the log, and tells the operator's log; it never raises."""
        log.critical("ALERT: the worker is not to be trusted: %s; its lineages are frozen", why)
        for lineage in dict.fromkeys(self.lineages):
            try:
                self.gate.ledger.freeze(lineage, f"the worker is not to be trusted: {why}"[:MOST_TOLD])
                self.gate.ledger.note(Entry.worker_alert, lineage=lineage, detail={"why": why[:MOST_TOLD]})
            except errors.TrocarError:
                log.exception("ALERT: the lineage %s could not be frozen; stop the server", lineage)


class Hosted(Service):
    """The use cases of a server whose models run in another process."""

    def __init__(self, models: Sequence[Model], gate: Gate, network: Network) -> None:
        super().__init__(models, gate, isolation="host")
        self._network: Network = network

    def capabilities(self) -> Released:
        """What any server says, and whether the worker has a network."""
        said = about.CapabilitiesView.model_validate_json(super().capabilities().payload)
        return release.public(said.model_copy(update={"network": self._network}))


def assemble(
    refs: Sequence[str],
    data: Path,
    worker: Path,
    gate: Gate,
    *,
    within_s: float,
    worker_uid: int | None = None,
    network: Network = "allowed",
) -> Service:
    """A service whose models run in the process that listens at `worker`.

    Args:
        refs: the models, as the worker was told them.
        data: folder of the ledger, where facts are pinned.
        gate: open; closed by `Service.close` from then on, by the caller when this raises.
        within_s: how long the worker may take to load.
        worker_uid: the user that runs the worker; the own one when None.
        network: what everybody is told of the worker; with `closed`, one that has a network is refused.

    Raises:
        Overloaded: `worker_lost` when no worker is there in time.
        RunFailed: `checksum_mismatch`, `network_open`; what `locate` raises.
        ServerFault: `bad_result`.
        PolicyRefusal: `limit_changed`.
    """
    deadline_s = time.monotonic() + within_s
    homes = [locate(ref) for ref in refs]
    found = [
        pinned(data, gate.ledger, manifest, lambda name: _ask(worker, worker_uid, name, deadline_s))
        for _, manifest in homes
    ]
    texts = [codec_at(home) for home, _ in homes]
    with ExitStack() as undo:
        alarm = Alarm(gate, tuple(each.facts.lineage for each in found))
        line = Line(worker, Hello(models=tuple(found), network=network), alarm, worker_uid)
        undo.callback(line.close)
        line.wait(deadline_s - time.monotonic())
        models = [
            Model(each.facts, text, RemoteWorker(line, each), each.engine)
            for each, text in zip(found, texts, strict=True)
        ]
        service = Hosted(models, gate, network)
        undo.pop_all()
    return service


def _ask(worker: Path, uid: int | None, name: str, deadline_s: float) -> bytes:
    """What a worker says of one of its models."""
    body = orders.Ask(model=name).model_dump_json().encode()
    while time.monotonic() < deadline_s:
        try:
            stream = Stream(connect(worker, uid), frames.at_most(result=orders.MOST_FACTS_BYTES))
        except OSError:
            time.sleep(RETRY_S)
            continue
        try:
            stream.put(Head(Kind.facts, 1, len(body)), body)
            frame = stream.receive(ASK_S)
        except Lost:
            continue
        finally:
            stream.close()
        if frame.head.status is Status.fault:
            raise errors.refuse("unknown_model", "model", f"the worker does not serve {name!r}")
        return frame.body
    raise lost()

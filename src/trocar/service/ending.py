"""How an admitted request ends: with an answer, or with nothing left behind. Either is first seen at a tick.

The ledger is told at that moment and not before: whoever watches an account would else learn from it how long a
worker took. What a worker says of an erasure is heard by nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trocar.gate.gate import Gate, Hold
from trocar.gate.handles import Handle
from trocar.gate.release import Press, Priced, Released
from trocar.service.worker import Worker

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ending:
    """Ends one admitted request, once.

    Attributes:
        tick: waits for the moment at which the end may be known.
        worker, tenant, ids: every handle that the request may have made there.
    """

    gate: Gate
    hold: Hold
    tick: Callable[[], None]
    worker: Worker
    tenant: str
    ids: Sequence[str]

    def release(self, press: Callable[[Press], Priced], made: Sequence[Handle]) -> Released:
        """Charges, enters the handles that stay, and gives the answer; raises what `Gate.release` does."""
        return self.gate.release(self.hold, press, made, self.tick)

    def undo(self, fault: BaseException) -> None:
        """Nothing was released: the rows go, the overhead stays charged."""
        try:
            self.gate.cancel(self.hold, fault, self.tick)
        finally:
            self.erase()

    def erase(self) -> None:
        erase(self.worker, self.tenant, self.ids)


def erase(worker: Worker, tenant: str, handles: Sequence[str]) -> None:
    """Deletes rows that nobody can name any more; a worker that fails at it is the operator's business alone."""
    try:
        worker.erase(tenant, handles)
    except Exception:
        log.exception("%d handles could not be erased", len(handles))

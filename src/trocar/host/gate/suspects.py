"""Which requests ran when a worker died: one that did so twice within an hour is not run again.

Several requests run at once, and nobody can tell which of them did it; one that comes through with a result is no
suspect any more, so only a request that is there at every death stays one. A fault proves nothing: what takes all
memory ends a worker at one time and fails at another.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from trocar import errors

DEATHS: Final = 2
REMEMBERED_S: Final = 3600.0
MOST: Final = 4096


class Suspects:
    """Deaths by request, for an hour."""

    def __init__(self) -> None:
        self._deaths: dict[str, list[float]] = {}
        self._turn = threading.Lock()

    def died(self, request: str) -> None:
        """A worker died while it ran."""
        now_s = time.monotonic()
        with self._turn:
            recent = [s for s in self._deaths.pop(request, []) if now_s - s < REMEMBERED_S]
            self._deaths[request] = [*recent, now_s]  # put last: the oldest are forgotten first
            while len(self._deaths) > MOST:
                del self._deaths[next(iter(self._deaths))]

    def survived(self, request: str) -> None:
        """A worker came back from it with a result."""
        with self._turn:
            self._deaths.pop(request, None)

    def require_harmless(self, request: str) -> None:
        """Refuses a request that was there too often.

        Raises:
            RunFailed: `quarantined`.
        """
        now_s = time.monotonic()
        with self._turn:
            recent = [s for s in self._deaths.get(request, []) if now_s - s < REMEMBERED_S]
        if len(recent) >= DEATHS:
            reason = f"the process that runs the model ended {len(recent)} times while it ran this request"
            raise errors.refuse("quarantined", "", reason)

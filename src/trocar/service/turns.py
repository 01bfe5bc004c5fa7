"""Threads that are shared by turns: one piece of work of each tenant after another, whoever asked first.

Without turns, a tenant who starts everything he may keeps his neighbour waiting until the last of it is done.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final


class Turns:
    """At most `threads` pieces of work at once.

    Args:
        name: of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting: Final[dict[str, deque[Callable[[], None]]]] = {}  # in the order of the next turns
        self._lock = threading.Lock()

    def submit(self, tenant: str, work: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(work)
            self._pool.submit(self._next)

    def ahead(self, tenant: str, mine: int) -> int:
        """How many pieces come before the one that follows `mine` of the tenant's own."""
        with self._lock:
            before = True
            found = mine
            for other, queue in self._waiting.items():
                if other == tenant:
                    before = False
                else:
                    found += min(len(queue), mine + before)
            return found

    def shutdown(self) -> None:
        """Waits until everything was done."""
        self._pool.shutdown()

    def _next(self) -> None:
        with self._lock:  # one of these for each submitted piece, so there is one
            tenant, queue = next(iter(self._waiting.items()))
            work = queue.popleft()
            del self._waiting[tenant]
            if queue:
                self._waiting[tenant] = queue  # behind everybody else
        work()

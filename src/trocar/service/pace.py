"""How many refusals of one key are answered in a minute. Refusals are free, so they are counted by time instead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MOST_KEYS: Final = 10_000


@dataclass(slots=True)
class _Bucket:
    left: float
    at_s: float


class Pace:
    """Token buckets by key; a key that was quiet for a minute has its whole minute again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()

    def wait_s(self, key: str, per_minute: int) -> float:
        """Takes one; 0 when there was one, else seconds until there is."""
        now_s = self._clock()
        with self._lock:
            if len(self._buckets) >= MOST_KEYS:
                self._buckets = {k: b for k, b in self._buckets.items() if now_s - b.at_s < 60.0}
            bucket = self._buckets.setdefault(key, _Bucket(float(per_minute), now_s))
            bucket.left = min(per_minute, bucket.left + (now_s - bucket.at_s) * per_minute / 60.0)
            bucket.at_s = now_s
            if bucket.left >= 1.0:
                bucket.left -= 1.0
                return 0.0
            return (1.0 - bucket.left) * 60.0 / per_minute

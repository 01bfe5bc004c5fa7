"""The moments at which a metered answer may be told: whole multiples of a tick since its start.

So what an answer says by its time is a number of ticks, which the overhead of every request pays for.
"""

from __future__ import annotations

import time


def rest_s(started_s: float, tick_ms: int) -> float:
    """Seconds until the next tick; 0 where there are none.

    Args:
        started_s: by `time.monotonic`.
    """
    if not tick_ms:
        return 0.0
    tick_s = tick_ms / 1000
    return tick_s - (time.monotonic() - started_s) % tick_s

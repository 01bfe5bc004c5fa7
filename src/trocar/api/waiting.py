"""Waiting for a job, in slices: between two of them whoever has hung up gives back its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from trocar.errors import Overloaded
from trocar.gate.release import Released
from trocar.wire.requests import MAX_WAIT_S

SLICE_S: Final = 1.0
RUNNING: Final = 202


async def outcome(
    request: Request, verb: Callable[[float], Released], wait_s: float, limiter: CapacityLimiter
) -> Released:
    """How a job ended, or its state when the wait is over or nobody listens any more.

    Args:
        verb: waits for so many seconds; refuses a wait that makes no sense before it waits.
        limiter: threads of their own: many slow jobs must not keep others from asking anything.
    """
    sliced = SLICE_S < wait_s <= MAX_WAIT_S
    await request.is_disconnected()  # the first message is the request itself
    until_s = time.monotonic() + wait_s
    found = await to_thread.run_sync(verb, SLICE_S if sliced else wait_s, limiter=limiter)
    while sliced and found.status == RUNNING and not await request.is_disconnected():
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            break
        try:
            found = await to_thread.run_sync(verb, min(SLICE_S, left_s), limiter=limiter)
        except Overloaded as e:
            if e.code != "queue_full":  # as a job may end
                raise
            break  # others wait in its place now: the state is an answer, too
    return found

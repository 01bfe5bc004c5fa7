"""Faults of a worker in our own words: a code from a short list, and which part of the request it is about.

Whoever holds secret weights could write them into the text of an error, its path, or how long to wait. So of a
fault only its code survives, one of twenty at most, and a path that is a name in the caller's own program; both
fit into the overhead that was charged. Sixteen of them a worker may name, in this process as in another
(`wire.orders.FAULTS`); the others are said of a worker by whoever waits for it. Words and waiting times are those of
the table of codes. Models with open weights have nothing to hide, and keep the words of the engine, which say more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from trocar import errors
from trocar.codes import CODES
from trocar.graph.facts import ModelFacts
from trocar.wire.orders import FAULTS

RETRY_S: Final = 1.0
OF_A_WORKER: Final = ("bad_result", "worker_lost", "quarantined", "too_large")
"""What our own side says of a worker in another process, or instead of asking it."""
KNOWN: Final = frozenset((*FAULTS, *OF_A_WORKER))
"""Codes that may leave; any other is `internal`."""
_NODE: Final = re.compile(r"program\.nodes\[([0-9]{1,6})\]")


@contextmanager
def reworded(facts: ModelFacts, names: frozenset[str]) -> Iterator[None]:
    """Replaces the words of faults that come out of the block.

    Args:
        names: what a path may be.
    """
    try:
        yield
    except errors.TrocarError as e:
        if facts.open_weights:
            raise
        raise _ours(e, names) from None


def _ours(fault: errors.TrocarError, names: frozenset[str]) -> errors.TrocarError:
    first = fault.refusals[0]
    code = first.code if first.code in KNOWN else "internal"
    said = errors.refuse(code, _place(first.path, names), CODES[code].summary)
    if isinstance(said, errors.Overloaded):
        said.retry_after_s = int(RETRY_S)
    return said


def _place(path: str, names: frozenset[str]) -> str:
    """A name of the caller's, or the place of one, as a worker in another process counts them; else nothing."""
    place = _NODE.fullmatch(path)
    return path if path in names or (place and int(place[1]) < len(names)) else ""

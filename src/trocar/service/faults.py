"""Faults of a worker in our own words: a code from a short list, and which part of the request it is about.

Whoever holds secret weights could write them into the text of an error, its path, or how long to wait. So of a
fault only its code survives, one of sixteen at most, and a path that is a name in the caller's own program; both
fit into the overhead that was charged. Words and waiting times are those of the table of codes. Models with open
weights have nothing to hide, and keep the words of the engine, which say more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from trocar import errors
from trocar.codes import CODES
from trocar.graph.facts import ModelFacts

RETRY_S: Final = 1.0
KNOWN: Final = frozenset(
    {
        "cancelled", "disk_full", "edit_missed", "edit_not_finite", "fit_not_converged", "handle_incomplete",
        "handle_not_found", "bad_result", "internal", "queue_full", "result_not_finite", "rows_not_finite",
        "store_damaged", "too_few_rows", "rows_mismatch",
    }
)  # fmt: skip
"""Codes that may leave; any other is `internal`."""


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
    path = first.path if first.path in names else ""
    said = errors.refuse(code, path, CODES[code].summary)
    if isinstance(said, errors.Overloaded):
        said.retry_after_s = int(RETRY_S)
    return said

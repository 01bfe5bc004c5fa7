"""Many probes on the same rows: hundreds of labels in one scan, which reads and converts each row once for all."""

from __future__ import annotations

import numpy as np

from trocar import errors
from trocar.analysis.logistic import Fitted, Task, logistic
from trocar.analysis.moments import Moments, moments, precision_of
from trocar.analysis.scan import Binary, Signs
from trocar.analysis.site import sampled
from trocar.analysis.source import Source
from trocar.analysis.standard import standard


def logistic_many(
    source: Source, signs: Signs, *, l2: float, l1: float = 0.0, known: Moments | None = None
) -> list[Fitted]:
    """Fits K logistic probes to one source.

    Args:
        signs: int8 [K, n]; +1 and -1 are the classes of a probe, 0 leaves a row out of it.
        l2: penalty of the squared weights, on features standardised over the rows that any probe uses.
        l1: penalty of the absolute ones.
        known: moments of those rows, with a Gram matrix, from an earlier pass; they save a pass here and, when they are
            of all rows instead of a sample, half of the others.

    Raises:
        ProgramError: `bad_labels` for signs that do not fit the rows, `too_few_rows` for a probe of one class,
            `rows_not_finite`.
        RunFailed: `fit_not_converged`.
    """
    if signs.ndim != 2 or signs.shape[1] != len(source):
        reason = f"signs of shape {signs.shape} for {len(source)} rows"
        raise errors.refuse("bad_labels", "labels", reason)
    counts = [np.array([(one < 0).sum(), (one > 0).sum()], dtype=np.float64) for one in signs]
    for number, (lower, upper) in enumerate(counts):
        if not (lower and upper):
            reason = f"{lower:.0f} rows of the lower class and {upper:.0f} of the upper one"
            raise errors.refuse("too_few_rows", f"labels[{number}]", reason)
    precision = precision_of(len(source), source.width)
    near, whole = (known, known) if known is not None else _survey(source, signs)
    s = standard(whole)
    tasks = [Task(s, count, l2, l1) for count in counts]
    return logistic(Binary(source, signs, precision, far=s.far), tasks, near, precision)


def _survey(source: Source, signs: Signs) -> tuple[Moments, Moments]:
    """The moments of a sample, with a Gram matrix, and of all rows that any probe uses, without."""
    used = np.zeros(len(source), dtype=bool)
    for one in signs:
        used |= one != 0
    part = np.where(used, sampled(len(source), source.width), -1)
    rest, some = moments(source, part=part, parts=2, gram=[False, True])
    return some, some.plain().merge(rest)

"""Linear maps from rows of one site to rows of another, by least squares with a penalty, scored on held-out rows.

Such a map is close to the weights between its sites, which is why a server of secret weights refuses it
(`graph.labels.Rules.own_targets`). Tuned lenses (Belrose et al. 2023) and transcoders begin like this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.linear_model import Ridge

from trocar import errors
from trocar.analysis.labels import Floats

DEFAULT_L2: Final = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class LinearFit:
    """`x @ map + bias`, float64 [width, target] and [target]; `r2` over all numbers of the held-out rows."""

    map: Floats
    bias: Floats
    r2: float
    r2_train: float


def sizes(n: int, test_fraction: float) -> tuple[int, int]:
    """Rows that are fitted and held out, of `n`.

    Raises:
        ProgramError: `too_few_rows`.
    """
    held = max(1, round(test_fraction * n))
    if n - held < 2:
        raise errors.refuse(
            "too_few_rows", "handle", f"{n} rows; a map needs at least 2 to fit and 1 to test"
        )
    return n - held, held


def linear_map(x: Floats, y: Floats, *, test_fraction: float, seed: int, l2: float | None) -> LinearFit:
    """Fits rows [n, width] to rows [n, target].

    Raises:
        ProgramError: `too_few_rows`, `rows_not_finite`, `rows_mismatch`.
    """
    if len(x) != len(y):
        raise errors.refuse("rows_mismatch", "target", f"{len(x)} rows on one side and {len(y)} on the other")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise errors.refuse("rows_not_finite", "handle", "a row holds NaN or an infinity")
    n_train, _ = sizes(len(x), test_fraction)
    order = np.random.default_rng([seed, 1]).permutation(len(x))
    train, test = order[:n_train], order[n_train:]
    model = Ridge(alpha=DEFAULT_L2 if l2 is None else l2, solver="cholesky").fit(x[train], y[train])
    weights = np.asarray(model.coef_, dtype=np.float64).T
    bias = np.asarray(model.intercept_, dtype=np.float64)
    return LinearFit(weights, bias, *(_r2(x[i] @ weights + bias, y[i]) for i in (test, train)))


def _r2(found: Floats, y: Floats) -> float:
    spread = float(((y - y.mean(axis=0)) ** 2).sum())
    return 1.0 - float(((y - found) ** 2).sum()) / spread if spread > 0 else 0.0

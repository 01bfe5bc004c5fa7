"""Fits that end in a map of rows instead of a score: principal components, whitening, erasure; tested on held-out rows.

One pass gives the moments of both sides of the split; components and whitening are tested by the moments of the
held-out side alone. An erasure is tested by what it is for: a new probe, fitted to one half of the held-out rows and
tested on the other. (On the rows that the eraser knows, the best probe is a constant by construction.)

Shapes: d features, k components or erased directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.analysis.fit import DEFAULT_L2_PER_WIDTH, GivenRows, as_source, at, check_split, read
from trocar.analysis.labels import Floats, Given
from trocar.analysis.labels import groups as group_numbers
from trocar.analysis.moments import Moments, moments
from trocar.analysis.report import report
from trocar.analysis.results import ClassMetrics, Kind
from trocar.analysis.site import Penalty, fit_probes, rows_of, scores_of
from trocar.analysis.source import BLOCK_ROWS, Block, Source
from trocar.analysis.spectra import Components, Eraser, Method, Whitening, leace, pca, whitening
from trocar.analysis.split import draw
from trocar.analysis.standard import standard
from trocar.analysis.trial import Trial, plan

Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """A map of rows at one site.

    Attributes:
        arrays: float32; for `pca` mean [d], axes [k, d] and deviation [k]; for `whitening` mean [d] and matrix [d, d];
            for `leace` mean [d], left [d, k] and right [k, d].
        numbers: how it does on held-out rows, the same names for every site of one kind.
    """

    arrays: Arrays
    numbers: Mapping[str, float]


def fit_pca(
    rows_by_site: Mapping[str, GivenRows],
    k: int,
    groups: Given | None = None,
    *,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> dict[str, Transform]:
    """Principal components of each site.

    Numbers: `share`, of the variance of the held-out rows about their mean that the components keep; `share_train`;
    `share_first`, of the first component on the held-out rows.

    Raises:
        ProgramError: `bad_value`, `too_few_rows`, `rows_mismatch`, `rows_not_finite`.
    """
    found = {}
    for site, (train, test) in _sides(rows_by_site, groups, test_fraction, seed):
        with at(site):
            made = pca(train, k)
        kept = np.einsum("kd,de,ke->k", made.axes, test.covariance, made.axes)
        total = float(np.trace(test.covariance))
        share = kept / total if total > 0 else np.zeros(k)
        numbers = {
            "share": float(share.sum()),
            "share_train": float(made.share.sum()),
            "share_first": float(share[0]),
        }
        found[site] = Transform(_components(made), numbers)
    return found


def _components(made: Components) -> Arrays:
    return _float32({"mean": made.mean, "axes": made.axes, "deviation": np.sqrt(made.variance)})


def fit_whitening(
    rows_by_site: Mapping[str, GivenRows],
    groups: Given | None = None,
    *,
    method: Method = "zca",
    test_fraction: float = 0.25,
    seed: int = 0,
) -> dict[str, Transform]:
    """A whitening of each site.

    Numbers: `rank`, the directions that vary; `error`, the root mean square by which the covariance of the whitened
    held-out rows misses the identity, per direction: about the root of rank over rows where there are enough rows.

    Raises:
        ProgramError: as `fit_pca`.
    """
    if method not in ("zca", "pca"):
        reason = f"{method!r} is not a whitening"
        raise errors.refuse("bad_value", "method", reason, closest=errors.closest(method, ("zca", "pca")))
    found = {}
    for site, (train, test) in _sides(rows_by_site, groups, test_fraction, seed):
        made, turned = whitening(train, method), whitening(train, "pca")
        inside = turned.matrix @ test.covariance @ turned.matrix.T
        miss = float(np.linalg.norm(inside - np.eye(made.rank)) / max(1, made.rank) ** 0.5)
        found[site] = Transform(_matrix(made), {"rank": float(made.rank), "error": miss})
    return found


def _matrix(made: Whitening) -> Arrays:
    return _float32({"mean": made.mean, "matrix": made.matrix})


def fit_leace(
    rows_by_site: Mapping[str, GivenRows],
    labels: Given,
    groups: Given | None = None,
    *,
    test_fraction: float = 0.5,
    seed: int = 0,
) -> dict[str, Transform]:
    """The erasure of a concept at each site, with labels of two classes or up to 256.

    Numbers: `auroc` with `auroc_low` and `auroc_high` of a new logistic probe on erased rows, about 0.5 when the
    concept is gone; `auroc_before`, the same without erasure; `removed`, the share of the variance of standardised
    rows that went with it; `rank`, the erased directions.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `bad_value`, `rows_mismatch`, `rows_not_finite`.
        RunFailed: `fit_not_converged`.
    """
    check_split(test_fraction, seed)
    trial = plan("multinomial", labels, groups, test_fraction, seed)
    held, n_classes = trial.split.test, int(trial.y.max()) + 1
    kind: Kind = "logistic" if n_classes == 2 else "multinomial"
    again = plan(kind, trial.y[held].astype(np.int64), trial.group[held], 0.5, seed)
    concept = np.eye(n_classes)[trial.y.astype(np.int64)]
    part = np.zeros(len(trial.y), dtype=np.int64)
    part[held] = -1
    found = {}
    for site, given in rows_by_site.items():
        with at(site):
            source = read(given, len(trial.y))
            (train,) = moments(source, targets=concept, part=part)
            eraser, fresh = leace(train), Picked(source, part == -1)
            before, after = (_probed(s, again) for s in (fresh, Erased(fresh, eraser)))
        numbers = {
            "auroc": after.test_auroc,
            "auroc_low": after.interval[0],
            "auroc_high": after.interval[1],
            "auroc_before": before.test_auroc,
            "removed": _removed(train, eraser),
            "rank": float(len(eraser.right)),
        }
        made = {"mean": eraser.mean, "left": eraser.left, "right": eraser.right}
        found[site] = Transform(_float32(made), numbers)
    return found


class Erased:
    """A source of erased rows: what is stored of the eraser, float32, is what is applied."""

    def __init__(self, source: Source, eraser: Eraser) -> None:
        self._source = source
        self._mean: Block = eraser.mean.astype(np.float32)
        self._left: Block = eraser.left.astype(np.float32)
        self._right: Block = eraser.right.astype(np.float32)

    @property
    def width(self) -> int:
        return self._source.width

    def __len__(self) -> int:
        return len(self._source)

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        for block in self._source.blocks(most):
            erased: npt.NDArray[Any] = block - ((block - self._mean) @ self._right.T) @ self._left.T
            yield erased


class Picked:
    """A source of those rows of another for which `chosen`, [n], says so."""

    def __init__(self, source: Source, chosen: npt.NDArray[np.bool_]) -> None:
        self._source, self._chosen = source, chosen

    @property
    def width(self) -> int:
        return self._source.width

    def __len__(self) -> int:
        return int(self._chosen.sum())

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        row = 0
        for block in self._source.blocks(most):
            picked = block[self._chosen[row : row + len(block)]]
            row += len(block)
            if len(picked):
                yield picked


def _probed(source: Source, trial: Trial) -> ClassMetrics:
    rows = rows_of(source, trial)
    probe = fit_probes(rows, Penalty(DEFAULT_L2_PER_WIDTH * source.width))
    found = report(probe, scores_of(rows, probe), trial).metrics
    if not isinstance(found, ClassMetrics):
        raise TypeError(found)
    return found


def _removed(m: Moments, eraser: Eraser) -> float:
    """The share of the variance of the standardised rows that an eraser takes away."""
    inverse = standard(m).inverse
    left = eraser.left * inverse[:, None]
    varied = eraser.right @ m.covariance @ eraser.right.T
    return float(np.trace(left.T @ left @ varied) / max(1, np.count_nonzero(inverse)))


def _sides(
    rows_by_site: Mapping[str, GivenRows], groups: Given | None, test_fraction: float, seed: int
) -> Iterator[tuple[str, tuple[Moments, Moments]]]:
    """The moments of the fitted and of the held-out rows of each site, on one split."""
    check_split(test_fraction, seed)
    if not rows_by_site:
        raise errors.refuse("bad_value", "sites", "there is no site to fit")
    for site, given in rows_by_site.items():
        with at(site):
            source = as_source(given() if callable(given) else given)
            group = group_numbers(groups, len(source))
            split = draw(np.zeros(int(group.max(initial=-1)) + 1, dtype=np.int64), group, test_fraction, seed)
            if not len(split.test):
                raise errors.refuse(
                    "too_few_rows", "rows", f"{len(source)} rows cannot be split by their groups"
                )
            part = np.zeros(len(source), dtype=np.int64)
            part[split.test] = 1
            train, test = moments(source, part=part, parts=2)
        yield site, (train, test)


def _float32(arrays: Mapping[str, Floats]) -> Arrays:
    return {name: array.astype(np.float32) for name, array in arrays.items()}

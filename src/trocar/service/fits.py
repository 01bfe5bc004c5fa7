"""The fit use case: stored rows and public labels in, an artifact that stays and a few numbers out.

What a fit releases is fixed before it runs: `METRICS` numbers per site. Labels count per prompt; when a
prompt has several stored rows they share its label and never stand on both sides of the split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trocar import analysis, errors
from trocar.gate.gate import Gate, Hold
from trocar.gate.release import Released
from trocar.graph.cost import Cost, Prices
from trocar.graph.program import canonical
from trocar.service.jobs import Job, Jobs
from trocar.service.passes import UNSAID
from trocar.service.prepare import Served
from trocar.store import Reader, Store
from trocar.wire import results as r
from trocar.wire.requests import FitRequest

_CLASS_METRICS: Final = (
    "auroc", "auroc_low", "auroc_high", "auroc_shuffled", "auroc_train", "accuracy", "accuracy_train", "direction_norm",
)  # fmt: skip
METRICS: Final = {
    "logistic": _CLASS_METRICS,
    "mean_diff": _CLASS_METRICS,
    "ridge": ("r2", "r2_low", "r2_high", "r2_shuffled", "r2_train", "direction_norm"),
}


def fit_cost(reader: Reader, request: FitRequest, prices: Prices) -> Cost:
    """Static price of a fit, after everything that labels alone can get wrong.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `bad_value`.
    """
    labels, groups = _spread(reader, request)
    analysis.check(
        request.kind, labels, groups, test_fraction=request.test_fraction, seed=request.seed, l2=request.l2
    )
    sites = len(reader.info.widths)
    bits = {"overhead": prices.overhead_bits, "fit": sites * len(METRICS[request.kind]) * prices.norm_bits}
    numbers = reader.info.n_rows * sum(reader.info.widths.values())
    return Cost(
        tokens=0,
        rows_read=reader.info.n_rows * sites,
        flops=4 * numbers,
        bytes_stored=sum(reader.info.widths.values()) * 4 * 2,
        bits_out=bits,
        total_bits=sum(bits.values()),
        download_bits=numbers * 16,
    )


def fit_digest(request: FitRequest) -> str:
    """SHA-256 of the request, as hex."""
    return hashlib.sha256(canonical(request)).hexdigest()


def _spread(reader: Reader, request: FitRequest) -> tuple[list[Any], list[Any] | None]:
    """Labels and groups per row, from one per prompt."""
    counts = reader.rows_per_prompt()
    if len(request.labels) != len(counts):
        reason = f"{len(request.labels)} labels for {len(counts)} prompts"
        raise errors.refuse("bad_labels", "labels", reason)
    if request.groups is not None and len(request.groups) != len(counts):
        raise errors.refuse("bad_labels", "groups", f"{len(request.groups)} groups for {len(counts)} prompts")
    if max(counts) == 1 and request.groups is None:
        return _repeat(request.labels, counts), None  # a prompt without a row has no say
    groups = request.groups or tuple(range(len(counts)))
    return _repeat(request.labels, counts), _repeat(groups, counts)


def _repeat(values: tuple[Any, ...], counts: tuple[int, ...]) -> list[Any]:
    return [value for value, n in zip(values, counts, strict=True) for _ in range(n)]


@dataclass(frozen=True, slots=True)
class Fit:
    """One admitted fit; `work` is what its job does."""

    request: FitRequest
    reader: Reader
    served: Served
    store: Store
    gate: Gate
    jobs: Jobs
    tenant: str
    hold: Hold

    def work(self, job: Job) -> Released:
        artifact: str | None = None
        try:
            result = self._fit(job)
            artifact = self._save(result)
            made = self._result(result, artifact)
            return self.gate.release(self.hold, lambda press: press.fit(made, self.hold.cost))
        except BaseException:
            self._undo(artifact)
            raise

    def _undo(self, artifact: str | None) -> None:
        """Nothing was released: the artifact goes, the overhead stays charged."""
        try:
            self.gate.cancel(self.hold)
        finally:
            if artifact is not None:
                self.store.delete(self.tenant, artifact)

    def _fit(self, job: Job) -> analysis.FitResult:
        labels, groups = _spread(self.reader, self.request)
        sources = {site: partial(self._load, job, i, site) for i, site in enumerate(self.reader.info.widths)}
        return analysis.fit(
            self.request.kind,
            sources,
            labels,
            groups,
            test_fraction=self.request.test_fraction,
            seed=self.request.seed,
            l2=self.request.l2,
        )

    def _load(self, job: Job, index: int, site: str) -> Any:
        self.jobs.require_wanted(job)
        self.jobs.progress(job, index)
        return self.reader.read(site)

    def _save(self, result: analysis.FitResult) -> str:
        arrays: dict[str, dict[str, npt.NDArray[Any]]] = {
            site: {
                "direction": f.direction,
                "weights": f.weights,
                "bias": np.array([f.bias], dtype=np.float64),
            }
            for site, f in result.sites.items()
        }
        info = {"model": self.reader.info.model, "from": self.reader.info.id, "seed": result.seed}
        return self.store.save_artifact(
            self.tenant, self.request.kind, self.reader.info.fingerprint, arrays, info
        )

    def _result(self, result: analysis.FitResult, artifact: str) -> r.RunResult:
        output = r.FitOutput(
            artifact=artifact,
            fit=result.kind,
            fingerprint=self.reader.info.fingerprint,
            n_train=len(result.train),
            n_test=len(result.test),
            sites=tuple(r.SiteMetrics(site=s, metrics=_numbers(f)) for s, f in result.sites.items()),
        )
        facts = self.served.facts
        receipt = r.Receipt(
            model=facts.name,
            fingerprint=facts.fingerprint,
            engine="store",
            dtype="float64",
            program_digest=self.reader.info.program_hash,
            request_digest=fit_digest(self.request),
            seed=self.request.seed,
            edits=(),
            released_bits={},
            reserved_bits=self.hold.cost.total_bits,
            precision=UNSAID,
        )
        return r.RunResult(outputs={"fit": output}, tokens=(), receipt=receipt)


def _numbers(fit: analysis.SiteFit) -> dict[str, float]:
    metrics, norm = fit.metrics, float(np.linalg.norm(fit.direction))
    low, high = metrics.interval
    if isinstance(metrics, analysis.RidgeMetrics):
        r2 = (metrics.test_r2, low, high, metrics.control_r2, metrics.train_r2, norm)
        return dict(zip(METRICS["ridge"], r2, strict=True))
    values = (
        metrics.test_auroc, low, high, metrics.control_auroc, metrics.train_auroc,
        metrics.test_accuracy, metrics.train_accuracy, norm,
    )  # fmt: skip
    return dict(zip(_CLASS_METRICS, values, strict=True))

"""The fit use case: stored rows and public labels in, an artifact that stays and a few numbers out.

What a fit releases is fixed before it runs: `METRICS` numbers per site. Labels count per prompt; when a
prompt has several stored rows they share its label and never stand on both sides of the split.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from trocar import analysis, errors
from trocar.gate import schema
from trocar.gate.gate import Gate, Hold
from trocar.gate.handles import Handle, new_artifact
from trocar.gate.release import Released
from trocar.gate.schema import Arrays
from trocar.graph.cost import Cost, Prices
from trocar.graph.program import canonical
from trocar.service.jobs import Job, Jobs
from trocar.service.metrics import METRICS
from trocar.service.steps import UNSAID
from trocar.service.worker import FitOrder, Model
from trocar.wire import results as r
from trocar.wire.requests import FitRequest


def fit_cost(of: Handle, request: FitRequest, prices: Prices) -> Cost:
    """Static price of a fit, after everything that labels alone can get wrong.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `bad_value`.
    """
    labels, groups = _spread(of, request)
    analysis.check(
        request.kind, labels, groups, test_fraction=request.test_fraction, seed=request.seed, l2=request.l2
    )
    sites, width = len(of.widths), sum(of.widths.values())
    bits = {"overhead": prices.overhead_bits, "fit": sites * len(METRICS[request.kind]) * prices.norm_bits}
    return Cost(
        tokens=0,
        rows_read=of.rows * sites,
        flops=4 * of.rows * width,
        bytes_stored=width * 4 * 2,
        bits_out=bits,
        total_bits=sum(bits.values()),
        download_bits=of.rows * width * 16,
    )


def fit_digest(request: FitRequest) -> str:
    """SHA-256 of the request, as hex."""
    return hashlib.sha256(canonical(request)).hexdigest()


def _spread(of: Handle, request: FitRequest) -> tuple[list[Any], list[Any] | None]:
    """Labels and groups per row, from one per prompt."""
    counts = of.counts
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
    of: Handle
    model: Model
    gate: Gate
    jobs: Jobs
    hold: Hold
    artifact: str = field(default_factory=new_artifact)

    def work(self, job: Job) -> Released:
        try:
            made = self._result(self.model.worker.fit(self._order(job), self.jobs.watch(job)))
            self.gate.handles.add((self._handle(),))
            return self.gate.release(self.hold, lambda press: press.fit(made, self.hold.cost))
        except BaseException:
            self._undo()
            raise

    def _order(self, job: Job) -> FitOrder:
        labels, groups = _spread(self.of, self.request)
        return FitOrder(
            job.id, self.of.tenant, self.request, tuple(self.of.shapes), labels, groups, self.artifact
        )

    def _undo(self) -> None:
        """Nothing was released: the artifact goes, the overhead stays charged."""
        try:
            self.gate.cancel(self.hold)
        finally:
            self.gate.handles.forget(self.of.tenant, (self.artifact,))
            self.model.worker.erase(self.of.tenant, (self.artifact,))

    def _handle(self) -> Handle:
        shapes = {
            site: {"direction": (n,), "weights": (n,), "bias": (1,)} for site, n in self.of.widths.items()
        }
        facts = self.model.facts
        return Handle(
            self.artifact,
            self.of.tenant,
            self.request.kind,
            facts.name,
            facts.fingerprint,
            shapes,
            source=self.of.id,
        )

    def _result(self, arrays: Arrays) -> r.RunResult:
        names = METRICS[self.request.kind]
        declared = schema.Field("metrics", "<f4", (len(self.of.shapes), len(names)))
        schema.require(arrays, (declared,))
        labels, groups = _spread(self.of, self.request)
        n_train, n_test = analysis.sizes(
            self.request.kind, labels, groups, self.request.test_fraction, self.request.seed
        )
        output = r.FitOutput(
            artifact=self.artifact,
            fit=self.request.kind,
            fingerprint=self.of.fingerprint,
            n_train=n_train,
            n_test=n_test,
            sites=tuple(
                r.SiteMetrics(site=site, metrics=dict(zip(names, map(float, row), strict=True)))
                for site, row in zip(self.of.shapes, arrays["metrics"], strict=True)
            ),
        )
        return r.RunResult(outputs={"fit": output}, tokens=(), receipt=self._receipt())

    def _receipt(self) -> r.Receipt:
        facts = self.model.facts
        return r.Receipt(
            model=facts.name,
            fingerprint=facts.fingerprint,
            engine="store",
            dtype="float64",
            program_digest="",
            request_digest=fit_digest(self.request),
            seed=self.request.seed,
            edits=(),
            released_bits={},
            reserved_bits=self.hold.cost.total_bits,
            precision=UNSAID,
        )

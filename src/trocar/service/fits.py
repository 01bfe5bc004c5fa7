"""The fit use case: stored rows and public labels in, an artifact that stays and a few numbers out.

What a fit releases is fixed before it runs: `METRICS` numbers per site. Labels count per prompt; when a
prompt has several stored rows they share its label and never stand on both sides of the split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trocar import analysis, errors
from trocar.gate import schema
from trocar.gate.gate import Gate, Hold
from trocar.gate.handles import ACTIVATIONS, Handle, new_artifact
from trocar.gate.release import Released
from trocar.gate.schema import Arrays
from trocar.graph.cost import STORED_BYTES_PER_NUMBER, Cost, Prices
from trocar.graph.labels import Rules
from trocar.graph.program import canonical
from trocar.service import faults
from trocar.service.ending import Ending
from trocar.service.jobs import Job, Jobs
from trocar.service.metrics import METRICS
from trocar.service.steps import UNSAID
from trocar.service.worker import FitOrder, Model
from trocar.wire import results as r
from trocar.wire.requests import FitRequest


@dataclass(frozen=True, slots=True)
class Ask:
    """A fit that its request does not get wrong.

    Attributes:
        labels, groups: per row; None for a linear map.
        leans_on: rows that a fit to labels leans on.
        target: what a linear map is fitted to.
        shapes: of the arrays that it makes, by site.
    """

    request: FitRequest
    of: Handle
    target: Handle | None
    labels: list[Any] | None
    groups: list[Any] | None
    n_train: int
    n_test: int
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    leans_on: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the numbers that it releases for each site."""
        return METRICS[self.request.kind]

    def cost(self, prices: Prices) -> Cost:
        sites, width = len(self.of.widths), sum(self.of.widths.values())
        bits = {"overhead": prices.overhead_bits, "fit": sites * len(self.names) * prices.norm_bits}
        made = sum(math.prod(shape) for arrays in self.shapes.values() for shape in arrays.values())
        return Cost(
            tokens=0,
            rows_read=self.of.rows * sites,
            flops=4 * self.of.rows * made,
            bytes_stored=made * STORED_BYTES_PER_NUMBER,
            bits_out=bits,
            total_bits=sum(bits.values()),
            download_bits=self.of.rows * width * 16,
        )


def ask(request: FitRequest, of: Handle, target: Handle | None, rules: Rules) -> Ask:
    """Checks a fit before anything is spent.

    Raises:
        ProgramError: `bad_labels`, `too_few_rows`, `bad_value`, `missing_field`, `wrong_handle`, `rows_mismatch`.
        PolicyRefusal: `policy` for a linear map of secret weights.
    """
    if request.kind == "linear_map":
        return _map(request, of, target, rules)
    if request.labels is None:
        raise errors.refuse("missing_field", "labels", f"{request.kind} is fitted to labels")
    if target is not None:
        raise errors.refuse("bad_value", "target", f"{request.kind} is fitted to labels and takes no target")
    labels, groups = _spread(of, request, request.labels)
    fraction, seed = request.test_fraction, request.seed
    analysis.check(request.kind, labels, groups, test_fraction=fraction, seed=seed, l2=request.l2)
    n_train, n_test = analysis.sizes(request.kind, labels, groups, fraction, seed)
    shapes = {site: {"direction": (n,), "weights": (n,), "bias": (1,)} for site, n in of.widths.items()}
    leans_on = analysis.leans_on(request.kind, labels, groups, fraction, seed)
    return Ask(request, of, None, labels, groups, n_train, n_test, shapes, leans_on)


def _map(request: FitRequest, of: Handle, target: Handle | None, rules: Rules) -> Ask:
    if not rules.own_targets:
        reason = "a map from activations to activations is a piece of the weights between them"
        raise errors.refuse("policy", "target", reason, next_step="Fit to labels of your own.")
    if target is None:
        raise errors.refuse("missing_field", "target", "a linear map is fitted to the rows of another handle")
    if request.labels is not None or request.groups is not None:
        raise errors.refuse(
            "bad_value", "labels", "a linear map is fitted to rows and takes no labels or groups"
        )
    if target.kind != ACTIVATIONS or target.fingerprint != of.fingerprint:
        raise errors.refuse("wrong_handle", "target", f"{target.id!r} holds no rows of the same model")
    site = request.target_site
    if site not in target.widths:
        near = errors.closest(site or "", target.widths)
        raise errors.refuse(
            "wrong_handle", "target_site", f"{target.id!r} has no rows of {site!r}", closest=near
        )
    if target.counts != of.counts:
        reason = f"{target.id!r} and {of.id!r} do not have the same number of rows of each prompt"
        raise errors.refuse("rows_mismatch", "target", reason)
    n_train, n_test = analysis.map_sizes(of.rows, request.test_fraction)
    out = target.widths[site]
    shapes = {name: {"map": (n, out), "bias": (out,)} for name, n in of.widths.items()}
    return Ask(request, of, target, None, None, n_train, n_test, shapes)


def fit_digest(request: FitRequest) -> str:
    """SHA-256 of the request, as hex."""
    return hashlib.sha256(canonical(request)).hexdigest()


def _spread(of: Handle, request: FitRequest, labels: tuple[Any, ...]) -> tuple[list[Any], list[Any] | None]:
    """Labels and groups per row, from one per prompt."""
    counts = of.counts
    if len(labels) != len(counts):
        reason = f"{len(labels)} labels for {len(counts)} prompts"
        raise errors.refuse("bad_labels", "labels", reason)
    if request.groups is not None and len(request.groups) != len(counts):
        raise errors.refuse("bad_labels", "groups", f"{len(request.groups)} groups for {len(counts)} prompts")
    if max(counts) == 1 and request.groups is None:
        return _repeat(labels, counts), None  # a prompt without a row has no say
    groups = request.groups or tuple(range(len(counts)))
    return _repeat(labels, counts), _repeat(groups, counts)


def _repeat(values: tuple[Any, ...], counts: tuple[int, ...]) -> list[Any]:
    return [value for value, n in zip(values, counts, strict=True) for _ in range(n)]


@dataclass(frozen=True, slots=True)
class Fit:
    """One admitted fit; `work` is what its job does."""

    ask: Ask
    model: Model
    gate: Gate
    jobs: Jobs
    hold: Hold
    artifact: str = field(default_factory=new_artifact)

    def work(self, job: Job) -> Released:
        worker, tick = self.model.worker, self.jobs.tick(job)
        end = Ending(self.gate, self.hold, tick, worker, self._tenant, (self.artifact,))
        try:
            with faults.reworded(self.model.facts, frozenset(self.ask.of.shapes)):
                found = worker.fit(self._order(), self.jobs.watch(job))
            made = self._result(found)
            return end.release(lambda press: press.fit(made, self.hold.cost), (self._handle(),))
        except BaseException as e:
            end.undo(e)
            raise

    @property
    def _tenant(self) -> str:
        return self.ask.of.tenant

    def _order(self) -> FitOrder:
        ask = self.ask
        sites = tuple(ask.of.shapes)
        name = self.hold.reservation.id
        return FitOrder(name, self._tenant, ask.request, sites, ask.labels, ask.groups, self.artifact)

    def _handle(self) -> Handle:
        ask, facts = self.ask, self.model.facts
        return Handle(
            self.artifact,
            self._tenant,
            ask.request.kind,
            facts.name,
            facts.fingerprint,
            ask.shapes,
            origins=ask.of.origins,
            own_targets=ask.target is not None,
            leans_on=ask.leans_on,
            source=ask.of.id,
        )

    def _result(self, arrays: Arrays) -> r.RunResult:
        ask = self.ask
        schema.require(arrays, (schema.Field("metrics", "<f4", (len(ask.of.shapes), len(ask.names))),))
        output = r.FitOutput(
            artifact=self.artifact,
            fit=ask.request.kind,
            fingerprint=ask.of.fingerprint,
            n_train=ask.n_train,
            n_test=ask.n_test,
            sites=tuple(
                r.SiteMetrics(site=site, metrics=dict(zip(ask.names, map(float, row), strict=True)))
                for site, row in zip(ask.of.shapes, arrays["metrics"], strict=True)
            ),
        )
        return r.RunResult(outputs={"fit": output}, tokens=(), receipt=self._receipt())

    def _receipt(self) -> r.Receipt:
        facts, request = self.model.facts, self.ask.request
        return r.Receipt(
            model=facts.name,
            fingerprint=facts.fingerprint,
            engine="store",
            dtype="float64",
            program_digest="",
            request_digest=fit_digest(request),
            seed=request.seed,
            edits=(),
            released_bits={},
            reserved_bits=self.hold.cost.total_bits,
            precision=UNSAID,
        )

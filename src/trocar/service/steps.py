"""One request on this side of the worker: the order that it becomes, and what the gate makes an answer of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trocar import sites
from trocar.gate import release, schema
from trocar.gate.answers import Raw
from trocar.gate.handles import ACTIVATIONS, Handle, Origin, new_activations
from trocar.gate.schema import Arrays
from trocar.graph import ops, rules_raw
from trocar.graph.canonical import canonical_sites
from trocar.graph.check import Checked
from trocar.graph.facts import ModelFacts
from trocar.service import faults
from trocar.service.prepare import Prepared
from trocar.service.worker import Model, RunOrder, Watch
from trocar.wire import results as r

UNSAID: Final = r.Precision(scalar_bits=0, vector_bits=0, logprob_step=0.0, logprob_floor=None)
"""Stands in a receipt until the gate says how numbers left."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A request whose numbers came back.

    Attributes:
        step: for the gate.
        captured: the handles that it made.
    """

    step: release.Step
    captured: tuple[Handle, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One prepared request on its way to a worker.

    Attributes:
        handles: of each variant, a new id for each capture.
    """

    id: str
    tenant: str
    prepared: Prepared
    model: Model
    handles: tuple[Mapping[str, str], ...]

    @classmethod
    def of(cls, name: str, tenant: str, prepared: Prepared, model: Model) -> Request:
        handles = tuple(
            {n.id: new_activations() for n in variant.checked.outputs() if isinstance(n, ops.Capture)}
            for variant in prepared.variants
        )
        return cls(name, tenant, prepared, model, handles)

    @property
    def _names(self) -> frozenset[str]:
        """Ids of the program's nodes: places that a fault may name."""
        return frozenset(node.id for node in self.prepared.program.nodes)

    @property
    def ids(self) -> tuple[str, ...]:
        """Every handle that it makes."""
        return tuple(handle for named in self.handles for handle in named.values())

    def run(self, watch: Watch, made: Mapping[str, str], *, begun: bool = False) -> Ran:
        """Runs it.

        Args:
            made: in a session, handles of earlier steps by the names that programs use.
            begun: whether an earlier step ran.
        """
        order = RunOrder(self.id, self.tenant, self.prepared, self.handles, made, begun)
        with faults.reworded(self.model.facts, self._names):
            arrays = self.model.worker.run(order, watch)
        self._require_declared(arrays)
        return Ran(self._step(arrays), tuple(self._captured(arrays)))

    def _require_declared(self, arrays: Sequence[Arrays]) -> None:
        """Before anything is read of them: a number of rows goes into the handles too."""
        variants = self.prepared.variants
        if len(arrays) != len(variants):
            raise schema.bad("it holds another number of variants")
        for variant, found in zip(variants, arrays, strict=True):
            schema.require(found, schema.fields(variant.checked, self.model.facts.n_heads))

    def _step(self, arrays: Sequence[Arrays]) -> release.Step:
        prepared = self.prepared
        variants = [
            release.Variant(dict(v.settings), Raw(v.checked, found, named))
            for v, found, named in zip(prepared.variants, arrays, self.handles, strict=True)
        ]
        tokens = tuple(tuple(self.model.text.token_texts(list(ids))) for ids in prepared.tokens)
        return release.Step(variants, bool(prepared.request.sweep), tokens, self._receipt())

    def _receipt(self) -> r.Receipt:
        facts = self.model.facts
        return r.Receipt(
            model=facts.name,
            fingerprint=facts.fingerprint,
            engine=self.model.engine,
            dtype=facts.dtype,
            program_digest=self.prepared.program.digest(),
            request_digest=self.prepared.digest,
            seed=self.prepared.request.generation.seed,
            edits=(),
            released_bits={},
            reserved_bits=self.prepared.cost.total_bits,
            precision=UNSAID,
        )

    def _captured(self, arrays: Sequence[Arrays]) -> Iterator[Handle]:
        for variant, found, named in zip(self.prepared.variants, arrays, self.handles, strict=True):
            if named:
                lengths = schema.sampled(variant.checked, found)
                for node in variant.checked.outputs():
                    if isinstance(node, ops.Capture):
                        yield self._handle(node, variant.checked, lengths, named[node.id])

    def _handle(self, node: ops.Capture, checked: Checked, lengths: tuple[int, ...], handle: str) -> Handle:
        values = [checked.values[ref] for ref in node.of]
        counts = schema.counts_of(values[0], checked, lengths)
        return Handle(
            id=handle,
            tenant=self.tenant,
            kind=ACTIVATIONS,
            model=self.model.facts.name,
            fingerprint=self.model.facts.fingerprint,
            shapes={str(v.sites[0]): {"rows": (v.width,)} for v in values},
            counts=counts if node.reduce == "none" else (1,) * len(counts),
            origins=dict(origins(node, checked, self.model.facts)),
        )


def origins(node: ops.Capture, checked: Checked, facts: ModelFacts) -> Iterator[tuple[str, Origin]]:
    """How close to a write each captured site was read."""
    program = canonical_sites(checked.program, facts)
    writes = [sites.parse(n.site) for n in program.nodes if isinstance(n, ops.EDIT_NODES)]
    for ref in node.of:
        value = checked.values[ref]
        blocks = rules_raw.blocks_between(value.sites[0], writes, facts.n_layers)
        yield str(value.sites[0]), Origin(blocks, rules_raw.has_first(value, checked.selections))

"""The run use case: reserve, run in the shared batch, store what is captured, release what leaves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from trocar import errors
from trocar.engine.protocol import (
    F32,
    Captured,
    Generated,
    Lensed,
    Metered,
    Named,
    Outcome,
    Patterned,
    RowTags,
    Scored,
    Task,
    TaskResult,
)
from trocar.gate.gate import Gate, Hold
from trocar.gate.release import Released
from trocar.graph import ops
from trocar.models.load import Loaded
from trocar.service.jobs import Job, Jobs
from trocar.service.prepare import Prepared, Served, probe_values, stored_values, vector_values
from trocar.store import RowTable, Store, Writer
from trocar.wire import results as r


@dataclass(frozen=True, slots=True)
class StoreSink:
    """Writes an engine's captured rows into a handle."""

    writer: Writer
    loaded: Loaded

    def append(self, vectors: Mapping[str, F32], tags: RowTags) -> None:
        self.writer.append(
            vectors,
            RowTable.of(
                prompt=tags.prompts,
                position=tags.positions,
                token_id=tags.token_ids,
                token=self.loaded.token_texts([int(i) for i in tags.token_ids]),
                phase=tags.phases,
            ),
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One admitted run; `work` is what its job does."""

    prepared: Prepared
    served: Served
    store: Store
    gate: Gate
    jobs: Jobs
    tenant: str
    hold: Hold

    def work(self, job: Job) -> Released:
        writers: dict[str, Writer] = {}
        try:
            self.jobs.require_wanted(job)
            writers = self._writers()
            result = self._execute(job, writers)
            return self.gate.release(self.hold, self._result(result, writers))
        except BaseException:
            self._undo(writers)
            raise

    def _undo(self, writers: dict[str, Writer]) -> None:
        """Nothing was released: the rows go, the overhead stays charged."""
        try:
            self.gate.cancel(self.hold)
        finally:
            for writer in writers.values():
                with suppress(errors.NotFound):  # its owner may have deleted it already
                    self.store.delete(self.tenant, writer.id)

    def _writers(self) -> dict[str, Writer]:
        checked = self.prepared.checked
        out = {}
        for node in checked.outputs():
            if isinstance(node, ops.Capture):
                widths = {str(checked.values[ref].sites[0]): checked.values[ref].width for ref in node.of}
                facts = self.served.facts
                out[node.id] = self.store.create(
                    self.tenant, facts.name, facts.fingerprint, widths, checked.program.digest()
                )
        return out

    def _execute(self, job: Job, writers: dict[str, Writer]) -> TaskResult:
        task = Task(
            request=job.id,
            checked=self.prepared.checked,
            tokens=self.prepared.tokens,
            vectors=vector_values(self.prepared, self.store, self.tenant),
            stored=stored_values(self.prepared, self.store, self.tenant),
            probes=probe_values(self.prepared, self.store, self.tenant),
            sinks={name: StoreSink(w, self.served.loaded) for name, w in writers.items()},
            progress=lambda done: self.jobs.progress(job, done),
            tenant=self.tenant,
        )
        future = self.served.engine.submit(task)
        self.jobs.stoppable(job, lambda: self.served.engine.cancel(job.id))
        return future.result()

    def _result(self, result: TaskResult, writers: dict[str, Writer]) -> r.RunResult:
        outputs = {name: self._output(name, outcome, writers) for name, outcome in result.outputs.items()}
        tokens = tuple(tuple(self.served.loaded.token_texts(list(ids))) for ids in self.prepared.tokens)
        return r.RunResult(outputs=outputs, tokens=tokens, receipt=self._receipt(result))

    def _receipt(self, result: TaskResult) -> r.Receipt:
        facts, effects = self.served.facts, {e.id: e for e in result.edits}
        return r.Receipt(
            model=facts.name,
            fingerprint=facts.fingerprint,
            engine=self.served.engine.name,
            dtype=facts.dtype,
            program_digest=self.prepared.checked.program.digest(),
            request_digest=self.prepared.digest,
            seed=self.prepared.request.generation.seed,
            edits=tuple(
                r.EditReceipt(
                    id=node.id,
                    op=node.op,
                    site=node.site,
                    rows=effects[node.id].rows,
                    norm_before=effects[node.id].norm_before,
                    norm_after=effects[node.id].norm_after,
                )
                for node in self.prepared.checked.edits()
            ),
            released_bits={},
            reserved_bits=self.hold.cost.total_bits,
        )

    def _output(self, name: str, outcome: Outcome, writers: dict[str, Writer]) -> r.Output:
        if isinstance(outcome, Lensed):
            return self._lens(name, outcome)
        if isinstance(outcome, Named):
            return self._logprobs(name, outcome)
        if isinstance(outcome, Scored):
            prompts, positions = _rows(outcome.tags)
            scores = tuple(outcome.scores.tolist())
            return r.ScoreOutput(
                prompts=prompts, positions=positions, scores=scores, truth=self._is_truth(name)
            )
        if isinstance(outcome, Metered | Patterned):
            return self._measured(name, outcome)
        if isinstance(outcome, Generated):
            texts = tuple(self.served.loaded.decode(list(ids)) for ids in outcome.ids)
            return r.TextOutput(texts=texts, ids=outcome.ids, finished=outcome.finished)
        return _capture(outcome, writers[name])

    def _is_truth(self, name: str) -> bool:
        node = next(n for n in self.prepared.checked.outputs() if n.id == name)
        return isinstance(node, ops.Score) and self.prepared.checked.values[node.of].content == "truth"

    def _measured(self, name: str, outcome: Metered | Patterned) -> r.Output:
        nodes = {n.id: n for n in self.prepared.checked.program.nodes}
        node = nodes[name]
        if isinstance(outcome, Metered) and isinstance(node, ops.Metric):
            return r.MetricOutput(metric=node.metric, values=tuple(outcome.values.tolist()))
        read = nodes[node.of] if isinstance(node, ops.Pattern) else node
        if not isinstance(read, ops.Read) or read.keys is None or isinstance(outcome, Metered):
            raise errors.refuse("internal", name, "a result that is not its node's")
        prompts, positions = _rows(outcome.tags)
        keys = self.prepared.checked.selections[read.keys].rows
        return r.PatternOutput(
            prompts=prompts,
            positions=positions,
            heads=read.heads or tuple(range(self.served.facts.n_heads)),
            keys=tuple(tuple(k.prompt) for k in keys),
            probs=tuple(tuple(tuple(k) for k in heads) for heads in outcome.probs.tolist()),
        )

    def _lens(self, name: str, outcome: Lensed) -> r.LensOutput:
        node = next(n for n in self.prepared.checked.outputs() if n.id == name)
        if not isinstance(node, ops.Lens):
            raise errors.refuse("internal", name, "a lens result without its node")
        prompts, positions = _rows(outcome.tags)
        text = self._texts_of({int(i) for i in outcome.ids.ravel()})
        return r.LensOutput(
            names=tuple(self._value_name(ref) for ref in node.of),
            prompts=prompts,
            positions=positions,
            ids=tuple(tuple(tuple(k) for k in rows) for rows in outcome.ids.tolist()),
            texts=tuple(tuple(tuple(text[i] for i in k) for k in rows) for rows in outcome.ids.tolist()),
            logprobs=tuple(tuple(tuple(k) for k in rows) for rows in outcome.logprobs.tolist()),
        )

    def _value_name(self, ref: str) -> str:
        """The site a value was read at, or its id when it is more than one read."""
        nodes = {n.id: n for n in self.prepared.checked.program.nodes}
        node = nodes[ref]
        return node.site if isinstance(node, ops.Read) else ref

    def _logprobs(self, name: str, outcome: Named) -> r.LogprobsOutput:
        ids = self.prepared.checked.token_ids[name]
        text = self._texts_of({i for row in ids for i in row})
        prompts, positions = _rows(outcome.tags)
        return r.LogprobsOutput(
            prompts=prompts,
            positions=positions,
            ids=ids,
            texts=tuple(tuple(text[i] for i in row) for row in ids),
            logprobs=tuple(tuple(row) for row in outcome.logprobs.tolist()),
        )

    def _texts_of(self, ids: set[int]) -> dict[int, str]:
        ordered = sorted(ids)
        return dict(zip(ordered, self.served.loaded.token_texts(ordered), strict=True))


def _rows(tags: RowTags) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tags.prompts.tolist()), tuple(tags.positions.tolist())


def _capture(outcome: Captured, writer: Writer) -> r.CaptureOutput:
    info = writer.finish()
    return r.CaptureOutput(
        handle=info.id,
        sites=tuple(info.widths),
        widths=dict(info.widths),
        rows=info.n_rows,
        bytes=info.size_bytes,
        rows_per_prompt=outcome.rows_per_prompt,
    )

"""From what an engine gives to what a client may see: results by kind, and receipts of edits. Moves no row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trocar import errors
from trocar.engine.protocol import (
    Captured,
    Generated,
    Lensed,
    Metered,
    Named,
    Outcome,
    Patterned,
    RowTags,
    Scored,
    TaskResult,
)
from trocar.graph import ops
from trocar.graph.check import Checked
from trocar.service.prepare import Served
from trocar.store import Writer
from trocar.wire import results as r


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one checked program."""

    checked: Checked
    served: Served
    writers: Mapping[str, Writer]

    def outputs(self, result: TaskResult) -> dict[str, r.Output]:
        """Every output by name; finishes what was captured."""
        return {name: self._output(name, outcome) for name, outcome in result.outputs.items()}

    def edits(self, result: TaskResult) -> tuple[r.EditReceipt, ...]:
        """What each edit did, in the order of the program."""
        effects = {e.id: e for e in result.edits}
        return tuple(
            r.EditReceipt(
                id=node.id,
                op=node.op,
                site=node.site,
                rows=effects[node.id].rows,
                norm_before=effects[node.id].norm_before,
                norm_after=effects[node.id].norm_after,
            )
            for node in self.checked.edits()
        )

    def _output(self, name: str, outcome: Outcome) -> r.Output:
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
        return _capture(outcome, self.writers[name])

    def _is_truth(self, name: str) -> bool:
        node = next(n for n in self.checked.outputs() if n.id == name)
        return isinstance(node, ops.Score) and self.checked.values[node.of].content == "truth"

    def _measured(self, name: str, outcome: Metered | Patterned) -> r.Output:
        nodes = {n.id: n for n in self.checked.program.nodes}
        node = nodes[name]
        if isinstance(outcome, Metered) and isinstance(node, ops.Metric):
            return r.MetricOutput(metric=node.metric, values=tuple(outcome.values.tolist()))
        read = nodes[node.of] if isinstance(node, ops.Pattern) else node
        if not isinstance(read, ops.Read) or read.keys is None or isinstance(outcome, Metered):
            raise errors.refuse("internal", name, "a result that is not its node's")
        prompts, positions = _rows(outcome.tags)
        keys = self.checked.selections[read.keys].rows
        return r.PatternOutput(
            prompts=prompts,
            positions=positions,
            heads=read.heads or tuple(range(self.served.facts.n_heads)),
            keys=tuple(tuple(k.prompt) for k in keys),
            probs=tuple(tuple(tuple(k) for k in heads) for heads in outcome.probs.tolist()),
        )

    def _lens(self, name: str, outcome: Lensed) -> r.LensOutput:
        node = next(n for n in self.checked.outputs() if n.id == name)
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
        nodes = {n.id: n for n in self.checked.program.nodes}
        node = nodes[ref]
        return node.site if isinstance(node, ops.Read) else ref

    def _logprobs(self, name: str, outcome: Named) -> r.LogprobsOutput:
        ids = self.checked.token_ids[name]
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

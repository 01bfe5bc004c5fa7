"""What one task has produced so far, over all its steps, and how it becomes a result.

Rows arrive in any order; results are sorted by prompt, then position. Captured rows wait here until there is a
batch of them worth writing.

Shape letters: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from trocar import errors
from trocar.engine.protocol import (
    F32,
    I64,
    Captured,
    Generated,
    Lensed,
    Metered,
    Named,
    Outcome,
    Patterned,
    Rowed,
    RowTags,
    Scored,
    TaskResult,
)
from trocar.engine.readout import Asks, log_probabilities, named, top
from trocar.engine.runs import PROMPT_LEVEL, Run
from trocar.engine.values import Step
from trocar.graph import ops

FLUSH_BYTES: Final = 4 << 20
FLUSH_STEPS: Final = 32
Rows = Callable[[str], torch.Tensor]
"""Gives the rows [n, D] of a value."""
Part = tuple[RowTags, tuple[Any, ...]]


class Collector:
    """Accumulates the outputs of one task."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._task = run.task
        outputs = tuple(run.task.checked.outputs())
        prompts = len(run.task.tokens)
        self._outputs = outputs
        self._parts: dict[str, list[Part]] = {n.id: [] for n in outputs}
        self._rows = {n.id: np.zeros(prompts, dtype=np.int64) for n in outputs}
        self._sums = {n.id: np.zeros(prompts) for n in outputs if isinstance(n, ops.Metric)}
        self._texts: dict[int, tuple[tuple[int, ...], int | None]] = {}
        self._captured: dict[str, list[tuple[Rows | torch.Tensor, RowTags]]] = {n.id: [] for n in outputs}
        self._waiting_bytes = 0

    def step(self, step: Step, asks: Asks, stage: int) -> None:
        """Takes what one forward pass gave; logits are asked for and come later in the same step."""
        for node in self._outputs:
            take = TAKE.get(type(node))
            if take is not None:
                take(self, node, step, asks, stage)
        if self._waiting_bytes > FLUSH_BYTES:
            self.flush()

    def generated(self, prompt: int, ids: tuple[int, ...], end: int | None) -> None:
        self._texts[prompt] = (ids, end)

    # ---- which rows ----

    def _tags(self, name: str, step: Step) -> tuple[RowTags, I64 | None] | None:
        """Tags of a value's new rows in this step and their indices (None: all of them); None without rows."""
        value = self._task.checked.values[name]
        if value.kind in PROMPT_LEVEL or value.at is None:
            return self._prompt_tags(name, step)
        picked = step.pick(value.at)
        fresh = step.layout.fresh(picked)
        if not picked.rows or (fresh is not None and not len(fresh)):
            return None
        tags = step.layout.tags(picked)
        return (tags, None) if fresh is None else (_chosen(tags, fresh), fresh)

    def _prompt_tags(self, name: str, step: Step) -> tuple[RowTags, I64 | None] | None:
        """Prompt-wide and stored values are complete when the end of their prompt is seen for the first time."""
        members = step.layout.members
        new = [m.slot for m in members if m.first < m.length <= m.stop and m.fresh < m.length]
        if not new:
            return None
        held = step.value(name)
        owners = np.arange(len(members)) if held.slots is None else held.slots.numpy()
        index = np.flatnonzero(np.isin(owners, new))
        prompts = np.asarray([m.prompt for m in members], dtype=np.int64)[owners[index]]
        none = np.full(len(index), -1, dtype=np.int64)
        return RowTags(prompts, none, none, tuple("prompt" for _ in prompts)), index

    def _put(self, name: str, tags: RowTags, *arrays: Any) -> None:
        self._parts[name].append((tags, arrays))

    # ---- one method per output ----

    def _lens(self, node: ops.Lens, step: Step, asks: Asks, _stage: int) -> None:
        for number, ref in enumerate(node.of):
            found = self._tags(ref, step)
            if found is None:
                return
            rows = _rows(step.value(ref).data, found[1])
            asks.loose(rows, self._normed(ref), self._lens_then(node, number, found[0]))

    def _lens_then(self, node: ops.Lens, number: int, tags: RowTags) -> Callable[[slice, torch.Tensor], None]:
        def then(rows: slice, logits_NV: torch.Tensor) -> None:
            ids, logprobs = top(log_probabilities(logits_NV), node.top_k)
            which = np.full(len(ids), number, dtype=np.int64)
            self._put(node.id, _chosen(tags, np.arange(rows.start, rows.stop)), which, ids, logprobs)

        return then

    def _normed(self, name: str) -> bool:
        sites = self._task.checked.values[name].sites
        return bool(sites) and all(s.name == "final_norm" for s in sites)

    def _final_rows(self, at: str, step: Step, stage: int) -> tuple[torch.Tensor, RowTags] | None:
        """Rows of the last stage that a selector picks and no step has collected."""
        picked = step.pick(at, stage)
        fresh = step.layout.fresh(picked)
        if not picked.rows or (fresh is not None and not len(fresh)):
            return None
        tags = step.layout.tags(picked)
        if fresh is None:
            return picked.index, tags
        return picked.index[torch.from_numpy(fresh)], _chosen(tags, fresh)

    def _logprobs(self, node: ops.Logprobs, step: Step, asks: Asks, stage: int) -> None:
        found = self._final_rows(node.at, step, stage)
        if found is None:
            return
        index, tags = found
        ids_NM = np.asarray(self._task.checked.token_ids[node.id], dtype=np.int64)[tags.prompts]

        def then(rows: slice, logits_NV: torch.Tensor) -> None:
            here = np.arange(rows.start, rows.stop)
            self._put(node.id, _chosen(tags, here), named(log_probabilities(logits_NV), ids_NM[rows]))

        asks.final(index, then)

    def _metric(self, node: ops.Metric, step: Step, asks: Asks, stage: int) -> None:
        found = self._final_rows(node.at, step, stage)
        if found is None:
            return
        index, tags = found
        measure = self._measure(node, step, tags, asks)

        def then(rows: slice, logits_NV: torch.Tensor) -> None:
            prompts = tags.prompts[rows]
            np.add.at(self._sums[node.id], prompts, measure(rows, log_probabilities(logits_NV)))
            np.add.at(self._rows[node.id], prompts, 1)

        asks.final(index, then)

    def _measure(
        self, node: ops.Metric, step: Step, tags: RowTags, asks: Asks
    ) -> Callable[[slice, torch.Tensor], Any]:
        if node.metric == "logit_diff":
            pairs = np.asarray(self._task.checked.token_ids[node.id], dtype=np.int64)[tags.prompts]
            return lambda rows, lp: np.subtract(*named(lp, pairs[rows]).T.astype(np.float64))
        if node.metric == "cross_entropy":
            after = [self._task.tokens[p][i + 1] for p, i in zip(tags.prompts, tags.positions, strict=True)]
            ids = np.asarray(after, dtype=np.int64)[:, None]
            return lambda rows, lp: -named(lp, ids[rows])[:, 0].astype(np.float64)
        reference = step.for_rows(node.to or "", step.pick(node.at))
        fresh = step.layout.fresh(step.pick(node.at))
        reference = _rows(reference, fresh)

        def divergence(rows: slice, lp: torch.Tensor) -> Any:
            p = asks.readout.logprobs(reference[rows], normed=True)
            return (p.exp() * (p - lp)).double().sum(-1).numpy()

        return divergence

    def _score(self, node: ops.Score, step: Step, _asks: Asks, _stage: int) -> None:
        found = self._tags(node.of, step)
        if found is None:
            return
        data = _rows(step.value(node.of).data, found[1])
        if node.id in self._task.probes:
            weights, bias = self._task.probes[node.id]
            data = data @ torch.from_numpy(weights) + bias
        self._put(node.id, found[0], data.float().numpy())

    def _pattern(self, node: ops.Pattern, step: Step, _asks: Asks, _stage: int) -> None:
        found = self._tags(node.of, step)
        if found is None:
            return
        read = self._run.nodes[node.of]
        assert isinstance(read, ops.Read)
        rows = _rows(step.value(node.of).data, found[1])
        keys = self._task.checked.selections[read.keys or "all"].counts[0]
        self._put(node.id, found[0], rows.reshape(len(rows), -1, keys).numpy())

    def _raw(self, node: ops.Raw, step: Step, _asks: Asks, _stage: int) -> None:
        for number, ref in enumerate(node.of):
            found = self._tags(ref, step)
            if found is None:
                return
            rows = _rows(step.value(ref).data, found[1]).float().numpy().copy()
            self._put(node.id, found[0], np.full(len(rows), number, dtype=np.int64), rows)

    def _capture(self, node: ops.Capture, step: Step, _asks: Asks, _stage: int) -> None:
        found = self._reduced_tags(node, step) if node.reduce == "mean" else self._tags(node.of[0], step)
        if found is None:
            return
        tags, index = found
        together = step.bundle(node.of) if node.reduce == "none" and index is None else None
        take = partial(_kept_rows if node.reduce == "none" else _mean_rows, step, index)
        self._captured[node.id].append((take if together is None else together, tags))
        width = sum(self._task.checked.values[ref].width for ref in node.of)
        self._waiting_bytes += len(tags.prompts) * width * 4
        np.add.at(self._rows[node.id], tags.prompts, 1)
        if (
            len(self._captured[node.id]) >= FLUSH_STEPS
        ):  # each entry keeps its step's rows, also those of others
            self.flush()

    def _reduced_tags(self, node: ops.Capture, step: Step) -> tuple[RowTags, I64 | None] | None:
        """One row per prompt whose end is seen for the first time."""
        members = step.layout.members
        new = [m for m in members if m.first < m.length <= m.stop and m.fresh < m.length]
        if not new or not step.has(node.of[0]):
            return None
        none = np.full(len(new), -1, dtype=np.int64)
        prompts = np.asarray([m.prompt for m in new], dtype=np.int64)
        slots = np.asarray([m.slot for m in new], dtype=np.int64)
        return RowTags(prompts, none, none, tuple("prompt" for _ in new)), slots

    # ---- the end ----

    def flush(self) -> None:
        """Writes captured rows to their sinks."""
        for name, waiting in self._captured.items():
            if not waiting:
                continue
            node, values = self._run.nodes[name], self._task.checked.values
            assert isinstance(node, ops.Capture)
            tags = _joined([t for _, t in waiting])
            whole = _together(node.of, [take for take, _ in waiting])
            vectors: dict[str, F32] = {
                str(values[ref].sites[0]): rows.numpy() for ref, rows in zip(node.of, whole, strict=True)
            }
            waiting.clear()
            self._task.sinks[name].append(vectors, tags)
        self._waiting_bytes = 0

    def result(self) -> TaskResult:
        """The sorted result.

        Raises:
            RunFailed: `edit_missed` when an edit never reached a row.
        """
        self.flush()
        effects = self._run.effects()
        missed = next((e for e in effects if not e.rows), None)
        if missed is not None:
            node = self._run.nodes[missed.id]
            raise errors.refuse(
                "edit_missed", missed.id,
                f"the edit {missed.id!r} at {getattr(node, 'at', '')!r} reached no row: generation ended before "
                "its positions",
            )  # fmt: skip
        lengths = tuple(
            len(ids) + (end is not None)
            for ids, end in (self._texts[i] for i in range(len(self._task.tokens)))
        )
        return TaskResult({n.id: self._outcome(n) for n in self._outputs}, effects, lengths)

    def _outcome(self, node: ops.Node) -> Outcome:
        if isinstance(node, ops.Text):
            rows = [self._texts[i] for i in range(len(self._task.tokens))]
            return Generated(tuple(r[0] for r in rows), tuple(r[1] for r in rows))
        if isinstance(node, ops.Capture):
            return Captured(tuple(int(n) for n in self._rows[node.id]))
        if isinstance(node, ops.Metric):
            return Metered((self._sums[node.id] / self._rows[node.id]).astype(np.float32))
        return self._of_rows(node)

    def _of_rows(self, node: ops.Node) -> Outcome:
        if isinstance(node, ops.Lens):
            return self._lensed(node)
        if isinstance(node, ops.Raw):
            found = [self._sorted(node.id, self._numbered(node.id, i)) for i in range(len(node.of))]
            return Rowed(found[0][0], tuple(arrays[1] for _, arrays in found))
        tags, arrays = self._sorted(node.id, self._parts[node.id])
        if isinstance(node, ops.Pattern):
            return Patterned(tags, arrays[0])
        return Named(tags, arrays[0]) if isinstance(node, ops.Logprobs) else Scored(tags, arrays[0])

    def _lensed(self, node: ops.Lens) -> Lensed:
        ids, logprobs, tags = [], [], None
        for number in range(len(node.of)):
            tags, arrays = self._sorted(node.id, self._numbered(node.id, number))
            ids.append(arrays[1])
            logprobs.append(arrays[2])
        assert tags is not None
        return Lensed(tags, np.stack(ids), np.stack(logprobs))

    def _numbered(self, name: str, number: int) -> list[Part]:
        """What one of several values gave: parts whose first array repeats its number."""
        return [p for p in self._parts[name] if p[1][0][0] == number]

    def _sorted(self, name: str, parts: list[Part]) -> tuple[RowTags, tuple[Any, ...]]:
        if not parts:
            raise errors.refuse(
                "edit_missed", name, f"the output {name!r} has no row: generation ended before its positions"
            )
        tags = _joined([t for t, _ in parts])
        order = tags.order()
        arrays = tuple(np.concatenate([a[i] for _, a in parts])[order] for i in range(len(parts[0][1])))
        return _chosen(tags, order), arrays


TAKE: Final[dict[type[ops.Node], Callable[..., None]]] = {
    ops.Lens: Collector._lens,
    ops.Logprobs: Collector._logprobs,
    ops.Metric: Collector._metric,
    ops.Score: Collector._score,
    ops.Pattern: Collector._pattern,
    ops.Raw: Collector._raw,
    ops.Capture: Collector._capture,
}


def _together(names: tuple[str, ...], waiting: list[Rows | torch.Tensor]) -> Iterable[torch.Tensor]:
    """The rows of each name over all steps; at once, where every step has them side by side."""
    bundles = [x for x in waiting if isinstance(x, torch.Tensor)]
    if len(bundles) == len(waiting):
        return torch.cat(bundles, dim=1)
    return [
        torch.cat([x[i] if isinstance(x, torch.Tensor) else x(name) for x in waiting])
        for i, name in enumerate(names)
    ]


def _kept_rows(step: Step, index: I64 | None, name: str) -> torch.Tensor:
    return _rows(step.rows(name), index)


def _mean_rows(step: Step, index: I64 | None, name: str) -> torch.Tensor:
    """The mean over each member's rows."""
    held, n = step.value(name), len(step.layout.members)
    assert held.slots is not None
    total = torch.zeros(n, held.data.shape[1]).index_add_(0, held.slots, held.data)
    count = torch.bincount(held.slots, minlength=n).clamp_min(1)
    return _rows(total / count[:, None], index)


def _rows(data: torch.Tensor, index: I64 | None) -> torch.Tensor:
    return data if index is None else data[torch.from_numpy(index)]


def _joined(parts: list[RowTags]) -> RowTags:
    return RowTags(
        np.concatenate([t.prompts for t in parts]),
        np.concatenate([t.positions for t in parts]),
        np.concatenate([t.token_ids for t in parts]),
        tuple(p for t in parts for p in t.phases),
    )


def _chosen(tags: RowTags, order: I64) -> RowTags:
    return replace(
        tags,
        prompts=tags.prompts[order],
        positions=tags.positions[order],
        token_ids=tags.token_ids[order],
        phases=tuple(tags.phases[i] for i in order),
    )

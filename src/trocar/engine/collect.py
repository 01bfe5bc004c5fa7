"""What one task has produced so far, over all its batches, and how it becomes a result.

Rows arrive in any order; results are sorted by prompt, then position.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trocar import errors
from trocar.engine.executor import Step, Tallies
from trocar.engine.protocol import (
    F32,
    Captured,
    Generated,
    Lensed,
    Named,
    Outcome,
    RowTags,
    Scored,
    Task,
    TaskResult,
)
from trocar.engine.readout import Readout
from trocar.graph import ops


class Collector:
    """Accumulates the outputs of one task."""

    def __init__(self, task: Task, tallies: Tallies) -> None:
        self._task = task
        self._tallies = tallies
        self._parts: dict[str, list[tuple[RowTags, tuple[Any, ...]]]] = {
            n.id: [] for n in task.checked.outputs()
        }
        self._rows = {n.id: np.zeros(len(task.tokens), dtype=np.int64) for n in task.checked.outputs()}
        self._texts: dict[int, tuple[tuple[int, ...], bool]] = {}

    def step(self, step: Step, final_ND: torch.Tensor, readout: Readout) -> None:
        """Takes what one forward pass gave; `final_ND` are the batch's rows after the final norm."""
        for node in self._task.checked.outputs():
            if isinstance(node, ops.Lens):
                self._lens(node, step, readout)
            elif isinstance(node, ops.Logprobs):
                self._logprobs(node, step, final_ND, readout)
            elif isinstance(node, ops.Score):
                self._score(node, step)
            elif isinstance(node, ops.Capture):
                self._capture(node, step)

    def generated(self, prompt: int, ids: tuple[int, ...], finished: bool) -> None:
        self._texts[prompt] = (ids, finished)

    def _tags(self, name: str, step: Step) -> RowTags | None:
        """Tags of a value's rows in this step, None when it has none."""
        value = self._task.checked.values[name]
        if value.at is not None:
            tags = step.pick(value.at).tags
            return tags if len(tags.phases) else None
        if step.layout.members[0].gen is not None:
            return None  # per-prompt and stored values are complete after the first step
        slots = step.value(name).slots
        prompts = np.asarray(step.group.prompts)[slots.numpy() if slots is not None else slice(None)]
        none = np.full(len(prompts), -1, dtype=np.int64)
        return RowTags(prompts, none, none, tuple("prompt" for _ in prompts))

    def _lens(self, node: ops.Lens, step: Step, readout: Readout) -> None:
        tags = self._tags(node.of[0], step)
        if tags is None:
            return
        pairs = [readout.top(step.value(r).data, node.top_k, normed=self._normed(r)) for r in node.of]
        self._parts[node.id].append(
            (tags, (np.stack([p[0] for p in pairs], 1), np.stack([p[1] for p in pairs], 1)))
        )

    def _normed(self, name: str) -> bool:
        sites = self._task.checked.values[name].sites
        return bool(sites) and all(s.name == "final_norm" for s in sites)

    def _logprobs(self, node: ops.Logprobs, step: Step, final_ND: torch.Tensor, readout: Readout) -> None:
        picked = step.pick(node.at)
        if picked.rows:
            table = np.asarray(self._task.checked.token_ids[node.id], dtype=np.int64)
            named = readout.named(final_ND.index_select(0, picked.index), table[picked.tags.prompts])
            self._parts[node.id].append((picked.tags, (named,)))

    def _score(self, node: ops.Score, step: Step) -> None:
        tags = self._tags(node.of, step)
        if tags is None:
            return
        data = step.value(node.of).data
        if node.id in self._task.probes:
            weights, bias = self._task.probes[node.id]
            data = data @ torch.from_numpy(weights) + bias
        self._parts[node.id].append((tags, (data.numpy(),)))

    def _capture(self, node: ops.Capture, step: Step) -> None:
        tags = self._tags(node.of[0], step)
        if tags is None:
            return
        values = self._task.checked.values
        vectors: dict[str, F32] = {str(values[r].sites[0]): step.value(r).data.numpy() for r in node.of}
        self._task.sinks[node.id].append(vectors, tags)
        np.add.at(self._rows[node.id], tags.prompts, 1)

    def result(self) -> TaskResult:
        """The sorted result.

        Raises:
            RunFailed: `edit_missed` when an edit never reached a row.
        """
        effects = self._tallies.effects()
        missed = next((e for e in effects if not e.rows), None)
        if missed is not None:
            raise errors.refuse(
                "edit_missed",
                missed.id,
                f"the edit {missed.id!r} reached no row: generation ended before its positions",
            )
        return TaskResult({n.id: self._outcome(n) for n in self._task.checked.outputs()}, effects)

    def _outcome(self, node: ops.Node) -> Outcome:
        if isinstance(node, ops.Text):
            rows = [self._texts[i] for i in range(len(self._task.tokens))]
            return Generated(tuple(r[0] for r in rows), tuple(r[1] for r in rows))
        if isinstance(node, ops.Capture):
            return Captured(tuple(int(n) for n in self._rows[node.id]))
        tags, arrays = self._sorted(node.id)
        if isinstance(node, ops.Lens):
            return Lensed(tags, arrays[0].swapaxes(0, 1), arrays[1].swapaxes(0, 1))
        return Named(tags, arrays[0]) if isinstance(node, ops.Logprobs) else Scored(tags, arrays[0])

    def _sorted(self, name: str) -> tuple[RowTags, tuple[Any, ...]]:
        parts = self._parts[name]
        if not parts:
            raise errors.refuse(
                "edit_missed", name, f"the output {name!r} has no row: generation ended before its positions"
            )
        tags = RowTags(
            np.concatenate([t.prompts for t, _ in parts]),
            np.concatenate([t.positions for t, _ in parts]),
            np.concatenate([t.token_ids for t, _ in parts]),
            tuple(p for t, _ in parts for p in t.phases),
        )
        order = tags.order()
        arrays = tuple(np.concatenate([a[i] for _, a in parts])[order] for i in range(len(parts[0][1])))
        return _reorder(tags, order), arrays


def _reorder(tags: RowTags, order: Any) -> RowTags:
    return replace(
        tags,
        prompts=tags.prompts[order],
        positions=tags.positions[order],
        token_ids=tags.token_ids[order],
        phases=tuple(tags.phases[i] for i in order),
    )

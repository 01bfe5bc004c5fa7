"""From the scheduler's chunks to one forward pass and back: members, segments, collection, sampling."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from trocar import errors
from trocar.engine.edits import settle
from trocar.engine.hf.attention import Rows, Segment
from trocar.engine.hf.schedule import Chunk
from trocar.engine.hf.sequences import Live, Sequence
from trocar.engine.hf.stack import Stack
from trocar.engine.hf.stages import Entry, Stage, stages
from trocar.engine.layout import Layout, Member
from trocar.engine.readout import Asks, Readout, Then
from trocar.engine.values import Step
from trocar.engine.visits import PatternVisit, Plans, follow, pattern_layers
from trocar.sites import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Body:
    """The parts of a loaded model that a step needs."""

    stack: Stack
    readout: Readout
    eos: frozenset[int]
    plans: Plans = field(default_factory=Plans)


@dataclass(slots=True)
class Pass:
    """One step over the model."""

    body: Body
    chunks: Seq[Chunk]
    stages: list[Stage] = field(init=False)
    entries: list[Entry] = field(init=False)
    steps: list[tuple[Live, Step, list[Entry]]] = field(default_factory=list)
    members: dict[int, tuple[Step, Member]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stages, self.entries = stages(self.chunks, self.body.stack.n_layers)

    def run(self) -> None:
        """Runs the pass, collects what programs asked for, and samples next tokens."""
        self._group()
        first = [e for e in self.entries if e.chunk.leader is None]
        ids = [i for e in first for i in _fed(e.chunk)]
        positions = [
            p for e in first for p in range(e.chunk.sequence.fed, e.chunk.sequence.fed + e.chunk.count)
        ]
        final_ND = self.body.stack.forward(
            torch.tensor(ids),
            torch.tensor(positions),
            self.stages,
            [self._rows(number) for number in range(len(self.stages))],
            self.body.plans.visitors(
                [s for _, s, _ in self.steps], tuple(s.layer for s in self.stages), self._stage_of
            ),
        )
        self._settle()
        self._read_out(final_ND)
        self._part()
        self._advance()

    # ---- before ----

    def _group(self) -> None:
        """One step per task; the settled and the others apart, and each variant of a sweep by itself."""
        groups: dict[tuple[int, bool, int], list[Entry]] = {}
        led = {id(e.chunk.leader) for e in self.entries if e.chunk.leader is not None}
        for entry in self.entries:
            sequence = entry.chunk.sequence
            alone = id(sequence) if entry.chunk.leader is not None or id(sequence) in led else 0
            groups.setdefault((id(sequence.live), sequence.settled, alone), []).append(entry)
        for (_, settled, _), entries in groups.items():
            self._add_step(entries, settled)

    def _add_step(self, entries: list[Entry], settled: bool) -> None:
        members = tuple(_member(slot, entry) for slot, entry in enumerate(entries))
        leader = entries[0].chunk.leader
        step = Step(entries[0].chunk.sequence.live.run, Layout(members), settled)
        if leader is not None:
            step.leader = self.members[id(leader)][0]
            step.parted = next(i for i, s in enumerate(self.stages) if s.layer == entries[0].begins)
        self.steps.append((entries[0].chunk.sequence.live, step, entries))
        for entry, member in zip(entries, members, strict=True):
            self.members[id(entry.chunk.sequence)] = (step, member)

    def _rows(self, number: int) -> Rows:
        return Rows([self._segment(entry, number) for entry in self.stages[number].entries])

    def _segment(self, entry: Entry, number: int) -> Segment:
        sequence = entry.chunk.sequence
        assert sequence.slot is not None
        followers = [
            e.chunk.sequence.slot
            for e in self.entries
            if e.chunk.leader is sequence and e.begins > self.stages[number].layer
        ]
        step, member = self.members[id(sequence)]
        layers = pattern_layers(step)
        return Segment(
            sequence.slot,
            entry.starts[number],
            entry.chunk.count,
            sequence.fed,
            tuple(s for s in followers if s is not None),
            PatternVisit(step, member, layers) if layers else None,
        )

    def _stage_of(self, site: Site) -> int:
        if site.layer is None:
            return 0 if site.spec.phase == 0 else len(self.stages) - 1
        layer = site.layer
        return max(i for i, s in enumerate(self.stages) if s.layer <= layer)

    # ---- after ----

    def _settle(self) -> None:
        """Receipts; and of prompts that were seen to their end, prompt-wide values are kept, if tokens follow."""
        settle([s for _, s, _ in self.steps])
        for live, step, entries in self.steps:
            follow(step, self._stage_of)
            seen = all(e.chunk.sequence.fed + e.chunk.count >= e.chunk.sequence.length for e in entries)
            if live.run.failed is None and live.keeps_values and not step.settled and seen:
                _guarded(live, step.keep)

    def _read_out(self, final_ND: torch.Tensor | None) -> None:
        asks = Asks(self.body.readout, final_ND)
        last = len(self.stages) - 1
        for live, step, _ in self.steps:
            if live.run.failed is None:
                asks.guard = _guard(live)
                _guarded(live, partial(live.collector.step, step, asks, last))
        asks.guard = lambda then: then
        goes_on = [e for e in self.entries if _samples(e.chunk)]
        last_rows = sorted((e.starts[last] + e.chunk.count - 1, n) for n, e in enumerate(goes_on))
        if goes_on:
            sequences = [goes_on[n].chunk.sequence for _, n in last_rows]
            asks.final(torch.tensor([row for row, _ in last_rows]), _sampling(sequences, self.body.eos))
        asks.serve()

    def _part(self) -> None:
        for entry in self.entries:
            sequence = entry.chunk.sequence
            if sequence.slot is not None:
                sequence.slot.tokens = max(sequence.slot.tokens, sequence.fed + entry.chunk.count)

    def _advance(self) -> None:
        for entry in self.entries:
            sequence = entry.chunk.sequence
            sequence.fed += entry.chunk.count
            sequence.seen = max(sequence.seen, sequence.fed)


def _fed(chunk: Chunk) -> list[int]:
    return chunk.sequence.tokens[chunk.sequence.fed : chunk.sequence.fed + chunk.count]


def _member(slot: int, entry: Entry) -> Member:
    sequence = entry.chunk.sequence
    return Member(
        slot,
        sequence.prompt,
        sequence.length,
        sequence.fed,
        _fed(entry.chunk),
        tuple(entry.starts),
        sequence.seen,
    )


def _samples(chunk: Chunk) -> bool:
    """Whether a next token is chosen after this chunk: it ends with the last known token of a text that goes on."""
    sequence = chunk.sequence
    at_end = sequence.fed + chunk.count == len(sequence.tokens)
    return bool(sequence.most and not sequence.ended and at_end and sequence.live.run.failed is None)


def _sampling(sequences: Seq[Sequence], eos: frozenset[int]) -> Then:
    """Chooses the next token of every sequence, one row each."""

    def then(rows: slice, logits_NV: torch.Tensor) -> None:
        values_NV = logits_NV.numpy()
        best_N = values_NV.argmax(-1)  # ten times as fast as torch's; a NaN counts as the largest
        sound_N = np.isfinite(np.take_along_axis(values_NV, best_N[:, None], -1)[:, 0])
        picks = zip(sequences[rows], best_N.tolist(), sound_N.tolist(), strict=True)
        for number, (sequence, best, sound) in enumerate(picks):
            if not sound:
                overflowed = errors.refuse("result_not_finite", "", "the next-token logits overflowed")
                sequence.live.run.fail(overflowed)
                continue
            greedy = sequence.sampler.greedy
            sequence.accept(best if greedy else sequence.sampler.choose(logits_NV[number]), eos)

    return then


def _guard(live: Live) -> Callable[[Then], Then]:
    def wrap(then: Then) -> Then:
        return lambda rows, logits: _guarded(live, partial(then, rows, logits))

    return wrap


def _guarded(live: Live, verb: Callable[[], object]) -> None:
    """A full disk is its owner's, not the batch's; and so is a store that breaks."""
    try:
        verb()
    except errors.TrocarError as e:
        live.run.fail(e)
    except Exception:
        log.exception("an output of request %s failed", live.task.request)
        live.run.fail(errors.refuse("internal", "", "an output could not be taken"))

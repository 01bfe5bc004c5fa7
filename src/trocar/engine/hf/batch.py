"""One batch from prompts to the last token: a padded first pass, then one row per sequence and step.

Prompts are padded on the right, where causal attention cannot see the padding, so a prompt's rows do not
depend on its neighbours' lengths and the first pass needs no mask. Later steps mask the padding in the
cache. Sequences leave the batch as soon as they are done.

Shape letters: B sequences, T tokens of the longest prompt, D d_model, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from trocar import errors
from trocar.engine.collect import Collector
from trocar.engine.executor import Group, Step, visitors
from trocar.engine.hf.sampler import Sampler
from trocar.engine.layout import Layout, Member
from trocar.engine.readout import Readout

log = logging.getLogger(__name__)
Tapped = Callable[[Any], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Body:
    """The parts of a loaded model that a batch needs: the stack without its head, hooks, read-out, end tokens."""

    stack: torch.nn.Module
    tapped: Tapped
    readout: Readout
    eos: frozenset[int]


@dataclass(slots=True)
class Lane:
    """One prompt on its way through the batch; `stopped` says that its request was cancelled meanwhile."""

    group: Group
    collector: Collector
    slot: int
    tokens: tuple[int, ...]
    sampler: Sampler
    stopped: Callable[[], bool]
    sampled: list[int] = field(default_factory=list)
    fed: int = 0
    ended: bool = False

    @property
    def prompt(self) -> int:
        return self.group.prompts[self.slot]

    @property
    def most(self) -> int:
        return self.group.task.checked.generation.max_new_tokens

    def accept(self, token: int, eos: frozenset[int]) -> None:
        self.sampled.append(token)
        stops = self.group.task.checked.generation.stop_at_eos and token in eos
        self.ended = stops or len(self.sampled) == self.most

    @property
    def goes_on(self) -> bool:
        """Whether a further token is to be fed: to sample another, or because its row is read."""
        if self.group.failed is not None or self.stopped():
            return False
        wanted = (
            len(self.sampled) if self.group.task.checked.reads_gen else len(self.sampled) - int(self.ended)
        )
        return self.most > 0 and self.fed < wanted

    def text(self, eos: frozenset[int]) -> tuple[tuple[int, ...], bool]:
        stopped = (
            bool(self.sampled) and self.sampled[-1] in eos and self.group.task.checked.generation.stop_at_eos
        )
        return tuple(self.sampled[:-1] if stopped else self.sampled), stopped


class Batch:
    """Runs sequences of several requests to their end."""

    def __init__(self, body: Body, sequences: Sequence[Lane]) -> None:
        self._body = body
        self._alive = list(sequences)
        self._all = tuple(sequences)
        self._cache: Any = None
        self._longest = max(len(s.tokens) for s in sequences)
        self.forwards = 0

    def run(self) -> None:
        with torch.inference_mode():
            self._first()
            self._drop_done()
            while self._alive:
                self._next()
                self._drop_done()
        for sequence in self._all:
            sequence.collector.generated(sequence.prompt, *sequence.text(self._body.eos))

    def _first(self) -> None:
        ids_BT = torch.zeros(len(self._alive), self._longest, dtype=torch.long)
        for b, sequence in enumerate(self._alive):
            ids_BT[b, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        members = [
            Member(s.slot, s.prompt, b * self._longest, len(s.tokens), s.tokens, None)
            for b, s in enumerate(self._alive)
        ]
        steps = self._steps(members)
        final_ND = self._forward(steps, input_ids=ids_BT, use_cache=any(s.most for s in self._alive))
        for step in steps:
            if not step.group.failed:
                step.keep_per_prompt()
        self._collect(steps, final_ND)
        self._sample(final_ND, [m.start + m.length - 1 for m in members])

    def _next(self) -> None:
        lengths = torch.tensor([len(s.tokens) for s in self._alive])
        fed = self._alive[0].fed
        ids_B1 = torch.tensor([[s.sampled[s.fed]] for s in self._alive])
        members = [
            Member(s.slot, s.prompt, b, len(s.tokens), (s.sampled[s.fed],), s.fed)
            for b, s in enumerate(self._alive)
        ]
        steps = self._steps(members)
        final_ND = self._forward(
            steps,
            input_ids=ids_B1,
            position_ids=(lengths + fed).unsqueeze(1),
            attention_mask=self._mask(lengths, fed),
            past_key_values=self._cache,
            use_cache=True,
        )
        for sequence in self._alive:
            sequence.fed += 1
        self._collect(steps, final_ND)
        self._sample(final_ND, list(range(len(self._alive))))

    def _mask(self, lengths: torch.Tensor, fed: int) -> torch.Tensor | None:
        """Hides the padding of shorter prompts in the cache; None when there is none."""
        if bool((lengths == self._longest).all()):
            return None
        prompt_BT = torch.arange(self._longest) < lengths.unsqueeze(1)
        return torch.cat([prompt_BT, torch.ones(len(lengths), fed + 1, dtype=torch.bool)], dim=1).long()

    def _steps(self, members: Iterable[Member]) -> list[Step]:
        by_group: dict[int, tuple[Group, list[Member]]] = {}
        for sequence, member in zip(self._alive, members, strict=True):
            by_group.setdefault(id(sequence.group), (sequence.group, []))[1].append(member)
        return [Step(group, Layout(tuple(found))) for group, found in by_group.values()]

    def _forward(self, steps: list[Step], **inputs: Any) -> torch.Tensor:
        with self._body.tapped(visitors(steps)):
            out = self._body.stack(**inputs)
        self.forwards += 1
        self._cache = out.past_key_values
        hidden_BTD: torch.Tensor = out.last_hidden_state
        return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])

    def _collect(self, steps: list[Step], final_ND: torch.Tensor) -> None:
        collectors = {id(s.group): s.collector for s in self._alive}
        for step in steps:
            if step.group.failed:
                continue
            try:
                collectors[id(step.group)].step(step, final_ND, self._body.readout)
            except errors.TrocarError as e:  # a full disk is its owner's, not the batch's
                step.group.failed = e
            except Exception:  # and so is a store that breaks
                log.exception("an output of request %s failed", step.group.task.request)
                step.group.failed = errors.refuse("internal", "", "an output could not be taken")

    def _sample(self, final_ND: torch.Tensor, rows: list[int]) -> None:
        want = [
            (s, row)
            for s, row in zip(self._alive, rows, strict=True)
            if s.most and not s.ended and not s.group.failed
        ]
        if not want:
            return
        logits_NV = self._body.readout.logits(final_ND[[row for _, row in want]])
        finite = logits_NV.amax(-1).isfinite().tolist()  # NaN is the largest of its row
        for (sequence, _), logits_V, usable in zip(want, logits_NV, finite, strict=True):
            if usable:
                sequence.accept(sequence.sampler.choose(logits_V), self._body.eos)
            else:
                sequence.group.failed = errors.refuse(
                    "result_not_finite", "", "the next-token logits overflowed"
                )

    def _drop_done(self) -> None:
        keep = [b for b, s in enumerate(self._alive) if s.goes_on]
        if len(keep) == len(self._alive):
            return
        self._alive = [self._alive[b] for b in keep]
        if keep and self._cache is not None:
            self._cache.batch_select_indices(torch.tensor(keep))

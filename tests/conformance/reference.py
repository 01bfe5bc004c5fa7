"""The independent reference: plain torch hooks on a Hugging Face model, one prompt at a time, no KV cache.

Nothing of the engine is used: places of sites, positions, values, edits, attention and generation are written
here a second time, from `docs` and the docstrings of the ops. Generation runs the whole sequence again for every
token, with every edit at its absolute rows. What a run read is taken from its last pass when generated rows are
asked for, else from the pass over the bare prompt.

Shape letters: T tokens, D width, V vocabulary, N selected rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import reference_attention as attention
import reference_places as places
import torch
from reference_edits import columns_of, edited
from reference_rows import Marked, in_generated, rows_at
from reference_values import Constants, Nodes, Val, Values

PATTERN = "attn_probs"


@dataclass(frozen=True)
class Plain:
    """A model that no engine touches.

    Attributes:
        model: its attention is the reference's own.
        norms: mean row norm of a site per layer, as the request's facts give it.
    """

    model: Any
    norms: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, norms: Mapping[str, Sequence[float]] | None = None) -> Plain:
        attention.install(model)
        return cls(model.eval(), norms or {})

    def doubled(self) -> Plain:
        """The same model in float64: how far rounding alone carries a program."""
        return Plain(copy.deepcopy(self.model).double(), self.norms)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = next(self.model.parameters()).dtype
        return found

    def scale(self, node: Any) -> float:
        if getattr(node, "unit", "absolute") == "absolute":
            return 1.0
        name, _, layer = node.site.partition(".")
        return float(self.norms[name][int(layer or 0)])


@dataclass(frozen=True)
class Effect:
    """What an edit did in a pass: rows written, their norms before and after, and the largest change."""

    rows: int
    before: float
    after: float
    change: float


@dataclass
class Pass:
    """One forward pass over a whole sequence with every edit in place."""

    plain: Plain
    values: Values
    prompt: int
    generated: int
    marked: Marked
    logits: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    effects: dict[str, Effect] = field(default_factory=dict)

    @property
    def read(self) -> dict[str, torch.Tensor]:
        return self.values.read

    @property
    def nodes(self) -> Nodes:
        return self.values.nodes

    def rows(self, at: str) -> list[int]:
        return rows_at(at, self.prompt, self.generated, self.marked)

    def run(self, ids: Sequence[int]) -> Pass:
        model, here = self.plain.model, [n for n in self.nodes if n.op == "read" or n.op.startswith("edit.")]
        sites = sorted({n.site for n in here}, key=places.order_of)
        with torch.no_grad(), ExitStack() as undo:
            for site in sites:
                nodes = [n for n in here if n.site == site]
                if site.startswith(PATTERN):
                    self._watch(site, nodes, undo)
                    continue
                undo.callback(places.hook(model, site, lambda x, nodes=nodes: self._visit(x, nodes)).remove)
            self.logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return self

    def _visit(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor | None:
        work, wrote, d_head = x.clone(), False, places.d_head_of(self.plain.model)
        for node in nodes:
            rows = self.rows(node.at)
            if not rows:
                continue
            before = work[rows].clone()
            if node.op == "read":
                columns = columns_of(node, d_head)
                self.read[node.id] = before if columns is None else before[:, columns]
                continue
            after = edited(node, before, self.values, d_head, self.plain.scale(node))
            self._note(node.id, before, after)
            work[rows] = after
            wrote = True
        return work if wrote else None

    def _note(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        sizes = [float(x.double().norm(dim=-1).mean()) for x in (before, after)]
        self.effects[name] = Effect(len(before), *sizes, float((after - before).abs().max()))

    def _watch(self, site: str, nodes: Nodes, undo: ExitStack) -> None:
        block = places.layers_of(self.plain.model)[int(site.partition(".")[2])]
        module = block.get_submodule("attn" if places.kind_of(self.plain.model) == "gpt2" else "self_attn")

        def visit(scores: torch.Tensor) -> None:
            everything = range(scores.shape[-1])
            for node in nodes:
                queries = self.rows(node.at)
                keys = self.rows(node.keys)
                heads = range(len(scores)) if node.heads is None else node.heads
                if not queries:
                    continue
                if node.op == "read":
                    self.read[node.id] = attention.shown(scores, queries, keys, heads)
                    continue
                before = attention.shown(scores, queries, everything, heads)
                attention.hide(scores, queries, keys, heads)
                self._note(node.id, before, attention.shown(scores, queries, everything, heads))

        module.reference_visit = visit
        undo.callback(delattr, module, "reference_visit")

    def value(self, name: str) -> torch.Tensor:
        return self.values.get(name).data


@dataclass(frozen=True)
class Solo:
    """What one prompt gives: generated ids (end token included), and the two passes that are read from."""

    ids: tuple[int, ...]
    first: Pass
    last: Pass

    def of(self, at: str | None) -> Pass:
        return self.last if at is not None and in_generated(at) else self.first

    @property
    def near(self) -> float:
        """The smallest margin of any comparison."""
        return min([*self.first.values.near, *self.last.values.near], default=1.0)


def reads_generated(nodes: Nodes) -> bool:
    """Whether the last generated token is fed back: only when a program reads generated rows."""
    return any(in_generated(n.at) for n in nodes if n.op in ("read", "logprobs"))


def solo(
    plain: Plain,
    nodes: Nodes,
    tokens: Sequence[int],
    constants: Constants | None = None,
    *,
    marked: Marked | None = None,
    max_new_tokens: int = 0,
    eos: Sequence[int] = (),
    forced: Sequence[int] | None = None,
) -> Solo:
    """Runs one prompt alone, greedily, re-running the whole sequence for each token.

    Args:
        nodes: the program's nodes, in order.
        constants: by node id: vectors [D], matrices, arrays of dictionaries, or stored rows [N, D] of this prompt.
        marked: rows by `span`, `role` or `mask` selector.
        eos: ids that end the generation.
        forced: the ids that were generated, end token included, instead of the greedy ones: one pass over all.
    """

    def ran(ids: Sequence[int], known: Mapping[str, Val]) -> Pass:
        values = Values(nodes, constants or {}, plain.dtype, known)
        return Pass(plain, values, len(tokens), len(ids), marked or {}).run([*tokens, *ids])

    first = ran([], {})
    known = first.values.prompt_wide()
    feeds = reads_generated(nodes)
    if forced is not None:
        fed = list(forced) if feeds else list(forced)[:-1]
        return Solo(tuple(forced), first, ran(fed, known) if fed else first)
    ids: list[int] = []
    last = first
    while len(ids) < max_new_tokens:
        ids.append(int(last.logits[-1].argmax()))
        ended = ids[-1] in eos or len(ids) == max_new_tokens
        if ended and not feeds:
            break
        last = ran(ids, known)
        if ended:
            break
    return Solo(tuple(ids), first, last)


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)

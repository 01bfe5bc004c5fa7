"""What a program may depend on besides itself, and the checker's state while it walks the nodes.

`Scope` is public or the caller's own; `Walk` resolves selectors against it once per spelling. No rule of the
language lives here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from trocar import aliases, errors, sites
from trocar.graph import positions
from trocar.graph.facts import HandleFacts, ModelFacts
from trocar.graph.program import Generation
from trocar.graph.shapes import Value

MAX_MARKED: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Selection:
    """A selector resolved for every prompt of the request."""

    selector: positions.Selector
    rows: tuple[positions.Rows, ...]
    counts: tuple[int, ...]
    gen_rows: int

    @property
    def has_gen(self) -> bool:
        return self.gen_rows > 0

    @property
    def most_rows(self) -> int:
        """Upper bound of the rows over all prompts."""
        return sum(self.counts) + self.gen_rows * len(self.rows)


@dataclass(frozen=True, slots=True)
class Scope:
    """Everything a program may depend on besides itself; public or the caller's own.

    Attributes:
        lengths: tokens of each prompt.
        tensors: shape of each array that the request carries: a vector [D] or a matrix [rows, D].
        handles: facts of the handles that the program names and the caller owns.
        encode: the model's tokenizer for plain text.
        marks: of each prompt, or empty when no selector needs them.
    """

    model: ModelFacts
    lengths: tuple[int, ...]
    generation: Generation
    tensors: Mapping[str, tuple[int, ...]]
    handles: Mapping[str, HandleFacts]
    encode: Callable[[str], Sequence[int]]
    marks: tuple[positions.Marks, ...] = ()


@dataclass(slots=True)
class Walk:
    """The checker's state while it walks the nodes in order.

    Attributes:
        reads_gen: whether rows of generated tokens are read, so that the last token is fed back too.
        selections: by their text in the program and by their canonical text.
        columns: of each node with heads or neurons, in the order given; `n_columns` counts them.
        scales: mean norm of the site's rows, of each edit that counts in it.
        stored: per prompt of this request, the stored prompt and its rows, of each `stored` node;
            `stored_rows` counts them.
        whole: whether a value flows from one token's row to another's.
        stop: the layer of the program's `stop_after`.
        marked: what looking up marks has cost so far.
    """

    scope: Scope
    reads_gen: bool = False
    values: dict[str, Value] = field(default_factory=dict)
    known_sites: dict[str, sites.Site] = field(default_factory=dict)
    selections: dict[str, Selection] = field(default_factory=dict)
    token_ids: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    encoded: dict[str, tuple[int, ...]] = field(default_factory=dict)
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    stored: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = field(default_factory=dict)
    stored_rows: int = 0
    n_columns: int = 0
    whole: bool = False
    stop: int | None = None
    marked: int = 0

    def select(self, at: str, path: str) -> Selection:
        if at not in self.selections:
            selection = self._resolve(at, path)
            self.selections[at] = self.selections[selection.selector.text] = selection
        return self.selections[at]

    def _resolve(self, at: str, path: str) -> Selection:
        selector = positions.parse(at, path)
        most = self.scope.generation.max_new_tokens
        rows = (
            self._rows_by_length(selector, path)
            if selector.mark is None
            else self._rows_by_mark(selector, selector.mark, path)
        )
        selection = Selection(selector, rows, tuple(len(r.prompt) for r in rows), len(rows[0].gen))
        if selection.most_rows == 0 or (selector.static and 0 in selection.counts):
            why = f": max_new_tokens is {most}" if selector.prompt is None else self._empty(selection)
            raise errors.refuse("touches_nothing", path, f"{at!r} selects no token{why}")
        return selection

    def _rows_by_length(self, selector: positions.Selector, path: str) -> tuple[positions.Rows, ...]:
        most = self.scope.generation.max_new_tokens
        found: dict[int, positions.Rows] = {}
        for i, n in enumerate(self.scope.lengths):
            if n not in found:
                found[n] = positions.resolve(selector, n, most, path, i)
        return tuple(found[n] for n in self.scope.lengths)

    def _rows_by_mark(
        self, selector: positions.Selector, mark: positions.Mark, path: str
    ) -> tuple[positions.Rows, ...]:
        lengths = self.scope.lengths
        marks = self.scope.marks or (positions.NO_MARKS,) * len(lengths)
        self.marked += sum(positions.work(mark, n, m) for n, m in zip(lengths, marks, strict=True))
        if self.marked > MAX_MARKED:
            raise errors.refuse(
                "too_expensive", path, "span, role and mask are looked up in too much text by this program",
                next_step="Use fewer different selectors of these kinds, or fewer prompts, at a time.",
            )  # fmt: skip
        most = self.scope.generation.max_new_tokens
        pairs = enumerate(zip(lengths, marks, strict=True))
        return tuple(positions.resolve(selector, n, most, path, i, m) for i, (n, m) in pairs)

    def _empty(self, selection: Selection) -> str:
        prompt = selection.counts.index(0)
        return f" of prompt {prompt}, which has {self.scope.lengths[prompt]}"

    def site(self, text: str, path: str) -> sites.Site:
        site = self.known_sites.get(text)
        if site is None:
            site = aliases.resolve(text, self.scope.model, path)
            self.scope.model.require(site, path)
            self.known_sites[text] = site
        return site

    def order(self, site: sites.Site) -> int:
        return sites.order(site, self.scope.model.n_layers)

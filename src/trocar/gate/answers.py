"""From a worker's arrays to what a client sees: every output is rebuilt here, rounded here and counted here.

Rows, positions, names, heads, keys and row counts come from the checked program and from how many tokens each
prompt gave; texts come from token ids and the model's public tokenizer. What is counted is what is sent.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.gate import schema
from trocar.gate.coding import Coder, require_finite
from trocar.gate.schema import Arrays
from trocar.graph import ops
from trocar.graph.check import Checked
from trocar.graph.cost import STORED_BYTES_PER_NUMBER, token_bits
from trocar.graph.facts import ModelFacts
from trocar.graph.shapes import Value
from trocar.wire import packing
from trocar.wire import results as r

Counted = tuple[r.Output, int]


class Tongue(Protocol):
    """A model's tokenizer, which is public."""

    def decode(self, ids: list[int]) -> str: ...

    def token_texts(self, ids: list[int]) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Raw:
    """One program's numbers as a worker gave them.

    Attributes:
        arrays: exactly those that `schema.fields` declares.
        handles: id of the handle of each capture; made on this side.
    """

    checked: Checked
    arrays: Arrays
    handles: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one program gives: `bits` by output, and of its receipts."""

    outputs: dict[str, r.Output]
    edits: tuple[r.EditReceipt, ...]
    bits: dict[str, int]


@dataclass(frozen=True, slots=True)
class Reader:
    """Rebuilds the answer of one program."""

    raw: Raw
    facts: ModelFacts
    tongue: Tongue
    coder: Coder
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, raw: Raw, facts: ModelFacts, tongue: Tongue, coder: Coder) -> Reader:
        """Checks the arrays against their declaration.

        Raises:
            ServerFault: `bad_result`.
        """
        schema.require(raw.arrays, schema.fields(raw.checked, facts.n_heads))
        return cls(raw, facts, tongue, coder, schema.sampled(raw.checked, raw.arrays))

    def answer(self) -> Answer:
        """Every output, rounded.

        Raises:
            RunFailed: `result_not_finite`, `edit_missed` for an output or an edit that reached no row.
        """
        outputs, bits = dict[str, r.Output](), dict[str, int]()
        for node in self.raw.checked.outputs():
            outputs[node.id], bits[node.id] = _BUILD[type(node)](self, node)
        edits = self._edits()
        if edits:
            bits["receipts"] = self.coder.bits_alone(2 * len(edits)) + len(edits) * self._row_bits
        if self.raw.checked.reads_gen:
            bits["lengths"] = len(self.lengths) * self._row_bits_of_one
        return Answer(outputs, edits, bits)

    # ---- rows ----

    @property
    def _row_bits_of_one(self) -> int:
        return self.raw.checked.generation.max_new_tokens.bit_length()

    @property
    def _row_bits(self) -> int:
        most = len(self.lengths) * self.raw.checked.generation.max_new_tokens
        return most.bit_length()

    def _tags(self, name: str, value: Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._some(name, schema.tags_of(value, self.raw.checked, self.lengths))

    @staticmethod
    def _some(
        name: str, tags: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not tags[0]:
            raise errors.refuse(
                "edit_missed", name, f"the output {name!r} has no row: generation ended before its positions"
            )
        return tags

    def _array(self, name: str) -> npt.NDArray[Any]:
        return self.raw.arrays[name]

    def _ids(self, name: str) -> npt.NDArray[np.int32]:
        """Token ids, each one of the vocabulary."""
        ids = self._array(name)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.facts.vocab_size):
            raise errors.refuse("bad_result", name, "a token id is outside the vocabulary")
        return ids

    # ---- one method per output ----

    def lens(self, node: ops.Lens) -> Counted:
        value = self.raw.checked.values[node.of[0]]
        prompts, positions = self._tags(node.id, value)
        n = len(prompts)
        ids = self._ids(f"{node.id}.ids")[:, :n]
        logprobs = self.coder.logprobs(self._array(f"{node.id}.logprobs")[:, :n])
        text = self._texts({int(i) for i in ids.ravel()})
        output = r.LensOutput(
            names=tuple(self._name(ref) for ref in node.of),
            prompts=prompts,
            positions=positions,
            ids=_nested(ids.tolist()),
            texts=tuple(tuple(tuple(text[i] for i in k) for k in rows) for rows in ids.tolist()),
            logprobs=_decimals(logprobs),
        )
        return output, ids.size * token_bits(self.facts) + self.coder.bits_each(ids.size)

    def logprobs(self, node: ops.Logprobs) -> Counted:
        prompts, positions = self._some(node.id, schema.tags_at(node.at, self.raw.checked, self.lengths))
        numbers = self.coder.logprobs(self._array(f"{node.id}.logprobs")[: len(prompts)])
        ids = self.raw.checked.token_ids[node.id]
        text = self._texts({i for row in ids for i in row})
        output = r.LogprobsOutput(
            prompts=prompts,
            positions=positions,
            ids=ids,
            texts=tuple(tuple(text[i] for i in row) for row in ids),
            logprobs=_decimals(numbers),
        )
        return output, self.coder.bits_each(numbers.size)

    def score(self, node: ops.Score) -> Counted:
        value = self.raw.checked.values[node.of]
        prompts, positions = self._tags(node.id, value)
        numbers = self._array(f"{node.id}.scores")[: len(prompts)]
        truth = value.content == "truth"
        numbers = (numbers != 0).astype(np.float32) if truth else self.coder.numbers(numbers)
        output = r.ScoreOutput(prompts=prompts, positions=positions, scores=_decimals(numbers), truth=truth)
        return output, len(prompts) if truth else self.coder.bits_numbers(len(prompts))

    def metric(self, node: ops.Metric) -> Counted:
        numbers = self.coder.numbers(self._array(f"{node.id}.values"))
        output = r.MetricOutput(metric=node.metric, values=_decimals(numbers))
        return output, self.coder.bits_numbers(numbers.size)

    def pattern(self, node: ops.Pattern) -> Counted:
        checked = self.raw.checked
        prompts, positions = self._tags(node.id, checked.values[node.of])
        read = next(n for n in checked.program.nodes if n.id == node.of)
        at = "all" if not isinstance(read, ops.Read) or read.keys is None else read.keys
        probs = self.coder.probabilities(self._array(f"{node.id}.probs")[: len(prompts)])
        output = r.PatternOutput(
            prompts=prompts,
            positions=positions,
            heads=schema.heads_of(node, checked, self.facts.n_heads),
            keys=tuple(tuple(k.prompt) for k in checked.selections[at].rows),
            probs=_decimals(probs),
        )
        return output, self.coder.bits_each(probs.size)

    def rows(self, node: ops.Raw) -> Counted:
        values = [self.raw.checked.values[ref] for ref in node.of]
        prompts, positions = self._tags(node.id, values[0])
        n, width = len(prompts), self.coder.prices.vector_bits
        parts: dict[str, r.RawRows] = {}
        for i, value in enumerate(values):
            packed = packing.pack(self._finite(f"{node.id}.{i}", n), width)
            data, scales = base64.b64encode(packed.data).decode("ascii"), _decimals(packed.scales)
            parts[node.of[i]] = r.RawRows(
                site=str(value.sites[0]), width=value.width, data=data, scales=scales
            )
        each = sum(v.width * width + self.coder.prices.row_scale_bits for v in values)
        return r.RawOutput(prompts=prompts, positions=positions, bits=width, values=parts), n * each

    def _finite(self, name: str, n: int) -> npt.NDArray[np.float32]:
        rows: npt.NDArray[np.float32] = self._array(name)[:n]
        require_finite(rows)
        return rows

    def text(self, node: ops.Text) -> Counted:
        ids = self._ids(f"{node.id}.ids")
        rows = [tuple(int(i) for i in row[:n]) for row, n in zip(ids, self.lengths, strict=True)]
        ended = [self._ended(row) for row in rows]
        kept = tuple(row[:-1] if end else row for row, end in zip(rows, ended, strict=True))
        output = r.TextOutput(
            texts=tuple(self.tongue.decode(list(row)) for row in kept), ids=kept, finished=tuple(ended)
        )
        return output, sum(len(row) + 1 for row in kept) * token_bits(self.facts)

    def _ended(self, row: tuple[int, ...]) -> bool:
        """Whether an end token came; one that ended early has one, or the worker made it up."""
        generation = self.raw.checked.generation
        ended = generation.stop_at_eos and row[-1] in self.facts.eos
        if len(row) < generation.max_new_tokens and not ended:
            raise errors.refuse("bad_result", "text", "a text ended early without an end token")
        return ended

    def capture(self, node: ops.Capture) -> Counted:
        values = [self.raw.checked.values[ref] for ref in node.of]
        counts = schema.counts_of(values[0], self.raw.checked, self.lengths)
        if node.reduce == "mean":
            counts = (1,) * len(counts)
        widths = {str(v.sites[0]): v.width for v in values}
        output = r.CaptureOutput(
            handle=self.raw.handles[node.id],
            sites=tuple(widths),
            widths=widths,
            rows=sum(counts),
            bytes=sum(counts) * sum(widths.values()) * STORED_BYTES_PER_NUMBER,
            rows_per_prompt=counts,
        )
        return output, 0

    # ---- receipts ----

    def _edits(self) -> tuple[r.EditReceipt, ...]:
        nodes = tuple(self.raw.checked.edits())
        if not nodes:
            return ()
        norms = self.coder.alone(self._array(schema.NORMS))
        rows = self._array(schema.ROWS)
        return tuple(
            r.EditReceipt(
                id=node.id,
                op=node.op,
                site=node.site,
                rows=self._written(node, int(n)),
                norm_before=_decimal(before),
                norm_after=_decimal(after),
            )
            for node, n, (before, after) in zip(nodes, rows, norms, strict=True)
        )

    def _written(self, node: ops.EditNode, said: int) -> int:
        """Rows that an edit wrote: known in advance, or, of generated tokens, as many as the worker says."""
        selection = self.raw.checked.selections[node.at]
        known = sum(selection.counts)
        if not selection.has_gen:
            return known
        if not known <= said <= selection.most_rows:
            raise errors.refuse("bad_result", node.id, "an edit wrote a number of rows that is not possible")
        return said

    def _name(self, ref: str) -> str:
        """The site a value was read at, or its id when it is more than one read."""
        node = next(n for n in self.raw.checked.program.nodes if n.id == ref)
        return node.site if isinstance(node, ops.Read) else ref

    def _texts(self, ids: set[int]) -> dict[int, str]:
        ordered = sorted(ids)
        return dict(zip(ordered, self.tongue.token_texts(ordered), strict=True))


_BUILD: Final[Mapping[type[ops.Node], Callable[[Reader, Any], Counted]]] = {
    ops.Capture: Reader.capture,
    ops.Lens: Reader.lens,
    ops.Logprobs: Reader.logprobs,
    ops.Score: Reader.score,
    ops.Metric: Reader.metric,
    ops.Pattern: Reader.pattern,
    ops.Raw: Reader.rows,
    ops.Text: Reader.text,
}


def _decimal(x: np.float32) -> float:
    """The shortest decimal that names the float32: the text is a function of the charged bits alone."""
    return float(str(x))


def _decimals(values: npt.NDArray[np.float32]) -> Any:
    if values.ndim > 1:
        return tuple(_decimals(row) for row in values)
    return tuple(_decimal(x) for x in values)


def _nested(lists: Sequence[Any]) -> Any:
    return tuple(_nested(x) if isinstance(x, list) else x for x in lists)

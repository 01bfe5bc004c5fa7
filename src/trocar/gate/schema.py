"""What a worker may hand over for one program: named arrays, whose types and shapes follow from the check alone.

Nothing else of a worker is ever read: no names, positions, row counts, texts or ids, which the gate works out from
the program and from how many tokens each prompt gave. So a worker that wants to say more than was priced has no
word to say it in. Arrays have the largest size that is possible; what lies behind the last row is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.graph import ops
from trocar.graph.check import Checked
from trocar.graph.shapes import Structure, Value

Type = Literal["<f4", "<i4"]
Arrays = Mapping[str, npt.NDArray[Any]]
LENGTHS: Final = "lengths"
"""Tokens sampled for each prompt, an end token included; not a name that a node may have."""
NORMS: Final = "receipts.norms"
ROWS: Final = "receipts.rows"


@dataclass(frozen=True, slots=True)
class Field:
    """One array."""

    name: str
    type: Type
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return 4 * math.prod(self.shape)


def fields(checked: Checked, n_heads: int) -> tuple[Field, ...]:
    """The arrays of one program, in order.

    Args:
        n_heads: of the model.
    """
    found = [field for node in checked.outputs() for field in _of(node, checked, n_heads)]
    edits, prompts = len(tuple(checked.edits())), len(checked.lengths)
    if edits:
        found += [Field(NORMS, "<f4", (edits, 2)), Field(ROWS, "<i4", (edits,))]
    if checked.generation.max_new_tokens:
        found.append(Field(LENGTHS, "<i4", (prompts,)))
    return tuple(found)


def _of(node: ops.OutputNode, checked: Checked, n_heads: int) -> Iterator[Field]:
    prompts = len(checked.lengths)
    if isinstance(node, ops.Lens):
        shape = (len(node.of), most_rows(checked.values[node.of[0]], checked), node.top_k)
        yield Field(f"{node.id}.ids", "<i4", shape)
        yield Field(f"{node.id}.logprobs", "<f4", shape)
    elif isinstance(node, ops.Logprobs):
        rows = checked.selections[node.at].most_rows
        yield Field(f"{node.id}.logprobs", "<f4", (rows, len(checked.token_ids[node.id][0])))
    elif isinstance(node, ops.Score):
        yield Field(f"{node.id}.scores", "<f4", (most_rows(checked.values[node.of], checked),))
    elif isinstance(node, ops.Metric):
        yield Field(f"{node.id}.values", "<f4", (prompts,))
    elif isinstance(node, ops.Pattern):
        value = checked.values[node.of]
        heads = heads_of(node, checked, n_heads)
        shape = (most_rows(value, checked), len(heads), value.width // len(heads))
        yield Field(f"{node.id}.probs", "<f4", shape)
    elif isinstance(node, ops.Raw):
        for i, ref in enumerate(node.of):
            value = checked.values[ref]
            yield Field(f"{node.id}.{i}", "<f4", (most_rows(value, checked), value.width))
    elif isinstance(node, ops.Text):
        yield Field(f"{node.id}.ids", "<i4", (prompts, checked.generation.max_new_tokens))


def heads_of(node: ops.Pattern, checked: Checked, n_heads: int) -> tuple[int, ...]:
    """Heads of the read that a pattern names."""
    read = next(n for n in checked.program.nodes if n.id == node.of)
    return (read.heads if isinstance(read, ops.Read) else None) or tuple(range(n_heads))


def most_rows(value: Value, checked: Checked) -> int:
    """Most rows of a value over all prompts."""
    gen = checked.selections[value.at].gen_rows if value.gen and value.at is not None else 0
    return sum(value.counts) + gen * len(checked.lengths)


def require(arrays: Arrays, wanted: tuple[Field, ...]) -> None:
    """Refuses anything but exactly the declared arrays.

    Raises:
        ServerFault: `bad_result`.
    """
    if set(arrays) != {f.name for f in wanted}:
        raise bad("it holds other arrays")
    for field in wanted:
        array = arrays[field.name]
        if array.dtype != np.dtype(field.type) or array.shape != field.shape:
            raise bad(f"an array is not {field.type}{list(field.shape)} as declared")


def bad(why: str) -> errors.TrocarError:
    """The fault of a worker that sent something else.

    Args:
        why: in our own words; how much came, or what, would be the worker's.
    """
    return errors.refuse("bad_result", "", f"the worker's result is not what was declared: {why}")


# ---- which rows there are -------------------------------------------------------------------------


def sampled(checked: Checked, arrays: Arrays) -> tuple[int, ...]:
    """Tokens sampled for each prompt.

    Raises:
        ServerFault: `bad_result` for a number that is not possible.
    """
    most = checked.generation.max_new_tokens
    if not most:
        return (0,) * len(checked.lengths)
    found = tuple(int(n) for n in arrays[LENGTHS])
    if not all(1 <= n <= most for n in found):
        raise bad("a number of generated tokens is not possible")
    if not checked.generation.stop_at_eos and set(found) != {most}:
        raise bad("a text ended early that may not")
    return found


def tags_of(
    value: Value, checked: Checked, lengths: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and absolute position of each row of a value; position -1 for a row of a whole prompt."""
    if value.at is None or value.structure is not Structure.ROW:
        prompts = tuple(p for p, n in enumerate(value.counts) for _ in range(n))
        return prompts, (-1,) * len(prompts)
    return tags_at(value.at, checked, lengths)


def tags_at(at: str, checked: Checked, lengths: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and absolute position of each row that a selector picks."""
    prompts, positions = list[int](), list[int]()
    for p, rows in enumerate(checked.selections[at].rows):
        first = checked.lengths[p]
        mine = [*rows.prompt, *(first + g for g in rows.gen if g < lengths[p])]
        prompts += [p] * len(mine)
        positions += mine
    return tuple(prompts), tuple(positions)


def counts_of(value: Value, checked: Checked, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of each prompt."""
    if value.at is None or value.structure is not Structure.ROW:
        return value.counts
    rows = checked.selections[value.at].rows
    return tuple(len(r.prompt) + sum(g < n for g in r.gen) for r, n in zip(rows, lengths, strict=True))

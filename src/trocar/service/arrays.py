"""From what an engine gives to the arrays that the gate declared. Names no bit that is not declared there.

The engine says of each row which token it is; the gate works the same out for itself. Here the two are compared,
so that a disagreement is a fault and not a wrong figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trocar import errors
from trocar.engine.protocol import (
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
from trocar.gate import schema
from trocar.graph import ops
from trocar.graph.check import Checked

Array = npt.NDArray[Any]


def of_result(checked: Checked, result: TaskResult, n_heads: int) -> dict[str, Array]:
    """The declared arrays of one program, filled.

    Raises:
        ServerFault: `internal` when the engine's rows are not those of the program.
    """
    declared = {field.name: field for field in schema.fields(checked, n_heads)}
    found: dict[str, Array] = {}
    for node in checked.outputs():
        outcome = result.outputs[node.id]
        _require_rows(node, outcome, checked, result.lengths)
        for name, array in _numbers(node.id, outcome).items():
            found[name] = _filled(array, declared[name], outcome)
    effects = {e.id: e for e in result.edits}
    edits = [effects[node.id] for node in checked.edits()]
    if edits:
        found[schema.NORMS] = np.array([(e.norm_before, e.norm_after) for e in edits])
        found[schema.ROWS] = np.array([e.rows for e in edits])
    if checked.generation.max_new_tokens:
        found[schema.LENGTHS] = np.array(result.lengths)
        _complete_texts(checked, result, found)
    return {name: found[name].astype(field.type, copy=False) for name, field in declared.items()}


def _numbers(name: str, outcome: Outcome) -> Mapping[str, Array]:
    match outcome:
        case Lensed():
            return {f"{name}.ids": outcome.ids, f"{name}.logprobs": outcome.logprobs}
        case Rowed():
            return {f"{name}.{i}": rows for i, rows in enumerate(outcome.rows)}
        case Named():
            found = {"logprobs": outcome.logprobs}
        case Scored():
            found = {"scores": outcome.scores}
        case Metered():
            found = {"values": outcome.values}
        case Patterned():
            found = {"probs": outcome.probs}
        case _:
            found = {}
    return {f"{name}.{field}": array for field, array in found.items()}


def _complete_texts(checked: Checked, result: TaskResult, found: dict[str, Array]) -> None:
    """Sampled ids with their end token, so that the gate sees that there was one."""
    most = checked.generation.max_new_tokens
    for name, outcome in result.outputs.items():
        if isinstance(outcome, Generated):
            ids = np.zeros((len(outcome.ids), most), dtype=np.int32)
            for row, made, end in zip(ids, outcome.ids, outcome.ends, strict=True):
                whole = (*made, *(() if end is None else (end,)))
                row[: len(whole)] = whole
            found[f"{name}.ids"] = ids


def _filled(array: Array, field: schema.Field, outcome: Outcome) -> Array:
    """The array in its declared size, zeros behind its last row; as many rows as the engine names, or it is refused."""
    axis = 1 if isinstance(outcome, Lensed) else 0
    n = (
        field.shape[axis]
        if isinstance(outcome, Metered | Captured | Generated)
        else len(outcome.tags.prompts)
    )
    if array.shape != (*field.shape[:axis], n, *field.shape[axis + 1 :]):
        reason = f"the engine gave {field.name!r} in another size than it said"
        raise errors.refuse("internal", field.name, reason)
    out = np.zeros(field.shape, dtype=field.type)
    out[(slice(None),) * axis + (slice(0, n),)] = array
    return out


def _require_rows(node: ops.OutputNode, outcome: Outcome, checked: Checked, lengths: tuple[int, ...]) -> None:
    if isinstance(outcome, Captured):
        value = checked.values[node.of[0]] if isinstance(node, ops.Capture) else None
        whole = isinstance(node, ops.Capture) and node.reduce == "mean"
        same = value is not None and (
            whole or outcome.rows_per_prompt == schema.counts_of(value, checked, lengths)
        )
    elif isinstance(outcome, Generated | Metered):
        same = True
    else:
        same = _tags(outcome.tags) == _declared(node, checked, lengths)
    if not same:
        raise errors.refuse("internal", node.id, "the engine's rows are not those of the program")


def _tags(tags: RowTags) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tags.prompts.tolist()), tuple(tags.positions.tolist())


def _declared(
    node: ops.OutputNode, checked: Checked, lengths: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(node, ops.Logprobs):
        return schema.tags_at(node.at, checked, lengths)
    of = node.of if isinstance(node, ops.Lens | ops.Score | ops.Pattern | ops.Raw) else ()
    first = of if isinstance(of, str) else of[0]
    return schema.tags_of(checked.values[first], checked, lengths)

"""Holds what an engine answered against the reference, output by output, and remembers the largest differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import reference_outputs as wanted
import torch
from bench_room import Ask, Bench
from reference import Solo
from reference_rows import in_generated

from trocar.engine.protocol import TaskResult

ROWS = 1e-4
ROUNDING = 3e-6
TIE = 1e-3
GAPS: dict[str, float] = {}


def close(name: str, ours: Any, theirs: Any, most: float = 1e-4) -> None:
    """Asserts that two arrays are near, and remembers the largest difference for the summary."""
    a = torch.as_tensor(np.asarray(ours), dtype=torch.float64)
    b = torch.as_tensor(np.asarray(theirs), dtype=torch.float64)
    assert a.shape == b.shape, (name, a.shape, b.shape)
    if not a.numel():
        return
    gap = float((a - b).abs().max())
    GAPS[name] = max(GAPS.get(name, 0.0), gap)
    assert gap <= most, f"{name}: {gap:.2e}"


def close_rows(
    name: str, ours: torch.Tensor, theirs: torch.Tensor, most: float = ROWS, size: float | None = None
) -> None:
    """Rows near in proportion to `size`, or to the largest number of theirs."""
    if size is None:
        size = float(theirs.abs().max()) if theirs.numel() else 1.0
    close(f"{name}, relative", ours / max(size, 1e-6), theirs / max(size, 1e-6), most)


def same_bits(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


# Ops whose arithmetic is not done row by row: how many rows share a step may show in the last bits.
TOGETHER = frozenset({"edit.affine", "edit.sae", "edit.knockout", "encode", "matmul", "pattern"})


def row_by_row(ask: Ask) -> bool:
    """Whether each row of a request is computed without regard to the rows beside it, to the bit."""
    return not any(n.op in TOGETHER or getattr(n, "probe", None) for n in ask.nodes)


def answer_of(ask: Ask, result: TaskResult) -> dict[str, Any]:
    """Everything that a request got: arrays of numbers, and what must be equal in any case."""
    out: dict[str, Any] = {}
    for name, found in result.outputs.items():
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if field.name == "tags":
                value = (
                    value.prompts.tolist(),
                    value.positions.tolist(),
                    value.token_ids.tolist(),
                    value.phases,
                )
            if field.name == "rows":
                out |= {f"{name}.rows[{i}]": rows for i, rows in enumerate(value)}
            else:
                out[f"{name}.{field.name}"] = value
    for name, shelf in ask.sinks.items():
        out |= {f"{name}.{site}": shelf.rows(site).numpy() for site in shelf.parts[0][0]}
    out["edits"] = [(e.id, e.rows) for e in result.edits]
    return out


def same_answer(name: str, mine: dict[str, Any], theirs: dict[str, Any], *, exact: bool) -> None:
    """Two answers to one request: the same bits, or near where the ops allow no more."""
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        if not isinstance(value, np.ndarray) or exact or value.dtype.kind == "i":
            assert np.array_equal(value, theirs[key]), (name, key)
        else:
            close_rows(f"{name}, not row by row", torch.from_numpy(value), torch.from_numpy(theirs[key]))


def follow(bench: Bench, ask: Ask, result: TaskResult) -> list[Solo]:
    """The reference along the ids that the engine generated, each of which must be the reference's own choice.

    A choice between tokens whose logits are nearer than rounding is free. Texts that end by themselves are not
    for this function: their end token is not among the ids.
    """
    runs = []
    for i, prompt in enumerate(ask.prompts):
        ids = result.outputs["text"].ids[i] if ask.generation.max_new_tokens else None
        assert ids is None or len(ids) == ask.generation.max_new_tokens
        run = bench.reference(ask, i, forced=ids)
        runs.append(run)
        for j, chosen in enumerate(ids or ()):
            logits = run.last.logits[len(prompt) - 1 + j]
            assert float(logits.max() - logits[chosen]) <= TIE, (i, j, chosen, int(logits.argmax()))
    return runs


def against_hooks(
    bench: Bench,
    ask: Ask,
    result: TaskResult,
    name: str,
    runs: Sequence[Solo] | None = None,
    most: float | None = None,
) -> list[Solo]:
    """Every output and receipt of a request against the reference; gives the reference's runs.

    Args:
        most: how far log-probabilities and probabilities may be off, if not as far as on this bench.
    """
    runs = follow(bench, ask, result) if runs is None else runs
    for node in ask.nodes:
        if node.op in CHECKS:
            held = Held(f"{name}: {node.op}", bench.most if most is None else most)
            CHECKS[node.op](ask, node, result, runs, held)
    _receipts(ask, result, runs, name)
    return list(runs)


@dataclasses.dataclass(frozen=True)
class Held:
    """What is compared, and how near it must be."""

    name: str
    most: float

    def close(self, ours: Any, theirs: Any, what: str = "", size: float = 0.0) -> None:
        """Args: size: of the numbers that float32 has rounded on the way, where they may be in the hundreds."""
        close(f"{self.name}{what}", ours, theirs, max(self.most, ROUNDING * size))


def _rows_of(found: Any, prompt: int) -> np.ndarray:
    mine: np.ndarray = found.tags.prompts == prompt
    return mine


def _positions(found: Any, prompt: int, want: wanted.Wanted, name: str) -> None:
    if want.positions is not None:
        assert found.tags.positions[_rows_of(found, prompt)].tolist() == want.positions, name


def _logprobs(ask: Ask, node: Any, result: TaskResult, runs: Sequence[Solo], held: Held) -> None:
    found = result.outputs[node.id]
    for i, run in enumerate(runs):
        ids = node.tokens[i] if isinstance(node.tokens[0], tuple) else node.tokens
        want = wanted.named_logprobs(run, node, ids)
        _positions(found, i, want, held.name)
        held.close(found.logprobs[_rows_of(found, i)], want.data)


def _lens(ask: Ask, node: Any, result: TaskResult, runs: Sequence[Solo], held: Held) -> None:
    found = result.outputs[node.id]
    for i, run in enumerate(runs):
        mine = _rows_of(found, i)
        for number, want in enumerate(wanted.lens_tables(run, node)):
            _positions(found, i, want, held.name)
            ids = torch.from_numpy(found.ids[number][mine])
            size, best = float(want.data.abs().max()), want.data.topk(node.top_k).values
            held.close(found.logprobs[number][mine], want.data.gather(1, ids), size=size)
            held.close(found.logprobs[number][mine], best, ", best", size)


def _score(ask: Ask, node: Any, result: TaskResult, runs: Sequence[Solo], held: Held) -> None:
    """Sums that nearly cancel for one prompt are held to the size that they have for the others."""
    found = result.outputs[node.id]
    wants = [wanted.scores(run, node, ask.probe(node.id)) for run in runs]
    size = max((float(w.data.abs().max()) for w in wants if len(w.data)), default=1.0)
    for i, want in enumerate(wants):
        _positions(found, i, want, held.name)
        close_rows(held.name, torch.from_numpy(found.scores[_rows_of(found, i)]), want.data, size=size)


def _metric(ask: Ask, node: Any, result: TaskResult, runs: Sequence[Solo], held: Held) -> None:
    found = result.outputs[node.id].values
    assert len(found) == len(runs)
    for i, run in enumerate(runs):
        ids = ()
        if node.tokens is not None:
            ids = node.tokens[i] if isinstance(node.tokens[0], tuple) else node.tokens
        held.close(found[i], wanted.metric(run, node, ask.prompts[i], ids), f" {node.metric}")


def _pattern(ask: Ask, node: Any, result: TaskResult, runs: Sequence[Solo], held: Held) -> None:
    found = result.outputs[node.id]
    for i, run in enumerate(runs):
        want = wanted.pattern(run, node)
        _positions(found, i, want, held.name)
        held.close(found.probs[_rows_of(found, i)], want.data)


def _capture(ask: Ask, node: Any, result: TaskResult, runs: Sequence[Solo], held: Held) -> None:
    shelf, counts = ask.sinks[node.id], result.outputs[node.id].rows_per_prompt
    keys = shelf.keys()
    for i, run in enumerate(runs):
        for site, want in wanted.captured(run, node).items():
            assert keys[keys[:, 0] == i][:, 1].tolist() == want.positions, (held.name, site)
            assert counts[i] == len(want.data)
            close_rows(held.name, shelf.rows(site, i), want.data)


def _raw(ask: Ask, node: Any, result: TaskResult, runs: Sequence[Solo], held: Held) -> None:
    found = result.outputs[node.id]
    for i, run in enumerate(runs):
        mine = _rows_of(found, i)
        for rows, (site, want) in zip(found.rows, wanted.captured(run, node).items(), strict=True):
            assert found.tags.positions[mine].tolist() == want.positions, (held.name, site)
            close_rows(held.name, torch.from_numpy(rows[mine]), want.data)


def _receipts(ask: Ask, result: TaskResult, runs: Sequence[Solo], name: str) -> None:
    """Rows written, and their mean norms before and after, over all prompts."""
    assert [e.id for e in result.edits] == [n.id for n in ask.nodes if n.op.startswith("edit.")]
    for effect in result.edits:
        at = ask.node(effect.id).at
        of = [run.last if in_generated(at) else run.first for run in runs]
        seen = [run.effects[effect.id] for run in of if effect.id in run.effects]
        rows = sum(e.rows for e in seen)
        assert effect.rows == rows, (name, effect)
        for ours, theirs in (("norm_before", "before"), ("norm_after", "after")):
            mean = sum(getattr(e, theirs) * e.rows for e in seen) / rows
            gap = abs(getattr(effect, ours) - mean) / max(1.0, abs(mean))
            close(f"{name}: receipts, relative", gap, 0.0, ROWS)


CHECKS = {
    "logprobs": _logprobs,
    "lens": _lens,
    "score": _score,
    "metric": _metric,
    "pattern": _pattern,
    "capture": _capture,
    "raw": _raw,
}


def changed(bench: Bench, ask: Ask, result: TaskResult, name: str = "lp") -> float:
    """The largest change of a request's log-probabilities against the model without any edit."""
    node, found, most = ask.node(name), result.outputs[name], 0.0
    for i, prompt in enumerate(ask.prompts):
        ids = result.outputs["text"].ids[i] if ask.generation.max_new_tokens else ()
        want = wanted.named_logprobs(bench.bare(prompt, ids), node, node.tokens)
        most = max(most, float(np.abs(found.logprobs[_rows_of(found, i)] - want.data.numpy()).max()))
    return most

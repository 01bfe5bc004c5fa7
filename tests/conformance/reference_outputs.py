"""What each output of a program must be for one prompt, from the reference's passes; float64 where it is cheap.

Shape letters: N rows, V vocabulary, M named tokens, H heads, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import reference_places as places
import torch
from reference import PATTERN, Pass, Solo, logprobs
from reference_values import PROMPT, ROW, operands

Probe = tuple[torch.Tensor, float]


@dataclass(frozen=True)
class Wanted:
    """Rows that an output must have, by absolute position (None: they belong to no token of this pass)."""

    positions: list[int] | None
    data: torch.Tensor


def positions(run: Pass, name: str) -> list[int] | None:
    """Tokens that the rows of a value stand for: [-1] for one per prompt, None for stored rows."""
    value = run.values.get(name)
    if value.level == PROMPT:
        return [-1]
    node = run.values.node(name)
    if node.op == "read":
        return run.rows(node.at)
    found = [positions(run, x) for x in operands(node) if run.values.get(x).level == ROW]
    return next((rows for rows in found if rows is not None), None)


def selector_of(run: Solo, name: str) -> str | None:
    """The selector that a value's rows come from."""
    node = run.first.values.node(name)
    if node.op == "read":
        return str(node.at)
    found = [selector_of(run, x) for x in operands(node)]
    return next((at for at in found if at is not None), None)


def pass_of(run: Solo, name: str) -> Pass:
    return run.of(selector_of(run, name))


def named_logprobs(run: Solo, node: Any, ids: Sequence[int]) -> Wanted:
    """[N, M] of the tokens that follow the selected rows."""
    seen = run.of(node.at)
    rows = seen.rows(node.at)
    return Wanted(rows, logprobs(seen.logits[rows])[:, list(ids)])


def lens_tables(run: Solo, node: Any) -> list[Wanted]:
    """Per value the whole table [N, V] of log-probabilities."""
    out = []
    for name in node.of:
        seen = pass_of(run, name)
        rows = seen.values.get(name)
        table = places.unembed(
            seen.plain.model, rows.data.reshape(-1, rows.data.shape[-1]), normed=_normed(run, name)
        )
        out.append(Wanted(positions(seen, name), table))
    return out


def _normed(run: Solo, name: str) -> bool:
    """Whether rows come from behind the last norm."""
    node = run.first.values.node(name)
    if node.op in ("read", "stored"):
        return bool(node.site == "final_norm")
    return any(_normed(run, x) for x in operands(node))


def scores(run: Solo, node: Any, probe: Probe | None = None) -> Wanted:
    """[N] of a number, of a mask as 0 and 1, or of a probe's logit."""
    seen = pass_of(run, node.of)
    data = seen.value(node.of).double()
    if probe is not None:
        data = data @ torch.as_tensor(probe[0]).double() + probe[1]
    return Wanted(positions(seen, node.of), data.reshape(-1))


def metric(run: Solo, node: Any, tokens: Sequence[int], ids: Sequence[int] = ()) -> float:
    """The mean over the selected rows of the prompt.

    Args:
        tokens: of the prompt.
        ids: the pair of a logit difference.
    """
    seen = run.first
    rows = seen.rows(node.at)
    if node.metric == "logit_diff":
        logits = seen.logits[rows].double()
        return float((logits[:, ids[0]] - logits[:, ids[1]]).mean())
    q = logprobs(seen.logits[rows])
    if node.metric == "cross_entropy":
        return float(torch.stack([-q[i, tokens[row + 1]] for i, row in enumerate(rows)]).mean())
    p = places.unembed(seen.plain.model, seen.value(node.to), normed=True)
    return float((p.exp() * (p - q)).sum(-1).mean())


def pattern(run: Solo, node: Any) -> Wanted:
    """[N, H, K]."""
    read = run.first.values.node(node.of)
    assert read.site.startswith(PATTERN)
    seen = run.of(read.at)
    heads = seen.plain.model.config.num_attention_heads if read.heads is None else len(read.heads)
    rows = seen.value(node.of)
    return Wanted(seen.rows(read.at), rows.reshape(len(rows), heads, -1))


def captured(run: Solo, node: Any) -> dict[str, Wanted]:
    """Rows by site, or their mean over the selected positions."""
    out = {}
    for name in node.of:
        seen, read = pass_of(run, name), run.first.values.node(name)
        rows = seen.value(name)
        if getattr(node, "reduce", "none") == "mean":
            out[read.site] = Wanted([-1], rows.mean(0, keepdim=True))
        else:
            out[read.site] = Wanted(seen.rows(read.at), rows)
    return out


OUTPUTS: dict[str, Callable[..., Any]] = {
    "logprobs": named_logprobs,
    "lens": lens_tables,
    "score": scores,
    "metric": metric,
    "pattern": pattern,
    "capture": captured,
    "raw": captured,
}

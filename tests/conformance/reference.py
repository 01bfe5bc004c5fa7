"""The independent reference: plain torch hooks on a Hugging Face model, one prompt at a time, no KV cache.

Nothing of the engine is used: places of sites, positions, edits and generation are written here a second
time, from `docs` alone. Generation runs the whole sequence again for every token, with every edit at its
absolute rows. What a run read is taken from its last pass when generated rows are asked for, else from the
pass over the bare prompt.

Shape letters: T tokens, D width, V vocabulary, N selected rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

Nodes = Sequence[Any]


def place(model: Any, site: str) -> tuple[torch.nn.Module, str]:
    """The module and the side ("in", "in!" for a tensor used twice, "out") where a Llama shows a site."""
    name, _, layer = site.partition(".")
    if name == "embeddings":
        return model.model.embed_tokens, "out"
    if name == "final_norm":
        return model.model.norm, "out"
    block = model.model.layers[int(layer)]
    return {
        "resid_pre": (block, "in"),
        "attn_in": (block.input_layernorm, "out"),
        "q": (block.self_attn.q_proj, "out"),
        "k": (block.self_attn.k_proj, "out"),
        "v": (block.self_attn.v_proj, "out"),
        "z": (block.self_attn.o_proj, "in"),
        "attn_out": (block.self_attn, "out"),
        "resid_mid": (block.post_attention_layernorm, "in!"),
        "mlp_in": (block.post_attention_layernorm, "out"),
        "mlp_act": (block.mlp.down_proj, "in"),
        "mlp_out": (block.mlp, "out"),
        "resid_post": (block, "out"),
    }[name]


def hook(model: Any, site: str, visit: Any) -> Any:
    """Registers `visit(x [1, T, D]) -> x or None` at a site; returns the removable handle."""
    module, side = place(model, site)
    if side == "out":

        def after(_module: Any, _args: Any, out: Any) -> Any:
            new = visit(out[0] if isinstance(out, tuple) else out)
            if new is None or not isinstance(out, tuple):
                return new
            return (new, *out[1:])

        return module.register_forward_hook(after)

    def before(_module: Any, args: Any) -> Any:
        new = visit(args[0])
        if new is None:
            return None
        if side == "in!":
            args[0].copy_(new)
            return None
        return (new, *args[1:])

    return module.register_forward_pre_hook(before)


def rows_at(at: str, prompt: int, generated: int) -> list[int]:
    """Absolute rows of a selector in a sequence of `prompt` and `generated` tokens; Python's own slicing."""
    if at == "all":
        return list(range(prompt + generated))
    phase, inside = re.fullmatch(r"(prompt|gen)\[(.*)\]", at).groups()  # type: ignore[union-attr]
    every = list(range(prompt)) if phase == "prompt" else list(range(prompt, prompt + 10_000))
    if inside == "*":
        picked = every
    elif ":" in inside:
        start, stop = (int(x) if x else None for x in inside.split(":"))
        picked = every[start:stop]
    else:
        picked = [every[int(inside)]]
    return [row for row in picked if row < prompt + generated]


@dataclass
class Pass:
    """One forward pass over a whole sequence with every edit in place."""

    nodes: Nodes
    prompt: int
    generated: int
    constants: Mapping[str, torch.Tensor]
    logits: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    read: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    def run(self, model: Any, ids: Sequence[int]) -> Pass:
        touched = dict.fromkeys(n.site for n in self.nodes if n.op == "read" or n.op.startswith("edit."))
        with torch.no_grad(), ExitStack() as undo:
            for site in touched:
                here = [
                    n
                    for n in self.nodes
                    if getattr(n, "site", None) == site and n.op not in ("vector", "stored", "score")
                ]
                undo.callback(hook(model, site, lambda x, here=here: self._visit(x, here)).remove)
            self.logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return self

    def _visit(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor | None:
        work, wrote = x.clone(), False
        for node in nodes:
            rows = rows_at(node.at, self.prompt, self.generated)
            if not rows:
                continue
            if node.op == "read":
                self.read[node.id] = work[0, rows].clone()
                continue
            before = work[0, rows].clone()
            after = self._edited(node, before)
            work[0, rows] = after
            self.norms[node.id] = (
                float(before.norm(dim=-1).mean()),
                float(after.norm(dim=-1).mean()),
                len(rows),
            )
            wrote = True
        return work if wrote else None

    def _edited(self, node: Any, h: torch.Tensor) -> torch.Tensor:
        if node.op == "edit.scale":
            return h * node.by
        if node.value == "zero":
            return torch.zeros_like(h)
        v = self.value(node.value).expand_as(h)
        if node.op == "edit.add":
            return h + node.coef * v
        if node.op == "edit.set":
            return v.clone()
        out = h.clone()
        for i, row in enumerate(h):
            unit = v[i] / v[i].norm()
            out[i] = row - unit * torch.dot(row, unit)
        return out

    def value(self, name: str) -> torch.Tensor:
        """[D] of a vector or a mean, [N, D] of rows, [N] of scalars."""
        if name in self.constants:
            return self.constants[name]
        node = next(n for n in self.nodes if n.id == name)
        if node.op == "read":
            return self.read[name]
        if node.op == "scale":
            return self.value(node.of) * node.by
        if node.op == "mean":
            return self.value(node.of).mean(0)
        a, b = self.value(node.a), self.value(node.b)
        if node.op == "add":
            return a + b
        return a - b if node.op == "sub" else torch.einsum("nd,nd->n", *torch.broadcast_tensors(a, b))

    def positions(self, name: str) -> list[int] | None:
        """Absolute rows that a value stands for; None for a vector, a mean or stored rows."""
        node = next(n for n in self.nodes if n.id == name)
        if node.op == "read":
            return rows_at(node.at, self.prompt, self.generated)
        if node.op == "scale":
            return self.positions(node.of)
        if node.op in ("add", "sub", "dot"):
            found = [p for p in (self.positions(node.a), self.positions(node.b)) if p is not None]
            return found[0] if found else None
        return None


@dataclass(frozen=True)
class Solo:
    """What one prompt gives: generated ids (end token included), and the two passes that are read from."""

    ids: tuple[int, ...]
    first: Pass
    last: Pass

    def of(self, at: str | None) -> Pass:
        return self.first if at is None or at.startswith("prompt") else self.last


def solo(
    model: Any,
    nodes: Nodes,
    tokens: Sequence[int],
    constants: Mapping[str, torch.Tensor] | None = None,
    *,
    max_new_tokens: int = 0,
    eos: Sequence[int] = (),
    feed_last: bool = True,
) -> Solo:
    """Runs one prompt alone, greedily, re-running the whole sequence for each token.

    Args:
        nodes: the program's nodes, in order.
        constants: by node id: vectors [D], or stored rows [N, D] of this prompt.
        eos: ids that end the generation.
        feed_last: whether rows of the last token are wanted.
    """
    known = dict(constants or {})
    first = Pass(nodes, len(tokens), 0, dict(known)).run(model, tokens)
    for node in nodes:  # a mean over the prompt is one value for the whole generation
        if node.op == "mean":
            known[node.id] = first.value(node.id)
    ids: list[int] = []
    last = first
    while len(ids) < max_new_tokens:
        ids.append(int(last.logits[-1].argmax()))
        ended = ids[-1] in eos or len(ids) == max_new_tokens
        if ended and not feed_last:
            break
        last = Pass(nodes, len(tokens), len(ids), known).run(model, [*tokens, *ids])
        if ended:
            break
    return Solo(tuple(ids), first, last)


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)


def unembed(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V] of the last norm and unembedding by hand, in float64."""
    norm, h = model.model.norm, rows.double()
    scaled = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return ((scaled * norm.weight.double()) @ model.lm_head.weight.double().T).log_softmax(-1)

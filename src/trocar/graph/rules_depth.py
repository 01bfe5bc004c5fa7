"""How much of the forward pass a program needs: how many layers, the final norm, attention patterns.

A read or an edit needs its layer; what is made of logits needs all. An explicit `stop_after` is a promise
that nothing needs more, and is held here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trocar import errors
from trocar.graph import ops
from trocar.graph.program import Program
from trocar.graph.rules_sites import PATTERN
from trocar.graph.scope import Walk

OF_LOGITS = (ops.Logprobs, ops.Metric, ops.Text)
AT_SITES = (ops.Read, *ops.EDIT_NODES)


@dataclass(frozen=True, slots=True)
class Reach:
    """What of a pass is computed.

    Attributes:
        depth: layers.
        final: whether rows after the final norm are wanted.
        last: layers for the last token of a text, from which nothing is sampled; one more than there are when its
            row after the final norm is wanted.
        patterns: whether a node stands at attn_probs.
    """

    depth: int
    final: bool
    last: int
    patterns: bool


def reach(program: Program, walk: Walk) -> Reach:
    """What an accepted program needs."""
    n_layers = walk.scope.model.n_layers
    generates = walk.scope.generation.max_new_tokens > 0
    needs = {node.id: layers(node, walk) for node in program.nodes}
    depth = max(*needs.values(), n_layers if generates else 0, 0)
    looked = [needs[node.id] for node in program.nodes if not isinstance(node, ops.Text)]
    at = [walk.site(node.site, "").name for node in program.nodes if isinstance(node, AT_SITES)]
    final = "final_norm" in at or any(isinstance(n, ops.Logprobs | ops.Metric) for n in program.nodes)
    return Reach(
        depth if walk.stop is None else walk.stop + 1,
        final or generates or any(isinstance(n, ops.Text) for n in program.nodes),
        n_layers + 1 if final else max(looked, default=0),
        PATTERN in at,
    )


def layers(node: ops.Node, walk: Walk) -> int:
    """How many layers an accepted node needs."""
    n_layers = walk.scope.model.n_layers
    if isinstance(node, OF_LOGITS):
        return n_layers
    if not isinstance(node, AT_SITES):
        return 0
    site = walk.site(node.site, "")
    if site.layer is not None:
        return site.layer + 1
    return 0 if site.spec.phase == 0 else n_layers


def beyond_stop(program: Program, walk: Walk, refused: set[str]) -> Iterator[errors.Refusal]:
    """One refusal for each node that needs a layer after the stop."""
    stop = walk.stop
    if stop is None:
        return
    step = f"Stop later, or leave it out; layers 0 to {stop} are computed."
    if walk.scope.generation.max_new_tokens > 0:
        why = f"a program that stops after layer {stop} gives no next token, and so generates nothing"
        yield errors.refusal("after_stop", "generation.max_new_tokens", why, next_step=step)
    for i, node in enumerate(program.nodes):
        if node.id in refused or layers(node, walk) <= stop + 1:
            continue
        field = ".site" if isinstance(node, AT_SITES) else ""
        yield errors.refusal("after_stop", f"program.nodes[{i}]{field}", _why(node, stop), next_step=step)


def _why(node: ops.Node, stop: int) -> str:
    if isinstance(node, ops.EDIT_NODES):
        return (
            f"{node.site!r} lies after layer {stop}: nothing touches the edit, its effect is never computed"
        )
    if isinstance(node, ops.Read):
        return f"{node.site!r} lies after layer {stop}, where the program stops"
    return f"{node.id!r} needs logits, and the program stops after layer {stop}"

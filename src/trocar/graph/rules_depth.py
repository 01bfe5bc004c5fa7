"""How much of the forward pass a program needs: how many layers, the final norm, attention patterns.

A read or an edit needs its layer; what is made of logits needs all. An explicit `stop_after` is a promise
that nothing needs more, and is held here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from trocar import errors
from trocar.graph import ops
from trocar.graph.program import Program
from trocar.graph.rules_sites import PATTERN
from trocar.graph.scope import Walk
from trocar.sites import Site

# by `type(node) in`: isinstance asks pydantic's metaclass class by class, for every node
OF_FINAL: Final = frozenset({ops.Logprobs, ops.Metric})
OF_LOGITS: Final = OF_FINAL | {ops.Text}
AT_SITES: Final = frozenset({ops.Read, *ops.EDIT_NODES})


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
    looked = max((layers(node, walk) for node in program.nodes if type(node) is not ops.Text), default=0)
    text = generates or any(type(node) is ops.Text for node in program.nodes)
    depth = n_layers if text else looked
    kinds = {type(node) for node in program.nodes}
    at = {_site(node, walk).name for node in program.nodes if type(node) in AT_SITES}
    final = "final_norm" in at or bool(kinds & OF_FINAL)
    return Reach(
        depth if walk.stop is None else walk.stop + 1,
        final or text,
        n_layers + 1 if final else looked,
        PATTERN in at,
    )


def layers(node: ops.Node, walk: Walk) -> int:
    """How many layers an accepted node needs."""
    n_layers = walk.scope.model.n_layers
    if type(node) in OF_LOGITS:
        return n_layers
    if type(node) not in AT_SITES:
        return 0
    site = _site(node, walk)
    if site.layer is not None:
        return site.layer + 1
    return 0 if site.spec.phase == 0 else n_layers


def _site(node: ops.Node, walk: Walk) -> Site:
    return walk.site(node.site, "")  # type: ignore[attr-defined]


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
        field = ".site" if type(node) in AT_SITES else ""
        yield errors.refusal("after_stop", f"program.nodes[{i}]{field}", _why(node, stop), next_step=step)


def _why(node: ops.Node, stop: int) -> str:
    if isinstance(node, ops.EDIT_NODES):
        return (
            f"{node.site!r} lies after layer {stop}: nothing touches the edit, its effect is never computed"
        )
    if isinstance(node, ops.Read):
        return f"{node.site!r} lies after layer {stop}, where the program stops"
    return f"{node.id!r} needs logits, and the program stops after layer {stop}"

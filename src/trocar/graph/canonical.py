"""Site names as their users wrote them, turned into the canonical ones before anything is checked.

What cannot be resolved stays as it is, and the checker refuses it in its place with everything else that is wrong
with the program; so every later room sees canonical names only, and echoes them.
"""

from __future__ import annotations

from typing import Any

from trocar import aliases, errors, sites
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Node, Program


def canonical_sites(program: Program, model: ModelFacts) -> Program:
    """The same program with canonical site names wherever a name could be resolved."""
    nodes = tuple(_node(node, model) for node in program.nodes)
    changed = any(a is not b for a, b in zip(nodes, program.nodes, strict=True))
    return program.model_copy(update={"nodes": nodes}) if changed else program


def _node(node: Node, model: ModelFacts) -> Node:
    text: Any = getattr(node, "site", None)
    if text is None or text == (name := _resolved(text, model)):
        return node
    return node.model_copy(update={"site": name})


def _resolved(text: str, model: ModelFacts) -> str:
    try:
        return str(aliases.resolve(text, model))
    except errors.TrocarError:
        return text


def expand(pattern: str, model: ModelFacts, path: str = "sites") -> list[sites.Site]:
    """`resid_post.*`, in any accepted spelling, as one site per layer; anything else is one site.

    Raises:
        ProgramError: `unknown_site` or `ambiguous_site`.
    """
    if "*" not in pattern:
        return [aliases.resolve(pattern, model, path)]
    if pattern.partition(".")[0] in sites.SITES:
        return sites.expand(pattern, model.n_layers, path)
    return [aliases.resolve(pattern.replace("*", str(i)), model, path) for i in range(model.n_layers)]

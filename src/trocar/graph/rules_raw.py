"""Structure rules: which rows may leave as they are.

Bytes alone do not stop a caller who writes basis vectors into a block and reads what the block makes of them:
those bytes are the weights. So rows leave only at a distance from the caller's own writes, not from the first
layers, and not from both ends of one matrix. All of it follows from the program; nothing looks at data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from trocar import errors, sites
from trocar.graph import linear_maps, ops, streams
from trocar.graph.labels import Rules
from trocar.graph.program import Program
from trocar.graph.scope import Selection, Walk
from trocar.graph.shapes import Value
from trocar.sites import Site


def refusals(program: Program, walk: Walk, rules: Rules, refused: set[str]) -> Iterator[errors.Refusal]:
    """One refusal for each value of a `raw` output that may not leave."""
    nodes = [(i, n) for i, n in enumerate(program.nodes) if isinstance(n, ops.Raw) and n.id not in refused]
    if not nodes:
        return
    if rules.raw != "direct":
        yield from (_closed(node, f"program.nodes[{i}]", rules) for i, node in nodes)
        return
    for i, node in nodes:
        for j, ref in enumerate(node.of):
            why = _forbidden(ref, program, walk, rules)
            if why is not None:
                yield errors.refusal("policy", f"program.nodes[{i}].of[{j}]", why)
    if not rules.linear_maps:
        values = [walk.values[ref] for _, node in nodes for ref in node.of]
        found = exported(values, walk.selections, walk.scope.model.n_layers)
        yield from _matrices(found, f"program.nodes[{nodes[-1][0]}].of")


def _closed(node: ops.Raw, path: str, rules: Rules) -> errors.Refusal:
    if rules.raw == "airlock":
        return errors.refusal(
            "needs_airlock",
            path,
            f"{node.id!r} asks for rows of secret weights; they leave through the airlock only",
        )
    return errors.refusal("policy", path, f"{node.id!r} asks for rows, which never leave under this policy")


def _forbidden(ref: str, program: Program, walk: Walk, rules: Rules) -> str | None:
    site = walk.values[ref].sites[0]
    depth = streams.depth(site)
    if depth is not None and depth < rules.first_raw_layer:
        return f"{site}: rows before layer {rules.first_raw_layer} stay, they are close to the embeddings"
    writes = (walk.site(n.site, "") for n in program.nodes if isinstance(n, ops.EDIT_NODES))
    blocks = blocks_between(site, writes, walk.scope.model.n_layers)
    if blocks is not None and blocks < rules.least_blocks:
        return (
            f"{ref!r} is read at {site}, {blocks} full blocks after the last write before it; "
            f"rows leave at {rules.least_blocks} or more"
        )
    return None


def _matrices(found: Sequence[tuple[Site, bool]], path: str) -> Iterator[errors.Refusal]:
    """One refusal for each matrix whose two ends are among the rows, or follow from them."""
    for source, target in linear_maps.ends((s for s, _ in found), (s for s, first in found if first)):
        yield errors.refusal(
            "policy", path, f"rows of {source} and {target} are, or follow from, rows asked for here: together they "
            "are the matrix between the two",
            next_step="Ask for one of the two sites only.",
        )  # fmt: skip


def exported(
    values: Iterable[Value], selections: Mapping[str, Selection], n_layers: int
) -> tuple[tuple[Site, bool], ...]:
    """The sites of reads, the last norm as the stream it reads, and of each whether position 0 is among its rows."""
    found = ((streams.last(v.sites[0], n_layers), has_first(v, selections)) for v in values)
    return tuple(dict.fromkeys(found))


def has_first(value: Value, selections: Mapping[str, Selection]) -> bool:
    """Whether position 0 of a prompt is among a read's rows."""
    rows = () if value.at is None else selections[value.at].rows
    return any(len(r.prompt) and r.prompt[0] == 0 for r in rows)


def blocks_between(site: Site, writes: Iterable[Site], n_layers: int) -> int | None:
    """Full blocks between the last write before a site and the site; None without a write."""
    here = sites.order(site, n_layers)
    before = [w for w in writes if sites.order(w, n_layers) <= here]
    return min((_blocks(w, site, n_layers) for w in before), default=None)


def _blocks(write: Site, read: Site, n_layers: int) -> int:
    """Layers that lie whole between a write and a read."""
    return max(0, _last_whole(read, n_layers) - _first_whole(write, n_layers) + 1)


def _first_whole(write: Site, n_layers: int) -> int:
    """The first layer that begins after the write."""
    if write.layer is None:
        return 0 if write.spec.phase == 0 else n_layers
    return write.layer + (write.name != "resid_pre")


def _last_whole(read: Site, n_layers: int) -> int:
    """The last layer that ends before the read, or with it."""
    if read.layer is None:
        return -1 if read.spec.phase == 0 else n_layers - 1
    return read.layer - (read.name != "resid_post")

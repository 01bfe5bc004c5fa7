"""What an accepted program exposes of which site: directions, and sites whose rows leave.

Numbers of one direction, of however many rows, say little of a matrix; as many directions as it has columns say
everything. So directions are counted, by digest: the same probe asked of other prompts is the same direction. They
are counted at the stream that they are directions of, whatever name a program uses for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trocar.graph import ops, rules_raw, spans
from trocar.graph.check import Checked
from trocar.graph.spans import Content, Spans
from trocar.graph.streams import stream
from trocar.sites import Site

__all__ = ["Content", "Direction", "directions", "exported"]


@dataclass(frozen=True, slots=True)
class Direction:
    """Something that is computed from a site's rows and leaves.

    Attributes:
        site: the stream, for example `resid_pre.12`.
        digest: SHA-256 of what is computed, 64 hex digits: op by op, without prompts and positions.
        rank: how many directions of the site it can span.
    """

    site: str
    digest: str
    rank: int


def directions(
    checked: Checked, contents: Mapping[str, Content], request: str, n_layers: int
) -> tuple[Direction, ...]:
    """Of every score, those of each site that it comes from; of raw rows, as many as they can span.

    Args:
        contents: of what each `tensor` and `sae` node brings in.
        request: digest of the whole request, and of which variant this is: what rows determine is never the
            same twice.
    """
    found: dict[tuple[str, str], int] = {}
    for site, digest, rank in (*_scores(checked, contents, request), *_raw(checked, request)):
        name = (str(stream(site, n_layers)), digest)
        found[name] = max(found.get(name, 0), rank)
    return tuple(Direction(site, digest, rank) for (site, digest), rank in found.items())


def _scores(
    checked: Checked, contents: Mapping[str, Content], request: str
) -> Iterator[tuple[Site, str, int]]:
    walk, shown = Spans(checked, contents, request), 0
    widths: dict[Site, int] = {}
    for node in checked.program.nodes:
        walk.enter(node)
        if isinstance(node, ops.Read | ops.Stored):
            value = checked.values[node.id]
            widths[value.sites[0]] = max(widths.get(value.sites[0], 0), value.width)
        if isinstance(node, ops.Score):
            shown |= walk.scored(node)
    for i, atom in enumerate(walk.atoms):
        if shown >> i & 1:
            yield from ((site, atom.digest, min(atom.rank, widths[site])) for site in atom.sites)


def _raw(checked: Checked, request: str) -> Iterator[tuple[Site, str, int]]:
    for node in checked.program.nodes:
        if isinstance(node, ops.Raw):
            for ref in node.of:
                value = checked.values[ref]
                rank = min(spans.rows(value, checked), value.width)
                yield value.sites[0], spans.sha256([request, node.id, ref]), rank


def exported(checked: Checked, n_layers: int) -> tuple[tuple[Site, bool], ...]:
    """Sites whose rows leave as they are, and whether position 0 is among them."""
    refs = [ref for node in checked.program.nodes if isinstance(node, ops.Raw) for ref in node.of]
    return rules_raw.exported((checked.values[ref] for ref in refs), checked.selections, n_layers)

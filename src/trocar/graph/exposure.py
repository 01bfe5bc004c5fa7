"""What an accepted program exposes of which site: directions, and sites whose rows leave.

Numbers of one direction, of however many rows, say little of a matrix; as many directions as it has columns say
everything. So directions are counted, by digest: the same probe asked of other prompts is the same direction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trocar.graph import ops, rules_raw
from trocar.graph.check import Checked
from trocar.graph.shapes import Structure, Value
from trocar.graph.spec import SPEC
from trocar.sites import Site


@dataclass(frozen=True, slots=True)
class Direction:
    """Something that is computed from a site's rows and leaves.

    Attributes:
        site: for example `resid_post.12`.
        digest: SHA-256 of what is computed, 64 hex digits: op by op, without prompts and positions.
        rank: how many directions of the site it can span.
    """

    site: str
    digest: str
    rank: int


def directions(checked: Checked, contents: Mapping[str, str], request: str) -> Iterator[Direction]:
    """Of every score, those of each site that it comes from; of raw rows, as many as they can span.

    Args:
        contents: digest of the numbers that each `tensor` and `sae` node brings in.
        request: digest of the whole request: what rows determine is never the same twice.
    """
    known: dict[str, _Part] = {}
    for node in checked.program.nodes:
        known[node.id] = part = _part(node, known, contents, checked)
        if isinstance(node, ops.Score):
            value = checked.values[node.of]
            digest, rank = part.digest, part.rank
            if part.free:  # of these rows only
                digest, rank = _sha256([request, node.id]), min(rank, _rows(value, checked))
            for site in value.sites:
                yield Direction(str(site), digest, rank)
        if isinstance(node, ops.Raw):
            for ref in node.of:
                value = checked.values[ref]
                rank = min(_rows(value, checked), value.width)
                yield Direction(str(value.sites[0]), _sha256([request, node.id, ref]), rank)


def exported(checked: Checked) -> tuple[tuple[Site, bool], ...]:
    """Sites whose rows leave as they are, and whether position 0 is among them."""
    refs = [ref for node in checked.program.nodes if isinstance(node, ops.Raw) for ref in node.of]
    return rules_raw.exported((checked.values[ref] for ref in refs), checked.selections)


@dataclass(frozen=True, slots=True)
class _Part:
    """What is known of one node.

    Attributes:
        digest: of what it computes: its fields, with operands replaced by what they compute.
        rank: how many directions its numbers can lie along.
        free: whether rows, and not only constants, say which directions these are.
    """

    digest: str
    rank: int
    free: bool


def _part(node: ops.Node, known: Mapping[str, _Part], contents: Mapping[str, str], checked: Checked) -> _Part:
    given = _operands(node)
    digest = _digest(node, {ref: known[ref].digest for ref in given}, contents)
    rank, free = max((known[ref].rank for ref in given), default=1), any(known[ref].free for ref in given)
    if isinstance(node, ops.Where):  # rows choose between the two
        return _Part(digest, known[node.a].rank + known[node.b].rank, free)
    if isinstance(node, ops.Dot):
        a, b = checked.values[node.a], checked.values[node.b]
        if Structure.REQUEST not in (a.structure, b.structure):  # each row has a direction of its own
            return _Part(digest, a.width, free=True)
    return _Part(digest, rank, free)


def _operands(node: ops.Node) -> tuple[str, ...]:
    """The earlier nodes that a node takes."""
    given = [getattr(node, name) for name in SPEC[node.op].takes]  # type: ignore[attr-defined]
    refs = [ref for each in given for ref in (each if isinstance(each, tuple) else (each,))]
    return tuple(ref for ref in refs if isinstance(ref, str) and ref != ops.ZERO)


def _rows(value: Value, checked: Checked) -> int:
    """Most rows over all prompts."""
    return sum(value.counts) if value.at is None else checked.selections[value.at].most_rows


_UNSAID: Final = {"id", "at", "name", "w_enc", "b_enc", "w_dec", "b_dec", "threshold"}
"""Names of nodes and arrays, and which tokens: not what is computed."""


def _digest(node: ops.Node, known: Mapping[str, str], contents: Mapping[str, str]) -> str:
    fields: dict[str, Any] = node.model_dump(mode="json", exclude=_UNSAID)
    for name in SPEC[fields["op"]].takes:
        fields[name] = _named(fields.get(name), known)
    brought = contents[node.id] if isinstance(node, ops.Tensor | ops.Sae) else ""
    return _sha256([fields, brought])


def _named(given: Any, known: Mapping[str, str]) -> Any:
    if isinstance(given, list):
        return [_named(each, known) for each in given]
    return known.get(given, given) if isinstance(given, str) else given


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

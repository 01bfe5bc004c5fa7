"""What an accepted program exposes of which site: directions, and sites whose rows leave.

Numbers of one direction, of however many rows, say little of a matrix; as many directions as it has columns say
everything. So directions are counted, by digest: the same probe asked of other prompts is the same direction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trocar.graph import ops, rules_raw
from trocar.graph.check import Checked
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
    """Of every score, one of each site that it comes from; of raw rows, as many as they can span.

    Args:
        contents: digest of the numbers that each constant node brings in.
        request: digest of the whole request: raw rows are never the same twice.
    """
    known: dict[str, str] = {}
    for node in checked.program.nodes:
        known[node.id] = _digest(node, known, contents)
        if isinstance(node, ops.Score):
            for site in checked.values[node.of].sites:
                yield Direction(str(site), known[node.id], 1)
        if isinstance(node, ops.Raw):
            for ref in node.of:
                value = checked.values[ref]
                rows = 0 if value.at is None else checked.selections[value.at].most_rows
                yield Direction(str(value.sites[0]), _sha256([request, node.id, ref]), min(rows, value.width))


def exported(checked: Checked) -> tuple[tuple[Site, bool], ...]:
    """Sites whose rows leave as they are, and whether position 0 is among them."""
    refs = [ref for node in checked.program.nodes if isinstance(node, ops.Raw) for ref in node.of]
    return rules_raw.exported((checked.values[ref] for ref in refs), checked.selections)


def _digest(node: ops.Node, known: Mapping[str, str], contents: Mapping[str, str]) -> str:
    """Of what a node computes: its fields, with operands replaced by what they compute."""
    fields: dict[str, Any] = node.model_dump(mode="json", exclude={"id", "at", "name"})
    for name in SPEC[fields["op"]].takes:
        fields[name] = _named(fields.get(name), known)
    return _sha256([fields, contents.get(node.id, "")])


def _named(given: Any, known: Mapping[str, str]) -> Any:
    if isinstance(given, list):
        return [_named(each, known) for each in given]
    return known.get(given, given) if isinstance(given, str) else given


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

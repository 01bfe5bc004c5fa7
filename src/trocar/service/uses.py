"""What a prepared request touches and exposes, for credentials and structure rules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from trocar.gate.use import Use
from trocar.grants.scope import FIT
from trocar.graph import exposure, ops
from trocar.graph.canonical import canonical_sites
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Program
from trocar.graph.rules_values import arrays
from trocar.service.prepare import Prepared, Vectors
from trocar.sites import Site


def of_run(prepared: Prepared, facts: ModelFacts, prefix: str = "") -> Use:
    """Of one request, over all variants of a sweep. What is exposed is not counted for open weights."""
    used_ops, sites = dict[str, str](), dict[str, str]()
    directions = dict[exposure.Direction, None]()
    exported = dict[tuple[Site, bool], None]()
    for variant in prepared.variants:
        program = canonical_sites(variant.checked.program, facts)
        for i, node in enumerate(program.nodes):
            path = f"{prefix}program.nodes[{i}]"
            used_ops[f"{path}.op"] = node.op
            site = getattr(node, "site", None)
            if site is not None:
                sites.setdefault(f"{path}.site", site)
                if sites[f"{path}.site"] != site:  # a sweep over sites: every one of them
                    sites[f"{path}.site<{site}>"] = site
        if not facts.open_weights:
            contents = dict(_contents(variant.checked.program, prepared.vectors))
            directions |= dict.fromkeys(exposure.directions(variant.checked, contents, prepared.digest))
            exported |= dict.fromkeys(exposure.exported(variant.checked))
    return Use(used_ops, sites, tuple(directions), tuple(exported))


def of_session(steps: Sequence[Prepared], facts: ModelFacts) -> Use:
    """Of all steps."""
    found = [of_run(step, facts, f"steps[{i}].") for i, step in enumerate(steps)]
    return Use(
        {path: op for use in found for path, op in use.ops.items()},
        {path: site for use in found for path, site in use.sites.items()},
        tuple(dict.fromkeys(d for use in found for d in use.directions)),
        tuple(dict.fromkeys(e for use in found for e in use.exported)),
    )


def of_fit(sites: Sequence[str]) -> Use:
    """Of a fit: it touches every site of its handle."""
    return Use({"kind": FIT}, {f"handle[{i}]": site for i, site in enumerate(sites)})


def _contents(program: Program, vectors: Vectors) -> Iterator[tuple[str, str]]:
    """A digest of the numbers that each constant brings in; a handle's are its id."""
    for node in program.nodes:
        if isinstance(node, ops.Tensor):
            yield node.id, _digest({"": node.name}, vectors)
        elif isinstance(node, ops.Sae):
            yield node.id, _digest(arrays(node), vectors)


def _digest(names: Mapping[str, str], vectors: Vectors) -> str:
    found = hashlib.sha256()
    for field, name in sorted(names.items()):
        found.update(f"{field}{vectors[name].shape}".encode() + vectors[name].tobytes())
    return found.hexdigest()

"""What a prepared request touches and exposes, for credentials and structure rules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trocar.gate.use import Use
from trocar.grants.scope import FIT
from trocar.graph import exposure, ops
from trocar.graph.canonical import canonical_sites
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Program
from trocar.graph.rules_values import arrays
from trocar.graph.sweep import Variant
from trocar.service.prepare import Prepared, Vectors
from trocar.sites import Site


def of_run(prepared: Prepared, facts: ModelFacts, prefix: str = "", session: str = "") -> Use:
    """Of one request, over all variants of a sweep. What is exposed is not counted for open weights.

    Args:
        prefix: of paths.
        session: digest of all programs that run before and after it, and whose rows it may use.
    """
    used_ops = {f"{prefix}program.nodes[{i}].op": n.op for i, n in enumerate(prepared.program.nodes)}
    sites = dict[str, str]()
    directions = dict[exposure.Direction, None]()
    exported = dict[tuple[Site, bool], None]()
    for number, variant in enumerate(prepared.variants):
        sites |= {prefix + path: site for path, site in _sites(prepared, variant, facts)}
        if not facts.open_weights:
            contents = dict(_contents(variant.checked.program, prepared.vectors))
            request = f"{session}{prefix}{prepared.digest}:{number}"
            directions |= dict.fromkeys(
                exposure.directions(variant.checked, contents, request, facts.n_layers)
            )
            exported |= dict.fromkeys(exposure.exported(variant.checked, facts.n_layers))
    return Use(used_ops, sites, tuple(directions), tuple(exported))


def _sites(prepared: Prepared, variant: Variant, facts: ModelFacts) -> Iterator[tuple[str, str]]:
    """Every place of one variant, by the path where it is said: in the node, or in the axis that sets it."""
    axes = {a.node: (i, a) for i, a in enumerate(prepared.request.sweep) if a.field in ("site", "layer")}
    for i, node in enumerate(canonical_sites(variant.checked.program, facts).nodes):
        site = getattr(node, "site", None)
        if site is not None and node.id in axes:
            index, axis = axes[node.id]
            yield f"sweep[{index}].values[{axis.values.index(variant.settings[axis.label])}]", site
        elif site is not None:
            yield f"program.nodes[{i}].site", site


def of_session(steps: Sequence[Prepared], facts: ModelFacts) -> Use:
    """Of all steps."""
    whole = hashlib.sha256("".join(step.digest for step in steps).encode()).hexdigest()
    found = [of_run(step, facts, f"steps[{i}].", whole) for i, step in enumerate(steps)]
    return Use(
        {path: op for use in found for path, op in use.ops.items()},
        {path: site for use in found for path, site in use.sites.items()},
        tuple(dict.fromkeys(d for use in found for d in use.directions)),
        tuple(dict.fromkeys(e for use in found for e in use.exported)),
    )


def of_fit(sites: Sequence[str], target_site: str | None = None) -> Use:
    """Of a fit: it touches every site of its handle, and the one that a linear map is fitted to."""
    target = {} if target_site is None else {"target_site": target_site}
    return Use({"kind": FIT}, {**{f"handle[{i}]": site for i, site in enumerate(sites)}, **target})


def _contents(program: Program, vectors: Vectors) -> Iterator[tuple[str, exposure.Content]]:
    """The numbers that each constant brings in; a handle's are its id."""
    for node in program.nodes:
        if isinstance(node, ops.Tensor):
            yield node.id, _content({"": node.name}, vectors)
        elif isinstance(node, ops.Sae):
            yield node.id, _content(arrays(node), vectors)


def _content(names: Mapping[str, str], vectors: Vectors) -> exposure.Content:
    found, nonzeros = hashlib.sha256(), 0
    for field, name in sorted(names.items()):
        found.update(f"{field}{vectors[name].shape}".encode() + vectors[name].tobytes())
        nonzeros += int(np.count_nonzero(vectors[name]))
    return exposure.Content(found.hexdigest(), nonzeros)

"""What a request or an export exposes of a lineage, and how much of it the policy allows. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from trocar.gate.airlock_request import ExportFacts
from trocar.gate.exposures import Direction, Exposure, Leaving
from trocar.gate.policy import Policy, Tier
from trocar.gate.use import Use
from trocar.graph.facts import ModelFacts
from trocar.graph.linear_maps import LINEAR_MAPS
from trocar.graph.streams import last, stream
from trocar.sites import parse


def of_use(policy: Policy, tier: Tier, facts: ModelFacts, use: Use) -> Exposure:
    """Of one request on secret weights."""
    directions = tuple(Direction(d.site, d.digest, d.rank) for d in use.directions)
    leaving = tuple(Leaving(site, first) for site, first in use.exported)
    widths = {d.site: facts.width(parse(d.site)) for d in use.directions}
    return _exposure(policy, tier, directions, leaving, widths)


def of_export(policy: Policy, tier: Tier, what: ExportFacts, request: str, n_layers: int | None) -> Exposure:
    """Of one file on secret weights: its rows, each of which is a direction of its site.

    Args:
        request: id of the request to the airlock.
        n_layers: of the model; None when it is not served any more.
    """
    directions, leaving, widths = list[Direction](), list[Leaving](), dict[str, int]()
    for part in what.parts:
        if part.site is not None and part.site in what.sites:
            site = str(stream(part.site, n_layers))
            digest = hashlib.sha256(f"{request}/{part.name}".encode()).hexdigest()
            directions.append(Direction(site, digest, min(part.rows, part.width)))
            leaving.append(Leaving(last(part.site, n_layers), part.first))
            widths[site] = max(widths.get(site, 0), part.width)
    return _exposure(policy, tier, tuple(directions), tuple(leaving), widths)


def _exposure(
    policy: Policy,
    tier: Tier,
    directions: tuple[Direction, ...],
    leaving: tuple[Leaving, ...],
    widths: Mapping[str, int],
) -> Exposure:
    key = {site: policy.rank_limit(tier, width) for site, width in widths.items()}
    return Exposure(
        directions,
        leaving,
        () if policy.data.linear_maps else LINEAR_MAPS,
        {site: limit for site, limit in key.items() if limit is not None},
        {site: policy.lineage_rank_limit(width) for site, width in widths.items()},
    )

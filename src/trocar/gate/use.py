"""What a request touches and exposes, as far as credentials and structure rules ask. Data; nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trocar.graph.exposure import Direction
from trocar.sites import Site


@dataclass(frozen=True, slots=True)
class Use:
    """One request.

    Attributes:
        ops: every op, by the JSON path where it stands; a fit is the op `fit`, the airlock `export`.
        sites: every place, by JSON path, written out.
        directions: what is computed from rows and leaves.
        exported: sites whose rows leave as they are, and whether position 0 is among them.
    """

    ops: Mapping[str, str] = field(default_factory=dict)
    sites: Mapping[str, str] = field(default_factory=dict)
    directions: tuple[Direction, ...] = ()
    exported: tuple[tuple[Site, bool], ...] = ()

"""What was asked of a secret so far, counted inside the transaction that admits a request.

Two counts that bits alone do not give. Directions: the vectors that a key, and all keys together, sent into
one site; the sum of their ranks is how much of the matrix behind it was probed, and a direction seen before
shows nothing new. Sites whose rows left, whoever asked: a request is weighed together with all of them, since
people can put together what each of them got.

Nothing is ever taken back here: a request that failed was still asked. This module counts what it is told;
which vectors a program sends, and which sites are the ends of one map, others know.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, func, insert, select

from trocar import errors
from trocar.gate.chain import Json
from trocar.gate.limits import EVERYONE, MAX_BITS
from trocar.gate.tables import DIRECTIONS, EXPORTED
from trocar.graph import linear_maps
from trocar.graph.linear_maps import LINEAR_MAPS, LinearMap
from trocar.sites import Site, parse

MOST_AT_ONCE: Final = 10_000
"""Directions of one request; more would be one statement with too many parameters."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True, slots=True)
class Direction:
    """A vector or matrix that a request sends into a site.

    Attributes:
        site: where.
        digest: SHA-256 of the values, 64 hex digits: equal digests are one direction.
        rank: how many dimensions it spans, at least 1.

    Raises:
        ProgramError: `bad_value`.
    """

    site: str
    digest: str
    rank: int

    def __post_init__(self) -> None:
        ranked = type(self.rank) is int and 1 <= self.rank <= MAX_BITS
        if not (_NAME.fullmatch(self.site) and _DIGEST.fullmatch(self.digest) and ranked):
            reason = f"no direction: {self.site[:80]!r}, {self.digest[:80]!r}, rank {str(self.rank)[:20]}"
            raise errors.refuse("bad_value", "exposure.directions", reason)


@dataclass(frozen=True, slots=True)
class Leaving:
    """Rows of a site that leave as they are, or that what leaves was made of.

    Attributes:
        first: whether the row of position 0 is among them.
    """

    site: Site
    first: bool


@dataclass(frozen=True, slots=True)
class Exposure:
    """What one request asks of a lineage.

    Attributes:
        maps: of each, the rows of one end may leave, ever; none when both may.
        key_limits: most rank per site for the key; a site without a row, and None, are counted only.
        lineage_limits: the same for all keys together.
    """

    directions: tuple[Direction, ...] = ()
    leaving: tuple[Leaving, ...] = ()
    maps: tuple[LinearMap, ...] = LINEAR_MAPS
    key_limits: Mapping[str, int] | None = None
    lineage_limits: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if len(self.directions) > MOST_AT_ONCE:
            reason = f"{len(self.directions)} directions in one request; the most is {MOST_AT_ONCE}"
            raise errors.refuse("bad_value", "exposure.directions", reason)


def record(connection: Connection, exposure: Exposure, owner: str, lineage: str) -> dict[str, Json]:
    """Counts an exposure for `owner` and for everyone; returns what of it is new, for the log.

    Raises:
        PolicyRefusal: `rank_exhausted` or `policy`; the caller's transaction must not commit then.
    """
    new: dict[tuple[str, str], Direction] = {}
    for who, limits in ((owner, exposure.key_limits), (EVERYONE, exposure.lineage_limits)):
        unseen = _unseen(connection, exposure.directions, who, lineage)
        _require_room(connection, unseen, who, lineage, limits or {})
        new.update({(d.site, d.digest): d for d in unseen})
        if unseen:
            connection.execute(insert(DIRECTIONS), [_row(d, who, lineage) for d in unseen])
    detail: dict[str, Json] = {}
    if new:
        detail["directions"] = [[d.site, d.digest, d.rank] for d in new.values()]
    fresh = _fresh(connection, exposure, lineage)
    if fresh:
        rows = [{"lineage": lineage, "site": site, "first": first} for site, first in fresh]
        connection.execute(insert(EXPORTED), rows)
        detail["exported"] = [[site, first] for site, first in fresh]
    return detail


def exported(connection: Connection, lineage: str) -> tuple[Leaving, ...]:
    """Sites whose rows left a lineage, under their canonical names, whoever asked."""
    query = select(EXPORTED.c.site, EXPORTED.c.first).where(EXPORTED.c.lineage == lineage)
    return tuple(Leaving(parse(row.site), bool(row.first)) for row in connection.execute(query))


def _row(direction: Direction, owner: str, lineage: str) -> dict[str, str | int]:
    named: dict[str, str | int] = {"owner": owner, "lineage": lineage}
    return {**named, "site": direction.site, "digest": direction.digest, "rank": direction.rank}


def _unseen(
    connection: Connection, directions: Iterable[Direction], owner: str, lineage: str
) -> list[Direction]:
    """One each of the directions that the owner has not sent into their sites before."""
    asked = {(d.site, d.digest): d for d in reversed(tuple(directions))}
    if not asked:
        return []
    columns = DIRECTIONS.c
    query = select(columns.site, columns.digest).where(
        columns.owner == owner,
        columns.lineage == lineage,
        columns.site.in_({site for site, _ in asked}),
        columns.digest.in_({digest for _, digest in asked}),
    )
    seen = {(row.site, row.digest) for row in connection.execute(query)}
    return [d for name, d in asked.items() if name not in seen]


def _require_room(
    connection: Connection, unseen: Iterable[Direction], owner: str, lineage: str, limits: Mapping[str, int]
) -> None:
    wanted: Counter[str] = Counter()
    for direction in unseen:
        wanted[direction.site] += direction.rank
    columns = DIRECTIONS.c
    for site in sorted(wanted.keys() & limits.keys()):
        here = (columns.owner == owner, columns.lineage == lineage, columns.site == site)
        used = int(
            connection.execute(select(func.coalesce(func.sum(columns.rank), 0)).where(*here)).scalar_one()
        )
        if wanted[site] > limits[site] - used:
            whose = "everyone" if owner == EVERYONE else owner.replace(":", " ", 1)
            raise errors.refuse(
                "rank_exhausted",
                site,
                f"the request sends new directions of rank {wanted[site]} into {site!r}; "
                f"{whose} has {max(0, limits[site] - used)} of {limits[site]} left on {lineage!r}",
            )


def _fresh(connection: Connection, exposure: Exposure, lineage: str) -> list[tuple[str, int]]:
    """What of the rows that leave is new, in order; refused when it makes two ends of one map known."""
    if not exposure.leaving:
        return []
    asked = {Leaving(linear_maps.canonical(one.site), one.first) for one in exposure.leaving}
    before = set(exported(connection, lineage))
    others = _ends(before - asked, exposure.maps)
    for source, target in _ends(before | asked, exposure.maps):
        if (source, target) not in others:
            raise errors.refuse(
                "policy", str(source),
                f"rows of {source} and {target} are, or follow from, rows asked for here and rows that left "
                f"{lineage!r} before: together they are the matrix between the two",
                next_step="Ask for rows of other sites.",
            )  # fmt: skip
    return sorted((str(one.site), int(one.first)) for one in asked - before)


def _ends(found: Iterable[Leaving], maps: tuple[LinearMap, ...]) -> tuple[tuple[Site, Site], ...]:
    every = tuple(found)
    return linear_maps.ends((one.site for one in every), (one.site for one in every if one.first), maps)

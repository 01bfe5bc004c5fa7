"""Who may learn how much, through which doors: one readable file in five parts, and the arithmetic of limits.

The parts are the five safes: people (tiers), projects, settings, data (what may never leave), outputs (how what
leaves is counted). Limits are fractions of the secret's size in bits: for life, which never refills, and for a
day. Fractions are whole parts per million and the arithmetic is exact integers, so the same limit comes out
everywhere. The reasons for the default fractions are in `docs/security.md`: lossy copies of a model exist at 1 % of
its bits.

This module is pure: it knows nothing about keys, databases or what has been spent.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from trocar import errors
from trocar.gate.limits import Limits, whole_bits
from trocar.gate.tiers import Role, Tier
from trocar.graph.cost import FLOAT_BITS, Prices
from trocar.graph.labels import FREE, RawDoor, Rules
from trocar.strict import Strict

__all__ = [
    "Airlock",
    "Data",
    "Limits",
    "Lineage",
    "Outputs",
    "People",
    "Policy",
    "Project",
    "Role",
    "Settings",
    "Tier",
]
_PPM: Final = 1_000_000
_LINEAGE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,199}")
Ppm = Annotated[int, Field(ge=0, le=_PPM)]
ScalarBits = Annotated[int, Field(ge=4, le=32)]


UNCAPPED: Final = Limits(None, None)


@dataclass(frozen=True, slots=True)
class Lineage:
    """One secret: a base model and all its fine-tunes share a lineage, and so one budget.

    Attributes:
        name: stable name, `[A-Za-z0-9._/:@+-]`, at most 200 characters.
        secret_bits: size of the secret, in bits.
        cap: tier whose fraction limits all keys together; None when the weights are open.

    Raises:
        ProgramError: `bad_value` for a name outside the grammar, or a cap of `Tier.open` (say None).
        ServerFault: `bad_bits`.
    """

    name: str
    secret_bits: int
    cap: Tier | None

    def __post_init__(self) -> None:
        whole_bits(self.secret_bits, "secret_bits", least=1)
        if not _LINEAGE_NAME.fullmatch(self.name):
            raise errors.refuse("bad_value", "lineage.name", f"{self.name[:80]!r} is not a lineage name")
        if self.cap is Tier.open:
            raise errors.refuse("bad_value", "lineage.cap", "open weights have no cap: use None, not 'open'")


# ---- the file, part by part -----------------------------------------------------------------------


class TierTerms(Strict):
    """What a tier means.

    Attributes:
        life_ppm: limit for life, in parts per million of the lineage's bits; absent: counted, not capped.
        day_ppm: limit for a day.
        scalar_bits: of one released number: 32 for a float32, else 4 to 16.
        vector_bits: of one number of a row.
        raw: whether rows leave in an answer (`direct`), through the `airlock` only, or `never`.
        rank_ppm: how many directions of one site's width a key may have scored, ever.
        tick_ms: answers leave at whole multiples of it; 0 for at once.
        guarded: whether the structure rules of `[data]` hold; only for keys of tier `open` they may not.
    """

    life_ppm: Ppm | None = None
    day_ppm: Ppm | None = None
    scalar_bits: ScalarBits = 8
    vector_bits: Literal[4, 8, 16, 32] = 8
    raw: RawDoor = "airlock"
    rank_ppm: Ppm | None = None
    tick_ms: Annotated[int, Field(ge=0, le=10_000)] = 0
    guarded: bool = True

    @model_validator(mode="after")
    def _widths(self) -> Self:
        if 16 < self.scalar_bits < FLOAT_BITS:
            raise ValueError("scalar_bits is 4 to 16, or 32")
        return self


_OPEN: Final = TierTerms(scalar_bits=32, vector_bits=32, raw="direct", guarded=False)
_TIERS: Final[Mapping[Tier, TierTerms]] = {
    Tier.open: _OPEN,
    Tier.trusted: TierTerms(
        life_ppm=10_000, day_ppm=1_000, scalar_bits=16, vector_bits=8, rank_ppm=250_000, tick_ms=20
    ),
    Tier.external: TierTerms(life_ppm=1_000, day_ppm=250, rank_ppm=100_000, tick_ms=100),
    Tier.agent: TierTerms(life_ppm=100, day_ppm=25, vector_bits=4, rank_ppm=25_000, tick_ms=100),
}


class Tiers(Strict):
    """`[people.tiers.*]`."""

    open: TierTerms = _TIERS[Tier.open]
    trusted: TierTerms = _TIERS[Tier.trusted]
    external: TierTerms = _TIERS[Tier.external]
    agent: TierTerms = _TIERS[Tier.agent]

    @model_validator(mode="after")
    def _only_open_is_open(self) -> Self:
        for name in ("trusted", "external", "agent"):
            terms: TierTerms = getattr(self, name)
            limited = terms.life_ppm is not None and terms.rank_ppm is not None and terms.tick_ms > 0
            if not (limited and terms.guarded):
                raise ValueError(
                    f"tier {name!r} needs life_ppm, rank_ppm, tick_ms and guarded: only 'open' may do without"
                )
        return self


class People(Strict):
    """`[people]`: who asks.

    Attributes:
        refusals_per_minute: refused requests of one key that are answered; more are told to wait. Each is an entry
            of the log of about a kilobyte.
    """

    tiers: Tiers = Tiers()
    refusals_per_minute: Annotated[int, Field(ge=1, le=100_000)] = 120


class Project(Strict):
    """`[projects.NAME]`: keys of one project share an account.

    Attributes:
        life_ppm: limit of all keys of the project, for life; absent: counted, not capped.
        day_ppm: limit for a day.
    """

    life_ppm: Ppm | None = None
    day_ppm: Ppm | None = None


class Settings(Strict):
    """`[settings]`: where it runs.

    Attributes:
        isolation: the least isolation with which secret weights are served.
    """

    isolation: Literal["process", "host"] = "process"


class Data(Strict):
    """`[data]`: what is protected, and what never leaves whatever it costs.

    Attributes:
        lineage_tier: tier whose fraction caps all keys together on secret weights.
        lineage_day_ppm: and on one day.
        lineage_rank_ppm: directions of one site's width that all keys together may have scored, ever.
        first_raw_layer: rows of earlier layers never leave: too close to the tokens.
        least_blocks: full blocks between a write and rows that leave.
        linear_maps: whether both ends of one linear map may leave.
        own_targets: whether maps may be fitted to activations, not to labels alone.
    """

    lineage_tier: Literal["trusted", "external", "agent"] = "external"
    lineage_day_ppm: Ppm = 250
    lineage_rank_ppm: Ppm = 500_000
    first_raw_layer: Annotated[int, Field(ge=0, le=1000)] = 2
    least_blocks: Annotated[int, Field(ge=0, le=1000)] = 1
    linear_maps: bool = False
    own_targets: bool = False


class Airlock(Strict):
    """`[outputs.airlock]`: how rows and artifacts leave.

    Attributes:
        approvers: persons who must agree, the author not among them.
        open_approvers: the same for weights that are open, when the automatic checks pass.
        days: after which a request that nobody decided expires.
        review_bytes: larger artifacts are looked at by the reviewers even when the checks find nothing.
        most_bytes: larger ones are refused.
    """

    approvers: Annotated[int, Field(ge=2, le=5)] = 2
    open_approvers: Annotated[int, Field(ge=0, le=5)] = 0
    days: Annotated[int, Field(ge=1, le=365)] = 14
    review_bytes: Annotated[int, Field(ge=0)] = 1 << 20
    most_bytes: Annotated[int, Field(ge=1)] = 64 << 20


class Outputs(Strict):
    """`[outputs]`: how what leaves is counted.

    Attributes:
        overhead_bits: price of being admitted at all: status, length and time of the answer.
    """

    overhead_bits: Annotated[int, Field(ge=256, le=1 << 20)] = 256
    airlock: Airlock = Airlock()


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Policy(Strict):
    """The whole policy; one frozen value per server.

    Attributes:
        version: of the file's form.
    """

    version: Literal[1] = 1
    people: People = People()
    projects: dict[Name, Project] = Field(default_factory=dict)
    settings: Settings = Settings()
    data: Data = Data()
    outputs: Outputs = Outputs()

    @property
    def overhead_bits(self) -> int:
        return self.outputs.overhead_bits

    def terms(self, tier: Tier) -> TierTerms:
        found: TierTerms = getattr(self.people.tiers, Tier(tier).value)
        return found

    def prices(self, tier: Tier) -> Prices:
        """What a key of a tier pays, and the rules that hold for it."""
        terms = self.terms(tier)
        return Prices(
            terms.scalar_bits,
            self.overhead_bits,
            terms.vector_bits,
            self._rules(terms) if terms.guarded else FREE,
        )

    def _rules(self, terms: TierTerms) -> Rules:
        data = self.data
        return Rules(terms.raw, data.first_raw_layer, data.least_blocks, data.linear_maps, data.own_targets)

    def limits(self, tier: Tier, lineage: Lineage) -> Limits:
        """Of one key on one lineage.

        >>> Policy().limits(Tier.external, Lineage("llama", 70_000_000_000 * 16, Tier.external)).life_bits
        1120000000
        """
        terms = self.terms(tier)
        return _limits(terms.life_ppm, terms.day_ppm, lineage)

    def lineage_limits(self, lineage: Lineage) -> Limits:
        """Of all keys together; nothing is capped when the weights are open."""
        if lineage.cap is None:
            return UNCAPPED
        return _limits(self.terms(lineage.cap).life_ppm, self.data.lineage_day_ppm, lineage)

    def project_limits(self, name: str, lineage: Lineage) -> Limits:
        """Of all keys of a project together."""
        found = self.projects.get(name, Project())
        return _limits(found.life_ppm, found.day_ppm, lineage)

    def rank_limit(self, tier: Tier, width: int) -> int | None:
        """Directions of a site of `width` that a key may have scored; None: not limited."""
        return _part(self.terms(tier).rank_ppm, width)

    def lineage_rank_limit(self, width: int) -> int:
        """The same of all keys together."""
        return max(1, width * self.data.lineage_rank_ppm // _PPM)

    def digest(self) -> str:
        """SHA-256 of the whole policy, defaults included, as hex; the order in which projects stand is none of it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _limits(life_ppm: int | None, day_ppm: int | None, lineage: Lineage) -> Limits:
    bits = lineage.secret_bits
    return Limits(
        None if life_ppm is None else bits * life_ppm // _PPM,
        None if day_ppm is None else bits * day_ppm // _PPM,
    )


def _part(ppm: int | None, width: int) -> int | None:
    return None if ppm is None else max(1, width * ppm // _PPM)

"""Which handles there are: whose, of which model, what they hold, and how close to a write their rows were read.

All of it follows from checked programs and from numbers that were charged, and is written here when a result
leaves; nothing is asked of whoever holds the rows. Absent, foreign and deleted handles get one and the same
answer. Rows themselves are unknown to this room.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    RowMapping,
    String,
    Table,
    and_,
    delete,
    insert,
    select,
)

from trocar import errors
from trocar.gate.database import Database
from trocar.gate.tables import METADATA
from trocar.graph.facts import HandleFacts

ACTIVATIONS: Final = "activations"
_ID: Final = re.compile(r"(act|art)_[0-9a-f]{32}")
_SHOWN: Final = 40

HANDLES: Final = Table(
    "handles",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("model", String(200), nullable=False),
    Column("fingerprint", String(100), nullable=False),
    Column("layout", String, nullable=False),
    Column("counts", String, nullable=False),
    Column("notes", String, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Index("handles_by_tenant", "tenant"),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """How rows of one site came about.

    Attributes:
        blocks: full blocks between the last write before them and the read; None without a write.
        first: whether position 0 of a prompt is among them.
    """

    blocks: int | None
    first: bool


@dataclass(frozen=True, slots=True)
class Handle:
    """One handle.

    Attributes:
        kind: `activations`, or the kind of fit that made the artifact.
        shapes: by site and array; activations have one array, `rows`, of shape [width].
        counts: rows of each prompt, in prompt order; empty for artifacts.
        origins: by site, of activations; of an artifact, of the rows that it was fitted on.
        own_targets: whether an artifact was fitted to activations, and so holds numbers of the weights.
        leans_on: rows that an artifact leans on when it was fitted to labels.
        source: what an artifact was fitted on.
        maker: the credential that asked for it.
    """

    id: str
    tenant: str
    kind: str
    model: str
    fingerprint: str
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    counts: tuple[int, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)
    own_targets: bool = False
    leans_on: int | None = None
    source: str = ""
    created_ms: int = 0
    maker: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def widths(self) -> dict[str, int]:
        """Width of a row or direction, by site."""
        return {site: next(iter(arrays.values()))[0] for site, arrays in self.shapes.items()}

    def facts(self) -> HandleFacts:
        """What the checker may know of it."""
        stored = self.kind == ACTIVATIONS
        return HandleFacts(
            handle=self.id,
            kind="activations" if stored else "artifact",
            fingerprint=self.fingerprint,
            widths={} if self.own_targets else self.widths,  # a map is no direction
            rows_per_prompt=self.counts,
            has_probe=not stored and all("weights" in arrays for arrays in self.shapes.values()),
        )


def new_activations() -> str:
    """A handle's id: nobody who holds rows has a say in it."""
    return f"act_{secrets.token_hex(16)}"


def new_artifact() -> str:
    return f"art_{secrets.token_hex(16)}"


class Handles:
    """The handles of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @staticmethod
    def enter(connection: Connection, made: Sequence[Handle], maker: tuple[str, ...]) -> None:
        """Enters handles whose rows are complete, in the transaction that charges for what they tell."""
        if made:
            rows = [_row(replace(handle, maker=maker)) for handle in made]
            connection.execute(insert(HANDLES), rows)

    def find(self, tenant: str, handle: str) -> Handle:
        """A handle of a tenant.

        Raises:
            NotFound: `handle_not_found`, the same for absent, foreign, deleted and malformed ids.
        """
        if _ID.fullmatch(handle) is None:
            raise _not_found(handle)
        with self._database.read() as connection:
            row = connection.execute(select(HANDLES).where(_owned(tenant, handle))).mappings().one_or_none()
        if row is None:
            raise _not_found(handle)
        return _handle(row)

    def list(self, tenant: str) -> tuple[Handle, ...]:
        """All handles of a tenant, oldest first."""
        query = select(HANDLES).where(HANDLES.c.tenant == tenant).order_by(HANDLES.c.created_ms, HANDLES.c.id)
        with self._database.read() as connection:
            return tuple(_handle(row) for row in connection.execute(query).mappings())

    def delete(self, tenant: str, handle: str) -> None:
        """Forgets a handle.

        Raises:
            NotFound: `handle_not_found`.
        """
        with self._database.write() as connection:
            gone = connection.execute(delete(HANDLES).where(_owned(tenant, handle))).rowcount
        if not gone:
            raise _not_found(handle)


def _owned(tenant: str, handle: str) -> Any:
    return and_(HANDLES.c.id == handle, HANDLES.c.tenant == tenant)


def _not_found(handle: str) -> errors.TrocarError:
    return errors.refuse("handle_not_found", "handle", f"you have no handle {handle[:_SHOWN]!r}")


def _row(handle: Handle) -> dict[str, Any]:
    notes = {
        "origins": {site: [o.blocks, o.first] for site, o in handle.origins.items()},
        "own_targets": handle.own_targets,
        "leans_on": handle.leans_on,
        "source": handle.source,
        "maker": handle.maker,
    }
    return {
        "id": handle.id,
        "tenant": handle.tenant,
        "kind": handle.kind,
        "model": handle.model,
        "fingerprint": handle.fingerprint,
        "layout": json.dumps(handle.shapes),
        "counts": json.dumps(handle.counts),
        "notes": json.dumps(notes),
        "created_ms": handle.created_ms or time.time_ns() // 1_000_000,
    }


def _handle(row: RowMapping) -> Handle:
    notes = json.loads(row["notes"])
    layout = json.loads(row["layout"])
    return Handle(
        id=row["id"],
        tenant=row["tenant"],
        kind=row["kind"],
        model=row["model"],
        fingerprint=row["fingerprint"],
        shapes={s: {name: tuple(shape) for name, shape in arrays.items()} for s, arrays in layout.items()},
        counts=tuple(json.loads(row["counts"])),
        origins={site: Origin(blocks, first) for site, (blocks, first) in notes["origins"].items()},
        own_targets=notes["own_targets"],
        leans_on=notes["leans_on"],
        source=notes["source"],
        created_ms=row["created_ms"],
        maker=tuple(notes["maker"]),
    )

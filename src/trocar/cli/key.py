"""`trocar key`: make, list and end API keys, also beside a running server: a ledger takes many processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trocar.cli import show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.show import JsonOption
from trocar.gate.policy import Role, Tier

if TYPE_CHECKING:
    from trocar.gate.keys import KeyRecord, Keys


@contextmanager
def _keys(folder: Folder) -> Iterator[Keys]:
    from trocar.gate.database import Database
    from trocar.gate.keys import Keys

    database = Database(folder.ledger_url)
    try:
        yield Keys(database)
    finally:
        database.close()


def create(
    tenant: Annotated[str, typer.Option(help="Who owns what the key makes: a-z, 0-9, '.', '_', '-'.")],
    tier: Annotated[Tier, typer.Option(help="Fixes the key's budgets, for life.")] = Tier.external,
    role: Annotated[Role, typer.Option(help="What else it may do.")] = Role.researcher,
    note: Annotated[str, typer.Option(help="For you; at most 200 characters.")] = "",
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key and print its secret, once."""
    folder = Folder.at(data)
    folder.make()
    with _keys(folder) as keys:
        made = keys.create(tenant, tier, role, note)
    who = made.principal
    if json:
        show.as_json({"key_id": who.key_id, "tenant": who.tenant, "tier": tier, "role": role, "note": note,
                      "secret": made.secret, "ledger": str(folder.ledger)})  # fmt: skip
        return
    print(f"key {who.key_id} for tenant {who.tenant!r} (tier {tier}, role {role}) in {folder.ledger}")
    print(f"its secret, shown once:  {made.secret}")


def list_(data: DataOption = None, json: JsonOption = False) -> None:
    """List the keys, oldest first, revoked ones included."""
    folder = Folder.at(data)
    folder.require_ledger()
    with _keys(folder) as keys:
        found = keys.list()
    if json:
        show.as_json([_as_json(record) for record in found])
        return
    rows = (
        (r.principal.key_id, r.principal.tenant, r.principal.tier, r.principal.role,
         show.when(r.created_ms), show.when(r.revoked_ms), r.note)
        for r in found
    )  # fmt: skip
    show.table(("key", "tenant", "tier", "role", "created", "revoked", "note"), rows)


def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's id, not its secret.")],
    data: DataOption = None,
) -> None:
    """End a key: nothing is admitted, settled or replayed for it afterwards."""
    folder = Folder.at(data)
    folder.require_ledger()
    with _keys(folder) as keys:
        keys.revoke(key)
    print(f"key {key} is revoked")


def _as_json(record: KeyRecord) -> dict[str, Any]:
    who = record.principal
    return {
        "key_id": who.key_id,
        "tenant": who.tenant,
        "tier": who.tier,
        "role": who.role,
        "note": record.note,
        "created_ms": record.created_ms,
        "revoked_ms": record.revoked_ms,
    }

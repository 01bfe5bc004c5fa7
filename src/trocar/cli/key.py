"""`trocar key`: make, narrow, list and end API keys, also beside a running server: a ledger takes many processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from trocar import errors
from trocar.cli import restrict, show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.restrict import BitsOption, ExpiresOption, ModelsOption, OpsOption, SitesOption
from trocar.cli.show import JsonOption
from trocar.gate.tiers import Role, Tier

if TYPE_CHECKING:
    from trocar.gate.keys import KeyRecord, Keys, Principal
    from trocar.grants.scope import Scope

LONGEST: Final = 20_000
"""Most characters read from stdin; more than any token has."""


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
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.researcher,
    project: Annotated[str | None, typer.Option(help="What it works for; the tenant by default.")] = None,
    holder: Annotated[
        str | None,
        typer.Option(help="The person behind it, a name or a mail address; the tenant by default."),
    ] = None,
    models: ModelsOption = None,
    ops: OpsOption = None,
    sites: SitesOption = None,
    bits: BitsOption = None,
    expires: ExpiresOption = None,
    note: Annotated[str, typer.Option(help="For you; at most 200 characters.")] = "",
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key and print its secret, once."""
    scope = restrict.scope(models, ops, sites, bits, expires)
    folder = Folder.at(data)
    folder.make()
    with _keys(folder) as keys:
        made = keys.create(tenant, tier, role, note, project=project, holder=holder, scope=scope)
    who = made.principal
    if json:
        show.as_json(
            {**_principal_json(who), "note": note, "secret": made.secret, "ledger": str(folder.ledger)}
        )
        return
    print(f"key {who.key_id} for tenant {who.tenant!r} (tier {tier}, role {role}) in {folder.ledger}")
    print(f"its secret, shown once:  {made.secret}")


def attenuate(
    agent: Annotated[bool, typer.Option("--agent", help="For an agent; there is no way back.")] = False,
    models: ModelsOption = None,
    ops: OpsOption = None,
    sites: SitesOption = None,
    bits: BitsOption = None,
    expires: ExpiresOption = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Print a weaker token for what is in TROCAR_API_KEY, or on stdin: a token (offline), or a key's secret.

    The first token of a key is signed with a file in the data folder. The token goes to stdout, its id to stderr.
    """
    from trocar.grants import tokens

    scope = restrict.scope(models, ops, sites, bits, expires)
    role: Literal["agent"] | None = "agent" if agent else None
    given = _secret()
    if given.startswith(tokens.PREFIX):
        token = tokens.attenuate(given, scope, role)
    else:
        token = _first(Folder.at(data), given, scope, role)
    token_id = tokens.ids(token)[-1]
    if json:
        show.as_json({"token_id": token_id, "token": token})
        return
    print(
        f"token {token_id}; `trocar key revoke {token_id}` ends it and all that are made from it",
        file=sys.stderr,
    )
    print(token)


def list_(data: DataOption = None, json: JsonOption = False) -> None:
    """List the keys, oldest first, revoked ones included."""
    folder = Folder.at(data)
    folder.require_ledger()
    with _keys(folder) as keys:
        found = keys.list()
    if json:
        show.as_json([_as_json(record) for record in found])
        return
    columns = (
        "key",
        "tenant",
        "project",
        "holder",
        "tier",
        "role",
        "scope",
        "created",
        "expires",
        "revoked",
        "note",
    )
    show.table(columns, (_row(record) for record in found))


def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="The id of a key or of a token, not its secret.")],
    data: DataOption = None,
) -> None:
    """End a key, or a token and all made from it: nothing is admitted, settled or replayed for it afterwards."""
    folder = Folder.at(data)
    folder.require_ledger()
    with _keys(folder) as keys:
        if len(key) == 32:  # a key's id has 16 digits
            keys.revoke_token(key)
            print(f"token {key} is revoked")
        else:
            keys.revoke(key)
            print(f"key {key} is revoked")


def _secret() -> str:
    found = os.environ.get("TROCAR_API_KEY") or ("" if sys.stdin.isatty() else sys.stdin.read(LONGEST))
    if not found.strip():
        raise errors.refuse(
            "no_key", "TROCAR_API_KEY", "there is no key or token to make weaker",
            next_step="Set TROCAR_API_KEY, or write the key or token to stdin.",
        )  # fmt: skip
    return found.strip()


def _first(folder: Folder, secret: str, scope: Scope, role: Literal["agent"] | None) -> str:
    folder.require_ledger()
    with _keys(folder) as keys:
        return keys.mint(keys.authenticate(secret), scope, role, root=folder.token_root).text


def _row(record: KeyRecord) -> tuple[str, ...]:
    who = record.principal
    return (
        who.key_id, who.tenant, who.project, who.holder, who.tier, who.role, _words(who.scope),
        show.when(record.created_ms), show.when(who.scope.expires_ms), show.when(record.revoked_ms), record.note,
    )  # fmt: skip


def _words(scope: Scope) -> str:
    """A scope in one line, without its expiry; empty for one that restricts nothing."""
    words = [" ".join(sorted(part)) for part in (scope.models, scope.ops, scope.sites) if part is not None]
    return "; ".join([*words, *([] if scope.most_bits is None else [show.bits(scope.most_bits)])])


def _as_json(record: KeyRecord) -> dict[str, Any]:
    return {
        **_principal_json(record.principal),
        "made_by": record.made_by,
        "note": record.note,
        "created_ms": record.created_ms,
        "revoked_ms": record.revoked_ms,
    }


def _principal_json(who: Principal) -> dict[str, Any]:
    sets = (("models", who.scope.models), ("ops", who.scope.ops), ("sites", who.scope.sites))
    return {
        "key_id": who.key_id,
        "tenant": who.tenant,
        "tier": who.tier,
        "role": who.role,
        "project": who.project,
        "holder": who.holder,
        **{name: None if words is None else sorted(words) for name, words in sets},
        "most_bits": who.scope.most_bits,
        "expires_ms": who.scope.expires_ms,
    }

"""`trocar ledger`: look at budgets and at the log, check both, stop and start a lineage, also while a server runs.

The ledger is opened without `gate.Ledger`, whose opening charges the reservations of dead processes: looking
at a ledger must not add to it, least of all to one that is damaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trocar import errors
from trocar.cli import show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.show import JsonOption

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from trocar.gate.accounts import Account
    from trocar.gate.chain import Head
    from trocar.gate.database import Database


@contextmanager
def reading(folder: Folder) -> Iterator[Connection]:
    """One snapshot of the ledger in a data folder.

    Raises:
        NotFound: `no_ledger`.
        ServerFault: `ledger_unavailable`.
    """
    with _opened(folder) as database, database.read() as connection:
        yield connection


@contextmanager
def _as_operator(folder: Folder) -> Iterator[tuple[Connection, str]]:
    """A transaction, and the key of the person who stands in the log for what it does.

    Raises:
        AuthError: `no_key`, `bad_key`.
        PolicyRefusal: `not_allowed` for a role that does not operate.
    """
    from trocar.gate import roles
    from trocar.gate.keys import Keys

    with _opened(folder) as database:
        who = Keys(database).authenticate(os.environ.get("TROCAR_API_KEY", "").strip() or None)
        roles.require(who.role, roles.Power.operate)
        with database.write() as connection:
            yield connection, who.key_id


@contextmanager
def _opened(folder: Folder) -> Iterator[Database]:
    from trocar.gate.database import Database

    folder.require_ledger()
    with closing(Database(folder.ledger_url)) as database:
        yield database


def problems(connection: Connection, anchor: Head | None = None) -> list[str]:
    """The first bad entry of the log; if there is none, every table that differs from it."""
    from trocar.gate import audit, chain

    return chain.verify(connection, anchor) or audit.differences(connection)


def show_(data: DataOption = None, json: JsonOption = False) -> None:
    """Show the accounts: limit, charged, held, left and the last day, for each payer and each lineage."""
    from trocar.gate import accounts

    with reading(Folder.at(data)) as connection:
        found = accounts.every(connection)
        tenants = _tenants(connection)
    if json:
        show.as_json([_as_json(a, tenants) for a in found])
        return
    rows = (
        (a.lineage, _owner(a), tenants.get(a.owner, ""), show.bits(a.limit_bits), show.bits(a.charged_bits),
         show.bits(a.held_bits), show.bits(a.left_life_bits), _day(a), show.bits(a.day_bits),
         show.bits(a.day_limit_bits))
        for a in found
    )  # fmt: skip
    columns = ("lineage", "account", "tenant", "limit", "charged", "held", "left", "day", "of it used", "of")
    show.table(columns, rows)


def verify(
    data: DataOption = None,
    anchor: Annotated[
        str,
        typer.Option(metavar="SEQ:HASH", help="A head kept elsewhere; catches a rewritten or older copy."),
    ] = "",
) -> None:
    """Check the whole log and what it adds up to; exit code 1 and the first bad entry when it is broken."""
    from trocar.gate import chain

    kept = anchor_of(anchor)
    with reading(Folder.at(data)) as connection:
        found, head = problems(connection, kept), chain.head(connection)
    for problem in found:
        print(problem)
    if found:
        raise typer.Exit(1)
    print(f"ok: {head.seq} entries, and all accounts agree with them")
    print(f"head {head.seq}:{head.hash}")


def log(
    data: DataOption = None,
    after: Annotated[int | None, typer.Option(min=0, help="Entries after this number, oldest first.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    json: JsonOption = False,
) -> None:
    """Print entries of the log; the last ones, unless --after says where to begin."""
    from trocar.gate import chain

    with reading(Folder.at(data)) as connection:
        start = max(0, chain.head(connection).seq - limit) if after is None else after
        found = chain.entries(connection, after_seq=start, limit=limit, key_id="", lineage="")
    if json:
        show.as_json([asdict(entry) for entry in found])
        return
    rows = (
        (str(e.seq), show.when(e.time_ms), e.kind, e.key_id, e.lineage, f"{e.held_bits:+}",
         f"{e.charged_bits:+}", e.hash[:12])
        for e in found
    )  # fmt: skip
    show.table(("seq", "time", "kind", "key", "lineage", "held", "charged", "hash"), rows)


LineageArgument = Annotated[str, typer.Argument(help="As `trocar ledger show` names it.")]


def freeze(
    lineage: LineageArgument,
    reason: Annotated[str, typer.Option(help="Told to whoever is refused.")],
    data: DataOption = None,
) -> None:
    """Stop a lineage at once, with the key in TROCAR_API_KEY: nothing of its models is admitted or repeated."""
    from trocar.gate import accounts, chain

    with _as_operator(Folder.at(data)) as (connection, who):
        accounts.freeze(connection, lineage, reason, key_id=who, now_ms=chain.now_ms())
    print(f"{lineage} is frozen; `trocar ledger thaw` lets it go on")


def thaw(lineage: LineageArgument, data: DataOption = None) -> None:
    """Let a frozen lineage go on, with the key in TROCAR_API_KEY, after you have looked at why it was stopped."""
    from trocar.gate import accounts, chain

    with _as_operator(Folder.at(data)) as (connection, who):
        accounts.thaw(connection, lineage, key_id=who, now_ms=chain.now_ms())
    print(f"{lineage} goes on")


def anchor_of(text: str) -> Head | None:
    """The head that `SEQ:HASH` names; None for an empty text.

    Raises:
        ClientError: `bad_argument`.
    """
    from trocar.gate.chain import Head

    seq, _, digest = text.partition(":")
    if not text:
        return None
    if not seq.isdecimal() or len(digest) != 64:
        raise errors.refuse("bad_argument", "anchor", f"{text[:100]!r} is not SEQ:HASH, as verify prints it")
    return Head(int(seq), digest)


def _tenants(connection: Connection) -> dict[str, str]:
    from sqlalchemy import select

    from trocar.gate.tables import KEYS

    return {
        f"key:{row.key_id}": row.tenant for row in connection.execute(select(KEYS.c.key_id, KEYS.c.tenant))
    }


def _owner(account: Account) -> str:
    from trocar.gate.accounts import EVERYONE

    return "everyone" if account.owner == EVERYONE else account.owner


def _day(account: Account) -> str:
    from trocar.gate.windows import DAY_MS

    return show.when(account.day * DAY_MS)[:10]


def _as_json(account: Account, tenants: dict[str, str]) -> dict[str, Any]:
    named = {**asdict(account), "owner": _owner(account), "left_bits": account.left_bits}
    return {**named, "tenant": tenants.get(account.owner)}

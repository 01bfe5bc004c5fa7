"""`trocar audit`: check the log, its tables and its anchors; read the log; write a head down in a second place.

Looking adds nothing to a ledger: like `trocar ledger`, it is opened without charging what dead processes held.
Only `anchor` writes, and only what it says.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trocar.cli import show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.ledger import anchor_of, problems, reading
from trocar.cli.show import JsonOption

AnchorsOption = Annotated[
    Path | None,
    typer.Option(
        "--anchors", envvar="TROCAR_ANCHORS", help="Folder where heads of the log are written down."
    ),
]


def verify(
    data: DataOption = None,
    anchors: AnchorsOption = None,
    anchor: Annotated[
        str, typer.Option(metavar="SEQ:HASH", help="A head from a receipt, which must be part of the log.")
    ] = "",
) -> None:
    """Check log, tables and anchors; exit code 1 and the first bad entry when they do not agree."""
    from trocar.gate import chain
    from trocar.gate.anchors import report

    kept = anchor_of(anchor)
    with reading(Folder.at(data)) as connection:
        found, head = problems(connection, kept), chain.head(connection)
        anchored = chain.identity(connection).anchored
        seen = report(connection, anchors) if anchors is not None and not found else None
    for problem in (*found, *(seen.problems if seen else ())):
        print(problem)
    if found or (seen and seen.problems):
        raise typer.Exit(1)
    print(f"ok: {head.seq} entries, and all tables agree with them")
    if seen:
        torn = f"; {seen.unreadable} more cannot be read" if seen.unreadable else ""
        print(f"anchors: {seen.lines} heads, all of them in the log{torn}")
    elif anchored:
        print("anchors: not checked; name their folder with --anchors")
    print(f"head {head.seq}:{head.hash}")


def log(
    data: DataOption = None,
    after: Annotated[int | None, typer.Option(min=0, help="Entries after this number, oldest first.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    key: Annotated[str, typer.Option(metavar="ID", help="Only entries of this key.")] = "",
    request: Annotated[str, typer.Option(metavar="ID", help="Only entries of this request.")] = "",
    json: JsonOption = False,
) -> None:
    """Print entries with their details; the last ones, unless an option says which."""
    from trocar.gate import chain

    with reading(Folder.at(data)) as connection:
        last = max(0, chain.head(connection).seq - limit)
        start = (0 if key or request else last) if after is None else after
        found = chain.entries(connection, after_seq=start, limit=limit, key_id=key, request_id=request)
    if json:
        show.as_json([asdict(entry) for entry in found])
        return
    rows = (
        (str(e.seq), show.when(e.time_ms), e.kind, e.key_id, e.lineage, e.request_id, f"{e.held_bits:+}",
         f"{e.charged_bits:+}", e.detail)
        for e in found
    )  # fmt: skip
    show.table(("seq", "time", "kind", "key", "lineage", "request", "held", "charged", "detail"), rows)


def anchor(
    data: DataOption = None,
    anchors: AnchorsOption = None,
    accept: Annotated[
        str,
        typer.Option(metavar="REASON", help="Start new anchors from this copy; what it lacks is forgotten."),
    ] = "",
) -> None:
    """Write the head of the log to the folder of anchors, and print it to be kept elsewhere."""
    from trocar import errors
    from trocar.gate import anchors as heads
    from trocar.gate import chain
    from trocar.gate.database import Database

    folder = Folder.at(data)
    folder.require_ledger()
    if anchors is None:
        raise errors.refuse("bad_argument", "anchors", "no folder of anchors is named: --anchors FOLDER")
    database = Database(folder.ledger_url)
    try:
        if accept:
            head = heads.accept(database, anchors, accept, chain.now_ms())
        else:
            head = heads.anchor(database, anchors, chain.now_ms())
    finally:
        database.close()
    print(f"head {head.seq}:{head.hash}")

"""`trocar airlock`: look at what waits to leave, and decide; also beside a running server.

Whoever acts is named by the key in TROCAR_API_KEY, never on the command line, where others could read it. What
people wrote is shown between quotes, with everything that is not a plain character spelled out: it is data, also
when it reads like a command, to a terminal or to whoever reads it.
"""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from trocar import errors
from trocar.cli import show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.show import JsonOption

if TYPE_CHECKING:
    from trocar.gate.accounts import Account
    from trocar.gate.airlock_desk import Desk, Review
    from trocar.gate.airlock_records import Ticket
    from trocar.gate.airlock_request import ExportFacts
    from trocar.gate.keys import Principal

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The request's id, as `list` prints it.")]
WordsOption = Annotated[str, typer.Option("--words", help="For the record; the author reads it.")]
MOST_FILE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Acting:
    """The desk of one data folder, and who stands at it."""

    desk: Desk
    who: Principal


@contextmanager
def _acting(folder: Folder) -> Iterator[Acting]:
    from trocar.gate.airlock_desk import Desk
    from trocar.gate.database import Database
    from trocar.gate.keys import Keys

    folder.require_ledger()
    database = Database(folder.ledger_url)
    try:
        who = Keys(database).authenticate(os.environ.get("TROCAR_API_KEY", "").strip() or None)
        yield Acting(Desk(database), who)
    finally:
        database.close()


def list_(
    state: Annotated[str, typer.Option(help="Only those in this state, for example submitted.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 100,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """List the requests that you can see, newest first."""
    from trocar.gate.airlock_states import State

    if state and state not in list(State):
        near = errors.closest(state, State)
        raise errors.refuse("bad_argument", "state", f"{state[:40]!r} is not a state", closest=near)
    with _acting(Folder.at(data)) as acting:
        found = acting.desk.list(acting.who, state=State(state) if state else None, limit=limit)
    if json:
        _print_json([_ticket_json(ticket) for ticket in found])
        return
    columns = ("id", "state", "what", "lineage", "author", "price", "agreed", "submitted", "expires")
    show.table(columns, (_row(ticket) for ticket in found))


def show_(request: IdArgument, data: DataOption = None, json: JsonOption = False) -> None:
    """Show all that a decision on a request needs: what, why, checks, price, and what left before."""
    with _acting(Folder.at(data)) as acting:
        review = acting.desk.show(acting.who, request)
    if json:
        _print_json(_review_json(review))
        return
    _print_review(review)


def sign(request: IdArgument, data: DataOption = None, json: JsonOption = False) -> None:
    """Take a request of an agent upon yourself, as a researcher of its project."""
    with _acting(Folder.at(data)) as acting:
        _done(acting.desk.sign(acting.who, request), json)


def approve(
    request: IdArgument,
    digest: Annotated[str, typer.Option(help="The digest that `show` printed: what you agree to.")],
    words: WordsOption = "",
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Agree to a request, as a checker or owner who did not ask for it."""
    with _acting(Folder.at(data)) as acting:
        _done(acting.desk.approve(acting.who, request, digest, words), json)


def reject(
    request: IdArgument,
    words: Annotated[str, typer.Option("--words", help="Why; the author reads it.")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """End a request that has not left, also one that was approved."""
    with _acting(Folder.at(data)) as acting:
        _done(acting.desk.reject(acting.who, request, words), json)


def withdraw(request: IdArgument, data: DataOption = None, json: JsonOption = False) -> None:
    """Take your own request back."""
    with _acting(Folder.at(data)) as acting:
        _done(acting.desk.withdraw(acting.who, request), json)


def apply(request: IdArgument, data: DataOption = None, json: JsonOption = False) -> None:
    """Give an account the limits that you asked for and that were approved."""
    with _acting(Folder.at(data)) as acting:
        _done(acting.desk.apply(acting.who, request), json)


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that left an airlock.")],
    public_key: Annotated[
        str, typer.Option(help="Of the gate, 64 hex digits; the data folder's by default.")
    ] = "",
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Compare a released file with its signed manifest; exit code 1 when anything was changed."""
    from trocar.gate import manifest

    opened = manifest.verify(_content(file), public_key or _public_key(Folder.at(data)))
    if json:
        _print_json({"faults": list(opened.faults), "manifest": opened.manifest})
    else:
        for fault in opened.faults:
            print(fault)
        if not opened.faults:
            _print_manifest(opened.manifest)
    if opened.faults:
        raise typer.Exit(1)


def _content(file: Path) -> bytes:
    try:
        if file.stat().st_size > MOST_FILE_BYTES:
            raise errors.refuse("bad_argument", "file", f"the file has more than {MOST_FILE_BYTES} bytes")
        return file.read_bytes()
    except OSError as e:
        raise errors.refuse("bad_argument", "file", f"{str(file)!r} cannot be read: {e.strerror}") from None


def _public_key(folder: Folder) -> str:
    from trocar.gate.manifest import KEY_FILE, SigningKey

    if not (folder.root / KEY_FILE).is_file():
        raise errors.refuse(
            "bad_argument", "public_key", "the data folder holds no key to verify with",
            next_step="Name the gate's public key with --public-key, or its data folder with --data.",
        )  # fmt: skip
    return SigningKey.in_folder(folder.root).public_key


def _print_manifest(told: Any) -> None:
    print(f"ok: let out by the gate {told['public_key']}")
    print(f"request {told['request']} on {told['lineage']}, model {told['fingerprint']}")
    print(f"approved by {', '.join(map(repr, told['approvers'])) or 'nobody: none was needed'}")
    print(f"{show.bits(told['charged_bits'])}, released {show.when(told['released_ms'])}")


def _done(ticket: Ticket, json: bool) -> None:
    if json:
        _print_json(_ticket_json(ticket))
        return
    print(f"request {ticket.id} is {ticket.state}")


def _print_json(value: Any) -> None:
    # ASCII: what people wrote must not move a terminal in JSON either
    print(json_module.dumps(value, indent=2, ensure_ascii=True))


def plain(text: str) -> str:
    """The text with everything that is not a plain character spelled out.

    >>> plain("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return repr(text)[1:-1] if not text.isprintable() else text


def _row(ticket: Ticket) -> tuple[str, ...]:
    asked = ticket.request
    agreed = sum(step.action == "approve" for step in ticket.steps)
    cells = (
        ticket.id, ticket.state.value, _what(ticket), asked.lineage.name, asked.author.holder,
        show.bits(asked.price_bits), f"{agreed} of {asked.needed}", show.when(asked.submitted_ms),
        show.when(asked.expires_ms),
    )  # fmt: skip
    return tuple(map(plain, cells))


def _what(ticket: Ticket) -> str:
    from trocar.gate.airlock_request import ExportFacts

    what = ticket.request.what
    return what.kind.value if isinstance(what, ExportFacts) else "limits"


def _print_review(review: Review) -> None:
    from trocar.gate.airlock_request import ExportFacts

    ticket, asked = review.ticket, review.ticket.request
    author = asked.author
    who = f"{author.holder} (key {author.key_id}, {author.role}) of {author.tenant}, project {author.project}"
    print(f"request    {ticket.id}: {_what(ticket)}, {ticket.state}; you are its {review.you}")
    print(f"author     {plain(who)}")
    print(f"lineage    {plain(asked.lineage.name)}")
    print(f"submitted  {show.when(asked.submitted_ms)}, expires {show.when(asked.expires_ms)}")
    for line in _money(review):
        print(line)
    print("written by the author; it is data, not instructions:")
    print(f"  reason    {asked.reason!r}")
    print(f"  controls  {asked.controls!r}")
    print(f"checks     {asked.checked.disposition}")
    for reason in asked.checked.reasons:
        print(f"  {reason.code}  {plain(reason.path)}  {plain(reason.text)}")
    if isinstance(asked.what, ExportFacts):
        _print_parts(asked.what)
    else:
        limits = asked.what.limits
        print(f"limits     {plain(asked.what.owner)}: {show.bits(limits.life_bits)} for life,"
              f" {show.bits(limits.day_bits)} a day")  # fmt: skip
    _print_history(review)
    print(f"digest     {ticket.digest}")


def _money(review: Review) -> Iterator[str]:
    asked = review.ticket.request
    yield f"price      {show.bits(asked.price_bits)}; {asked.needed} must agree"
    share = review.share_of_lineage
    if share is not None:
        yield f"           {100 * share:.3g} % of what the lineage may ever give"
    for name, account in (("lineage", review.lineage), ("key", review.key)):
        if account is not None:
            yield f"           the {name} has {show.bits(account.left_life_bits)} left for life"


def _print_parts(what: ExportFacts) -> None:
    columns = ("part", "origin", "site", "label", "rows", "width", "blocks", "position 0", "words")
    show.table(
        columns,
        (
            (plain(p.name), p.origin.value, str(p.site or ""), p.label.name, str(p.rows), str(p.width),
             "" if p.blocks is None else str(p.blocks), "yes" if p.first else "", " ".join(map(repr, p.texts)))
            for p in what.parts
        ),
    )  # fmt: skip


def _print_history(review: Review) -> None:
    print("steps:")
    show.table(
        ("time", "step", "by", "state", "words"),
        (
            (
                show.when(s.time_ms),
                plain(s.action),
                plain(s.holder),
                s.state.value,
                repr(s.words) if s.words else "",
            )
            for s in review.ticket.steps
        ),
    )
    if review.earlier:
        print("earlier exports of the project:")
        rows = (
            (e.id, e.state.value, plain(e.lineage), show.bits(e.price_bits), " ".join(e.sites),
             show.when(e.submitted_ms))
            for e in review.earlier
        )  # fmt: skip
        show.table(("id", "state", "lineage", "price", "sites", "submitted"), rows)


def _ticket_json(ticket: Ticket) -> dict[str, Any]:
    from dataclasses import asdict

    from trocar.gate import airlock_request

    told = airlock_request.as_json(ticket.request)
    steps = [asdict(step) for step in ticket.steps]
    return {**told, "state": ticket.state, "digest": ticket.digest, "steps": steps}


def _review_json(review: Review) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **_ticket_json(review.ticket),
        "you": review.you,
        "share_of_lineage": review.share_of_lineage,
        "left_bits": {"lineage": _left(review.lineage), "key": _left(review.key)},
        "earlier": [asdict(e) for e in review.earlier],
    }


def _left(account: Account | None) -> int | None:
    return None if account is None else account.left_life_bits

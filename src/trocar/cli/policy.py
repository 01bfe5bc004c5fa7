"""`trocar policy`: read a policy before a server does, compare it, agree to it, and ask why something was refused.

A policy is one TOML file. What a server runs under is in its log; a file that is looser than that starts only
after two people approved it.
"""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trocar import errors
from trocar.cli import show
from trocar.cli.folder import DataOption, Folder
from trocar.cli.ledger import reading
from trocar.cli.show import JsonOption

if TYPE_CHECKING:
    from trocar.gate.policy import Policy

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A policy as TOML.")]


def read_file(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        ClientError: `bad_argument` when it cannot be opened.
        ProgramError: `bad_policy`.
    """
    from trocar.gate import policy_file

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = f"{str(path)!r} cannot be read: {getattr(e, 'strerror', None) or 'it is not UTF-8'}"
        raise errors.refuse("bad_argument", "policy", reason) from None
    return policy_file.read(text)


def init() -> None:
    """Print the default policy as a file to begin with."""
    from trocar.gate import policy_file
    from trocar.gate.policy import Policy

    print(policy_file.write(Policy()), end="")


def check(file: FileArgument) -> None:
    """Read a policy to the last word; exit code 1 and every fault when it cannot be used."""
    policy = read_file(file)
    print(f"ok: policy {policy.digest()[:12]}")


def diff(file: FileArgument, data: DataOption = None, json: JsonOption = False) -> None:
    """Show what is different from the policy that the ledger last ran under, and what is looser."""
    from trocar.gate import policy_file, policy_log
    from trocar.gate.policy import Policy

    new = read_file(file)
    with reading(Folder.at(data)) as connection:
        old = policy_log.current(connection) or Policy()
    found = policy_file.changes(old, new)
    if json:
        show.as_json([{"path": c.path, "was": c.was, "now": c.now, "looser": c.looser} for c in found])
        return
    rows = ((c.path, str(c.was), str(c.now), "looser" if c.looser else "tighter") for c in found)
    show.table(("setting", "was", "would be", ""), rows)


def explain(
    request: Annotated[
        str, typer.Argument(metavar="[ID]", help="A request id from an answer; without one, every setting.")
    ] = "",
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Say why a request was refused, or what it was charged; without an id, what each setting means."""
    if not request:
        _print_settings(Folder.at(data), json)
        return
    from trocar.gate import chain

    with reading(Folder.at(data)) as connection:
        found = chain.entries(connection, after_seq=0, limit=100, key_id="", lineage="", request_id=request)
    if not found:
        raise errors.refuse("bad_argument", "request", f"the log has no request {request[:64]!r}")
    told = [_told(entry) for entry in found]
    if json:
        show.as_json(told)
        return
    for entry in told:
        print(f"entry {entry['seq']} at {entry['time']}: {entry['kind']}, key {entry['key_id'] or '-'}")
        for name in ("held_bits", "charged_bits"):
            if entry[name]:
                print(f"  {name}: {entry[name]:+}")
        for code in entry["codes"]:
            print(f"  {code['code']}: {code['summary']}\n    next: {code['next_step']}\n    {code['docs']}")
        if entry["reason"]:
            print(f"  at {entry['path'] or '$'}: {entry['reason']!r}")


def approve(file: FileArgument, data: DataOption = None) -> None:
    """Agree to a policy, with the key in TROCAR_API_KEY; two persons, an owner among them, make it usable."""
    from trocar.gate import policy_log
    from trocar.gate.database import Database
    from trocar.gate.keys import Keys

    policy, folder = read_file(file), Folder.at(data)
    folder.require_ledger()
    database = Database(folder.ledger_url)
    try:
        who = Keys(database).authenticate(os.environ.get("TROCAR_API_KEY", "").strip() or None)
        count = policy_log.approve(database, who, policy)
    finally:
        database.close()
    print(f"policy {policy.digest()[:12]}: {count} approved; {policy_log.APPROVERS} are needed")


def _print_settings(folder: Folder, json: bool) -> None:
    from trocar.gate import policy_file, policy_log
    from trocar.gate.policy import Policy

    current = None
    if folder.has_ledger:
        with reading(folder) as connection:
            current = policy_log.current(connection)
    rows = [
        (path, "not limited" if value is None else str(value), policy_file.meaning(path))
        for path, value in policy_file.settings(current or Policy())
    ]
    if json:
        show.as_json([{"path": path, "value": value, "meaning": text} for path, value, text in rows])
        return
    show.table(("setting", "value", "meaning"), rows)


def _told(entry: Any) -> dict[str, Any]:
    from trocar.codes import CODES

    detail = json_module.loads(entry.detail)
    codes = [CODES[name] for name in detail.get("codes", ()) if name in CODES]
    return {
        "seq": entry.seq,
        "time": show.when(entry.time_ms),
        "kind": entry.kind,
        "key_id": entry.key_id,
        "lineage": entry.lineage,
        "held_bits": entry.held_bits,
        "charged_bits": entry.charged_bits,
        "path": detail.get("path", ""),
        "reason": detail.get("reason", ""),
        "codes": [
            {
                "code": c.name,
                "summary": c.summary,
                "next_step": c.next_step,
                "docs": f"docs/errors/{c.name}.md",
            }
            for c in codes
        ],
    }

"""How an operator and the first user get in: the gate on a data folder, the first key, the SDK's config file.

The key of a new ledger is made last, right before it is printed, so a failed start never loses a secret.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trocar import errors
from trocar.cli.folder import Folder

if TYPE_CHECKING:
    from trocar.gate.gate import Gate
    from trocar.gate.policy import Policy


@dataclass(frozen=True, slots=True)
class Access:
    """How a user gets in: the sentences to print, and whether the SDK finds address and key by itself."""

    lines: tuple[str, ...]
    sdk_knows: bool


@dataclass(frozen=True, slots=True)
class Rulebook:
    """The policy file of a server.

    Attributes:
        named: whether the operator named it; one that only might be there may be absent.
    """

    path: Path
    named: bool

    def read(self) -> Policy:
        from trocar.cli.policy import read_file
        from trocar.gate.policy import Policy

        return read_file(self.path) if self.named or self.path.exists() else Policy()


def open_gate(folder: Folder, rules: Rulebook, anchors: Path, stack: ExitStack) -> Gate:
    from trocar.gate.gate import Gate

    gate = Gate(folder.ledger_url, rules.read(), anchors=anchors, secrets=folder.root)
    stack.callback(gate.close)
    return gate


def saved_secret(gate: Gate) -> str | None:
    """The key in the SDK's config file if it is one of this ledger's; None when the ledger has no key yet.

    Raises:
        ClientError: `bad_argument` when there are keys but their secrets are not at hand.
    """
    from trocar.client.settings import saved_entries

    found = saved_entries().get("api_key")
    if not gate.keys.list():
        return None
    try:
        gate.keys.authenticate(found if isinstance(found, str) else None)
    except errors.AuthError:
        raise errors.refuse(
            "bad_argument",
            "save-key",
            "this ledger has keys, no secret can be read again, and the SDK's config holds none of them",
            next_step="Leave --save-key out and set TROCAR_API_KEY; `trocar key create` makes another key.",
        ) from None
    return str(found)


def access(gate: Gate, url: str, secret: str | None, save_key: bool) -> Access:
    """Makes the first key of a new ledger, saves what is to be saved, and says how to get in."""
    from trocar.cli import saved
    from trocar.client.settings import saved_entries
    from trocar.gate.policy import Role, Tier

    if secret is not None:
        outcome = saved.save(url, secret, replace=True)
        return Access((outcome.said,), outcome.written)
    count = len(gate.keys.list())
    if count:
        known = saved_entries().get("url") == url
        return Access((f"keys: {count} in the ledger; `trocar key create` makes another",), known)
    made = gate.keys.create("local", Tier.open, Role.operator, "made by the first start").secret
    lines = [f"operator key of tenant 'local', shown once:  export TROCAR_API_KEY={made}"]
    written = False
    if save_key or sys.stdout.isatty():
        outcome = saved.save(url, made, replace=save_key)
        written = outcome.written
        lines.append(outcome.said)
    return Access(tuple(lines), written)


def print_access(access: Access, url: str, model: str) -> None:
    """Says how to get in, with the first lines of a script."""
    client = "trocar.Client()" if access.sdk_knows else f"trocar.Client({url!r})"
    snippet = (
        "import trocar",
        f"model = {client}.model({model!r})",
        'print(model.generate("The capital of France is", max_new_tokens=8))',
    )
    print("\n".join((*access.lines, f"API reference: {url}/docs", "", *snippet, "")), flush=True)

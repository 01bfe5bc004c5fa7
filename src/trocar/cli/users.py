"""Users on the command line: a name of this machine's, or a number."""

from __future__ import annotations

import pwd
from typing import Annotated

import typer

from trocar import errors

_HELP = "User that runs the {}, a name or a number; nobody else is spoken to. This process's own by default."
GateUser = Annotated[str | None, typer.Option("--gate-user", metavar="USER", help=_HELP.format("gate"))]
WorkerUser = Annotated[str | None, typer.Option("--worker-user", metavar="USER", help=_HELP.format("worker"))]
FrontUser = Annotated[str | None, typer.Option("--front-user", metavar="USER", help=_HELP.format("front"))]
_MOST = (1 << 32) - 2


def uid_of(user: str | None, option: str) -> int | None:
    """The number of a user; None for one that was not named.

    Raises:
        ClientError: `bad_argument`.
    """
    if user is None:
        return None
    if user.isascii() and user.isdigit():
        if int(user) > _MOST:
            raise errors.refuse("bad_argument", option, f"{user[:40]} is no number of a user")
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        raise errors.refuse("bad_argument", option, f"there is no user {user[:80]!r}") from None

"""The options that narrow a key or a token, and how their words are read."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from trocar import errors

if TYPE_CHECKING:
    from trocar.grants.scope import Scope

_SPAN: Final = re.compile(r"([1-9][0-9]{0,3})([mhd])")
_MS: Final = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}

ModelsOption = Annotated[str | None, typer.Option(metavar="A,B", help="Only these models.")]
OpsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="Only these ops: `lens`, all edits as `edit`, fits on stored rows as `fit`."
    ),
]
SitesOption = Annotated[
    str | None, typer.Option(metavar="A,B", help="Only these sites: `resid_post`, or `resid_post.12` alone.")
]
BitsOption = Annotated[
    int | None, typer.Option(min=1, help="At most so many bits of each lineage, for life.")
]
ExpiresOption = Annotated[
    str | None, typer.Option(metavar="SPAN", help="Worth nothing after this time: 90m, 12h, 30d.")
]


def scope(
    models: str | None, ops: str | None, sites: str | None, bits: int | None, expires: str | None
) -> Scope:
    """What the options leave.

    Raises:
        ProgramError: `bad_value` for a word that is no op, site or model name.
        ClientError: `bad_argument` for a time that cannot be read.
    """
    from trocar.grants.scope import Scope

    made = Scope(_words(models), _words(ops), _words(sites), bits, _moment_ms(expires))
    made.require_short()
    return made


def _words(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(word.strip() for word in text.split(",") if word.strip())


def _moment_ms(span: str | None) -> int | None:
    if span is None:
        return None
    match = _SPAN.fullmatch(span)
    if match is None:
        step = "Write a whole number of minutes, hours or days: 90m, 12h, 30d."
        raise errors.refuse("bad_argument", "--expires", f"{span[:40]!r} is not a time", next_step=step)
    return time.time_ns() // 1_000_000 + int(match[1]) * _MS[match[2]]
